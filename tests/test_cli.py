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


# a model behind an address

def chat_server(tools=True):
    "An OpenAI-compatible server whose model searches once, then submits; asked to verify, it says incorrect if the proposal is not 'right'."
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    async def models(request): return JSONResponse({"data": [{"id": "tiny", "max_model_len": 8192}]})
    async def chat(request):
        body = await request.json()
        if body["model"] != "tiny": return JSONResponse({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        if body.get("tools") and not tools: return JSONResponse({"error": {"message": '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'}}, 400)
        asked, last = next(m["content"] for m in body["messages"] if m["role"] == "user"), body["messages"][-1]
        verify, looked = "Proposed answer" in asked, last["role"] == "tool" or "<tool_response>" in (last["content"] or "")
        name, args = ("submit_answer", {"answer": ("correct" if "right" in asked else "incorrect") if verify else "right"}) if looked else ("search", {"query": f"director {asked[:40]}"})
        if body.get("tools"):
            said = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(args)}}]}
        else: said = {"role": "assistant", "content": "Let me see.\n<tool_call>\n" + json.dumps(dict(name=name, arguments=args)) + "\n</tool_call>"}
        return JSONResponse({"choices": [{"index": 0, "message": said, "finish_reason": "stop"}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})
    return Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])])


@pytest.mark.parametrize("tools", [True, False])
def test_ask_any_model_and_view_it(tmp_path, tools):
    from webseer.remote import running_app
    with running_app(chat_server(tools)) as url:
        r = webseer("ask", "Who?", "--profile", "smoke", "--base-url", url, "--save", tmp_path/"run.jsonl")
        assert r.returncode == 0 and "# tiny at" in r.stdout and "▸ search  query: director Who?" in r.stdout and "■ submit_answer  answer: right" in r.stdout, r
        assert "220 tokens read and written" in r.stdout
        refused(webseer("ask", "--profile", "smoke", "--base-url", url, "--model", "tony"), "tiny")
    assert webseer("view", tmp_path/"run.jsonl", "-o", tmp_path/"run.html").returncode == 0 and (tmp_path/"run.html").stat().st_size > 10_000
    (tmp_path/"run.jsonl").open("a").write("{torn\n")
    refused(webseer("view", tmp_path/"run.jsonl"), "line 2")


def test_ask_without_set_up():
    r = webseer("ask")
    assert r.returncode == 0 and "checkpoint" in r.stdout and "submit_answer" in r.stdout and "= " in r.stdout, r


def test_run_and_synth(tmp_path):
    from webseer.remote import running_app
    qs = tmp_path/"q.jsonl"
    qs.write_text("".join(json.dumps(dict(question=f"Question {i}?", golden_answers=["right" if i % 2 else "other"])) + "\n" for i in range(8)))
    with running_app(chat_server()) as url:
        r = webseer("run", qs, tmp_path/"run", "--profile", "smoke", "--base-url", url, "--price", "1,2")
        assert r.returncode == 0 and "| em | 0.5 |" in r.stdout and len((tmp_path/"run"/"run.jsonl").read_text().splitlines()) == 8, r
        again = webseer("run", qs, tmp_path/"run", "--profile", "smoke", "--base-url", url, "--price", "1,2")
        assert again.returncode == 0 and "| em | 0.5 |" in again.stdout
        s = webseer("synth", qs, tmp_path/"data", "--profile", "smoke", "--base-url", url, "--rounds", "1", "--retries", "2")
        assert s.returncode == 0 and (tmp_path/"data"/"sft.parquet").is_file(), s
    from webseer.synth import load_sft
    assert len(load_sft(tmp_path/"data"/"sft.parquet")) == 4
    qs.write_text('{"question": "a", "golden_answers": ["b"]}\n{"question": "c"}\n')
    refused(webseer("run", qs, tmp_path/"other", "--base-url", "http://127.0.0.1:9"), "line 2")


def failing_server(after, seen):
    "Says which keys it is sent; answers so many times, then refuses for good."
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    async def models(request): return JSONResponse({"data": [{"id": "tiny", "max_model_len": 8192}]})
    async def chat(request):
        seen.append(request.headers.get("authorization"))
        if len(seen) > after: return JSONResponse({"error": {"message": "CUDA error: no luck"}}, 400)
        call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"query": "director"}'}}
        return JSONResponse({"choices": [{"index": 0, "message": {"role": "assistant", "content": "", "tool_calls": [call]}, "finish_reason": "stop"}]})
    return Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])])


def test_ask_keeps_what_was_done(tmp_path):
    from webseer.remote import running_app
    with running_app(failing_server(1, [])) as url:
        refused(webseer("ask", "Who?", "--profile", "smoke", "--base-url", url, "--save", tmp_path/"run.jsonl"), "CUDA error: no luck")
    kept = json.loads((tmp_path/"run.jsonl").read_text())
    assert kept["calls"] == ["search"] and kept["messages"][-1]["role"] == "tool"


def test_synth_over_the_mini_web_and_without_luck(tmp_path):
    from webseer.remote import running_app
    with running_app(chat_server()) as url:
        r = webseer("synth", "miniweb", tmp_path/"mini", "--profile", "smoke", "--base-url", url, "-n", "2", "--rounds", "1", "--retries", "1")
        assert r.returncode == 0 and "| attempts | 2 |" in r.stdout, r
    with running_app(failing_server(0, [])) as url:
        r = webseer("synth", "miniweb", tmp_path/"none", "--profile", "smoke", "--base-url", url, "-n", "2")
        assert r.returncode == 2 and "all 2 attempts failed" in r.stderr and "CUDA error: no luck" in r.stderr, r


def test_the_verifiers_server_is_not_sent_the_reasoners_key(tmp_path, monkeypatch):
    from webseer.remote import running_app
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-reasoner")
    monkeypatch.setenv("OTHER", "of-the-verifier")
    (tmp_path/"q.jsonl").write_text(json.dumps(dict(question="Who?", golden_answers=["right"])) + "\n")
    for more, key in (((), None), (("--verifier-key-env", "OTHER"), "Bearer of-the-verifier")):
        seen = []
        with running_app(chat_server()) as url, running_app(failing_server(0, seen)) as other:
            webseer("synth", tmp_path/"q.jsonl", tmp_path/f"data{len(more)}", "--profile", "smoke", "--base-url", url, "--verifier-url", other, *more)
        assert seen and set(seen) == {key}


def test_a_folder_of_one_checkpoint_is_not_resumed_with_another(tmp_path, monkeypatch):
    from webseer.core import load_profile
    from webseer.model import Codec, ModelConfig, Qwen2, init_weights, save_checkpoint
    p, codec = load_profile("smoke"), Codec()
    monkeypatch.setenv("WEBSEER_OUTPUTS", str(tmp_path/"outputs"))
    for seed in (0, 1):
        model = init_weights(Qwen2(ModelConfig.of(p, codec.n)), seed)
        save_checkpoint(tmp_path/"outputs"/"smoke"/"seed0"/"srrl"/"checkpoint", model, codec, dict(stage="srrl", seed=seed))
        r = webseer("run", "miniweb", tmp_path/"run", "--profile", "smoke", "-n", "2")
        if seed == 0: assert r.returncode == 0, r
        else: refused(r, "weights")
