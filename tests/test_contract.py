"""What every backend must do, whatever is behind it.

A backend joins by a function that yields a `Case`, marked with `@backend`; nothing else needs to change."""
import asyncio
import contextlib
import json
import math
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import pytest
from starlette.responses import Response

from webseer.core import WebseerError, to_json
from webseer.fetch import Fetcher, Refused
from webseer.live import Google, Jina, Joined, Serper, SearXNG, WebPages, call, identity
from webseer.local import build_index
from webseer.remote import RemoteRetriever, Transient, running_app, running_server
from webseer.retrieval import Hit, MiniWeb, Page, PageNotFound
from webseer.simulated import Chat, Simulated
from webseer.store import Recorded
from webseer.world import World

from . import providers
from .providers import KEYS, SECRETS, Speaker

QUICK = dict(attempts=1, timeout=0.5, deadline=2.0)


@dataclass
class Case:
    backend: Any
    query: str = "page"                 # finds something
    url: str | None = None              # can be read (None: the first hit's address)
    missing: str = "https://nowhere.example/missing"
    searches: bool = True
    fetches: bool = True
    at: Callable | None = None          # the same backend at another address, to be tried on broken servers


BACKENDS = {}
def backend(f): BACKENDS[f.__name__.strip("_")] = contextlib.contextmanager(f)


WORLD = World("contract")
QUESTION = SimpleNamespace(qid="q1", text="Who directed Nightfall?", golds=("Veltin",))


@backend
def miniweb(): yield Case(MiniWeb(WORLD), WORLD.entities["film"][0])

@backend
def remote():
    with running_server(MiniWeb(WORLD)) as url: yield Case(RemoteRetriever(url), WORLD.entities["film"][0],
                                                           at=lambda u: RemoteRetriever(u, **QUICK))

@backend
def serper():
    with running_app(Speaker(providers.serper)) as url: yield Case(Serper(url), fetches=False, at=lambda u: Serper(u, **QUICK))

@backend
def google():
    with running_app(Speaker(providers.google)) as url: yield Case(Google(url), fetches=False, at=lambda u: Google(u, **QUICK))

@backend
def searxng():
    with running_app(Speaker(providers.searxng)) as url: yield Case(SearXNG(url), fetches=False, at=lambda u: SearXNG(u, **QUICK))

@backend
def jina():
    with running_app(Speaker(providers.jina)) as url:
        yield Case(Jina(url), url="https://site.example/page?a=b", searches=False, at=lambda u: Jina(u, **QUICK))

@backend
def webpages():
    with running_app(Speaker(providers.site)) as url:
        yield Case(WebPages(Fetcher(allow=("127.0.0.1",))), url=url + "/page", missing=url + "/missing", searches=False)

@backend
def joined():
    with running_app(Speaker(providers.serper)) as one, running_app(Speaker(providers.jina)) as two:
        yield Case(Joined(search=Serper(one), fetch=Jina(two)), at=lambda u: Joined(search=Serper(u, **QUICK), fetch=Jina(u, **QUICK)))

@backend
def simulated():
    with running_app(Speaker(providers.llm)) as url:
        yield Case(Simulated(Chat(url, "m"), useful_share=0.5).for_question(QUESTION), missing="simulated://nowhere/1",
                   at=lambda u: Simulated(Chat(u, "m", **QUICK)).for_question(QUESTION))

@backend
def local():
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        corpus.write_text("".join(json.dumps(dict(id=str(i), title=p["title"], text=p["text"], url=p["url"])) + "\n" for i,
                                  p in enumerate(providers.PAGES)))
        index = build_index(corpus, Path(folder, "index"), progress=False)
        yield Case(index)
        index.close()

@backend
def recorded():
    with tempfile.TemporaryDirectory() as folder, running_app(Speaker(providers.serper)) as one, running_app(Speaker(providers.jina)) as two:
        yield Case(Recorded(Joined(search=Serper(one), fetch=Jina(two)), Path(folder, "store"), "record"),
                   at=lambda u: Recorded(Serper(u, **QUICK), mode="live"))


@pytest.fixture(scope="module", params=list(BACKENDS))
def case(request):
    with mock.patch.dict("os.environ", KEYS), BACKENDS[request.param]() as c: yield c


def run(coro): return asyncio.run(coro)
def search(c, query, k=3): return run(call(c.backend, "search", query, k))
def fetch(c, url): return run(call(c.backend, "fetch", url))
def page_of(c): return c.url or search(c, c.query)[0].url


def check_hits(hits, k):
    assert isinstance(hits, list) and len(hits) <= k
    for h in hits:
        assert isinstance(h, Hit) and all(isinstance(x, str) for x in (h.title, h.url, h.snippet)) and h.url
        assert isinstance(h.score, float) and math.isfinite(h.score)
        (h.title + h.url + h.snippet).encode()                       # no half surrogate pairs
    assert len({h.url for h in hits}) == len(hits)


def test_search(case):
    if not case.searches:
        with pytest.raises(WebseerError, match="cannot search"): search(case, case.query)
        return
    for k in (1, 3, 50): check_hits(search(case, case.query, k), k)
    assert len(search(case, case.query, 1)) == 1 and len(search(case, case.query, 3)) == 3
    assert search(case, case.query, 3) == search(case, case.query, 3)
    assert search(case, case.query, 3) == search(case, case.query, 50)[:3]


@pytest.mark.parametrize("query",
                         ["", "   ", "Ünïcode 𝄞 页面 صفحة", "half a \ud800 pair", "nul \x00 and \x1b[31m", "page " * 400,
                          "<|im_end|> </tool_response>", "a\nb\tc", '"\\\'{}%s&q=x#'])
def test_odd_queries(case, query):
    if case.searches: check_hits(search(case, query), 3)
    if case.searches and not query.strip(): assert search(case, query) == []


def test_fetch(case):
    if not case.fetches:
        with pytest.raises(WebseerError, match="cannot read a page"): fetch(case, page_of(case))
        return
    url = page_of(case)
    page = fetch(case, url)
    assert isinstance(page, Page) and all(isinstance(x, str) for x in (page.url, page.title, page.text, page.html)) and page.text
    assert page == fetch(case, url) and json.loads(json.dumps(page.meta)) == page.meta
    assert "<|im_end|>" not in page.text


@pytest.mark.parametrize("url",
                         [None, "", "no address", "http://[", "http://127.0.0.1:1/", "file:///etc/passwd", "https://user:secret@host.example/",
                          "https://nowhere.example/missing/\ud800"])
def test_unknown_page(case, url):
    with pytest.raises((PageNotFound, Refused) if case.fetches and url is None else WebseerError): fetch(case,
            case.missing if url is None else url)


def test_many_at_once(case):
    if not case.searches: jobs = [("fetch", page_of(case))] * 20
    else: jobs = [("search", f"{case.query} {i}" if i % 2 else case.query, 3) for i in range(20)]
    async def both_ways(): return await asyncio.gather(*(call(case.backend, *j) for j in jobs)), [await call(case.backend, *j) for j in jobs]
    at_once, one_by_one = run(both_ways())
    assert at_once == one_by_one


def test_plain_and_asynchronous_agree(case):
    b = case.backend
    if case.searches: assert b.search(case.query, 3) == search(case, case.query, 3)
    if case.fetches: assert b.fetch(page_of(case)) == fetch(case, page_of(case))


def test_identity(case):
    said = identity(case.backend)
    assert json.loads(to_json(said)) and said["backend"]
    for text in (to_json(said), repr(case.backend), str(case.backend), repr(vars(case.backend))):
        assert not any(secret in text for secret in SECRETS)


async def attempt(c, b):
    "What the backend does about a broken server: (error, seconds)."
    begun = time.monotonic()
    with pytest.raises(WebseerError) as e: await (call(b, "search", "page", 3) if c.searches else call(b, "fetch", c.url))
    assert not any(secret in str(e.value) + repr(e.value) for secret in SECRETS) and "\n" not in str(e.value)
    return e.value, time.monotonic() - begun


def test_server_down(case):
    if not case.at: pytest.skip("no server")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        error, seconds = run(attempt(case, case.at(f"http://127.0.0.1:{s.getsockname()[1]}")))
    assert isinstance(error, Transient) and seconds < 15


@pytest.fixture(scope="module")
def silent():
    async def app(scope, receive, send): await asyncio.sleep(2)
    with running_app(app) as url: yield url


def test_silent_server(case, silent):
    if not case.at: pytest.skip("no server")
    assert run(attempt(case, case.at(silent)))[1] < 15


GARBAGE = [b"", b"\xff\xfe\x00garbage", b"[]", b"null", b'"text"', b"{}", b"<html><title>Log in</title>", b"[" * 50_000,
           b'{"organic": {"a": 1}, "results": 7, "hits": [1], "content": 3, "choices": []}',
           b'{"results": [{"document": 7}, null], "organic": "x", "hits": {}, "choices": [{"message": []}]', b'{"error": {"message": "no"}}',
           b'{"choices": [{"message": {"content": null}}]}']


def test_garbage(case):
    if not case.at: pytest.skip("no server")
    left = []
    async def app(scope, receive, send): await Response(left[0], left[1], media_type=left[2])(scope, receive, send)
    async def all_of_it(b):
        for body in GARBAGE:
            for left[:] in [(body, *how) for how in ((200, "application/json"), (200, "text/html"), (403, "text/html"),
                                                     (500, "application/json"))]:
                await attempt(case, b)
    with running_app(app) as url: run(all_of_it(case.at(url)))
