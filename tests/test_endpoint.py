import asyncio
import contextlib
import copy
import itertools
import json
import logging
import random
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from webseer.agent import CLOSING, INSTRUCTION, SYSTEM, Budget, ContextFull, call_text, first_messages, parse_reply, rollout, rollouts, system_text
from webseer.core import WebseerError
from webseer.endpoint import (EndpointPolicy, HistoryChanged, drift, hermes_call, join_calls, native_messages, observation, reply_text, text_messages,
                              verify_tokens)
from webseer.simulated import Assembled
from webseer.remote import DeadlineExceeded, Service, Transient, running_app, wait_for
from webseer.tools import TOOLS
from webseer.traj import Traj


def traj(**k): return Traj("Who?", ["Ada"], qid="q1", messages=first_messages("Who?"), **k)


def called(name, args, content=None):
    return {"role": "assistant", "content": content, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": name, "arguments": args}}]}


class Server:
    "Gives prepared answers in turn (the last for ever): a message, or (status, headers, body). Keeps requests and headers."
    def __init__(self, *answers, wait=0):
        self.left, self.bodies, self.headers, self.paths, self.wait, self.now, self.peak = list(answers), [], [], [], wait, 0, 0
    async def __call__(self, scope, receive, send):
        r = Request(scope, receive)
        self.now += 1; self.peak = max(self.peak, self.now)
        body = await r.body()
        body = json.loads(body) if body else None
        self.bodies.append(body); self.headers.append(dict(r.headers)); self.paths.append(r.url.path)
        await asyncio.sleep(self.wait)
        a = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if callable(a) and not isinstance(a, Response): a = a(body)
        if isinstance(a, Response): self.now -= 1; return await a(scope, receive, send)
        if isinstance(a, dict): a = (200, {}, {"choices": [{"message": a, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
        status, headers, body = a
        make = PlainTextResponse if isinstance(body, str) else JSONResponse
        self.now -= 1
        await make(body, status, headers)(scope, receive, send)


class Host:
    "One listening server for all tests; each puts its own application behind it."
    app = url = None
    async def __call__(self, scope, receive, send): await self.app(scope, receive, send)


HOST = Host()


@pytest.fixture(autouse=True, scope="module")
def host():
    with running_app(HOST) as HOST.url: yield


@contextlib.contextmanager
def served(app):
    before, HOST.app = HOST.app, app
    try: yield HOST.url
    finally: HOST.app = before


def act(server, t=None, path="", **k):
    "One turn against a server; the reply, or the error it raises."
    k = {"api_key_env": None, **k}
    async def go(url):
        async with EndpointPolicy(url + path, "m", **k) as p: return await p.act(t or traj())
    with served(server) as url: return asyncio.run(go(url))


def test_request_and_reply():
    s = Server(called("search", '{"query": "x"}', "Let me look."))
    r = act(s, temperature=0.3, max_tokens=77, extra={"top_p": 0.9})
    assert r.content == 'Let me look.<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
    assert r.ids is None and r.usage["prompt_tokens"] == 3 and r.usage["completion_tokens"] == 2 and r.usage["finish"] == "stop"
    b = s.bodies[0]
    assert s.paths == ["/v1/chat/completions"] and b["model"] == "m" and b["temperature"] == 0.3 and b["max_tokens"] == 77 and b["top_p"] == 0.9
    assert [t["function"]["name"] for t in b["tools"]] == ["search", "query_on_page", "submit_answer"]
    assert "<tools>" not in b["messages"][0]["content"] and "authorization" not in s.headers[0]


def test_without_native_tools():
    s = Server({"role": "assistant", "content": call_text("search", query="x")})
    r = act(s, native_tools=False, temperature=None, max_tokens=None, seed=None)
    assert r.content == call_text("search", query="x") and set(s.bodies[0]) == {"model", "messages"} and s.bodies[0]["messages"][0]["content"] == SYSTEM


def test_address():
    ok = {"role": "assistant", "content": "x"}
    for path, want in (("", "/v1"), ("/", "/v1"), ("/v1", "/v1"), ("/v1/", "/v1"), ("/api/openai", "/api/openai")):
        s = Server(ok); act(s, path=path); assert s.paths == [want + "/chat/completions"]
    for bad in ("localhost:8000", "", None, "ftp://x/v1"):
        with pytest.raises(WebseerError, match="base_url"): EndpointPolicy(bad, "m", api_key_env=None)


def test_seeds_differ_and_repeat():
    p = EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None)
    one = p.request(traj(seed=1))["seed"]
    assert one == p.request(traj(seed=1))["seed"] and 0 <= one < 2**31
    longer = traj(seed=1); longer.messages = longer.messages + [dict(role="assistant", content="")]
    other = EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None, seed=5)
    assert len({one, p.request(traj(seed=2))["seed"], p.request(longer)["seed"], other.request(traj(seed=1))["seed"]}) == 4


@pytest.mark.parametrize("message,want", [
    ({"content": "just talk"}, "just talk"),
    ({"content": None}, ""),
    ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
    (called("search", '{"query": "Ü"}'), hermes_call("search", {"query": "Ü"})),
    (called("search", {"query": "x"}), hermes_call("search", {"query": "x"})),
    (called("search", None), hermes_call("search", {})), (called("search", " "), hermes_call("search", {})),
    (called("search", [1]), hermes_call("search", [1])), (called("search", '"{\\"query\\": \\"x\\"}"'), hermes_call("search", '{"query": "x"}')),
    (called("", "{}"), hermes_call(None, {})), (called(None, "{}"), hermes_call(None, {})),
    ({"content": None, "tool_calls": [{"function": None}, 7, None]}, "\n".join([hermes_call(None, {})] * 3)),
    ({"content": None, "tool_calls": [{"name": "search", "arguments": "{}"}]}, hermes_call("search", {})),
    ({"content": "", "tool_calls": {}, "function_call": {"name": "search", "arguments": '{"query": "x"}'}}, hermes_call("search", {"query": "x"})),
    ({"content": None, "tool_calls": []}, ""), ({"content": 7}, ""), ({}, ""), ({"content": [None, 3, {"type": "text"}, {"text": "b"}]}, "b"),
    ({"content": None, "refusal": "I cannot."}, "I cannot."), ({"content": "half \ud83d"}, "half ?"),
    (called("search", "{}", "a stray <tool_call> tag "), "a stray  tag " + hermes_call("search", {})),
    (called("search", "{}", "<think><tool_call>x</tool_call></think>now "), "<think><tool_call>x</tool_call></think>now " + hermes_call("search", {})),
    (called("search", '{"q'), hermes_call("search", '{"q')), (called("search", '{"query": "x \\ud83d"}'), hermes_call("search", {"query": "x ?"})),
    (called("search", "{}", "<think>I look.\n"), "<think>I look.\n</think>" + hermes_call("search", {})), ({"content": "<think>I look."}, "<think>I look."),
    (called("search", "{}", "see <tool_call>\n{}\n</tool_call>"), "see <tool_call>\n{}\n</tool_call>"),
    ({"content": "a", "reasoning": "b"}, "a")])
def test_reply_text(message, want): assert reply_text(message) == want


def test_several_calls_and_parser():
    m = called("search", '{"query": "x"}', "t\n")
    m["tool_calls"].append({"function": {"name": "submit_answer", "arguments": '{"answer": "</tool"}'}})
    said = parse_reply(reply_text(m))
    assert said[:3] == ("t\n", [("search", {"query": "x"}), ("submit_answer", {"answer": "</tool"})], None) and said.faults == ["several_calls"]
    assert "not valid JSON" in parse_reply(reply_text(called("search", '{"q'))).error
    assert join_calls("", [("a", {})]) == hermes_call("a", {})


def test_history_is_acceptable_to_strict_servers():
    ms = first_messages("Who?") + [called("bad name!", "{}"), dict(role="tool", tool_call_id="c1", content="no such tool"), dict(role="tool", content="stray"),
                                   dict(role="assistant", content="hm"), dict(role="user", content="Call one tool.")]
    out = native_messages(ms)
    assert [m["role"] for m in out] == ["system", "user", "assistant", "tool", "user", "assistant", "user"]
    assert out[2]["tool_calls"][0]["function"]["name"] == "bad_name_" and out[3]["tool_call_id"] == out[2]["tool_calls"][0]["id"]
    assert ms[2]["tool_calls"][0]["function"]["name"] == "bad name!"
    text = text_messages(ms)
    assert [m["role"] for m in text] == ["system", "user", "assistant", "user", "assistant", "user"] and "<tool_response>\nstray" in text[3]["content"]


def test_a_rollout(tmp_path):
    class Q: text, golds, qid, hops, world, path = "Who built it?", ["Ada"], "q", 1, 0, []
    class T:
        def call(self, name, args): return f"{name}: Ada built it."
    s = Server(called("search", '{"query": "x"}'), {"role": "assistant", "content": "no call"}, called("submit_answer", '{"answer": "Ada"}'))
    with served(s) as url:
        t = asyncio.run(rollout(EndpointPolicy(url, "m", api_key_env=None), T(), Q()))
    assert t.stop == "submitted" and t.submissions[0]["em"] == 1 and t.calls == ["search", "malformed", "submit_answer"]
    assert s.bodies[1]["messages"][-1] == {"role": "tool", "tool_call_id": "0", "content": "search: Ada built it."}


def test_concurrency_is_bounded():
    class Q: text, golds, qid, hops, world, path = "Who?", ["Ada"], "q", 1, 0, []
    s = Server(called("submit_answer", '{"answer": "Ada"}'), wait=0.01)
    with served(s) as url:
        ts = asyncio.run(rollouts(EndpointPolicy(url, "m", api_key_env=None, concurrency=4), [(None, Q(), i) for i in range(24)]))
    assert len(ts) == 24 and s.peak == 4 and len({b["seed"] for b in s.bodies}) == 24


def test_retries():
    ok = {"role": "assistant", "content": "x"}
    s = Server((429, {"retry-after": "0.1"}, {}), (503, {}, "busy"), (500, {"retry-after": "0"}, {}), ok)
    assert act(s).content == "x" and len(s.bodies) == 4 and len({b["seed"] for b in s.bodies}) == 1
    s = Server((503, {"retry-after": "0"}, {"error": {"message": "loading"}}))
    with pytest.raises(Transient, match="503 Service Unavailable: loading"): act(s, attempts=3)
    assert len(s.bodies) == 3
    s = Server((429, {"retry-after": "3600"}, {}))
    with pytest.raises(Transient, match="429"): act(s)
    assert len(s.bodies) == 1
    s = Server((429, {}, {"error": {"message": "You exceeded your current quota"}}))
    with pytest.raises(WebseerError, match="quota"): act(s)
    assert len(s.bodies) == 1
    for status in (400, 401, 404, 422):
        s = Server((status, {}, {"error": "no"}))
        with pytest.raises(WebseerError, match=str(status)): act(s)
        assert len([b for b in s.bodies if b]) == 1                                       # after a 404 the list of models is asked for


def test_timeout_of_a_try_and_deadline():
    s = Server({"role": "assistant", "content": "x"}, wait=0.5)
    with pytest.raises(Transient, match="no answer in time"): act(s, timeout=0.1, attempts=2)
    assert len(s.bodies) == 2
    with pytest.raises(DeadlineExceeded, match="deadline of 0.2 s"): act(Server({"content": "x"}, wait=0.5), deadline=0.2)


@pytest.mark.parametrize("status,body,word", [
    (200, "hello", "not JSON"), (200, [], "OpenAI-compatible"), (200, {}, "OpenAI-compatible"), (200, {"choices": []}, "OpenAI-compatible"),
    (200, {"choices": [{"message": None}]}, "OpenAI-compatible"), (200, {"choices": 7}, "OpenAI-compatible"), (200, "<html><title>Hi", "web page"),
    (200, {"error": {"message": "no credit", "code": 402}}, "no credit"), (404, {"error": {"message": "The model `m` does not exist"}}, "is 'm' a model"),
    (400, {"message": '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'}, "native_tools=False"),
    (500, {"error": {"message": "tools param requires --jinja flag; tool use"}}, "native_tools=False"),
    (400, {"error": "registry/x:1b does not support tools"}, "native_tools=False"),
    (404, {"error": {"message": "No endpoints found that support tool use."}}, "native_tools=False"),
    (401, {"error": "no"}, "it wants a key")])
def test_clear_messages(status, body, word):
    with pytest.raises(WebseerError, match=word): act(Server((status, {}, body)), attempts=1)


def test_redirect_is_told():
    with pytest.raises(WebseerError, match="redirected"): act(Server((307, {"location": "http://b.example/v1"}, {})))


def test_unreachable():
    with running_app(Server({})) as url: pass
    async def go(): await EndpointPolicy(url, "m", api_key_env=None, attempts=2).act(traj())
    with pytest.raises(WebseerError, match="nothing answers"): asyncio.run(go())


def test_key_comes_from_the_environment_and_never_shows(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " test-key-123 ")
    s = Server({"role": "assistant", "content": "x"})
    act(s, api_key_env="OPENAI_API_KEY"); assert s.headers[0]["authorization"] == "Bearer test-key-123"
    act(s); assert "authorization" not in s.headers[1]
    with pytest.raises(WebseerError, match="the key in OPENAI_API_KEY was not accepted") as e:
        act(Server((401, {}, {"error": {"message": "Incorrect API key provided: test-key-123"}})), api_key_env="OPENAI_API_KEY")
    assert "test-key-123" not in str(e.value)
    p = EndpointPolicy("https://models.example.org", "m")
    assert "test-key-123" not in repr(p) and "test-key-123" not in json.dumps(p.request(traj()))
    with pytest.raises(WebseerError, match="unprotected") as e: EndpointPolicy("http://models.example.org", "m")
    assert "test-key-123" not in str(e.value)
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(WebseerError, match="OPENAI_API_KEY"): EndpointPolicy("https://models.example.org", "m")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(WebseerError, match="set the environment variable OPENAI_API_KEY"): act(Server((401, {}, {})), api_key_env="OPENAI_API_KEY")


def test_check():
    async def go(url, model): return await EndpointPolicy(url, model, api_key_env=None).check()
    with served(Server((200, {}, {"data": [{"id": "m"}, {"id": "n"}]}))) as url:
        assert asyncio.run(go(url, "n")) == ["m", "n"]
        with pytest.raises(WebseerError, match="no model 'k'; it has: m, n"): asyncio.run(go(url, "k"))
        with pytest.raises(WebseerError, match="did you mean 'm'"): asyncio.run(go(url, "M"))
    with served(Server((200, {}, {"data": [{"id": "m:latest", "max_model_len": 77}]}))) as url: assert asyncio.run(go(url, "m")) == ["m:latest"]
    with served(Server((200, {}, {"data": []}), {"content": "hello"})) as url: assert asyncio.run(go(url, "m")) == []
    with served(Server((200, {}, {"data": []}), (404, {}, {"error": "no such model"}))) as url:
        with pytest.raises(WebseerError, match="is 'm' a model"): asyncio.run(go(url, "m"))
    with served(Server((200, {}, {"hello": 1}))) as url:
        with pytest.raises(WebseerError, match="no list of models"): asyncio.run(go(url, "m"))


def test_a_wrong_name_is_told_what_there_is():
    def server(body): return (404, {}, {"error": "no"}) if body else (200, {}, {"data": [{"id": n} for n in ("Qwen/Qwen3-8B", "other")]})
    with pytest.raises(WebseerError, match="did you mean 'Qwen/Qwen3-8B'"):
        async def go(url): await EndpointPolicy(url, "qwen3-8b", api_key_env=None).act(traj())
        with served(Server(server)) as url: asyncio.run(go(url))



# tools on offer

PYTHON = {"type": "function", "function": {"name": "execute_python", "description": "Run code.", "parameters": {
    "type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}}}


def test_the_tools_that_the_trajectory_offers():
    t = Traj("Who?", ["Ada"], messages=first_messages("Who?", [*TOOLS, PYTHON]), tools=[*TOOLS, PYTHON])
    p = EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None)
    b = p.request(t)
    assert b["tools"] == [*TOOLS, PYTHON] and b["messages"][0]["content"] == INSTRUCTION and p.request(traj())["tools"] == TOOLS
    assert EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None, tools=[PYTHON]).request(t)["tools"] == [PYTHON]
    text = EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None, native_tools=False).request(t)
    assert text["messages"][0]["content"] == system_text([*TOOLS, PYTHON]) and "tools" not in text
    own = [dict(role="system", content="Be brief.\n\n# Tools\n\nare for carpenters."), dict(role="user", content="Hi")]
    assert native_messages(own) == own                                                # a heading that is not ours
    said = parse_reply(act(Server(called("execute_python", '{"code": "print(\\"</tool_call>\\")"}')), t).content)
    assert said.calls == [("execute_python", {"code": 'print("</tool_call>")'})]


def test_calls_without_a_result_are_not_sent_again():
    a = called("search", "{}")
    a["tool_calls"].append({"id": "c2", "function": {"name": "search", "arguments": {"query": "x"}}})
    out = native_messages([a, dict(role="tool", tool_call_id="c1", content="r"), dict(role="user", content="Go on."), dict(role="tool", content="stray")])
    assert [c["id"] for c in out[0]["tool_calls"]] == ["c1"] and [m["role"] for m in out] == ["assistant", "tool", "user", "user"]
    assert native_messages([a])[0]["tool_calls"][1]["function"]["arguments"] == '{"query": "x"}' and len(a["tool_calls"]) == 2


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["content", "tool_calls", "function_call", "refusal", "reasoning", "reasoning_content"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "{}", "search"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["id", "function", "name", "arguments", "type", "text"]), x, max_size=4), max_leaves=8)),
    st.booleans())
def test_any_message_has_a_text(message, reasoning):
    text = reply_text(message, reasoning)
    text.encode()
    native = message.get("tool_calls")
    if isinstance(native, list) and native and "tool_call>" not in str(message.get("content")): assert text.count("<tool_call>") >= len(native)
    parse_reply(text)


def question(i=0, text="Who built it?"): return SimpleNamespace(text=text, golds=["Ada"], qid=f"q{i}", hops=1, world=0, path=[])


class Count:
    "A tool that counts its calls."
    def __init__(self, text="Ada built it."): self.calls, self.text = [], text
    def call(self, name, args): self.calls.append((name, str(args))); return self.text


@pytest.mark.parametrize("message,fault", [
    (called("search", '{"query": "x'), "bad_json"), (called("search", "[]"), "bad_arguments"), (called(None, "{}"), "no_name"), ({"content": None}, "empty_reply"),
    ({"content": "hm"}, "no_call"), (called("search", '"{\\"query\\": 1}"'), "double_encoded"), ({"content": "<tool_call>{"}, "unclosed")])
def test_irregular_turns_reach_the_loop_and_are_counted(message, fault):
    s, tools = Server(message, called("submit_answer", '{"answer": "Ada"}')), Count()
    with served(s) as url: t = asyncio.run(rollout(EndpointPolicy(url, "m", api_key_env=None), tools, question()))
    assert t.stop == "submitted" and t.faults == {fault: 1} and len(tools.calls) == (fault == "double_encoded")


@pytest.mark.parametrize("args,content", [('{"query": "x \\ud83d"}', None), ('{"query": "x"}', "<think>I should look.\n"),
                                          ('{"query": "x"}', " <think>or <tool_call>{}</tool_call>")])
def test_a_real_call_is_carried_out_whatever_stands_beside_it(args, content):
    s, tools = Server(called("search", args, content), called("submit_answer", '{"answer": "Ada"}')), Count()
    with served(s) as url: t = asyncio.run(rollout(EndpointPolicy(url, "m", api_key_env=None), tools, question()))
    assert t.stop == "submitted" and t.faults == {} and [n for n, _ in tools.calls] == ["search"]


def test_calls_in_the_text_beside_native_calls_are_made_once():
    s, tools = Server(called("search", '{"query": "x"}', call_text("search", query="x")), called("submit_answer", '{"answer": "Ada"}')), Count()
    with served(s) as url: t = asyncio.run(rollout(EndpointPolicy(url, "m", api_key_env=None), tools, question()))
    assert tools.calls == [("search", "{'query': 'x'}")] and t.calls == ["search", "submit_answer"]


# no tool support

def tools_refused(body): return (400, {}, {"error": {"message": "m does not support tools"}}) if "tools" in body else {"content": call_text("submit_answer", answer="Ada")}


def test_auto_goes_on_in_text(caplog):
    s = Server(tools_refused)
    async def go(url):
        async with EndpointPolicy(url, "m", api_key_env=None, native_tools="auto") as p:
            ts = await rollouts(p, [(None, question(i)) for i in range(8)])
            more = len(s.bodies)
            await p.act(traj())
            return p, ts, more
    with served(s) as url, caplog.at_level(logging.WARNING, "webseer.endpoint"): p, ts, more = asyncio.run(go(url))
    assert all(t.stop == "submitted" for t in ts) and len(s.bodies) == more + 1 and not p.native
    assert len([r for r in caplog.records if r.name == "webseer.endpoint"]) == 1 and "does not support tools" in caplog.text
    assert "<tools>" in s.bodies[-1]["messages"][0]["content"]


def test_auto_stays_native_where_it_works():
    s = Server(called("search", "{}"), tools_refused)
    async def go(url):
        async with EndpointPolicy(url, "m", api_key_env=None, native_tools="auto") as p: await p.act(traj()); await p.act(traj())
    with served(s) as url, pytest.raises(WebseerError, match="native_tools=False"): asyncio.run(go(url))
    with pytest.raises(WebseerError, match="must be True, False or 'auto'"): EndpointPolicy("http://127.0.0.1:1", "m", native_tools="maybe")


# the context

@pytest.mark.parametrize("status,error", [
    (400, {"message": "This model's maximum context length is 4096 tokens. However, your prompt contains 4100 input tokens", "type": "BadRequestError"}),
    (400, {"message": "The input (61709 tokens) is longer than the model's context length (40960 tokens)."}),
    (400, {"message": "request (4390 tokens) exceeds the available context size (4096 tokens)", "type": "exceed_context_size_error"}),
    (500, {"message": "Context size has been exceeded.", "type": "server_error", "code": 500}),
    (400, {"message": "Please shorten it", "code": "context_length_exceeded"}), (413, "prompt too long; exceeded max context length by 7 tokens")])
def test_a_full_context_is_recognised(status, error):
    s = Server((status, {}, {"error": error}))
    with pytest.raises(ContextFull): act(s)
    assert len(s.bodies) == 1 + ("40" not in str(error))                              # waiting would not help, a shorter turn might where no room is told
    s = Server((200, {}, {"error": {"code": status} | error if isinstance(error, dict) else error}))
    with pytest.raises(ContextFull): act(s, attempts=1)


def cut(content, used, prompt=4000, **message):
    return (200, {}, {"choices": [{"message": {"content": content, **message}, "finish_reason": "length"}],
                      "usage": {"prompt_tokens": prompt, "completion_tokens": used}})


def test_an_answer_without_room_is_a_full_context():
    for a in (cut("", 0), cut(None, 1), cut("Let me", 2), cut("<tool_call>{", 5)):
        with pytest.raises(ContextFull, match="4000 tokens"): act(Server(a))
    for a in (cut("long " * 50, 50), cut("Let me", 1024), cut(call_text("search", query="x"), 9), cut("", 1024), cut("", 700, reasoning="hm")):
        assert act(Server(a)).usage["finish"] == "length"
    async def go(url):
        async with EndpointPolicy(url, "m", api_key_env=None) as p:
            await p.check()
            await p.act(traj())
    models = (200, {}, {"data": [{"id": "m", "max_model_len": 4050}]})
    with served(Server(models, cut("long " * 50, 50))) as url, pytest.raises(ContextFull): asyncio.run(go(url))


FITS = "'max_tokens' or 'max_completion_tokens' is too large: {n}. This model's maximum context length is 4096 tokens and your request has {p} input tokens"
REFUSALS = {FITS: True, "This model's maximum context length is 4096 tokens. However, you requested {n} tokens ({p} in the messages, {n} in the completion)": True,
            "The decoder prompt (length {p}) is longer than the maximum model length of 4096": True, "context_length_exceeded": False}


def tight(prompt, said=FITS, answer=None):
    "vLLM's rule: prompt and longest turn must fit together."
    def reply(body):
        n = body.get("max_completion_tokens") or body["max_tokens"]
        if prompt + n > 4096: return 400, {}, {"error": {"message": said.format(n=n, p=prompt)}}
        return answer or called("submit_answer", '{"answer": "Ada"}')
    return Server(reply)


@pytest.mark.parametrize("said", REFUSALS)
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_turn_is_shortened_to_the_room_there_is(said, field):
    s = tight(3000, said)
    k = {field: 2000} if field == "max_tokens" else dict(max_tokens=None, extra={field: 2000})
    assert parse_reply(act(s, **k).content).calls
    assert [b[field] for b in s.bodies] == ([2000, 1096] if REFUSALS[said] else [2000, 1000])
    for prompt, asked in ((3600, 1 if REFUSALS[said] else 3), (5000, 1 if REFUSALS[said] else 3)):
        s = tight(prompt, said)
        with pytest.raises(ContextFull): act(s, **k)
        assert len(s.bodies) == asked                                                 # 2000, 1000, 512 where the server does not say
    told = traj()
    told.messages.append(dict(role="user", content=CLOSING))                          # a submission needs little
    s = tight(3900, said)
    assert act(s, told, **k).content and s.bodies[-1][field] == (196 if REFUSALS[said] else 125)


def test_wrong_numbers_in_a_refusal_do_not_ask_for_ever():
    def server(body): return 400, {}, {"error": {"message": FITS.format(n=0, p=4097 - body["max_tokens"])}}      # always room for one less
    s = Server(server)
    with pytest.raises(ContextFull): act(s, max_tokens=3000)
    assert [b["max_tokens"] for b in s.bodies] == [3000, 2999, 1499, 749, 512]
    s = tight(3000, answer=cut("long " * 50, 1096, 3000))
    with pytest.raises(ContextFull, match="3000 tokens"): act(s, max_tokens=2000)     # cut off by the lowered limit
    assert act(tight(3000, answer=cut("long " * 50, 900, 3000)), max_tokens=900).usage["finish"] == "length"


def test_no_more_is_asked_for_than_the_known_context_holds():
    p = EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None, max_tokens=2000)
    t = traj(turns=[dict(prompt_tokens=3000)])
    assert p.request(t)["max_tokens"] == 2000
    p.context = 4096
    assert p.request(t)["max_tokens"] == 1096 and p.request(traj())["max_tokens"] == 2000
    assert p.request(traj(turns=[dict(prompt_tokens=4000)]))["max_tokens"] == 512
    assert p.request(traj(turns=[dict(prompt_tokens=None)]))["max_tokens"] == 2000 and p.settings["max_tokens"] == 2000


def test_a_rollout_submits_although_the_longest_turn_no_longer_fits():
    "Characters / 4 stand for tokens."
    def server(body):
        n = sum(len(json.dumps(m)) for m in body["messages"]) // 4
        if n + body["max_tokens"] > 4096: return 400, {}, {"error": {"message": FITS.format(n=body["max_tokens"], p=n)}}
        told = any(str(m.get("content")).endswith(CLOSING) for m in body["messages"])
        m = called("submit_answer", '{"answer": "Ada"}') if told else called("search", '{"query": "x"}', "think " * 300)
        return 200, {}, full(m) | {"usage": {"prompt_tokens": n, "completion_tokens": 450}}
    s = Server(server)
    with served(s) as url:
        t = asyncio.run(rollout(EndpointPolicy(url, "m", api_key_env=None, max_tokens=1000), Count("word " * 40), question(),
                                Budget(max_tokens=4096, reserve=512)))
    assert t.stop == "submitted" and len(t.calls) >= 6


def test_the_loop_shortens_and_asks_again():
    "Characters stand for tokens: more than 3,000 do not fit."
    def server(body):
        n = len(json.dumps(body["messages"]))
        if n > 3000: return 400, {}, {"error": {"message": f"maximum context length is 3000 tokens, your prompt contains {n}"}}
        return called("search", '{"query": "x"}') if len(body["messages"]) == 2 else called("submit_answer", '{"answer": "Ada"}')
    s = Server(server)
    with served(s) as url: t = asyncio.run(rollout(EndpointPolicy(url, "m", api_key_env=None), Count("word " * 2000), question()))
    assert t.stop == "submitted" and t.calls == ["search", "submit_answer"] and len(s.bodies) > 3 and "Submit your answer now" in t.messages[3]["content"]


# money and time

def test_usage_and_cost():
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 900}}
    s = Server((200, {}, {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": usage}))
    async def go(url):
        async with EndpointPolicy(url, "m", api_key_env=None, price=(1.0, 2.0)) as p: return await p.act(traj()), await p.act(traj()), p.usage
    with served(s) as url: a, b, total = asyncio.run(go(url))
    assert 0 < a.usage.pop("seconds") < 5
    assert a.usage == dict(prompt_tokens=1000, completion_tokens=10, cached_tokens=900, cost=pytest.approx(0.00102), finish="stop")
    assert total == dict(requests=2, retries=0, prompt_tokens=2000, completion_tokens=20, cached_tokens=1800, cost=pytest.approx(0.00204))
    odd = (200, {}, {"choices": [{"message": {"content": "x"}, "finish_reason": 3}], "usage": {"prompt_tokens": "many", "completion_tokens": -1}})
    assert {k: v for k, v in act(Server(odd)).usage.items() if k != "seconds"} == dict(prompt_tokens=None, completion_tokens=None, finish=None)


def test_unknown_usage_is_unknown_everywhere(tmp_path):
    from webseer.batch import summarise, summary_table
    from webseer.synth import _use
    from webseer.trace import outcome
    from webseer.viewer import view
    from webseer.traj import save_trajs
    def run(usage, budget=Budget(), **k):
        answer = full(called("submit_answer", '{"answer": "Ada"}'))
        s = Server((200, {}, full(called("search", '{"query": "x"}')) | {"usage": usage}), (200, {}, answer | {"usage": usage}))
        async def go(url):
            async with EndpointPolicy(url, "m", api_key_env=None, price=(1.0, 2.0)) as p: return await rollout(p, Count(), question(), budget), p.usage
        with served(s) as url: return asyncio.run(go(url))
    t, total = run(None, Budget(max_tokens=1))                                       # unknown: not 0, and no reason to stop
    assert t.stop == "submitted" and [(u["prompt_tokens"], u["completion_tokens"], u["cost"]) for u in t.turns] == [(None, None, None)] * 2
    assert (total["prompt_tokens"], total["cost"], total["requests"]) == (0, 0, 2)
    got = summarise([(t.to_dict(), 1.0)])
    assert got["prompt_tokens"] is got["completion_tokens"] is got["cost"] is None and "not known" in summary_table(got)
    assert "tokens" not in outcome(t) and "cost" not in outcome(t)
    rec = dict(use={})
    _use(rec, "reasoner", t)
    assert rec["use"]["reasoner"]["prompt_tokens"] is rec["use"]["reasoner"]["cost"] is None
    save_trajs(tmp_path/"t.jsonl", [t])
    view([tmp_path/"t.jsonl"], tmp_path/"t.html")
    t, _ = run({"prompt_tokens": 10.0, "completion_tokens": 5.0})
    assert [(u["prompt_tokens"], u["completion_tokens"], u["cost"]) for u in t.turns] == [(10, 5, 2e-5)] * 2 and "30 tokens" in outcome(t)
    assert all(type(u["prompt_tokens"]) is int for u in t.turns)
    assert run({"prompt_tokens": 10.0}, Budget(max_tokens=10))[0].stop == "max_tokens"
    t, _ = run({"prompt_tokens": 10.5, "completion_tokens": 5})
    assert (t.turns[0]["prompt_tokens"], t.turns[0]["completion_tokens"], t.turns[0]["cost"]) == (None, 5, None)
    assert act(Server((200, {}, {"choices": [{"message": {"content": "Let me"}, "finish_reason": "length"}]}))).usage["prompt_tokens"] is None


def test_hundreds_of_turns_at_once():
    s = Server(called("submit_answer", '{"answer": "Ada"}'), wait=0.3)
    async def go(url):
        async with EndpointPolicy(url, "m", api_key_env=None, concurrency=600) as p: return await rollouts(p, [(None, question(i)) for i in range(600)])
    with served(s) as url: ts = asyncio.run(go(url))
    assert all(t.stop == "submitted" for t in ts) and s.peak > 200 and len({b["seed"] for b in s.bodies}) == 600


def test_more_connections_than_files():
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 600), hard))
        EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None, concurrency=1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1256
        with pytest.raises(WebseerError, match="ulimit"): EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None, concurrency=hard)
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_tool_call_is_repeated_although_a_third_of_the_requests_fail():
    "Every answer before the last one searches for its own number; whatever is spoiled must not show in the calls."
    rng, spoiled = random.Random(3), []
    def server(body):
        if rng.random() < 1 / 3:
            spoiled.append(1)
            return rng.choice([(503, {"retry-after": "0"}, "busy"), (429, {"retry-after": "0.01"}, {}), (200, {}, '{"choi'), (200, {}, {"choices": []}),
                               (500, {"retry-after": "0"}, {"error": "x"})])
        n = sum(m["role"] == "assistant" for m in body["messages"])
        return called("search", json.dumps({"query": f"{body['messages'][1]['content']} {n}"})) if n < 4 else called("submit_answer", '{"answer": "Ada"}')
    s, tools = Server(server), Count()
    with served(s) as url:
        async def go():
            async with EndpointPolicy(url, "m", api_key_env=None, attempts=30, concurrency=20) as p:
                return await rollouts(p, [(tools, question(i, f"Who built number {i}?")) for i in range(40)]), p.usage
        ts, usage = asyncio.run(go())
    assert all(t.stop == "submitted" for t in ts) and len(spoiled) > 50 and usage["retries"] == len(spoiled) and usage["requests"] == 200
    assert sorted(tools.calls) == sorted(("search", str({"query": f"Who built number {i}? {n}"})) for i in range(40) for n in range(4))


def test_a_cancelled_turn_frees_its_place():
    s = Server(called("submit_answer", '{"answer": "Ada"}'), wait=0.2)
    async def go(url):
        async with EndpointPolicy(url, "m", api_key_env=None, concurrency=1) as p:
            late = await rollout(p, Count(), question(), Budget(seconds=0.05))
            return late, await rollout(p, Count(), question())
    with served(s) as url: late, t = asyncio.run(go(url))
    assert late.stop == "deadline" and len(late.messages) == 2 and t.stop == "submitted"


def test_an_endless_answer_is_given_up():
    async def endless():
        for _ in range(100): yield b" " * 65536
    async def go(url): await Service(url, max_bytes=2**20).send("x", {})
    for kind in ("application/json", "text/event-stream"):
        with running_app(Server(lambda body: StreamingResponse(endless(), media_type=kind))) as url, pytest.raises(WebseerError, match="longer than 1,048,576 bytes"):
            asyncio.run(go(url))


# streaming

def events(answer, rng, error=None):
    "A chat completion as a stream, its texts cut anywhere."
    def pieces(text):
        while text: n = rng.randint(1, max(1, len(text) // 2)); yield text[:n]; text = text[n:]
    c, m = answer["choices"][0], answer["choices"][0]["message"]
    deltas = [{"role": "assistant", "content": ""}] + [{f: p} for f in ("reasoning", "content") for p in pieces(m.get(f) or "")]
    for i, call in enumerate(m.get("tool_calls") or []):
        deltas.append({"tool_calls": [{"index": i, "id": call["id"], "type": "function", "function": {"name": call["function"]["name"], "arguments": ""}}]})
        deltas += [{"tool_calls": [{"index": i, "function": {"arguments": p}}]} for p in pieces(call["function"]["arguments"])]
    chunks = [{"id": "a", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": d}]} for d in deltas]
    chunks[0] |= {k: answer[k] for k in ("prompt_token_ids",) if k in answer}
    for k, (i, lp) in enumerate(zip(c.get("token_ids", []), c.get("logprobs", {}).get("content", []))):        # a few tokens with each piece
        x = chunks[min(k, len(chunks) - 1)]["choices"][0]
        x.setdefault("token_ids", []).append(i); x.setdefault("logprobs", {"content": []})["content"].append(lp)
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": c["finish_reason"]}]}, {"choices": [], "usage": answer["usage"]}]
    return [f"data: {json.dumps(x, ensure_ascii=False)}\n\n".encode() for x in chunks] + [b": ping\n\n", b"data: [DONE]\n\n"]


def streamed(answer, rng=None, stop=None, end=b"", fail=False):
    "The answer as a response: in pieces that do not respect the lines; `stop` of the events, then `end`, then perhaps a broken connection."
    rng = rng or random.Random(1)
    raw = b"".join(events(answer, rng)[:stop]) + end
    async def body():
        at = 0
        while at < len(raw): n = rng.randint(1, 200); yield raw[at:at + n]; at += n
        if fail: raise ConnectionError("the model fell over")
    return StreamingResponse(body(), media_type="text/event-stream; charset=utf-8")


def full(message, finish="stop", **more):
    return {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, **more}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


TWO = called("search", '{"query": "Ü 𝄞"}', "Let me look, twice.\n")
TWO["tool_calls"].append({"id": "c2", "type": "function", "function": {"name": "search", "arguments": '{"query": "tru'}})


@pytest.mark.parametrize("message", [{"content": "Just talk with Ünïcode 𝄞."}, TWO, {"content": "so", "reasoning": "First I think."}, {"content": None}, called("a", "{}")])
@pytest.mark.parametrize("reasoning", [False, True])
def test_a_stream_is_the_same_answer(message, reasoning):
    shown, answer = [], full(message)
    def both(body): return streamed(answer, random.Random(7)) if body.get("stream") else (200, {}, answer)
    s = Server(both)
    plain = act(s, reasoning=reasoning)
    r = act(s, stream=True, reasoning=reasoning, on_text=lambda t, piece: shown.append(piece))
    plain.usage.pop("seconds"), r.usage.pop("seconds")
    assert r == plain and s.bodies[-1]["stream_options"] == {"include_usage": True} and "stream" not in s.bodies[0]
    assert "".join(shown) == (message.get("reasoning", "") if reasoning else "") + (message.get("content") or "")


def test_a_server_that_does_not_stream():
    r = act(Server(called("search", '{"query": "x"}')), stream=True, on_text=lambda *a: 1 / 0)
    assert parse_reply(r.content).calls


@pytest.mark.parametrize("broken", [dict(stop=6), dict(stop=6, fail=True), dict(stop=3, end=b'data: {"error": {"message": "engine died", "code": 500}}\n\n'),
                                    dict(stop=3, end=b'data: {"error": {"message": "engine died"}}\n\ndata: [DONE]\n\n'),
                                    dict(stop=4, end=b"data: {oops\n\n"), dict(stop=4, end=b'data: {"choices": [{"del')])
def test_a_broken_stream_is_asked_again_as_a_whole(broken):
    answer = full({"content": "A rather long text that is cut into many pieces."})
    s, shown = Server(streamed(answer, **broken), lambda body: streamed(answer)), []
    r = act(s, stream=True, on_text=lambda t, piece: shown.append(piece))
    assert r.content == answer["choices"][0]["message"]["content"] and len(s.bodies) == 2 and s.bodies[0] == s.bodies[1]
    assert None in shown and "".join(shown[shown.index(None) + 1:]) == r.content and "".join(shown[:shown.index(None)]) not in ("", r.content)


def test_pieces_of_a_turn_that_fails_are_withdrawn():
    shown, ends = [], dict(stream=True, on_text=lambda t, piece: shown.append(piece), attempts=1)
    with pytest.raises(ContextFull):
        act(Server(streamed(full({"content": "Let me"}, "length"))), **ends)
    assert shown[-1] is None and shown.pop() is None
    with pytest.raises(ContextFull): act(Server(streamed(full({"content": "Let me see"}), stop=3, end=b'data: {"error": {"message": "context size exceeded"}}\n\n')), **ends, max_tokens=512)
    assert shown[-1] is None
    async def slow(): yield b"".join(events(full({"content": "Let me see"}), random.Random(1))[:3]); await asyncio.sleep(1)
    with pytest.raises(DeadlineExceeded): act(Server(StreamingResponse(slow(), media_type="text/event-stream")), **ends | dict(deadline=0.3))
    assert shown[-1] is None and shown[-2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([b"data: ", b"data:", b"\n", b"\r\n", b"\n\n", b"[DONE]", b"{", b"}", b'{"choices": [{"delta": {"content": "x"}}]}', b"\xff", b"[]", b"null",
                                 b'{"choices": [{"index": [], "delta": {"tool_calls": [{}, 3, {"index": 5, "function": 7}]}, "logprobs": 3, "token_ids": 4}]}',
                                 b'{"choices": {"a": 1}, "usage": [], "error": null}', b'{"choices": [{"finish_reason": "stop", "delta": 4}, 9]}'])))
def test_any_stream_is_an_answer_or_one_of_our_errors(parts):
    with served(Server(lambda body: Response(b"".join(parts), media_type="text/event-stream"))) as url:
        if url not in FUZZ: FUZZ[url] = EndpointPolicy(url, "m", api_key_env=None, stream=True, attempts=1)
        try: wait_for(FUZZ[url].act(traj()))
        except WebseerError: pass


FUZZ = {}


def chunk(delta=None, **more): return {"choices": [{"index": 0, "delta": delta or {}, **more}]}
def sse(*chunks): return Response("".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n", media_type="text/event-stream")


@pytest.mark.parametrize("contents,text", [
    ([[{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}], "Answer"], "Answer"), ([[{"type": "text", "text": "a "}], [{"text": "b"}]], "a b"),
    (["", [{"type": "text", "text": "x"}], "y", 7, {}, None], "xy"), ([7, {}, "x"], "x"), ([[None, 3, {"text": 5}]], "")])
def test_a_streamed_content_in_parts_is_joined(contents, text):
    shown = []
    r = act(Server(sse(*(chunk({"content": c}) for c in contents), chunk(finish_reason="stop"))), stream=True, on_text=lambda t, piece: shown.append(piece))
    assert r.content == text == "".join(shown)


def test_odd_pieces_of_a_stream_are_left_out():
    call = called("search", '{"query": "x"}')["tool_calls"]
    first = chunk({"content": None, "function_call": None, "tool_calls": None}, logprobs=[], token_ids=4)
    last = chunk({"tool_calls": call, "function_call": "x"}, logprobs={"content": []}, token_ids=[5], finish_reason="stop")
    assert act(Server(sse(first, last)), stream=True).content == hermes_call("search", {"query": "x"})
    with pytest.raises(Transient, match="oops"):
        act(Server(Response(b'data: {"error": {"message": "oops \\ud83d", "n": NaN}}\n\n', media_type="text/event-stream")), stream=True, attempts=1)


def test_parallel_calls_under_one_index():
    def piece(args, i=None, name=None, index=0): return chunk({"tool_calls": [{"index": index} | ({"id": i} if i else {}) | {"function": {"name": name, "arguments": args}}]})
    def calls(*chunks): return parse_reply(act(Server(sse(*chunks, chunk(finish_reason="tool_calls"))), stream=True).content).calls
    two = [("search", {"query": "a"}), ("search", {"query": "b"})]
    assert calls(piece('{"query": "a"}', "f1", "search"), piece('{"query": "b"}', "f2", "search")) == two                      # Gemini
    assert calls(piece('{"query":', "f1", "search"), piece(' "a"}'), piece('{"que', "f2", "search"), piece('ry": "b"}')) == two
    assert calls(piece('{"query":', "f1", "search"), piece(' "a"}', "other id")) == two[:1]                                   # ids that change within a call
    assert calls(piece('{"query":', "f1", "search"), piece(' "a"}', "f1", "search")) == two[:1]
    assert calls(piece('{"query": "a"}', "f1", "search"), piece('{"query": "b"}', "f2", "search", 1)) == two
    assert calls(piece('{"query":', "f1", "search", None), piece(' "a"}', index=None), piece('{"query": "b"}', "f2", "search", None)) == two


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2, 10**30) | st.floats() | st.text(max_size=4) | st.just("a \ud83d"), lambda x: st.lists(x, max_size=3) | st.dictionaries(
    st.sampled_from(["text", "content", "name", "arguments", "function", "id", "index", "type", "token", "logprob", "prompt_tokens", "cached_tokens"]), x, max_size=4), max_leaves=8)
def some(fields): return st.fixed_dictionaries({}, optional={f: JSON | v for f, v in fields.items()})
CALLS = st.lists(some(dict(index=st.integers(0, 2), id=st.sampled_from("ab"), type=st.just("function"), function=some(dict(name=st.just("search"), arguments=st.just("{}"))))), max_size=3)
DELTA = some(dict(content=st.just("x"), reasoning=st.just("y"), role=st.just("assistant"), tool_calls=CALLS, function_call=some(dict(name=st.just("f"), arguments=st.just("{}")))))
ROWS = st.lists(some(dict(token=st.just("x"), logprob=st.just(-0.5))), max_size=2)
CHOICE = some(dict(index=st.integers(0, 1), delta=DELTA, message=DELTA, logprobs=some(dict(content=ROWS)), token_ids=st.lists(st.integers(0, 9), max_size=2),
                   finish_reason=st.sampled_from(["stop", "length", "tool_calls"]), stop_reason=JSON))
CHUNK = some(dict(choices=st.lists(CHOICE, max_size=2), usage=some(dict(prompt_tokens=st.just(1.0), completion_tokens=st.just(2))), prompt_token_ids=st.just([1, 2])))


@settings(max_examples=500, deadline=None)
@given(st.lists(CHUNK, max_size=4), st.booleans())
def test_any_pieces_make_an_answer_or_one_of_our_errors(chunks, token_ids):
    a = Assembled()
    for c in chunks:
        for field, text in a.add(c): assert isinstance(field, str) and isinstance(text, str)
    p = EndpointPolicy("http://127.0.0.1:1", "m", api_key_env=None, token_ids=token_ids, price=(1.0, 1.0))
    assert a.finished in (True, False)
    try: reply, _ = p._read(traj(), {"max_tokens": 4}, a.whole())
    except WebseerError: return
    reply.content.encode()
    parse_reply(reply.content)
    assert all(reply.usage[f] is None or type(reply.usage[f]) is int for f in ("prompt_tokens", "completion_tokens"))


# tokens

PAIRS, SPECIAL = ("se", "ar", "ch", "er", "in", "th", "\n\n", ": ", "us"), ("<|im_start|>", "<|im_end|>")
WORD = {p: 10_000_000 + i for i, p in enumerate(PAIRS + SPECIAL)}
TEXT = {i: w for w, i in WORD.items()}
START, END = WORD["<|im_start|>"], WORD["<|im_end|>"]


def encode(text): return [WORD.get(w) or ord(w) for w in re.findall("|".join(map(re.escape, SPECIAL + PAIRS)) + "|.", text, re.S)]
def spell(ids): return "".join(TEXT.get(i) or chr(i) for i in ids)


def chatml(messages):
    "The way of Qwen's templates: a line break before every call, results as a user's turn."
    out = ""
    for m in messages:
        calls = [hermes_call(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in m.get("tool_calls", [])]
        body = f"<tool_response>\n{m['content']}\n</tool_response>" if m["role"] == "tool" else "\n".join([x for x in [m["content"]] if x] + calls)
        out += f"<|im_start|>{'user' if m['role'] == 'tool' else m['role']}\n{body}<|im_end|>\n"
    return out + "<|im_start|>assistant\n"


class TinyVLLM(Server):
    "Plays vLLM with its Hermes parser: `texts` are what the model writes turn by turn, `sample` makes ids of them, `template` the prompt of messages."
    def __init__(self, texts, sample=lambda text: encode(text) + [END], template=chatml, finish=None, tokenizes=False):
        super().__init__(self.turn)
        self.tokenizes = tokenizes
        self.texts, self.sample, self.template, self.finish = texts, sample, template, finish or {}
    def turn(self, body):
        if "tokens" in body: return 200, {}, {"prompt": spell(body["tokens"])}
        if "prompt" in body: return (200, {}, {"tokens": encode(body["prompt"])}) if self.tokenizes else (404, {}, {})
        n = sum(m["role"] == "assistant" for m in body["messages"])
        text = self.texts[n]
        said, calls = self.sample(text), []
        thought, mark, rest = text.rpartition("</think>")
        message = {"content": rest, **({"reasoning": thought} if mark else {})}
        try:
            found = [json.loads(x) for x in re.findall(r"<tool_call>(.*?)</tool_call>", rest, re.S)]
            calls = [{"id": f"c{i}", "type": "function", "function": {"name": x["name"], "arguments": json.dumps(x["arguments"], ensure_ascii=False)}} for i, x in enumerate(found)]
        except ValueError: pass
        if calls: message |= {"content": rest.partition("<tool_call>")[0] or None, "tool_calls": calls}
        answer = full(message, self.finish.get(n) or ("tool_calls" if calls else "stop"), token_ids=said,
                      logprobs={"content": [{"token": spell([i]), "logprob": -0.25 * (i % 3)} for i in said]})
        answer["prompt_token_ids"] = encode(self.template(body["messages"]))
        answer["usage"] = {"prompt_tokens": len(answer["prompt_token_ids"]), "completion_tokens": len(said)}
        return streamed(answer) if body.get("stream") else (200, {}, answer)


def letters(text): return [ord(c) for c in text] + [END]


def sampled(server, **k):
    async def go(url):
        async with EndpointPolicy(url, "m", **{"api_key_env": None, "token_ids": True, "max_tokens": None, **k}) as p:
            t = await rollout(p, Count("this was built in March by Ada"), question())
            assert not p._past
            return t
    with served(server) as url: return asyncio.run(go(url))


TURNS = ["Let me search for it.\n" + call_text("search", query="these arches"), "I see nothing there.", "Then I say it:\n\n" + call_text("submit_answer", answer="Ada")]


def generated(t): return [[i for i, _ in g] for on, g in itertools.groupby(zip(t.ids, t.mask), lambda x: x[1]) if on]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_exact_where_the_server_feeds_back_what_was_sampled(stream):
    t = sampled(TinyVLLM(TURNS), stream=stream)
    assert t.stop == "submitted" and t.calls == ["search", "malformed", "submit_answer"]
    assert t.ids == encode(chatml(native_messages(t.messages)).removesuffix("\n<|im_start|>assistant\n"))
    assert generated(t) == [encode(x) + [END] for x in TURNS] and verify_tokens(t, spell) == [] and not any("drift" in u for u in t.turns)
    assert t.logprobs == [-0.25 * (i % 3) * on for i, on in zip(t.ids, t.mask)]


@pytest.mark.parametrize("stream", [False, True])
def test_drift_keeps_what_was_sampled(stream):
    s = TinyVLLM(TURNS, letters)
    t = sampled(s, stream=stream)
    assert t.stop == "submitted" and generated(t) == [letters(x) for x in TURNS] and verify_tokens(t, spell) == []
    fed = [t.ids[a + 1] for a in range(len(t.ids) - 1) if t.ids[a] == START]                # every turn of the others was found as a whole
    assert len(fed) == spell(t.ids).count("<|im_start|>") == 7 and spell(t.ids) == chatml(native_messages(t.messages)).removesuffix("\n<|im_start|>assistant\n")
    first, second, third = t.turns
    d = second["drift"]
    at = d["at"]
    assert "drift" not in first and t.ids[:at] == encode(chatml(t.messages[:2]).replace(SYSTEM, INSTRUCTION) + "Let me ")
    assert spell(d["generated"]) == spell(d["fed"])[:len(spell(d["generated"]))] and d["n_generated"] > d["n_fed"] and len(d["generated"]) <= 32 >= len(d["fed"])
    assert third["drift"]["at"] == at and third["drift"]["n_generated"] > 0
    report = drift([t, sampled(TinyVLLM(TURNS))], spell)
    assert {k: v for k, v in report.items() if k != "examples"} == dict(
        trajs=2, turns=6, tokens=sum(t.mask) + len([i for x in TURNS for i in encode(x) + [END]]), trajs_drifted=1, turns_drifted=2, replies_changed=2,
        tokens_changed=d["n_generated"] + third["drift"]["n_generated"])
    assert len(report["examples"]) == 2 and report["examples"][0]["generated_text"].startswith("se") and drift([t])["examples"][0]["generated"][:2] == [ord("s"), ord("e")]


def test_calls_written_in_another_way_are_drift():
    "vLLM's parser reads the JSON and the template writes it anew."
    t = sampled(TinyVLLM(['{"x": 1} <tool_call>{"arguments":{"query":"x"},"name":"search"}</tool_call> and more', TURNS[2]]))
    assert t.stop == "submitted" and verify_tokens(t, spell) == [] and t.turns[1]["drift"]["n_generated"] > 10
    assert spell(t.ids).count("this was built in March") == 1 and generated(t)[0] == encode('{"x": 1} <tool_call>{"arguments":{"query":"x"},"name":"search"}</tool_call> and more') + [END]


@pytest.mark.parametrize("sample", [lambda text: encode(text), lambda text: [ord(c) for c in text]])
def test_a_reply_that_was_cut_off_gets_its_end_from_the_template(sample):
    s = TinyVLLM([TURNS[0], "I will search and se", TURNS[2]], lambda text: sample(text) + ([] if text.endswith(" se") else [END]), finish={1: "length"})
    t = sampled(s)
    assert t.stop == "submitted" and verify_tokens(t, spell) == [] and spell(generated(t)[1]) == "I will search and se"
    spans = spell(t.ids).split("I will search and se")
    assert len(spans) == 2 and spans[1].startswith("<|im_end|>\n<|im_start|>user\nNo tool was called")
    at = len(t.ids) - len(encode(spans[1]))
    assert t.ids[at] == END and t.mask[at] == 0 if sample("se") == encode("se") else END in t.ids


def test_replies_that_are_all_cut_off():
    "No reply shows the token that ends a turn; the server is asked for it once."
    texts = ["I will search and se", "I will search and se", TURNS[2]]
    told, untold = (sampled(TinyVLLM(texts, lambda text: [ord(c) for c in text], finish={0: "length", 1: "length"}, tokenizes=t)) for t in (True, False))
    assert told.stop == "submitted" and [spell(g) for g in generated(told)] == texts and verify_tokens(told, spell) == []
    assert spell(told.ids).count("<|im_end|>") == 6 and untold.stop == "error" and "changed earlier turns" in untold.meta["error"]


def test_another_end_than_the_templates():
    "The model ends its turn with another token; the template's own is then taken along."
    other = 77_777_777
    TEXT[other] = "<|endoftext|>"
    try:
        s = TinyVLLM(TURNS, lambda text: encode(text) + [END if text == TURNS[0] else other])
        t = sampled(s)
        assert t.stop == "submitted" and [g[-1] for g in generated(t)] == [END, other, other] and spell(t.ids).count("<|endoftext|><|im_end|>\n") == 1
        assert t.turns[2]["drift"]["generated"][-1] == other and verify_tokens(t, spell) == []
    finally: del TEXT[other]


def test_an_end_spelled_out_does_not_shift_the_mask():
    t = sampled(TinyVLLM([TURNS[0], "I write <|im_end|> in letters.", TURNS[2]], letters))
    assert t.stop == "submitted" and spell(generated(t)[1]) == "I write <|im_end|> in letters.<|im_end|>"
    assert spell(t.ids).count("in letters.") == 1 and spell(t.ids).count("No tool was called") == 1


@pytest.mark.parametrize("template,k", [
    (lambda ms: chatml([{**m, "content": "…"} if m["role"] == "tool" and m is not ms[-1] else m for m in ms]), {}),     # rewrites an old result
    (lambda ms: chatml([m for m in ms if m["role"] != "assistant"]), {}),                                                # forgets what the model said
    (chatml, dict(reasoning=False))])                                                                                    # the thoughts are not sent back
def test_a_template_that_rewrites_the_past_is_refused(template, k):
    texts = ["I should think about this for a while and then search.</think>" * bool(k) + x for x in [TURNS[0], TURNS[0], TURNS[2]]]
    t = sampled(TinyVLLM(texts, template=template), **k)
    assert t.stop == "error" and "changed earlier turns" in t.meta["error"] and verify_tokens(t) == []


def test_thoughts_that_are_kept():
    said = ["I should think about this.</think>" + x for x in TURNS]
    template = lambda ms: chatml([{**m, "content": re.sub("^<think>\n(.*)\n</think>\n", r"\1</think>", m["content"])} for m in ms])
    t = sampled(TinyVLLM(said, template=template), reasoning=True)
    assert t.stop == "submitted" and not any("drift" in u for u in t.turns) and t.messages[2]["content"].startswith("<think>\nI should think")


def test_token_ids_that_are_missing_or_odd():
    ok = TinyVLLM(TURNS).turn(dict(messages=first_messages("Who?")))[2]
    for path, v in ((("prompt_token_ids",), None), (("choices", 0, "token_ids"), None), (("choices", 0, "token_ids"), ["1"]), (("choices", 0, "logprobs"), None),
                    (("choices", 0, "logprobs"), {"content": [{"logprob": None}]})):
        a = copy.deepcopy(ok)
        x = a
        for k in path[:-1]: x = x[k]
        x[path[-1]] = v
        with pytest.raises(WebseerError, match="token_ids=False"): act(Server((200, {}, a)), token_ids=True)
    s = Server((200, {}, ok))
    r = act(s, token_ids=True)
    assert s.bodies[0]["return_token_ids"] is s.bodies[0]["logprobs"] is True and r.prompt_ids == ok["prompt_token_ids"]
    n = len(r.prompt_ids)
    assert act(s, traj(ids=r.prompt_ids[:9], mask=[0] * 9), token_ids=True).prompt_ids == r.prompt_ids[9:]            # without `start`: from the record
    with pytest.raises(HistoryChanged): act(s, traj(ids=[1, 2], mask=[0, 1]), token_ids=True)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_way_to_sample_a_text_keeps_mask_and_order(data):
    "What is fed between the replies is found again, whatever way each reply was sampled and cut."
    texts = data.draw(st.lists(st.text("these |in\nchar", min_size=1, max_size=20), min_size=1, max_size=5))
    ids, mask, prompt, past = [], [], [], None
    messages = [dict(role="user", content="Who is it?")]
    for text in texts:
        whole = data.draw(st.booleans())
        said = (encode(text) if data.draw(st.booleans()) else [ord(c) for c in text]) + [END] * whole
        prompt = encode(chatml(messages))
        new, change = observation(prompt, *past, [END]) if past else (prompt, None)
        ids, mask = ids + new + said, mask + [0] * len(new) + [1] * len(said)
        past = prompt, said
        messages += [dict(role="assistant", content=text), dict(role="user", content=f"answer {len(messages)}")]
    assert spell(ids) == chatml(messages[:-1]).removesuffix("\n<|im_start|>assistant\n").removesuffix("" if whole else "<|im_end|>")
    assert spell([i for i, on in zip(ids, mask) if on]).replace("<|im_end|>", "") == "".join(texts)


def test_verify_tokens_finds_what_is_wrong():
    t = sampled(TinyVLLM(TURNS, letters))
    def broken(**k):
        new = copy.deepcopy(t)
        for f, change in k.items(): change(getattr(new, f))
        return verify_tokens(new, spell)
    i = t.mask.index(1)
    def put(at, v): return lambda x: x.__setitem__(at, v)
    assert broken() == []
    for k, word in ((dict(ids=list.pop), "marks"), (dict(mask=put(i - 1, 1)), "reply 0"), (dict(mask=put(i, 0), logprobs=put(i, 0.0)), "reply 0"), (dict(mask=put(i + 3, 2)), "more than"),
                    (dict(mask=put(0, 1)), "prompt is missing"), (dict(mask=put(i + 5, 0), logprobs=put(i + 5, 0.0)), "spans"), (dict(logprobs=put(i, 0.5)), "log-prob"),
                    (dict(logprobs=put(2, -1.0)), "log-prob"), (dict(logprobs=put(i, float("nan"))), "log-prob"), (dict(ids=put(i + 4, ord("#"))), "reply 0"),
                    (dict(messages=lambda ms: ms[2].update(content="Something else.")), "reply 0"),
                    (dict(messages=lambda ms: ms[2]["tool_calls"][0]["function"].update(arguments="{}")), "reply 0")):
        assert any(word in x for x in broken(**k)), (word, broken(**k))


def test_the_server_turns_ids_into_text():
    s = TinyVLLM(TURNS)
    t = sampled(TinyVLLM(TURNS, letters))
    with served(s) as url:
        p = EndpointPolicy(url, "m", api_key_env=None)
        assert p.decode(encode("in this search")) == "in this search" and s.paths == ["/detokenize"]
        assert verify_tokens(t, p.decode) == [] and drift([t], p.decode)["examples"][0]["generated_text"]
    with served(Server((404, {}, {}))) as url, pytest.raises(WebseerError): EndpointPolicy(url, "m", api_key_env=None).decode([1])


def test_describe_tells_no_secret(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "test-key-123")
    p = EndpointPolicy("https://models.example.org", "m", max_tokens=5)
    assert p.describe() == dict(policy="endpoint", model="m", seed=0, native_tools=True, reasoning=False, temperature=0.7, max_tokens=5)
    assert "test-key-123" not in repr(vars(p)) + repr(vars(p.chat)) + json.dumps(p.describe())
    assert EndpointPolicy("https://models.example.org", "m", max_tokens=5, token_ids=True).describe() == p.describe() | {"token_ids": True}
    with pytest.raises(WebseerError, match=r"api_key_env=None of a policy, --key-env ''"): EndpointPolicy("http://10.0.0.5:8000", "m")
    EndpointPolicy("http://10.0.0.5:8000", "m", api_key_env=""), EndpointPolicy("http://10.0.0.5:8000", "m", api_key_env=None)
