import asyncio
import json

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

from webseer.agent import SYSTEM, call_text, first_messages, parse_reply, rollout, rollouts
from webseer.core import WebseerError
from webseer.endpoint import EndpointPolicy, hermes_call, join_calls, native_messages, reply_text, text_messages
from webseer.remote import DeadlineExceeded, Transient, running_app
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
        self.bodies.append(json.loads(body) if body else None); self.headers.append(dict(r.headers)); self.paths.append(r.url.path)
        await asyncio.sleep(self.wait)
        a = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if isinstance(a, dict): a = (200, {}, {"choices": [{"message": a, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
        status, headers, body = a
        make = PlainTextResponse if isinstance(body, str) else JSONResponse
        self.now -= 1
        await make(body, status, headers)(scope, receive, send)


def act(server, t=None, path="", **k):
    "One turn against a server; the reply, or the error it raises."
    k = {"api_key_env": None, **k}
    async def go(url):
        async with EndpointPolicy(url + path, "m", **k) as p: return await p.act(t or traj())
    with running_app(server) as url: return asyncio.run(go(url))


def test_request_and_reply():
    s = Server(called("search", '{"query": "x"}', "Let me look."))
    r = act(s, temperature=0.3, max_tokens=77, extra={"top_p": 0.9})
    assert r.content == 'Let me look.\n<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
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
    (called("search", None), hermes_call("search", {})),
    (called("search", '{"q'), hermes_call("search", '{"q')),
    (called("search", "{}", "see <tool_call>\n{}\n</tool_call>"), "see <tool_call>\n{}\n</tool_call>"),
    ({"content": "a", "reasoning": "b"}, "a")])
def test_reply_text(message, want): assert reply_text(message) == want


def test_several_calls_and_parser():
    m = called("search", '{"query": "x"}', "t\n")
    m["tool_calls"].append({"function": {"name": "submit_answer", "arguments": '{"answer": "</tool"}'}})
    assert parse_reply(reply_text(m)) [:3] == ("t\n", [("search", {"query": "x"}), ("submit_answer", {"answer": "</tool"})], None)
    assert "not valid JSON" in parse_reply(reply_text(called("search", '{"q')))[2]
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
    with running_app(s) as url:
        t = asyncio.run(rollout(EndpointPolicy(url, "m", api_key_env=None), T(), Q()))
    assert t.stop == "submitted" and t.submissions[0]["em"] == 1 and t.calls == ["search", "malformed", "submit_answer"]
    assert s.bodies[1]["messages"][-1] == {"role": "tool", "tool_call_id": "0", "content": "search: Ada built it."}


def test_concurrency_is_bounded():
    class Q: text, golds, qid, hops, world, path = "Who?", ["Ada"], "q", 1, 0, []
    s = Server(called("submit_answer", '{"answer": "Ada"}'), wait=0.01)
    with running_app(s) as url:
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
        assert len(s.bodies) == 1


def test_timeout_of_a_try_and_deadline():
    s = Server({"role": "assistant", "content": "x"}, wait=0.5)
    with pytest.raises(Transient, match="within 0.1 s"): act(s, timeout=0.1, attempts=2)
    assert len(s.bodies) == 2
    with pytest.raises(DeadlineExceeded, match="deadline of 0.2 s"): act(Server({"content": "x"}, wait=0.5), deadline=0.2)


@pytest.mark.parametrize("status,body,word", [
    (200, "hello", "not in JSON"), (200, [], "not in JSON"), (200, {}, "OpenAI-compatible"), (200, {"choices": []}, "OpenAI-compatible"),
    (200, {"choices": [{"message": None}]}, "OpenAI-compatible"), (404, {"error": {"message": "The model `m` does not exist"}}, "is 'm' a model"),
    (400, {"message": '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'}, "native_tools=False"),
    (500, {"error": {"message": "tools param requires --jinja flag; tool use"}}, "native_tools=False"),
    (400, {"error": "registry/x:1b does not support tools"}, "native_tools=False"),
    (401, {"error": "no"}, "it wants a key")])
def test_clear_messages(status, body, word):
    with pytest.raises(WebseerError, match=word): act(Server((status, {}, body)))


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
    with running_app(Server((200, {}, {"data": [{"id": "m"}, {"id": "n"}]}))) as url:
        assert asyncio.run(go(url, "n")) == ["m", "n"]
        with pytest.raises(WebseerError, match="no model 'k'; it has: m, n"): asyncio.run(go(url, "k"))


def test_token_ids():
    answer = (200, {}, {"prompt_token_ids": [1, 2, 3, 4], "choices": [{"message": {"content": "x"}, "token_ids": [5, 6],
              "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}}]})
    s = Server(answer)
    r = act(s, token_ids=True)
    assert (r.prompt_ids, r.ids, r.logprobs) == ([1, 2, 3, 4], [5, 6], [-1.0, -2.0]) and s.bodies[0]["return_token_ids"] is True
    assert act(Server(answer), traj(ids=[1, 2]), token_ids=True).prompt_ids == [3, 4]
    with pytest.raises(WebseerError, match="changed earlier turns"): act(Server(answer), traj(ids=[1, 9]), token_ids=True)
    with pytest.raises(WebseerError, match="no token ids"): act(Server({"content": "x"}), token_ids=True)
