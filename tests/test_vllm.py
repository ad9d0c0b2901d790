"""A real vLLM on the CPU serves the embedded checkpoint. Runs where WEBSEER_VLLM names the program (`make test-vllm` installs it and sets it).

The checkpoint is the one that comes with the repository, or the folder that WEBSEER_CHECKPOINT names.
"""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from webseer.agent import Budget, rollouts, run_sync
from webseer.core import WebseerError, load_profile, root

pytestmark = pytest.mark.skipif(not os.environ.get("WEBSEER_VLLM"), reason="needs vLLM: run `make test-vllm`, or set WEBSEER_VLLM to the program")
N = 50


@pytest.fixture(scope="module")
def checkpoint():
    path = Path(os.environ.get("WEBSEER_CHECKPOINT") or root()/"data"/"checkpoint")
    assert (path/"model.safetensors").is_file(), f"no checkpoint at {path}"
    return path


@pytest.fixture(scope="module")
def profile(checkpoint):
    note = json.loads((checkpoint/"webseer.json").read_text())
    return load_profile(note.get("profile", "laptop"))


@pytest.fixture(scope="module")
def server(checkpoint, profile, tmp_path_factory):
    from webseer.serving import ModelServer
    log = tmp_path_factory.mktemp("vllm")/"vllm.log"
    with ModelServer(profile, checkpoint, port=0, log=log, patience=400) as s:
        yield s
    assert not s.running
    with pytest.raises(httpx.ConnectError): httpx.get(f"http://127.0.0.1:{s.port}/health", trust_env=False)


@pytest.fixture(scope="module")
def ours(checkpoint, profile):
    "The same questions answered in this process, greedily."
    from webseer.evaluate import test_world
    from webseer.model import ModelPolicy, load_checkpoint
    _, tools, qs = test_world(profile, 0)
    model, codec, _ = load_checkpoint(checkpoint)
    budget = Budget(max_calls=profile.max_calls, max_tokens=profile.max_tokens)
    jobs = [(tools, q) for q in qs[:N]]
    return jobs, budget, run_sync(rollouts(ModelPolicy(model, codec), jobs, budget)), codec


def policy(server, **more):
    from webseer.endpoint import EndpointPolicy
    return EndpointPolicy(server.base_url, server.model, **{**dict(temperature=0, max_tokens=24, seed=None, api_key_env=None, concurrency=64), **more})


class Listening:
    "Keeps what the server answered."
    def __init__(self, policy):
        self.answers, inner = [], policy.chat.complete
        async def complete(*a, **k):
            answer = await inner(*a, **k)
            self.answers.append(answer)
            return answer
        policy.chat.complete = complete


@pytest.mark.parametrize("stream", [False, True])
def test_same_answers_calls_and_tokens(server, ours, stream):
    jobs, budget, expected, codec = ours
    p = policy(server, token_ids=True, stream=stream)
    heard = None if stream else Listening(p)
    got = run_sync(rollouts(p, jobs, budget))
    answer = lambda t: [s["answer"] for s in t.submissions]
    same = sum(answer(a) == answer(b) for a, b in zip(expected, got))
    tokens = sum(a.ids == b.ids and a.mask == b.mask for a, b in zip(expected, got))
    print(f"\n{len(jobs)} questions: {same} with the same answers, {tokens} with the same {sum(len(t.ids) for t in got):,} token ids and mask")
    assert same >= .95 * len(jobs) and tokens >= .95 * len(jobs)
    for t in got:                                       # what was fed and emitted is what our tokenizer makes of the words
        from webseer.agent import render
        assert codec.decode(t.ids) == render(t.messages) and len(t.ids) == len(t.mask) == len(t.logprobs)
    if heard:                                           # every call came through vLLM's own Hermes parser
        calls = sum(len(a["choices"][0]["message"].get("tool_calls") or []) for a in heard.answers)
        in_text = sum("<tool_call>" in (a["choices"][0]["message"].get("content") or "") for a in heard.answers)
        made = sum(len(m.get("tool_calls", [])) for t in got for m in t.messages)
        print(f"{calls} calls parsed by vLLM, {in_text} left in the text, {made} in the trajectories")
        assert calls == made > 0 and in_text == sum(t.calls.count("malformed") for t in got)


def test_log_probabilities_agree(server, ours):
    jobs, budget, expected, _ = ours
    got = run_sync(rollouts(policy(server, token_ids=True), jobs[:8], budget))
    far = [abs(a - b) for x, y in zip(expected, got) if x.ids == y.ids for a, b, m in zip(x.logprobs, y.logprobs, x.mask) if m]
    print(f"\nlargest difference of {len(far)} log-probabilities: {max(far):.2e}")
    assert max(far) < 1e-3


def test_context_overflow_ends_one_rollout(server, ours):
    jobs, _, _, _ = ours
    (tools, q), p = jobs[0], policy(server)
    t, = run_sync(rollouts(p, [(tools, replace(q, text="Who is it? " * 5000))], Budget()))      # more than the model has room for
    assert t.stop == "max_tokens" and len(t.messages) == 2 and "400" in t.meta["error"]
    t, = run_sync(rollouts(policy(server, max_tokens=2000), jobs[:1], Budget()))                # only the longest turn is too long
    assert len(t.messages) > 2


def test_wrong_model_name_says_which_it_has(server):
    from webseer.endpoint import EndpointPolicy
    p = EndpointPolicy(server.base_url, "web-seer", api_key_env=None)
    with pytest.raises(WebseerError, match="webseer"): run_sync(p.check())


def test_command_serves_asks_and_stops(checkpoint, profile, tmp_path):
    "`webseer serve-model` with YaRN by a factor of 4, `webseer ask` against it, and its end."
    import socket
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    code = ("from webseer.core import load_profile; from webseer.serving import serve_model; "
            f"serve_model(load_profile({profile.name!r}, serve_yarn=4, serve_context=4096), {str(checkpoint)!r}, port={port}, log={str(tmp_path/'log')!r})")
    run = subprocess.Popen([sys.executable, "-c", code], stdout=open(tmp_path/"out", "w"), stderr=subprocess.STDOUT, cwd=root())
    try:
        end = time.time() + 400
        while "answers at" not in (tmp_path/"out").read_text():
            assert run.poll() is None and time.time() < end, (tmp_path/"out").read_text()[-2000:]
            time.sleep(1)
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).json()["data"]
        assert models[0]["max_model_len"] == 4096
        asked = subprocess.run([Path(sys.executable).parent/"webseer", "ask", "--profile", profile.name, "--base-url", f"http://127.0.0.1:{port}", "--save", tmp_path/"run.jsonl"],
                               capture_output=True, text=True, cwd=root(), timeout=300)
        assert asked.returncode == 0 and "= " in asked.stdout and (tmp_path/"run.jsonl").is_file(), asked.stdout + asked.stderr
    finally:
        run.send_signal(signal.SIGTERM)                # as Ctrl-C, which a process in the background may be told to ignore
        run.wait(120)
    assert (tmp_path/"out").read_text().rstrip().endswith("stopped")
    with pytest.raises(httpx.ConnectError): httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
