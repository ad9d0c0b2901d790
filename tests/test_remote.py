import asyncio
import contextlib
import gc
import gzip
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, PlainTextResponse, Response

from webseer.core import WebseerError
from webseer.remote import (DeadlineExceeded, RemoteRetriever, Service, Transient, check_address, index_html, is_loopback, listen, local_links,
                            make_client, retry_after, running_app, running_server, serve)
from webseer.retrieval import Hit, MiniWeb, Page, PageNotFound
from webseer.tools import Tools
from webseer.world import World, query_text


class Few:
    "A web of two pages with awkward text."
    pages = {"http://a.example/1": Page("http://a.example/1", "One", "one\n\tÜ 𝄞 \x00", '<h1>One</h1><a href="/2">two</a>'),
             "http://a.example/2": Page("http://a.example/2", "<i>", "", "")}

    def search(self, query, k=3):
        if query == "boom": raise WebseerError("the index is gone")
        if query == "bug": raise ZeroDivisionError("oops")
        return [Hit(p.title, p.url, p.text, 0.1 + 0.2 + i) for i, p in enumerate(self.pages.values())][:k]

    def fetch(self, url):
        if url not in self.pages: raise PageNotFound(f"no page {url}")
        return self.pages[url]


@pytest.fixture(scope="module")
def few():
    with running_server(Few()) as url: yield url


@pytest.fixture(scope="module")
def web(): return MiniWeb(World(3))


def answering(*answers):
    "A server that gives these (status, headers, body) in turn, the last one for ever."
    left = list(answers)
    async def app(scope, receive, send):
        status, headers, body = left.pop(0) if len(left) > 1 else left[0]
        await JSONResponse(body, status, headers)(scope, receive, send)
    return app


def test_identical_to_in_process(web):
    queries = [query_text(r, e, w) for e, r in list(web.world.facts)[:80] for w in (0, 1)] + ["", "no such words anywhere"]
    urls = list(web.world.pages)[:80]
    with running_server(web) as url, RemoteRetriever(url) as remote:
        for q in queries:
            for k in (1, 3, 10): assert remote.search(q, k) == web.search(q, k)
        here, there = Tools(web), Tools(remote)
        for u in urls:
            assert remote.fetch(u) == web.fetch(u)
            subject = web.subject(u)[0]
            for question in (f"Who is the director of {subject}?", f"Is the mayor of {subject} Veltin?"):
                args = dict(url=u, question=question)
                assert there.call("query_on_page", args) == here.call("query_on_page", args)
        with pytest.raises(PageNotFound) as far: remote.fetch("http://nowhere")
        with pytest.raises(PageNotFound) as near: web.fetch("http://nowhere")
        assert str(far.value) == str(near.value)

        async def all_at_once():
            async with RemoteRetriever(url, concurrency=8) as r:
                return await asyncio.gather(*(r.asearch(q) for q in queries)), await asyncio.gather(*(r.afetch(u) for u in urls))
        hits, pages = asyncio.run(all_at_once())
        assert hits == [web.search(q) for q in queries] and pages == [web.fetch(u) for u in urls]


def test_every_character_and_float_survives(few):
    with RemoteRetriever(few) as r:
        assert r.search("x") == Few().search("x") and r.search("x", 1)[0].score == 0.1 + 0.2
        assert r.fetch("http://a.example/1") == Few().fetch("http://a.example/1")
        assert r.search("half \ud800 a pair") == Few().search("x")
        with pytest.raises(PageNotFound): r.fetch("http://a.example/\ud800")
        assert r.subject("http://a.example/1")[0] == "One"


def test_one_object_in_several_loops(few):
    r = RemoteRetriever(few)
    for _ in range(3): assert asyncio.run(r.asearch("x")) == Few().search("x")
    r.close()


def test_plain_calls_from_many_threads(few):
    r, out = RemoteRetriever(few), []
    ts = [threading.Thread(target=lambda: out.append(r.search("x"))) for _ in range(20)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert out == [Few().search("x")] * 20


def test_async_retriever_is_awaited():
    class A:
        async def asearch(self, query, k): return [Hit("t", "u", "s", 1.0)]
    with running_server(A()) as url: assert RemoteRetriever(url).search("x") == [Hit("t", "u", "s", 1.0)]


@pytest.mark.parametrize("path,body,word", [("search", b"{", "search"), ("search", b"[]", "body must be"), ("search", b'{"query": 1}', "body must be"),
                                            ("search", b'{"query": "x", "k": 0}', "whole number"), ("search", b'{"query": "x", "k": true}', "whole number"),
                                            ("search", b"", "body must be"), ("get_content", b'{"query": "x"}', '"url"')])
def test_wrong_request_is_told(few, path, body, word):
    r = httpx.post(f"{few}/{path}", content=body)
    assert r.status_code == 400 and r.json()["success"] is False and word in r.json()["error"]


def test_released_server_fields(few):
    r = httpx.post(few + "/search", json={"query": "x", "index": "wiki", "source": ["a"]}).json()
    assert r["success"] and set(r["hits"][0]) == {"id", "title", "url", "content", "highlight", "score"}
    assert r["hits"][1]["id"] == 1 and r["hits"][1]["highlight"] == {"content": [r["hits"][1]["content"]]}
    r = httpx.post(few + "/get_content", json={"url": "http://a.example/1"}).json()
    assert r["success"] and {"content", "title", "html"} <= set(r)
    r = httpx.post(few + "/get_content", json={"url": "none"})
    assert r.status_code == 404 and r.json()["success"] is False
    assert httpx.get(few + "/health").json()["status"] == "ok"


def test_errors_of_the_retriever(few, caplog):
    with RemoteRetriever(few, attempts=2) as r:
        with pytest.raises(WebseerError, match="the index is gone") as e: r.search("boom")
        assert not isinstance(e.value, Transient)
        with pytest.raises(WebseerError, match="ZeroDivisionError: oops"): r.search("bug")


def test_pages_for_people(few):
    r = httpx.get(few + "/page", params={"url": "http://a.example/1"})
    assert r.status_code == 200 and 'href="/page?url=http%3A%2F%2Fa.example%2F2"' in r.text
    assert "sandbox" in r.headers["content-security-policy"] and "script-src" not in r.headers["content-security-policy"]
    assert "&lt;i&gt;" in httpx.get(few + "/page", params={"url": "http://a.example/2"}).text
    r = httpx.get(few + "/page", params={"url": "<script>alert(1)</script>"})
    assert r.status_code == 404 and "<script>" not in r.text
    assert "<script>" not in httpx.get(few, params={"q": '"><script>'}).text
    assert httpx.get(few).status_code == 200 and "<form" in httpx.get(few).text
    assert "<b>" not in index_html('"<b>', [Hit("<b>", "http://x/<b>", "<b>", 1.0)])


def test_local_links():
    base = "http://a.example/x/"
    assert local_links("<A HREF='y'>", base) == '<A HREF="/page?url=http%3A%2F%2Fa.example%2Fx%2Fy">'
    assert local_links('<a href="y#part">', base) == '<a href="/page?url=http%3A%2F%2Fa.example%2Fx%2Fy#part">'
    for same in ('<a href="#part">', '<a href="javascript:x()">', '<a name="y">', "plain"): assert local_links(same, base) == same


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.dates().map(lambda d: d.strftime("%a, %d %b %Y 10:00:00 GMT")) | st.floats().map(str) | st.integers().map(str))
def test_retry_after_of_any_text(text):
    try: r = httpx.Response(429, headers={"retry-after": text})
    except UnicodeEncodeError: return
    wait = retry_after(r)
    assert wait is None or wait >= 0


def test_retries_then_answers():
    ok = (200, {}, {"hits": [], "success": True})
    with running_app(answering((503, {"retry-after": "0"}, {}), (429, {}, {}), ok)) as url: assert RemoteRetriever(url).search("x") == []
    with running_app(answering((503, {"retry-after": "0"}, {}), ok)) as url: assert asyncio.run(RemoteRetriever(url).asearch("x")) == []
    with running_app(answering((503, {"retry-after": "0"}, {"error": "warming up"}))) as url:
        with pytest.raises(Transient, match="503 Service Unavailable: warming up"): RemoteRetriever(url, attempts=2).search("x")
    with running_app(answering((429, {"retry-after": "3600"}, {}))) as url:
        with pytest.raises(Transient, match="429"): RemoteRetriever(url).search("x")


def test_deadline():
    async def slow(scope, receive, send):
        await asyncio.sleep(1)
        await PlainTextResponse("late")(scope, receive, send)
    with running_app(slow) as url:
        with pytest.raises(WebseerError, match="no answer"): RemoteRetriever(url, deadline=0.2).search("x")
        with pytest.raises(DeadlineExceeded, match="0.2 s"): asyncio.run(RemoteRetriever(url, deadline=0.2).asearch("x"))


def test_foreign_servers():
    for body in ({}, [], {"hits": [{"id": 1}]}, {"hits": 3}):
        with running_app(answering((200, {}, body))) as url:
            with pytest.raises(WebseerError, match="base_url"): RemoteRetriever(url).search("x")
    with running_app(answering((302, {"location": "http://b.example/"}, {}))) as url:
        with pytest.raises(WebseerError, match="redirected"): RemoteRetriever(url).search("x")
    with running_app(answering((404, {}, {"detail": "Not Found"}))) as url:
        with pytest.raises(WebseerError, match="404") as e: RemoteRetriever(url).fetch("x")
        assert not isinstance(e.value, PageNotFound)


def test_nothing_there():
    with listen("127.0.0.1", 0) as s: port = s.getsockname()[1]
    r = RemoteRetriever(f"http://127.0.0.1:{port}", attempts=2)
    with pytest.raises(WebseerError, match="nothing answers"): r.search("x")
    with pytest.raises(WebseerError, match="nothing answers"): asyncio.run(r.asearch("x"))
    with pytest.raises(WebseerError, match="nothing answers"): r.health()


@pytest.mark.parametrize("bad", ["localhost:8021", "", "ftp://x", "http://", None, 8021, "http://[::1", "http://a:99999", "http://a b\n"])
def test_bad_address(bad):
    with pytest.raises(WebseerError, match="base_url"): RemoteRetriever(bad)
    with pytest.raises(WebseerError, match="base_url"): make_client(bad, is_async=True)


def test_client_settings():
    with make_client("http://127.0.0.1:1") as c: assert not c.trust_env and c.timeout.pool is None
    assert is_loopback("http://localhost") and not is_loopback("http://10.0.0.1") and not is_loopback("http://localhost.example.org")


def test_occupied_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        port = s.getsockname()[1]
        with pytest.raises(WebseerError, match=f"port {port} is taken"): serve(Few(), port=port)
        with pytest.raises(WebseerError, match="taken"), running_server(Few(), port=port): pass
    with pytest.raises(WebseerError, match="0 to 65535"): listen("127.0.0.1", 70000)
    with pytest.raises(WebseerError, match="cannot serve on no.such.host.invalid"): listen("no.such.host.invalid", 0)


def test_server_stops_and_frees_its_port():
    with running_server(Few()) as url: port = int(url.rsplit(":", 1)[1])
    assert not any(t.name == f"webseer-server-{port}" for t in threading.enumerate())
    with running_server(Few(), port=port) as again: assert RemoteRetriever(again).search("x") == Few().search("x")
    with pytest.raises(RuntimeError, match="inside"), running_server(Few(), port=port): raise RuntimeError("inside")
    listen("127.0.0.1", port).close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_serve_until_interrupted():
    code = ("from webseer.remote import serve\nclass E:\n    def search(self, q, k=3): return []\n"
            "serve(E(), port=0, tell=lambda t: print(t, flush=True))\nprint('bye')")
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = p.stdout.readline().split()[2]
        assert RemoteRetriever(url).search("x") == []
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=20)
    finally: p.kill()
    assert out.strip() == "bye" and "Traceback" not in err


def test_asynchronous_tools_answer_as_those_in_process():
    import asyncio
    from webseer.retrieval import MiniWeb
    from webseer.tools import AsyncTools, ToolError, Tools
    from webseer.world import World, WorldConfig, query_text
    web = MiniWeb(World("async", WorldConfig(n_entities=6)))
    with running_server(web) as url:
        here, there = Tools(web), AsyncTools(RemoteRetriever(url))
        calls = [("search", dict(query=query_text(r, e, w))) for e, r in list(web.world.facts)[:12] for w in (0, 1)]
        calls += [("query_on_page", dict(url=u, question=f"Who is the star of {p.title}?")) for u, p in list(web.world.pages.items())[:12]]

        async def both():
            with pytest.raises(ToolError, match="No page"): await there.call("query_on_page", dict(url="https://nowhere.example/X", question="?"))
            return await asyncio.gather(*(there.call(*c) for c in calls))
        assert asyncio.run(both()) == [here.call(*c) for c in calls]


# ---- a service

TRANSPORTS = ["aiohttp", "pools"]

@pytest.fixture(params=TRANSPORTS)
def transport(request, monkeypatch):
    "Each test with this runs over both ways of carrying many requests."
    if request.param == "pools": monkeypatch.setitem(sys.modules, "httpx_aiohttp", None)
    return request.param


class Slow:
    "A server that answers its path after a while and keeps count."
    def __init__(self, seconds=0.1): self.seconds, self.asked, self.times, self.now, self.most = seconds, [], [], 0, 0
    async def __call__(self, scope, receive, send):
        while (await receive()).get("more_body"): pass
        self.asked.append(scope["path"]); self.times.append(time.monotonic()); self.now += 1; self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.seconds)
            if scope["path"] == "/bad": return await JSONResponse({"error": "no"}, 422)(scope, receive, send)
            await JSONResponse({"path": scope["path"]})(scope, receive, send)
        finally: self.now -= 1


def run(coro, seconds=30):
    async def bounded(): return await asyncio.wait_for(coro, seconds)
    return asyncio.run(bounded())


def test_identical_calls_in_flight_are_one_request(transport):
    server = Slow()
    async def go(url):
        s = Service(url, concurrency=64)
        assert await asyncio.gather(*(s.send("a", {"x": 1}) for _ in range(20))) == [{"path": "/a"}] * 20 and server.asked == ["/a"]
        await s.send("a", {"x": 1})
        assert len(server.asked) == 2                                        # not in flight any more: asked again
        await asyncio.gather(*(s.send("b", {"x": i}) for i in range(5)), *(s.send("c", params={"x": i}) for i in range(5)), s.send("b"))
        assert server.asked.count("/b") == 6 and server.asked.count("/c") == 5
        await asyncio.gather(*(s.send("d", coalesce=False) for _ in range(5)))
        assert server.asked.count("/d") == 5
        ends = await asyncio.gather(*(s.send("bad") for _ in range(10)), return_exceptions=True)
        assert server.asked.count("/bad") == 1 and all(type(e) is WebseerError and "422" in str(e) for e in ends)
        await s.aclose()
    with running_app(server) as url: run(go(url))


@pytest.mark.parametrize("gone", [[0], [0, 3], [1, 2, 3]])
def test_a_waiter_may_leave(gone):
    server, complaints = Slow(), []
    async def go(url):
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        s = Service(url)
        calls = [asyncio.ensure_future(s.send("a")) for _ in range(4)]
        await asyncio.sleep(0.03)
        for i in gone: calls[i].cancel()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(e, asyncio.CancelledError) if i in gone else e == {"path": "/a"} for i, e in enumerate(ends)) and server.asked == ["/a"]
        await s.aclose()
        gc.collect()
    with running_app(server) as url: run(go(url))
    assert complaints == []


def test_when_all_waiters_leave_the_request_ends():
    server, complaints = Slow(1), []
    async def go(url):
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        s = Service(url, concurrency=1)
        calls = [asyncio.ensure_future(s.send("a")) for _ in range(3)]
        while not server.asked: await asyncio.sleep(0.01)
        for c in calls: c.cancel()
        await asyncio.wait(calls)
        server.seconds = 0
        assert await s.send("a") == {"path": "/a"}                           # the only slot is free again
        assert server.asked == ["/a", "/a"]
        server.seconds = 0.1                                                 # a failure that nobody waits for is not reported by asyncio
        call = asyncio.ensure_future(s.send("bad"))
        while "/bad" not in server.asked: await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.wait([call])
        await asyncio.sleep(0.2)
        await s.aclose()
        gc.collect()
    with running_app(server) as url: run(go(url))
    assert complaints == []


def test_concurrency_is_bounded(transport):
    server = Slow(0.01)
    async def go(url):
        s = Service(url, concurrency=4)
        await asyncio.gather(*(s.send(str(i)) for i in range(60)))
        await s.aclose()
        async with make_client(url, is_async=True, connections=3) as c: await asyncio.gather(*(c.get(f"c{i}") for i in range(30)))
    with running_app(server) as url:
        run(go(url))
        assert server.most == 4 and len(set(server.asked)) == 90


def test_the_deadline_begins_with_the_turn_and_patience_bounds_the_wait():
    server = Slow(0.4)
    async def go(url):
        s = Service(url, concurrency=1, deadline=1.5)
        assert len(await asyncio.gather(*(s.send(str(i)) for i in range(5)))) == 5          # two seconds in all: waiting is no failure
        await s.aclose()
        s = Service(url, concurrency=1, patience=0.1)
        ends = await asyncio.gather(*(s.send(f"p{i}") for i in range(4)), return_exceptions=True)
        assert [type(e) for e in ends] == [dict] + [DeadlineExceeded] * 3 and "0.1 s for its turn" in str(ends[3])
        assert (await s.send("after")) == {"path": "/after"}
        assert [p for p in server.asked if p.startswith("/p")] == ["/p0"]
        await s.aclose()
        s = Service(url, concurrency=2, rate=0.1, patience=0.3)                             # one at once, the next after ten seconds
        ends = await asyncio.gather(*(s.send(f"r{i}") for i in range(2)), return_exceptions=True)
        assert [type(e) for e in ends] == [dict, DeadlineExceeded]
        await s.aclose()
    with running_app(server) as url: run(go(url))


def test_the_deadline_tells_the_last_failure():
    async def app(scope, receive, send): await JSONResponse({"error": "warming up"}, 503)(scope, receive, send)
    with running_app(app) as url:
        with pytest.raises(DeadlineExceeded, match="deadline of 0.25 s .the last try: .*warming up"): run(Service(url, attempts=99, deadline=0.25).send("x"))


def test_retry_after_is_honoured(transport):
    times = []
    async def app(scope, receive, send):
        times.append(time.monotonic())
        await JSONResponse({}, 200 if len(times) > 2 else 429, {"retry-after": "0.4"})(scope, receive, send)
    with running_app(app) as url:
        assert run(Service(url).send("x")) == {}
        assert len(times) == 3 and all(b - a >= 0.4 for a, b in zip(times, times[1:]))
    async def later(scope, receive, send):
        times.append(None)
        await JSONResponse({}, 429, {"retry-after": "3600"})(scope, receive, send)
    with running_app(later) as url:
        times.clear(); t0 = time.monotonic()
        with pytest.raises(Transient, match="429") as e: run(Service(url, deadline=25).send("x"))
        assert e.value.after == 3600 and time.monotonic() - t0 < 20 and len(times) == 1       # no use in waiting


def test_rate_is_shared_by_all_services_of_a_host():
    one, two = Slow(0), Slow(0)
    async def go(url, other):
        services = [Service(url, rate=8), Service(url + "/", rate=8), Service(other, rate=8)]
        a, b, c = (s._of()[2] for s in services)
        assert a is b and a is not c
        await asyncio.gather(*(s.send(f"{i}") for s in services for i in range(7)))
        for s in services: await s.aclose()
    with running_app(one) as url, running_app(two) as other: run(go(url, other))
    assert max(one.times) - min(one.times) >= 0.6                            # 14 calls: eight at once, six an eighth of a second apart
    assert len(two.times) == 7


@pytest.mark.parametrize("wrong", [dict(attempts=0), dict(concurrency=0), dict(rate=0), dict(rate=-1.0), dict(deadline=0), dict(timeout=-1), dict(patience=0)])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(WebseerError, match=f"{list(wrong)[0]} of the service at http://a.example"): Service("http://a.example", **wrong)


def test_requests_that_cannot_be_sent(transport):
    with running_app(answering((200, {}, {}))) as url:
        async def go():
            s = Service(url)
            for data in ({"q": "half \ud800"}, {1, 2}, {"a": object()}):
                with pytest.raises(WebseerError, match="as JSON"): await s.send("x", data)
            for path in ("a\nb", "a\x00b", "http://[", "http://a:99999/"):
                with pytest.raises(WebseerError): await s.send(path)
            with pytest.raises(WebseerError): await s.send("x", params={"q": "half \ud800"})
            assert await s.send("ü 𝄞?<>") == {}
            await s.aclose()
        run(go())


# ---- both transports fail in the same words

@contextlib.contextmanager
def raw(answer, then="close"):
    "A server below HTTP: sends these bytes to whoever asks, then closes, resets, or keeps silent."
    sock = socket.create_server(("127.0.0.1", 0))
    held, stop = [], threading.Event()
    def serve():
        while not stop.is_set():
            try: c, _ = sock.accept()
            except OSError: return
            with contextlib.suppress(OSError):
                c.settimeout(5)
                data = b""
                while b"\r\n\r\n" not in data and (piece := c.recv(65536)): data += piece
                c.sendall(answer)
                if then == "hold": held.append(c); continue
                if then == "reset": c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                c.close()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        stop.set()
        with contextlib.suppress(OSError): sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        for c in held: c.close()

def http(body, declared=None, head="HTTP/1.1 200 OK", more=""):
    return f"{head}\r\ncontent-type: application/json\r\ncontent-length: {len(body) if declared is None else declared}\r\n{more}\r\n".encode() + body

FAILURES = {  # name: (what is sent, what follows, a word of the message)
    "closed at once": (b"", "close", "connection broke"),
    "reset at once": (b"", "reset", "connection broke"),
    "not http": (b"\x00\x01garbage\xff\r\n\r\n", "close", "connection broke"),
    "not http, with the address": (b"GET ?key=s3cret HTTP/1.1 nonsense\r\n\r\n", "close", "connection broke"),
    "half a head": (b"HTTP/1.1 200 OK\r\ncontent-le", "close", "connection broke"),
    "bad length": (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}", "close", "connection broke"),
    "half a body": (http(b'{"a": ', declared=100), "close", "connection broke"),
    "reset in the body": (http(b'{"a": ', declared=100), "reset", "connection broke"),
    "half a chunk": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{", "close", "connection broke"),
    "bad chunk": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}", "close", "connection broke"),
    "silence": (b"", "hold", "no answer in time"),
    "silence in the head": (b"HTTP/1.1 200 OK\r\n", "hold", "no answer in time"),
    "silence in the body": (http(b'{"a": ', declared=100), "hold", "no answer in time"),
    "not JSON": (http(b"\xff\xfe<html>"), "close", "not JSON"),
    "half of gzip": (http(gzip.compress(b"{}" * 500)[:20], more="content-encoding: gzip\r\n"), "close", "not JSON"),
    "no gzip": (http(b"{}plain text", more="content-encoding: gzip\r\n"), "close", "decompressed"),
    "status 500": (http(b"{}", head="HTTP/1.1 500 Oh"), "close", "500"),
}

@pytest.mark.parametrize("failure", FAILURES)
def test_failures_have_the_same_names(transport, failure):
    answer, then, word = FAILURES[failure]
    async def go(url):
        s = Service(url, attempts=1, timeout=0.4, deadline=5, headers={"authorization": "Bearer s3cret"})
        with pytest.raises(Transient, match=word) as e: await s.send("path", {"q": 1}, params={"key": "s3cret"})
        assert "s3cret" not in str(e.value) and "/path: " in str(e.value) and "\n" not in str(e.value)
        await s.aclose()
    with raw(answer, then) as url: run(go(url))


def test_nothing_listens(transport):
    with listen("127.0.0.1", 0) as s: port = s.getsockname()[1]
    with pytest.raises(Transient, match="nothing answers"): run(Service(f"http://127.0.0.1:{port}", attempts=1).send("x"))
    with pytest.raises(Transient, match="nothing answers"): run(Service("http://no.such.host.invalid", attempts=1, timeout=5).send("x"))


def test_secrets_are_not_shown():
    for headers in ({"authorization": "Bearer s3cret\n"}, {"x-api-key": "s3crét"}):
        for make in (lambda: make_client("http://a.example", headers=headers), lambda: Service("http://a.example", headers=headers)):
            with pytest.raises(WebseerError, match=f"the header {list(headers)[0]}") as e: make()
            assert "s3cr" not in str(e.value)
    with pytest.raises(WebseerError, match="a.example has a user name") as e: check_address("http://me:s3cret@a.example")
    assert "s3cret" not in str(e.value)


class Says:
    "A server that answers what the test wants."
    def __init__(self): self.status, self.headers, self.body = 200, {}, b""
    async def __call__(self, scope, receive, send): await Response(self.body, self.status, self.headers)(scope, receive, send)

@pytest.fixture(scope="module")
def says():
    server = Says()
    with running_app(server) as url:
        remote = RemoteRetriever(url, attempts=1, timeout=5)
        yield server, remote
        remote.close()

answers = st.recursive(st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
                       | st.dictionaries(st.sampled_from(["hits", "title", "url", "content", "score", "html", "subject", "lines", "error"]), x, max_size=5), max_leaves=10)

@settings(max_examples=150, deadline=None)
@given(st.sampled_from([200, 200, 200, 204, 301, 404, 429, 500]), st.sampled_from(["application/json", "text/html; charset=nonsense", ""]),
       answers | st.binary(max_size=60), st.sampled_from(["", "gzip", "deflate"]))
def test_any_answer_is_read_or_told(says, status, kind, body, encoding):
    import orjson
    server, remote = says
    server.status, server.body = status, body if isinstance(body, bytes) else orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS)
    server.headers = {"content-type": kind} | ({"content-encoding": encoding} if encoding else {})
    for call in (lambda: remote.search("x"), lambda: remote.fetch("u"), lambda: remote.subject("u")):
        try: result = call()
        except WebseerError as e: assert str(e)
        else:
            if isinstance(result, list): assert all(isinstance(h, Hit) and isinstance(h.url, str) for h in result)
            elif isinstance(result, Page): assert all(isinstance(x, str) for x in (result.url, result.title, result.text, result.html))


# ---- connections

def test_less_work_per_request_than_plain_httpx(transport):
    def work(client, n=100):
        async def go():
            async with client:
                room = asyncio.Semaphore(64)
                async def one(i):
                    async with room: assert (await client.post("search", json={"query": "x"})).status_code == 200
                await asyncio.gather(*(one(i) for i in range(64)))
                t0 = time.thread_time()                                      # this thread alone: the server runs in another
                await asyncio.gather(*(one(i) for i in range(n)))
                return time.thread_time() - t0
        return asyncio.run(go())
    with running_server(Few()) as url:
        plain = httpx.AsyncClient(base_url=url, trust_env=False, timeout=httpx.Timeout(30, pool=None), limits=httpx.Limits(max_connections=64, max_keepalive_connections=64))
        assert work(make_client(url, 30, is_async=True, connections=64)) < 0.7 * work(plain)


def test_loops_come_and_go_without_keeping_connections(transport):
    count = lambda: len(os.listdir("/proc/self/fd"))
    if not os.path.isdir("/proc/self/fd"): pytest.skip("no /proc")
    async def many(r): await asyncio.gather(*(r.asearch(f"x{i}") for i in range(8)))
    with running_server(Few()) as url:
        r = RemoteRetriever(url)
        asyncio.run(many(r)); gc.collect()
        before = count()
        for _ in range(10): asyncio.run(many(r))
        gc.collect()
        assert count() - before < 40                                         # eighty connections of each side were opened
        r.close()


@pytest.mark.parametrize("how", ["r = RemoteRetriever(url); r.search('x')", "RemoteRetriever(url).search('x'); gc.collect()",
                                 "asyncio.run(RemoteRetriever(url).asearch('x'))", "r = RemoteRetriever(url); [asyncio.run(r.asearch('x')) for _ in range(3)]"])
def test_nothing_is_said_about_clients_left_open(few, how):
    code = f"import asyncio, gc, logging\nlogging.basicConfig()\nfrom webseer.remote import RemoteRetriever\nurl = {few!r}\n{how}\nprint('end')"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (p.stdout, p.stderr) == ("end\n", "")


def test_a_proxy_of_the_environment_is_used(transport, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "https_proxy", "all_proxy", "no_proxy"): monkeypatch.delenv(name, raising=False)
    with running_app(answering((200, {}, {"through": "the proxy"}))) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        assert run(Service("http://some.host.invalid", attempts=1).send("x")) == {"through": "the proxy"}
        with running_app(answering((200, {}, {"through": "nothing"}))) as url: assert run(Service(url).send("x")) == {"through": "nothing"}


def test_a_client_that_leaves_is_no_error(few, caplog):
    host, port = few.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as s: s.sendall(b"POST /search HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
    time.sleep(0.2)
    assert RemoteRetriever(few).search("x") == Few().search("x")
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_deadline_of_the_retriever_is_a_504():
    class Late:
        def search(self, query, k): raise DeadlineExceeded("the engine was too slow")
    with running_server(Late()) as url: assert httpx.post(url + "/search", json={"query": "x"}).status_code == 504
