"""A model server as a child process: the program in vLLM's place takes the same arguments and has a worker, as vLLM has."""
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from webseer.core import WebseerError, load_profile
from webseer.serving import ModelServer, serve_command, serve_model

PLAYED = f"""#!{sys.executable}
import os, signal, socket, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen(["sleep", "600"])
print("pids", os.getpid(), worker.pid, flush=True)
if "--crash" in sys.argv: sys.exit("ValueError: Head size 24 is not supported")
if "--talks" in sys.argv:
    for i in range(3000): print("INFO", i, "x" * 100)                          # more than a pipe holds
    sys.stdout.flush()
class H(BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
if ":" in sys.argv[sys.argv.index("--host") + 1]: HTTPServer.address_family = socket.AF_INET6
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
    serving = subprocess.Popen(command, env={**os.environ, "WEBSEER_VLLM": str(played/"vllm")}, stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))     # nohup would have it ignored
    assert any("answers at" in line for line in serving.stdout)
    pids = pids_in(played/"log")
    assert all(map(lives, pids))
    serving.send_signal(number)
    serving.wait(30)
    assert gone(pids)


def sentence(f):
    "The one sentence that a call fails with."
    with pytest.raises(WebseerError) as e: f()
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_listener_that_fails_is_dropped_and_the_log_goes_on(played):
    heard = []
    def tell(line):
        heard.append(line)
        if len(heard) > 5: raise BrokenPipeError(32, "Broken pipe")
    with ModelServer(load_profile("smoke", serve_args="--talks"), played/"checkpoint", port=0, vllm=str(played/"vllm"), log=played/"log", tell=tell,
                     patience=60) as server: assert server._reader.is_alive()
    assert len(heard) == 6 and (played/"log").read_text().count("INFO") == 3000


def test_a_log_that_cannot_go_on_is_told_and_the_server_lives(played):
    heard = []
    with ModelServer(load_profile("smoke", serve_args="--talks"), played/"checkpoint", port=0, vllm=str(played/"vllm"), log="/dev/full",
                     tell=heard.append, patience=60) as server: assert server._reader.is_alive()
    assert sum("INFO" in l for l in heard) == 3000 and [l for l in heard if "ends here" in l] == ["the log /dev/full ends here: No space left on device"]


def test_the_command_outlives_its_reader(played):
    "`webseer serve-model | head -1`"
    command = [sys.executable, "-c", "from webseer.cli import app; app()", "serve-model", played/"checkpoint", "--profile", "smoke",
               "--port", "0", "--log", played/"log"]
    (played/"vllm").write_text(PLAYED.replace('"--talks" in sys.argv', "True"))
    serving = subprocess.Popen(command, env={**os.environ, "WEBSEER_VLLM": str(played/"vllm")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = int(shlex.split(serving.stdout.readline())[8])
    serving.stdout.close()
    try: assert any(socket.socket().connect_ex(("127.0.0.1", port)) == 0 or time.sleep(0.1) for _ in range(600))
    finally: serving.send_signal(signal.SIGTERM); _, err = serving.communicate(timeout=60)
    assert "Traceback" not in err and (played/"log").read_text().count("INFO") == 3000 and gone(pids_in(played/"log"))


def yarn(*a):
    words = serve_command(*a)
    return json.loads(words[words.index("--hf-overrides") + 1])


def test_yarn_does_not_depend_on_how_the_model_is_named(played):
    p, f = load_profile("qwen3-14b"), played/"checkpoint"/"config.json"
    f.write_text('{"rope_theta": 1e6, "max_position_embeddings": 40960}')
    assert yarn(p, f.parent) == yarn(p) and yarn(p)["max_position_embeddings"] == 131072
    f.write_text('{"rope_theta": 1e4, "max_position_embeddings": 1024}')
    assert yarn(p, f.parent) == dict(max_position_embeddings=4096, rope_parameters=dict(rope_type="yarn", factor=4, rope_theta=1e4,
                                                                                         original_max_position_embeddings=1024))


@pytest.mark.parametrize("host, port, said", [
    ("127.0.0.1", 99999, "99999 is no port"), ("127.0.0.1", -1, "-1 is no port"), ("nosuch.invalid", 8123, "'nosuch.invalid' is no address of this machine"),
    ("", 8123, "'' is no address"), ("a" * 70, 8123, "is no address"), ("192.0.2.1", 8123, "'192.0.2.1' is no address"), ("2001:db8::1", 8123, "is no address")])
def test_addresses_that_cannot_be_had(played, host, port, said):
    assert said in sentence(lambda: ModelServer(load_profile("smoke"), played/"checkpoint", host, port, vllm=str(played/"vllm")))
    if "port" in said: assert said in sentence(lambda: serve_model(load_profile("smoke"), played/"checkpoint", host, port, dry_run=True))


def test_a_port_that_is_taken(played):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        said = sentence(lambda: ModelServer(load_profile("smoke"), played/"checkpoint", port=s.getsockname()[1], vllm=str(played/"vllm")))
    assert "is taken" in said


def test_ipv6(played):
    try:
        with socket.socket(socket.AF_INET6) as s: s.bind(("::1", 0))
    except OSError: pytest.skip("this machine has no ::1")
    with ModelServer(load_profile("smoke"), played/"checkpoint", "::1", 0, vllm=str(played/"vllm"), patience=60) as server:
        assert server.base_url == f"http://[::1]:{server.port}/v1" and server.running


@pytest.mark.parametrize("log, why", [("none/log", "No such file or directory"), (".", "Is a directory")])
def test_a_log_that_cannot_be_written(played, log, why):
    said = sentence(ModelServer(load_profile("smoke"), played/"checkpoint", port=0, vllm=str(played/"vllm"), log=played/log).start)
    assert said == f"the log {played/log} cannot be written ({why}): name a file in a folder that exists"


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_a_damaged_configuration(played, text):
    (played/"checkpoint"/"config.json").write_text(text)
    assert "config.json is damaged" in sentence(lambda: serve_command(load_profile("smoke"), played/"checkpoint"))


def test_the_dry_run_shows_what_a_start_runs(played, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ""); monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8"); monkeypatch.setenv("DO_NOT_TRACK", "a b")
    monkeypatch.setenv("WEBSEER_VLLM", str(played/"vllm"))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    told, server = [], ModelServer(load_profile("smoke"), played/"checkpoint", port=port)
    serve_model(load_profile("smoke"), played/"checkpoint", port=port, dry_run=True, tell=told.append)
    assert shlex.split(told[0]) == [*(f"{k}={v}" for k, v in server.env.items()), *server.command]
    assert server.env["VLLM_CPU_KVCACHE_SPACE"] == "8" and server.env["VLLM_NO_USAGE_STATS"] == "1"
