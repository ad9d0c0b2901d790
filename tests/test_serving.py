"""A model server as a child process: the program in vLLM's place takes the same arguments and has a worker, as vLLM has."""
import os
import signal
import subprocess
import sys
import time

import pytest

from webseer.core import WebseerError, load_profile
from webseer.serving import ModelServer

PLAYED = f"""#!{sys.executable}
import os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen(["sleep", "600"])
print("pids", os.getpid(), worker.pid, flush=True)
if "--crash" in sys.argv: sys.exit("ValueError: Head size 24 is not supported")
class H(BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
HTTPServer((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])), H).serve_forever()
"""


@pytest.fixture
def played(tmp_path):
    (tmp_path/"checkpoint").mkdir()
    (tmp_path/"checkpoint"/"config.json").write_text("{}")
    (tmp_path/"vllm").write_text(PLAYED)
    (tmp_path/"vllm").chmod(0o755)
    return tmp_path


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as f: return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def gone(pids, seconds=20): return any(not any(map(lives, pids)) or time.sleep(0.1) for _ in range(10*seconds))
def pids_in(log): return [int(w) for w in log.read_text().split("\n")[0].split()[1:]]


def test_the_server_and_its_worker_end_with_the_block(played):
    with ModelServer(load_profile("smoke"), played/"checkpoint", port=0, vllm=str(played/"vllm"), log=played/"log") as server:
        pids = pids_in(played/"log")
        assert len(pids) == 2 and all(map(lives, pids)) and server.running
        guard = server._guard.pid
    assert gone([*pids, guard])
    assert not server.running


def test_a_deaf_server_is_killed(played):
    server = ModelServer(load_profile("smoke", serve_args="--deaf"), played/"checkpoint", port=0, vllm=str(played/"vllm"), log=played/"log").start()
    server.stop(grace=0.5)
    assert gone(pids_in(played/"log"))


def test_a_crash_is_told_and_leaves_nothing(played):
    server = ModelServer(load_profile("smoke", serve_args="--crash"), played/"checkpoint", port=0, vllm=str(played/"vllm"), log=played/"log")
    with pytest.raises(WebseerError, match="heads of 32, 64"): server.start()
    assert gone([*pids_in(played/"log"), server._guard.pid])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_outlives_the_command_that_serves(played, number):
    "However the command ends, killed outright or with its terminal."
    command = [sys.executable, "-c", "from webseer.cli import app; app()", "serve-model", played/"checkpoint", "--profile", "smoke",
               "--port", "0", "--log", played/"log"]
    serving = subprocess.Popen(command, env={**os.environ, "WEBSEER_VLLM": str(played/"vllm")}, stdout=subprocess.PIPE, text=True)
    assert any("answers at" in line for line in serving.stdout)
    pids = pids_in(played/"log")
    assert all(map(lives, pids))
    serving.send_signal(number)
    serving.wait(30)
    assert gone(pids)
