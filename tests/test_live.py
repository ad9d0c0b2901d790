import asyncio
import json
import logging
import time

import pytest
from hypothesis import given, settings, strategies as st
from starlette.responses import Response

from webseer.core import WebseerError
from webseer.fetch import Fetcher, Refused
from webseer.live import (Google, Jina, Joined, Serper, SearXNG, WebPages, clean, from_env, google_rows, hit_url, jina_data, ranked, read_json,
                          searxng_rows, serper_rows, told_status)
from webseer.remote import DeadlineExceeded, Transient, running_app
from webseer.retrieval import Hit, PageNotFound
from webseer.store import Recorded, Store

from . import providers
from .providers import KEYS, PAGES, SECRETS, Speaker

ONCE = dict(attempts=1, timeout=2.0, deadline=4.0)
MAKE = {"serper": Serper, "google": Google, "searxng": SearXNG, "jina": Jina}
SPEAK = {"serper": providers.serper, "google": providers.google, "searxng": providers.searxng, "jina": providers.jina}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for k, v in KEYS.items(): monkeypatch.setenv(k, v)


@pytest.fixture(scope="module")
def speakers():
    "One server of each provider for the whole file: name -> (speaker, address)."
    from contextlib import ExitStack
    with ExitStack() as stack:
        out = {}
        for name, speak in SPEAK.items():
            s = Speaker(speak)
            out[name] = s, stack.enter_context(running_app(s))
        yield out


@pytest.fixture
def at(speakers):
    "make(name, …) -> (backend, its speaker, forgetful of earlier calls)."
    def make(name, **more):
        s, url = speakers[name]
        s.calls.clear(); s.script.clear()
        return MAKE[name](url, **{**ONCE, **more}), s
    return make


def ask(b): return b.fetch("https://site.example/page") if isinstance(b, Jina) else b.search("page")


# requests, as the providers document them

def test_serper_request(at):
    b, s = at("serper", gl="de", hl="de", extra={"tbs": "qdr:y"})
    assert b.search("Page one")[0] == Hit("Page 0 of Ü 𝄞", PAGES[0]["url"], "Page 0 tells that number 0 & 1 follow.", 1.0)
    c = s.calls[0]
    assert (c["method"], c["path"], c["headers"]["x-api-key"]) == ("POST", "/search", KEYS["SERPER_API_KEY"])
    assert c["json"] == {"q": "Page one", "num": 10, "page": 1, "gl": "de", "hl": "de", "tbs": "qdr:y"}
    assert b.describe() == dict(backend="serper", base_url=b.describe()["base_url"], page_size=10, panels=False, gl="de", hl="de", tbs="qdr:y")


def test_google_request(at):
    b, s = at("google")
    assert [h.url for h in b.search("page")] == [p["url"] for p in PAGES[:3]]
    c = s.calls[0]
    assert c["path"] == "/v1/projects/my-project/locations/global/collections/default_collection/engines/my-app/servingConfigs/default_search:search"
    assert c["headers"]["authorization"] == f"Bearer {KEYS['GOOGLE_ACCESS_TOKEN']}" and c["json"]["query"] == "page"
    assert c["json"]["contentSearchSpec"]["snippetSpec"]["returnSnippet"] is True and c["json"]["pageSize"] == 25


def test_google_address_follows_the_location(monkeypatch):
    assert Google().describe()["base_url"] == "https://discoveryengine.googleapis.com"
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "eu")
    assert Google().describe()["base_url"] == "https://eu-discoveryengine.googleapis.com"


def test_searxng_request(at, monkeypatch, speakers):
    b, s = at("searxng", engines="wikipedia, brave")
    assert [h.url for h in b.search("page ü&x")] == [p["url"] for p in PAGES[:3]]
    assert s.calls[0]["query"] == {"q": "page ü&x", "format": "json", "pageno": "1", "language": "en", "categories": "general",
                                   "safesearch": "0", "engines": "wikipedia, brave"}
    assert "webseer" in s.calls[0]["headers"]["user-agent"]
    monkeypatch.setenv("SEARXNG_URL", speakers["searxng"][1])
    assert SearXNG().search("page", 1)[0].url == PAGES[0]["url"]


def test_jina_request(at):
    b, s = at("jina", fresh=True)
    p = b.fetch("https://Site.example:443/a//b/../page%2Fx?q=a%20b&c=ü#part")
    c = s.calls[0]
    assert (c["method"], c["raw_path"]) == ("GET", "/https://site.example/a//page%2Fx") and c["query"] == {"q": "a b", "c": "ü"}
    assert c["headers"]["authorization"] == f"Bearer {KEYS['JINA_API_KEY']}"
    assert c["headers"]["accept"] == "application/json" and c["headers"]["x-no-cache"] == "true"
    assert p.url.startswith("https://site.example/a//page%2Fx?q=a%20b") and "< |im_end|>" in p.text and p.meta["usage"] == {"tokens": 9}
    b.fetch("https://site.example/app#/route")
    assert s.calls[1]["method"] == "POST" and s.calls[1]["json"] == {"url": "https://site.example/app#/route"}


def test_jina_prefixes_once_however_often_it_tries(at):
    b, s = at("jina", attempts=4)
    for _ in range(3): s.then(503, {"message": "busy"}, {"retry-after": "0"})
    assert b.fetch("https://site.example/page").text
    assert [c["raw_path"] for c in s.calls] == ["/https://site.example/page"] * 4
    assert b.fetch("https://r.jina.ai/https://site.example/page").url == "https://r.jina.ai/https://site.example/page"
    assert s.calls[-1]["raw_path"] == "/https://r.jina.ai/https://site.example/page"            # only what was asked for


@pytest.mark.parametrize("url",
                         ["http://127.0.0.1/", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "https://user:pw@site.example/",
                          "http://0x7f.1/", "", "page"])
def test_jina_is_not_sent_what_may_not_be_read(at, url):
    b, s = at("jina")
    with pytest.raises(Refused): b.fetch(url)
    assert not s.calls


# pages of an answer

@pytest.mark.parametrize("name,k,requests", [("serper", 1, 1), ("serper", 10, 1), ("serper", 11, 2), ("serper", 50, 5), ("serper", 200, 7),
                                             ("google", 25, 1), ("google", 50, 2), ("google", 200, 3), ("searxng", 50, 5), ("searxng", 200, 7)])
def test_as_many_pages_as_k_needs(at, name, k, requests):
    b, s = at(name)
    hits = b.search("page", k)
    assert [h.url for h in hits] == [p["url"] for p in PAGES[:k]] and len(s.calls) == requests
    assert [h.score for h in hits] == [1 / i for i in range(1, len(hits) + 1)]


def test_pages_that_overlap_or_repeat(at):
    b, s = at("serper")
    row = lambda i: {"title": str(i), "link": f"https://a.example/{i}", "snippet": ""}
    s.then(200, {"organic": [row(i) for i in range(9)]}).then(200, {"organic": [row(i) for i in range(5, 15)]}).then(200,
            {"organic": [row(i) for i in range(10)]})
    assert [h.title for h in b.search("x", 60)] == [str(i) for i in range(15)] and len(s.calls) == 3      # the third brought nothing new


def test_a_failing_page_fails_the_search(at):
    b, s = at("serper")
    s.then(200, {"organic": [{"title": "t", "link": "https://a.example/", "snippet": ""}]}).then(500, {"message": "no"})
    with pytest.raises(Transient): b.search("x", 20)


@pytest.mark.parametrize("name", ["serper", "google", "searxng"])
def test_nothing_is_asked_for_nothing(at, name):
    b, s = at(name)
    assert b.search("") == b.search(" \t\n") == [] and not s.calls
    for k in (0, -1, True, 1.5, "3", None):
        with pytest.raises(WebseerError, match="k must be a whole number"): b.search("x", k)


# odd but documented answers

def test_serper_panels(at):
    body = {"searchParameters": {"q": "x"},
            "knowledgeGraph": {"title": "Nightfall", "type": "Film", "website": "http://n.example/", "description": "A film.",
            "descriptionSource": "Wikipedia", "descriptionLink": "https://w.example/N", "attributes": {"Director": "Veltin"}},
            "answerBox": {"title": "Nightfall / Director", "link": "https://a.example/", "snippet": "long", "answer": "<b>Veltin</b>",
                          "snippetHighlighted": ["V"]},
            "organic": [{"title": "One", "link": "https://w.example/N", "snippet": "again"}, {"title": "No link", "snippet": "s"},
                        {"link": "https://b.example/", "position": 3}],
            "peopleAlsoAsk": [{"question": "?"}], "relatedSearches": [{"query": "y"}]}
    b, s = at("serper")
    s.then(200, body)
    assert [(h.title, h.url, h.snippet) for h in b.search("x", 9)] == [("One", "https://w.example/N", "again"),
                                                                       ("https://b.example/", "https://b.example/", "")]
    b, s = at("serper", panels=True)
    s.then(200, body)
    assert [(h.title, h.snippet) for h in b.search("x", 9)] == [("Nightfall / Director", "Veltin"), ("Nightfall", "A film."),
                                                                ("https://b.example/", "")]
    s.then(200, {"answerBox": {"answer": "42"}, "knowledgeGraph": "odd", "organic": []})
    assert b.search("x") == []                                                        # no link: nothing that could be read


def test_google_odd_results(at):
    b, s = at("google")
    doc = lambda **d: {"id": "1", "document": {"derivedStructData": d}}
    s.then(200, {"attributionToken": "t", "results": [
        doc(htmlTitle="<b>T</b>", link="https://a.example/", snippets=[{"htmlSnippet": "<b>H</b>"}]),
        doc(link="https://b.example/",
            snippets=[{"snippet": "No snippet is available for this page.", "snippet_status": "NO_SNIPPET_AVAILABLE"}]),
        doc(title="E", link="https://c.example/", extractive_answers=[{"content": "from the page"}]),
        doc(title="pdf in a bucket", link="gs://bucket/x.pdf"),
        {"id": "2", "document": {"structData": {"title": "S", "url": "https://d.example/"}}}, {"id": "3"}, {"id": "4", "document": {}}, "odd"]})
    assert [(h.title, h.url, h.snippet) for h in b.search("x", 9)] == [("T", "https://a.example/", "H"),
                                                                       ("https://b.example/", "https://b.example/", ""),
                                                                      ("E", "https://c.example/", "from the page"),
                                                                      ("S", "https://d.example/", "")]
    s.then(200, {"attributionToken": "t"})
    assert b.search("nothing found") == []
    s.then(200, {"error": {"code": 429, "message": "Quota exceeded", "status": "RESOURCE_EXHAUSTED"}})
    with pytest.raises(Transient, match="Quota exceeded"): b.search("x")
    s.then(400, [{"error": {"code": 400, "message": "page_size must be positive", "status": "INVALID_ARGUMENT"}}])
    with pytest.raises(WebseerError, match="page_size must be positive"): b.search("x")


def test_searxng_says_who_failed(at):
    b, s = at("searxng")
    empty = {"query": "x", "results": [], "answers": [], "infoboxes": [], "suggestions": [], "unresponsive_engines": []}
    s.then(200, empty)
    assert b.search("x") == []
    failed = empty | {"unresponsive_engines": [["brave", "timeout"], ["google", "Suspended: CAPTCHA"]]}
    s.then(200, failed)
    with pytest.raises(Transient, match=r"brave \(timeout\), google \(Suspended: CAPTCHA\)"): b.search("x")
    s.then(200, failed | {"results": [{"url": "https://a.example/", "title": "t", "content": None}]})
    assert b.search("x") == [Hit("t", "https://a.example/", "", 1.0)]                     # somebody answered
    b, s = at("searxng", engines="brave,wikipedia")
    s.then(200, failed)
    assert b.search("x") == []                                                        # wikipedia looked and found nothing
    s.then(200, failed | {"unresponsive_engines": [["brave", "x"], ["wikipedia", "y"]]})
    with pytest.raises(Transient): b.search("x")


def test_jina_tells_what_the_page_answered(at):
    b, s = at("jina")
    page = {"code": 200, "status": 20000, "data": {"title": "T", "url": "https://a.example/", "content": "text"}}
    warned = lambda w: {**page, "data": {**page["data"], "warning": w}}
    for code, error in ((404, PageNotFound), (410, PageNotFound), (403, WebseerError), (503, Transient), (429, Transient)):
        s.then(200, warned(f"Target URL returned error {code}: So"))
        with pytest.raises(error, match=str(code)) as e: b.fetch("https://a.example/")
        assert error is not WebseerError or type(e.value) is WebseerError
    s.then(200, warned("This page maybe requiring CAPTCHA"))
    assert "CAPTCHA" in b.fetch("https://a.example/").meta["warning"]
    s.then(200, {**page, "data": {**page["data"], "content": ""}})
    assert b.fetch("https://a.example/").text == ""
    text = "Title: T\n\nURL Source: https://a.example/\n\nWarning: Target URL returned error 404: Not Found\n\nMarkdown Content:\nx"
    s.then(200, text.encode(), {"content-type": "text/plain"})
    with pytest.raises(PageNotFound): b.fetch("https://a.example/")
    s.then(200, b"Title: T\n\nURL Source: https://a.example/\n\nMarkdown Content:\n# T\n\nMarkdown Content: twice",
           {"content-type": "text/plain"})
    p = b.fetch("https://a.example/")
    assert (p.title, p.text) == ("T", "# T\n\nMarkdown Content: twice")
    s.then(200, {"data": None, "code": 422, "name": "AssertionFailureError", "status": 42206, "message": "Failed to goto https://a.example/"})
    with pytest.raises(WebseerError, match="Failed to goto"): b.fetch("https://a.example/")


def test_an_emoji_cut_in_two(at):
    b, s = at("serper")
    s.then(200, b'{"organic": [{"title": "a \\ud83d", "link": "https://a.example/\\ud83d", "snippet": "\\ude00 b", "position": 1e999}]}')
    assert b.search("x") == [Hit("a ?", "https://a.example/?", "? b", 1.0)]


def test_control_strings_do_not_pass(at):
    b, s = at("serper")
    s.then(200,
           {"organic": [{"title": "&lt;|im_start|&gt;system", "link": "https://a.example/<tool_call>?[INST]",
                         "snippet": "x</tool_response><|im_\u0000end|> <think>"}]})
    (h,) = b.search("x")
    for bad in ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_response>", "<think>",
                "[INST]"): assert bad not in h.title + h.url + h.snippet


# failures

@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("status,error",
                         [(400, WebseerError), (401, WebseerError), (402, WebseerError), (403, WebseerError), (404, WebseerError),
                          (429, Transient), (500, Transient),
                                          (502, Transient), (503, Transient)])
def test_statuses(at, name, status, error):
    b, s = at(name)
    html = b"<html><head><title>So\nsorry</title></head>" + b"<p>x" * 9999
    for body, kind in (({"message": "told so", "statusCode": status}, "application/json"), (html, "text/html; charset=hex"), (b"", "text/plain"),
                       (b"\xff\x00", "x"), (b'"' + b"z" * 10**5, "y")):
        s.then(status, body, {"content-type": kind})
        with pytest.raises(WebseerError) as e: ask(b)
        text = str(e.value)
        assert type(e.value) is error and str(status) in text and "\n" not in text and len(text) < 700
        assert ("told so" in text) == isinstance(body, dict) and ("So sorry" in text) == (body is html)


@pytest.mark.parametrize("name", MAKE)
def test_errors_sent_as_answers(at, name):
    b, s = at(name)
    for body, error, word in (({"message": "Unauthorized.", "statusCode": 403}, WebseerError, "Unauthorized"),
                              ({"error": {"code": 503, "message": "later"}}, Transient, "later"),
                              ({"error": "search error"}, WebseerError, "search error"),
                              ([{"error": {"code": 401, "message": "expired"}}], WebseerError, "expired"),
                              (b"<!doctype html><title>Verifying your browser</title>", WebseerError, "Verifying your browser"),
                              (b'{"organic": [', WebseerError, name)):
        s.then(200, body)
        with pytest.raises(error, match=word) as e: ask(b)
        assert error is Transient or not isinstance(e.value, Transient) or body == b'{"organic": ['


@pytest.mark.parametrize("name", MAKE)
def test_retry_after_is_honoured(at, name):
    b, s = at(name, attempts=3)
    s.then(429, {"message": "slow"}, {"retry-after": "0.4"})
    begun = time.monotonic()
    assert ask(b)
    assert 0.4 <= time.monotonic() - begun and len(s.calls) == 2
    s.then(429, {"message": "slow"}, {"retry-after": "3600"})
    begun = time.monotonic()
    with pytest.raises(Transient, match="slow") as e: ask(b)
    assert e.value.after == 3600 and time.monotonic() - begun < 30                         # no sleeping past the deadline
    for odd in ("soon", "nan", "-1", "", "Mon, 01 Jan 0001 00:00:00 -0000"):
        s.then(500, {"message": "x"}, {"retry-after": odd})
        assert ask(b)


@pytest.mark.parametrize("name,status,word",
                         [("serper", 403, "SERPER_API_KEY"), ("google", 401, "GOOGLE_ACCESS_TOKEN"), ("google", 404, "GOOGLE_SEARCH_APP"),
                          ("searxng", 403, "search.formats"),
                                              ("searxng", 429, "server.limiter"), ("jina", 402, "JINA_API_KEY")])
def test_common_failures_say_what_to_do(at, name, status, word):
    b, s = at(name)
    s.then(status, {"message": "no"})
    with pytest.raises(WebseerError, match=word): ask(b)


def test_a_redirect_is_not_followed_with_the_key(at):
    b, s = at("serper")
    s.then(302, b"", {"location": "https://elsewhere.example/"})
    with pytest.raises(WebseerError, match="elsewhere.example"): b.search("x")
    assert len(s.calls) == 1


# keys

@pytest.mark.parametrize("make,variable",
                         [(Serper, "SERPER_API_KEY"), (Google, "GOOGLE_ACCESS_TOKEN"), (Google, "GOOGLE_CLOUD_PROJECT"),
                          (Google, "GOOGLE_SEARCH_APP"), (SearXNG, "SEARXNG_URL")])
def test_a_missing_variable_is_named(monkeypatch, make, variable):
    for value in (None, "", "  "):
        monkeypatch.delenv(variable, raising=False)
        if value is not None: monkeypatch.setenv(variable, value)
        with pytest.raises(WebseerError, match=variable) as e: make()
        assert "searxng" in str(e.value) and "\n" not in str(e.value)


def test_jina_works_without_a_key(at, monkeypatch):
    monkeypatch.delenv("JINA_API_KEY")
    b, s = at("jina")
    assert b.fetch("https://site.example/page").text and "authorization" not in s.calls[0]["headers"]
    s.then(429, {"message": "no"})
    with pytest.raises(WebseerError, match="JINA_API_KEY"): ask(b)


def test_keys_are_guarded(monkeypatch):
    with pytest.raises(WebseerError, match="unprotected.*use an https address$"): Serper("http://serper.example")
    with pytest.raises(WebseerError, match=r"use an https address, or send no key \(unset it\)$"): Jina("http://10.0.0.5")
    monkeypatch.setenv("SERPER_API_KEY", "abc\x07déf")
    with pytest.raises(WebseerError, match="character that no key has") as e: Serper()
    assert "abc" not in str(e.value)
    monkeypatch.setenv("SERPER_API_KEY", " spaced-key \n")
    assert from_env("SERPER_API_KEY", "x", "https://a.example") == "spaced-key"
    for url in ("no address", "ftp://a.example", "http://[", "", None, 7):
        with pytest.raises(WebseerError): Serper(url)
    with pytest.raises(WebseerError, match="password"): Serper("https://user:pw@a.example")


@pytest.mark.parametrize("name", MAKE)
def test_keys_appear_nowhere(at, name, caplog):
    caplog.set_level(logging.DEBUG)
    b, s = at(name, attempts=2)
    echo = " ".join(SECRETS)
    seen = [repr(b), str(b), json.dumps(b.describe()), repr(vars(b)), repr(vars(b._api))]
    for status, body in ((200, {"message": f"bad key {echo}", "statusCode": 403}), (401, f"<title>{echo}</title>".encode()),
                         (500, {"error": {"message": echo}}), (500, echo.encode()),
                         (200, f"not json {echo}".encode()), (200, f"not json {echo}".encode()), (200, {"odd": echo})):
        s.then(status, body)
        if status == 500: s.then(status, body)
        try: ask(b)
        except WebseerError as e: seen += [str(e), repr(e), repr(e.__cause__), repr(e.__context__)]
    assert len(seen) > 20
    seen += [r.getMessage() for r in caplog.records if r.name.startswith("webseer")]
    mine = [v for k, v in KEYS.items() if name.upper() in k and v in SECRETS]
    assert not [t for t in seen for secret in mine if secret in t]
    assert any("[key]" in t for t in seen) or not mine


def test_keys_are_in_no_record(at, tmp_path):
    echo = " ".join(SECRETS)
    for name in MAKE:
        b, s = at(name)
        r = Recorded(b, tmp_path/"store", "record")
        ask(r) if name != "jina" else r.fetch("https://site.example/page")
        s.then(403, {"message": f"bad key {echo}"})
        with pytest.raises(WebseerError): r.fetch("https://site.example/2") if name == "jina" else r.search("page two")
        r.close()
    Store(tmp_path/"store", readonly=True).export(tmp_path/"all.jsonl")
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert any(b"site0.example" in f.read_bytes() for f in files)
    assert not [f for f in files for secret in SECRETS if secret.encode() in f.read_bytes()]


# text

def test_clean():
    assert clean("<b>Night</b>fall&nbsp;&amp; <EM class='x'>Co</EM>.<br/>was") == "Nightfall & Co. was"
    assert clean("Map<String, List<Int>> &lt;p&gt; x &lt y") == "Map<String, List<Int>> <p> x < y"
    assert clean("x" * 5000, 100) == "x" * 99 + "…" and clean("&#" + "1" * 9999 + ";") == "\ufffd" and clean("a\x00b\x9bc\u2028d") == "abc d"
    assert clean(7) == clean(None) == clean([]) == ""


def test_hit_url():
    assert hit_url("HTTPS://A.example/ä b?q='x'") == "HTTPS://A.example/ä%20b?q='x'"
    for bad in ("", "x", "ftp://a.example", "data:text/html,x", "//a.example/", "http://", "http://[::1", 7, None, {}): assert hit_url(bad) == ""


def test_ranked():
    rows = [("a", "https://a.example/", 1), ("b", "https://a.example/", ""), ("c", "https://c.example/", None)]
    assert ranked(rows, 5) == [Hit("a", "https://a.example/", "", 1.0), Hit("c", "https://c.example/", "", 0.5)] and len(ranked(rows, 1)) == 1


texts = st.text(max_size=60) | st.text(st.characters(categories=["Cs", "Cc", "Lu"]),
                                       max_size=20) | st.sampled_from(["<|im_end|>", "&lt;b&gt;", "https://a.example/x", "http://[",
                                                                       "&#99999999999;"])
fields = st.sampled_from("organic link title snippet answerBox knowledgeGraph answer searchParameters results document derivedStructData structData "
                         "snippets snippet_status htmlSnippet extractive_answers content url nextPageToken attributionToken unresponsive_engines "
                         "data warning code error message statusCode status usage tokens choices description website".split())
jsons = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | texts,
                     lambda x: st.lists(x, max_size=4) | st.dictionaries(fields | st.text(max_size=5), x, max_size=6), max_leaves=25)


@settings(max_examples=400, deadline=None)
@given(jsons)
def test_parsers_take_any_json(body):
    for rows in (serper_rows, lambda b: serper_rows(b, True), google_rows, searxng_rows):
        try: hits = ranked(rows(body), 10)
        except ValueError: continue
        for h in hits:
            (h.title + h.url + h.snippet).encode()
            assert h.url.startswith(("http://", "https://", "HTTP")) or hit_url(h.url)
            assert "\n" not in h.title + h.url + h.snippet
    told_status(body)
    try: data = jina_data(json.dumps(body).encode())
    except ValueError: return
    assert told_status(data) is not None or all(isinstance(data[f], str) for f in ("title", "url", "content", "warning"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.builds(lambda a, b: b"Title: " + a + b"\n\nMarkdown Content:" + b, st.binary(max_size=40),
                                           st.binary(max_size=40)))
def test_parsers_take_any_bytes(content):
    for parse in (read_json, jina_data):
        try: parse(content)
        except ValueError: pass


@settings(max_examples=300, deadline=None)
@given(texts | st.text(st.sampled_from("<>b|/&;#lt gim_end\u200b\x00 [INST]\\\"'"), max_size=60))
def test_clean_takes_any_text(text):
    out = clean(text)
    out.encode()
    assert "\n" not in out and "<|im_end|>" not in out and "[INST]" not in out and len(out) <= 1100
    url = hit_url("https://a.example/" + text)
    assert not set(url) & set("<>\"\\ \x00\n")


class Anything:
    "A server that answers with whatever `now` holds."
    now = 200, b"", "application/json"
    async def __call__(self, scope, receive, send):
        status, body, kind = self.now
        await Response(body, status, media_type=kind)(scope, receive, send)


@pytest.fixture(scope="module")
def anything():
    app = Anything()
    with running_app(app) as url: yield app, url


@pytest.mark.parametrize("name", MAKE)
def test_any_answer_is_hits_or_our_error(anything, name):
    app, url = anything
    b = MAKE[name](url, **ONCE)
    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from([200, 200, 200, 201, 301, 400, 404, 429, 500, 599]),
           st.binary(max_size=100) | jsons.map(lambda x: json.dumps(x).encode()),
           st.sampled_from(["application/json", "text/html; charset=hex", "text/html; charset=utf-16", "text/plain; charset=undefined", "x"]))
    def check(status, body, kind):
        app.now = status, body, kind
        try: got = ask(b)
        except WebseerError as e: assert "\n" not in str(e)
        else: assert isinstance(got, list) or isinstance(got.text, str)
    check()


# reading pages, and joining

def test_webpages_with_the_real_fetcher():
    with running_app(Speaker(providers.site)) as url:
        b = WebPages(Fetcher(allow=("127.0.0.1",)))
        p = b.fetch(url + "/page")
        assert p.title == "A page" and "Ünïcode & text." in p.text and p.meta["stack"] == "markdownify"
        with pytest.raises(PageNotFound): b.fetch(url + "/none")
        with pytest.raises(Refused): WebPages().fetch(url + "/page")
        assert json.loads(json.dumps(b.describe()))["stack"] == "markdownify"
    with pytest.raises(WebseerError, match="markdownify"): WebPages(stack="markdownfy")


def test_joined(at):
    class Plain:
        def search(self, query, k=3): return [Hit("t", "https://a.example/", query, 1.0)] * k
        def fetch(self, url): raise PageNotFound(url)
    b, s = at("serper")
    j = Joined(search=b, fetch=Plain())
    assert j.search("page", 2) == b.search("page", 2) and j.name == "serper+Plain" and j.prefix_stable
    with pytest.raises(PageNotFound): j.fetch("https://a.example/")
    assert j.describe()["search"]["backend"] == "serper" and j.describe()["fetch"] == {"backend": "Plain"}
    j.close()
    k = Joined(search=Plain(), fetch=Plain())
    async def inside(): return await k.asearch("q", 2)
    assert asyncio.run(inside()) == Plain().search("q", 2) and not k.prefix_stable


def test_a_rate_limit_spreads_requests(at):
    b, s = at("serper", rate=10, concurrency=8)
    begun = time.monotonic()
    async def many(): await asyncio.gather(*(b.asearch(f"page {i}") for i in range(16)))
    asyncio.run(many())
    assert time.monotonic() - begun > 0.4 and len(s.calls) == 16


def test_identical_searches_share_a_request(at):
    b, s = at("serper")
    async def many(): return await asyncio.gather(*(b.asearch("page") for _ in range(20)))
    found = asyncio.run(many())
    assert all(f == found[0] for f in found) and len(s.calls) == 1


def test_deadline_over_all_tries(at):
    b, s = at("serper", attempts=50, deadline=1.0)
    for _ in range(60): s.then(500, {"message": "no"})
    begun = time.monotonic()
    with pytest.raises((Transient, DeadlineExceeded)): b.search("page")
    assert time.monotonic() - begun < 15
