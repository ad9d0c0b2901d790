"Commands as a user types them: what they print, and one line for what they refuse."
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def webseer(*args, **kw):
    return subprocess.run([sys.executable, "-c", "from webseer.cli import app; app()", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=120, **kw)


def refused(r, says):
    assert r.returncode == 2 and says in r.stderr and len(r.stderr.splitlines()) == 1, r
    assert "Traceback" not in r.stderr


def test_help():
    r = webseer("--help")
    assert r.returncode == 0 and all(c in r.stdout for c in ("reproduce", "analyze", "ask", "serve"))


@pytest.mark.parametrize("args, says", [
    (("reproduce", "--profile", "labtop"), "did you mean 'laptop'"),
    (("reproduce", "--profile", "smoke", "--only", "figures"), "unknown step 'figures'"),
    (("ask", "--stage", "srl"), "did you mean 'srrl'"),
    (("analyze", "nowhere.json"), "nowhere.json does not exist"),
    (("analyze", "tests"), "is a folder"),
    (("serve", "--port", "99999"), "port 99999 is not a number from 0 to 65535"),
])
def test_refusals(args, says): refused(webseer(*args), says)


def test_occupied_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        refused(webseer("serve", "--port", s.getsockname()[1]), "choose another port")


def test_analyze_truncated_and_foreign(tmp_path):
    cut, other = tmp_path/"cut.json", tmp_path/"other.json"
    cut.write_text('[{"messages": [{"role": "us')
    other.write_text(json.dumps({"name": "something else"}))
    for p in (cut, other): refused(webseer("analyze", p), p.name)


def test_serve_answers(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    p = subprocess.Popen([sys.executable, "-c", "from webseer.cli import app; app()", "serve", "--port", str(port), "--profile", "smoke"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(150):
            try: opener.open(f"http://127.0.0.1:{port}/", timeout=2); break
            except urllib.error.HTTPError: break
            except OSError: time.sleep(0.1)
            assert p.poll() is None, p.stderr.read()
        body = json.dumps({"query": "director"}).encode()
        got = json.load(opener.open(urllib.request.Request(f"http://127.0.0.1:{port}/search", body, {"Content-Type": "application/json"}), timeout=5))
        assert got["success"] and got["hits"]
    finally:
        p.terminate()
        p.wait(10)
