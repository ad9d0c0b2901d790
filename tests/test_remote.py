import asyncio
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from webseer.core import WebseerError
from webseer.remote import (DeadlineExceeded, RemoteRetriever, Transient, index_html, is_loopback, listen, local_links, make_client,
                            running_app, running_server, serve)
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
    assert r["success"] and set(r["hits"][0]) == {"title", "url", "content", "score"}
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


@pytest.mark.parametrize("bad", ["localhost:8021", "", "ftp://x", "http://", None, 8021])
def test_bad_address(bad):
    with pytest.raises(WebseerError, match="base_url"): RemoteRetriever(bad)


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
