import asyncio
import gzip
import hashlib
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import webseer
from webseer.core import WebseerError, to_json
from webseer.fetch import Refused
from webseer.remote import DeadlineExceeded, RemoteRetriever, Transient, running_server
from webseer.retrieval import Hit, MiniWeb, Page, PageNotFound
from webseer.store import (KINDS, BudgetSpent, Ledger, NotRecorded, Record, Recorded, Store, make_record, normal_key, normal_request, normal_url,
                           source_of)
from webseer.world import World, WorldConfig, query_text

HITS = [Hit("Ä 𝄞", "http://a.example/1", "half \ud800 and \x00", 0.1 + 0.2), Hit("two", "http://a.example/2", "", 1.0)]
PAGE = Page("http://a.example/1", "Ä", "text " * 200, "<p>text</p>", {"stack": "raw", "pages": [1, 2], "ratio": 0.1})
DEMO = {"backend": "demo", "version": "1"}


class Asked:
    "A backend that notes what it is asked."
    name, prefix_stable = "asked", False

    def __init__(self, wait=0.0, **identity): self.calls, self.wait, self.more = [], wait, identity
    def describe(self): return {"backend": self.name, **self.more}

    async def asearch(self, query, k=3):
        self.calls.append(query)
        await asyncio.sleep(self.wait)
        if query in self.failing: raise self.failing[query]
        return [Hit(query, f"http://a.example/{i}", "x" * 10, 1 / (i + 1)) for i in range(k)]

    async def afetch(self, url):
        self.calls.append(url)
        if url in self.failing: raise self.failing[url]
        return Page(url, "title", "text", "")

    failing = {}


def told(f, *args, **kwargs):
    with pytest.raises(WebseerError) as e: f(*args, **kwargs)
    assert "\n" not in str(e.value) and len(str(e.value)) < 900
    return str(e.value)


def python(code, *args, **kwargs):
    "A process that runs this webseer."
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(webseer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    with Store(tmp_path_factory.mktemp("scratch")/"s.sqlite") as s: yield s


# ---------------------------------------------------------------- requests

hosts = st.sampled_from(["a.example", "A.Example", "bücher.example", "[::1]", "[2001:DB8::1]", "1.2.3.4", "a_b", "xn--a"])
urls = st.one_of(st.text(max_size=60), st.builds(lambda s, h, p, t: f"{s}://{h}{p}{t}", st.sampled_from(["http", "HTTPS", "ftp", "hTTp"]), hosts,
                                                 st.sampled_from(["", ":80", ":443", ":8080", ":", ":99999", ":x"]),
                                                 st.text("/?#%&=;@:.~+aAzZ09ü \t\\4127eE", max_size=30)))


@given(urls)
@settings(max_examples=400, deadline=None)
def test_addresses_have_one_normal_form(url):
    try: once = normal_url(url)
    except Refused: return
    assert normal_url(once) == once and normal_url(f" {url}\n") == once


@given(st.text(max_size=40), st.text(max_size=40), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_queries_have_one_normal_form(a, b, k):
    forms = [normal_request("search", {"query": q, "k": k}) for q in (a, b)]
    keys = [normal_key("search", {"query": q, "k": k}) for q in (a, b)]
    assert (keys[0] == keys[1]) == (forms[0] == forms[1])
    assert [normal_key("search", f) for f in forms] == keys
    assert normal_key("search", {"k": k, "query": f"\n {a}  "}) == keys[0]
    json.loads(keys[0]), keys[0].encode()


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.binary(max_size=10) | st.just({1, 2}),
                        lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), x, max_size=4), max_leaves=12)


@given(st.sampled_from(KINDS) | st.text(max_size=5), st.dictionaries(st.sampled_from(["query", "url", "messages", "k", "seed"]), anything) | anything)
@settings(max_examples=150, deadline=None)
def test_any_request_has_a_key_or_a_sentence(scratch, kind, request):
    try: key = normal_key(kind, request)
    except WebseerError: return
    assert normal_key(kind, normal_request(kind, request)) == key and json.loads(key)[0] == kind
    scratch.put(kind, request, None)
    assert scratch.get(kind, request) is not None


def test_spellings_that_are_one_request():
    for group in [["http://a.example/", "HTTP://A.EXAMPLE:80", "http://a.example#x", "http://a.example:/"],
                  ["https://a.example/%7E%C3%BC?x=%2f", "https://a.example:443/~%c3%bc?x=%2F"], ["http://[2001:db8::1]:8080/", "HTTP://[2001:DB8::1]:8080/#"]]:
        assert len({normal_url(u) for u in group}) == 1
    assert normal_url("HTTPS://a.example:443/%7e%c3%bc?x=%2f") == "https://a.example/~%C3%BC?x=%2F" and normal_url("http://a.example/5%") == "http://a.example/5%25"
    different = ["http://a.example/a", "http://a.example/A", "https://a.example/a", "http://a.example/a/", "http://a.example/a?", "http://a.example/a?x", "http://a.example/a%2Fb",
                 "http://a.example/a/b", "http://a.example:81/a", "http://a.example/ü", "http://a.example/%C3%BC", "http://a.example/a?x=1&y=2", "http://a.example/a?y=2&x=1",
                 "Sorissa", "ftp://a.example/a", "http://", "http://a.example:x/", "http://[::1", "http://a.example/a b", "http://a.example\\b"]
    assert len({normal_url(u) for u in different}) == len(different) and all(normal_url(u) == u for u in different)
    key = lambda q: normal_key("search", {"query": q, "k": 3})
    assert key("a  b") == key("a\u00a0b\n") and key("\u00c5") == key("\u212b") == key("A\u030a") and key("IT") != key("it")
    assert normal_key("page", {"url": "x"}) != normal_key("subject", {"url": "x"})


def test_a_password_in_an_address_is_not_recorded(tmp_path):
    with Recorded(Asked(), tmp_path/"s.sqlite") as r:
        with pytest.raises(Refused) as e: r.fetch("http://me:geheim77@a.example/")
        assert "geheim77" not in str(e.value)
    assert b"geheim77" not in (tmp_path/"s.sqlite").read_bytes()


# ---------------------------------------------------------------- records

@pytest.mark.parametrize("error", [PageNotFound("no page"), Refused("127.0.0.1 may not be fetched", "loopback"), Transient("busy", after=1.5),
                                   DeadlineExceeded("too late"), WebseerError("index is gone: \ud800")])
def test_a_failure_comes_back_as_it_was(error, tmp_path):
    r = make_record("page", {"url": "u"}, error)
    with Store(tmp_path/"s") as s:
        s.put("page", {"url": "u"}, error)
        for rec in (r, s.get("page", {"url": "u"})):
            with pytest.raises(type(error)) as e: rec.result()
            assert type(e.value) is type(error) and str(e.value) == str(error) and vars(e.value) == vars(error)


def test_a_class_of_ones_own_comes_back_as_the_nearest_known():
    class Mine(PageNotFound): pass
    with pytest.raises(PageNotFound, match="^gone$") as e: make_record("page", {"url": "u"}, Mine("gone")).result()
    assert type(e.value) is PageNotFound


@pytest.mark.parametrize("module,name", [("os", "system"), ("webseer.core", "to_json"), ("webseer.nothing", "X"), ("webseer.core", "nothing"), ("webseer.core.x", "y"), (3, 4)])
def test_a_foreign_record_names_no_code(module, name):
    text = json.dumps({"error": name, "module": module, "message": "m"})
    with pytest.raises(WebseerError): Record("page", {"url": "u"}, {}, "error", text, "", 0).result()


@given(st.sampled_from(KINDS), st.text(max_size=30) | anything.map(lambda x: json.dumps(x, default=str, skipkeys=True)), st.sampled_from(["ok", "error", "?"]))
@settings(max_examples=150, deadline=None)
def test_any_text_is_an_answer_or_a_sentence(kind, text, status):
    try: Record(kind, {"url": "u", "query": "q", "messages": []}, {}, status, text, "", 0).result()
    except WebseerError: pass


def test_an_answer_that_is_no_json(tmp_path):
    with Store(tmp_path/"s") as s:
        assert "JSON" in told(s.put, "page", {"url": "u"}, Page("u", "", "", "", {"x": object()}))
        loop = []; loop.append(loop)
        told(s.put, "llm", {"messages": loop}, ("", {})), told(s.put, "page", {"url": "u"}, Page("u", "", "", "", {"x": loop}))
        s.put("search", {"query": "nan"}, [Hit("", "", "", math.nan)])
        assert math.isnan(s.get("search", {"query": "nan"}).result()[0].score)


def test_keys_of_the_environment_stay_out_of_records(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "sk-1234567890")
    with Store(tmp_path/"s.sqlite") as s:
        s.put("search", {"query": "q"}, WebseerError("serper: 401 for key sk-1234567890"))
        with pytest.raises(WebseerError, match=r"\$SERPER_API_KEY"): s.get("search", {"query": "q"}).result()
        assert b"sk-1234567890" not in gzip.decompress(s.export(tmp_path/"x.gz").read_bytes())


# ---------------------------------------------------------------- the file

def fill(s, order=range(20)):
    for i in order:
        s.put("search", {"query": f"q{i}", "k": 3}, HITS, DEMO, 0.5)
        s.put("page", {"url": f"http://a.example/{i}"}, PAGE if i % 3 else PageNotFound("none"), DEMO | {"stack": "raw"}, 0.25)


def test_put_and_get(tmp_path):
    with Store(tmp_path/"deep"/"s.sqlite") as s:
        fill(s)
        assert s.get("search", {"query": " q3", "k": 3}, DEMO).result() == HITS
        got = s.get("page", {"url": "http://A.example/1#x"}, DEMO | {"stack": "raw"})
        assert got.result() == PAGE and got.result().meta == PAGE.meta and got.seconds == 0.25 and got.source == "demo" and got.time.endswith("+00:00")
        assert s.get("search", {"query": "q3", "k": 4}, DEMO) is None and s.get("search", {"query": "q3", "k": 3}) is None
        assert s.put("search", {"query": "q3", "k": 3}, [], DEMO).result() == HITS                       # the first stays
        assert s.put("search", {"query": "q3", "k": 3}, [], DEMO, replace=True).result() == [] == s.get("search", {"query": "q3", "k": 3}, DEMO).result()
        rows = list(s.items())
        assert len(rows) == 40 and rows[0]["request"] == {"k": 3, "query": "q0"} and {r["status"] for r in rows} == {"ok", "not_found"}
        assert len(list(s.items("page"))) == 20 and rows[0]["bytes"] == len(s.get("search", {"query": "q0", "k": 3}, DEMO).text.encode())
        assert s.backends("page") == [DEMO | {"stack": "raw"}] and len(s.backends()) == 2
        with s._db() as c: assert c.execute("SELECT count(*) FROM blobs").fetchone() == (4,)              # one of each content
        assert "| page" in s._repr_markdown_()
    assert "closed" in told(s.get, "page", {"url": "u"})
    s.close()


def test_nothing_is_left_beside_a_closed_store(tmp_path):
    with Store(tmp_path/"s.sqlite") as s: fill(s)
    with Store(tmp_path/"s.sqlite", readonly=True) as s: assert s.get("search", {"query": "q3", "k": 3}, DEMO)
    assert [p.name for p in tmp_path.iterdir()] == ["s.sqlite"]
    with Store(tmp_path/"s.sqlite") as writer, Store(tmp_path/"s.sqlite", readonly=True) as reader:
        writer.put("page", {"url": "new"}, PAGE)
        assert reader.get("page", {"url": "new"}).result() == PAGE
        reader.close()
        writer.put("page", {"url": "newer"}, PAGE)
    assert [p.name for p in tmp_path.iterdir()] == ["s.sqlite"] and len(list(Store(tmp_path/"s.sqlite", readonly=True).items())) == 42


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="no sqlite3 program")
def test_the_sqlite3_program_reads_it(tmp_path):
    with Store(tmp_path/"s.sqlite") as s: fill(s, range(2))
    run = lambda q: subprocess.run(["sqlite3", str(tmp_path/"s.sqlite"), q], capture_output=True, text=True, timeout=20)
    assert run("SELECT kind, status, source FROM records ORDER BY 1, 2").stdout.split() == ["page|not_found|demo", "page|ok|demo", "search|ok|demo", "search|ok|demo"]
    out = run("SELECT sqlar_uncompress(data, size) FROM blobs JOIN answers ON blob = sha256 WHERE kind = 'page' AND status = 'ok'")
    if "no such function" not in out.stderr: assert json.loads(out.stdout)["text"] == PAGE.text


WRITER = """
import sys, hashlib
from webseer.store import Store
from webseer.retrieval import Page
path, who, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
with Store(path) as s:
    for i in (range(n) if who == "a" else reversed(range(n))):
        r = s.put("page", {"url": f"http://a.example/{i}"}, Page(f"http://a.example/{i}", who, "x" * (i * 37 % 5000), ""))
        print(i, hashlib.sha256(r.text.encode()).hexdigest())
"""


def test_two_processes_write_the_same_keys(tmp_path):
    path = tmp_path/"s.sqlite"
    both = [python(WRITER, path, who, 200, stdin=subprocess.PIPE) for who in "ab"]
    for p in both: assert p.stdout.readline() == "ready\n"
    for p in both: p.stdin.write("go\n"); p.stdin.flush()
    lines = []
    for p in both:
        out, err = p.communicate(timeout=60)
        assert p.returncode == 0, err
        lines.append(dict(l.split() for l in out.splitlines()))
    assert lines[0] == lines[1] and len(lines[0]) == 200                       # both were handed the same answers
    with Store(path, readonly=True) as s:
        for i, sha in lines[0].items():
            assert hashlib.sha256(s.get("page", {"url": f"http://a.example/{i}"}).text.encode()).hexdigest() == sha
        assert {s.get("page", {"url": f"http://a.example/{i}"}).result().title for i in range(200)} == {"a", "b"}
        with s._db() as c: assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_many_threads_write(tmp_path):
    with Store(tmp_path/"s.sqlite") as s:
        def work(who):
            for i in range(30): s.put("page", {"url": f"http://a.example/{i}"}, Page("", str(who), "", "")); s.get("page", {"url": f"http://a.example/{i}"})
        threads = [threading.Thread(target=work, args=(w,)) for w in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert len(list(s.items())) == 30 and len(s._idle) <= 8


ENDLESS = """
import sys, itertools
from webseer.store import Store
from webseer.retrieval import Page
s = Store(sys.argv[1])
for i in itertools.count():
    s.put("page", {"url": f"http://a.example/{i}"}, Page(f"http://a.example/{i}", "", "".join(chr(33 + (i * j) % 90) for j in range(20000)), ""))
    print(i, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("n", [1, 40])
def test_kill_in_the_middle_of_writing(tmp_path, n):
    path = tmp_path/"s.sqlite"
    p = python(ENDLESS, path)
    try:
        for _ in range(n): last = int(p.stdout.readline())
        p.send_signal(signal.SIGKILL)
        last = max([last, *map(int, p.stdout.read().split("\n")[:-1])])
    finally: p.kill(); p.wait()
    assert p.returncode == -signal.SIGKILL
    for readonly in (True, False):
        with Store(path, readonly=readonly) as s:
            for i in range(last + 1): assert s.get("page", {"url": f"http://a.example/{i}"}).result().url == f"http://a.example/{i}"
            assert last + 1 <= len(list(s.items())) <= last + 2
            with s._db() as c: assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            if not readonly: s.put("page", {"url": "after"}, PAGE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_uses_its_own_connections(tmp_path):
    s = Store(tmp_path/"s.sqlite")
    s.put("page", {"url": "parent"}, PAGE)
    child = os.fork()
    if not child:
        try:
            s.put("page", {"url": "child"}, PAGE)
            ok = s.get("page", {"url": "parent"}).result() == PAGE
        finally: os._exit(0 if ok else 1)
    s.put("page", {"url": "meanwhile"}, PAGE)
    assert os.waitpid(child, 0)[1] == 0
    assert {i["request"]["url"] for i in s.items()} == {"parent", "child", "meanwhile"}
    s.close()


READER = """
import os, sys
from webseer.store import Recorded, Store
if os.getuid() == 0: os.setuid(65534)
try: open(sys.argv[1] + ".x", "w"); sys.exit("the folder can be written")
except PermissionError: pass
with Store(sys.argv[1], readonly=True) as s: print(len(list(s.items())))
print(Recorded(None, sys.argv[1], "replay").search(sys.argv[2])[1].title)
try: Store(sys.argv[1]).put("page", {"url": "u"}, None)
except Exception as e: print(type(e).__name__, e)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_from_a_folder_that_cannot_be_written():
    folder = Path(tempfile.mkdtemp())
    try:
        with Store(folder/"s.sqlite") as s: s.put("search", {"query": "q", "k": 3}, HITS)
        export = Store(folder/"s.sqlite", readonly=True).export(folder/"x.jsonl.gz")
        for p in folder.iterdir():
            if p.name.endswith(("-wal", "-shm")): p.unlink()
        os.chmod(folder/"s.sqlite", 0o444), os.chmod(export, 0o444), os.chmod(folder, 0o555)
        for name in ("s.sqlite", "x.jsonl.gz"):
            p = python(READER, folder/name, "q", cwd="/")
            out, err = p.communicate(timeout=30)
            assert p.returncode == 0, err
            lines = out.splitlines()
            assert lines[:2] == ["1", "two"] and lines[2].startswith("WebseerError") and ("may not be written" in lines[2] or "is an export" in lines[2])
    finally:
        os.chmod(folder, 0o755)
        shutil.rmtree(folder)


def test_a_disk_that_is_full(tmp_path):
    s = Store(tmp_path/"s.sqlite")
    big = lambda i: Page(f"u{i}", "", os.urandom(3000).hex(), "")
    s.put("page", {"url": "u0"}, big(0))
    with s._db() as c: c.execute(f"PRAGMA max_page_count = {c.execute('PRAGMA page_count').fetchone()[0] + 8}")
    with pytest.raises(WebseerError, match="disk is full: free some space") as e:
        for i in range(1, 50): s.put("page", {"url": f"u{i}"}, big(i))
    n = len(list(s.items()))
    assert 1 < n < 12 and all(s.get("page", {"url": f"u{i}"}).result().url == f"u{i}" for i in range(n)) and s.get("page", {"url": f"u{n}"}) is None
    assert "safe" in str(e.value)
    with s._db() as c: c.execute("PRAGMA max_page_count = 1000000")
    s.put("page", {"url": f"u{n}"}, big(n))                                    # and goes on when there is room again
    s.close()


def test_a_full_disk_ends_a_recording_with_a_sentence(tmp_path):
    s = Store(tmp_path/"s.sqlite")
    with s._db() as c: c.execute(f"PRAGMA max_page_count = {c.execute('PRAGMA page_count').fetchone()[0]}")
    class Long(Asked):
        async def afetch(self, url): return Page(url, "", os.urandom(9000).hex(), "")
    r = Recorded(Long(), s)
    assert "disk is full" in told(r.fetch, "http://a.example/")
    with s._db() as c: c.execute("PRAGMA max_page_count = 1000000")
    r.fetch("http://a.example/")
    assert [t["requests"] for t in r.ledger.totals()] == [2]                   # both were asked and counted
    s.close()


def test_a_store_that_another_process_holds(tmp_path):
    with Store(tmp_path/"s.sqlite") as first, Store(tmp_path/"s.sqlite", timeout=0.2) as s:
        with first._db("BEGIN IMMEDIATE"):
            assert "kept it locked for 0.2 s" in told(s.put, "page", {"url": "u"}, PAGE)
            assert s.get("page", {"url": "u"}) is None                         # readers do not wait
        s.put("page", {"url": "u"}, PAGE)


def test_foreign_and_damaged_files(tmp_path):
    assert "does not exist" in told(Store, tmp_path/"none", readonly=True)
    assert "is a folder" in told(Store, tmp_path)
    (tmp_path/"text").write_text("hello there, this is no database at all")
    assert "neither a store nor" in told(Store, tmp_path/"text")
    assert "cannot be opened" in told(Store, tmp_path/"text"/"below")
    with sqlite3.connect(tmp_path/"other") as c: c.execute("CREATE TABLE t (x)")
    c.close()
    before = (tmp_path/"other").read_bytes()
    assert "another program" in told(Store, tmp_path/"other") and (tmp_path/"other").read_bytes() == before
    Store(tmp_path/"newer").close()
    with sqlite3.connect(tmp_path/"newer") as c: c.execute("PRAGMA user_version = 9")
    c.close()
    assert "layout 9" in told(Store, tmp_path/"newer")
    (tmp_path/"empty").touch()
    with Store(tmp_path/"empty") as s: fill(s, range(2))


def test_bytes_that_changed_on_disk_are_noticed(tmp_path):
    with Store(tmp_path/"s.sqlite") as s: fill(s, range(40))
    data = (tmp_path/"s.sqlite").read_bytes()
    for at in range(0, len(data), 2039):
        (tmp_path/"bad.sqlite").write_bytes(data[:at] + bytes(64) + data[at + 64:])
        try:
            with Store(tmp_path/"bad.sqlite") as s:
                for i in range(40):
                    r = s.get("page", {"url": f"http://a.example/{i}"}, DEMO | {"stack": "raw"})
                    if r and r.status == "ok" and i % 3: assert r.result() == PAGE
                s.export(tmp_path/"x")
        except (WebseerError): pass
    for cut in (10, 100, 4096, 9000, len(data) - 5000):
        (tmp_path/"bad.sqlite").write_bytes(data[:cut])
        with pytest.raises(WebseerError):
            with Store(tmp_path/"bad.sqlite") as s: s.export(tmp_path/"x"), list(s.items()), s.put("page", {"url": "new"}, PAGE)


# ---------------------------------------------------------------- one file

def test_export_has_the_same_bytes_for_the_same_content(tmp_path):
    with Store(tmp_path/"a.sqlite") as a, Store(tmp_path/"b.sqlite") as b, Store(tmp_path/"c.sqlite") as c:
        fill(a)
        for name in ("x.jsonl", "x.jsonl.gz"):
            first = a.export(tmp_path/name).read_bytes()
            if name.endswith("gz"): assert first[4:8] == bytes(4)                # no time in the header
            assert b.import_(tmp_path/name)["kept"] == 0 and b.export(tmp_path/"y"/name).read_bytes() == first == a.export(tmp_path/name).read_bytes()
        recs = [(i["kind"], i["request"]) for i in a.items()]
        for kind, request in reversed(recs):                                   # the same content in another order
            backend = DEMO if kind == "search" else DEMO | {"stack": "raw"}
            c._keep(a.get(kind, request, backend), False, lambda status: False)
        assert c.export(tmp_path/"z.jsonl").read_bytes() == (tmp_path/"x.jsonl").read_bytes()
        assert c.import_(tmp_path/"a.sqlite") == dict(added=0, same=40, kept=0)
        b.put("search", {"query": "q1", "k": 3}, [], DEMO, replace=True)
        assert b.import_(tmp_path/"x.jsonl") == dict(added=0, same=39, kept=1)
        assert b.get("search", {"query": "q1", "k": 3}, DEMO).result() == []
        assert a.get("search", {"query": "q1", "k": 3}, DEMO) == Store(tmp_path/"x.jsonl.gz", readonly=True).get("search", {"query": "q1", "k": 3}, DEMO)
    assert "import it" in told(Store, tmp_path/"x.jsonl.gz")


def test_an_edited_or_cut_export_is_refused(tmp_path):
    with Store(tmp_path/"a.sqlite") as a: fill(a, range(4)); data = a.export(tmp_path/"x.jsonl").read_bytes()
    lines = data.splitlines(keepends=True)
    with Store(tmp_path/"b.sqlite") as b:
        def refused(new):
            (tmp_path/"y.jsonl").write_bytes(new)
            assert "nothing was imported" in told(b.import_, tmp_path/"y.jsonl") and list(b.items()) == []
        refused(b"".join(lines[:-1])), refused(data[:-20]), refused(b"".join(lines[1:])), refused(b"".join(lines[:3] + lines[4:])), refused(b"")
        refused(data.replace(b'"query":"q1"', b'"query":"q9"')), refused(data.replace(b"Founder", b"Finder").replace(b"text text", b"text tent"))
        refused(data.replace(b'"version":"1"', b'"version":"2"')), refused(gzip.compress(data)[:-9]), refused(b"\x1f\x8b" + data)
        assert "cannot be read" in told(b.import_, tmp_path/"none") and "cannot be read" in told(b.import_, tmp_path)
        (tmp_path/"y.jsonl").write_bytes(data.replace(b'"webseer_store": 1', b'"webseer_store": 7'))
        assert "layout 7" in told(b.import_, tmp_path/"y.jsonl")
        assert b.import_(tmp_path/"x.jsonl")["added"] == 8


@given(st.binary(max_size=80) | st.text(max_size=50).map(str.encode) | anything.map(lambda x: json.dumps(x, default=str, skipkeys=True).encode()),
       st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_no_export(scratch, data, zipped, header):
    if header: data = b'{"webseer_store": 1, "backends": 1, "blobs": 1, "answers": 1}\n' + data
    path, before = scratch.path.parent/"x", list(scratch.items())
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(WebseerError): scratch.import_(path)
    assert list(scratch.items()) == before
    if not (header or zipped):
        with pytest.raises(WebseerError): Store(path, readonly=True)


def test_a_failed_export_leaves_the_old_file(tmp_path):
    with Store(tmp_path/"a.sqlite") as a:
        fill(a, range(3))
        old = a.export(tmp_path/"x.gz").read_bytes()
        with a._db() as c: c.execute("UPDATE blobs SET data = x'00'")
        assert "damaged" in told(a.export, tmp_path/"x.gz") and "damaged" in told(a.get, "search", {"query": "q1", "k": 3}, DEMO)
        with Store(tmp_path/"b.sqlite") as b: told(b.import_, tmp_path/"a.sqlite"); assert list(b.items()) == []
    assert (tmp_path/"x.gz").read_bytes() == old and not list(tmp_path.glob(".x*"))


# ---------------------------------------------------------------- record and replay

@pytest.fixture(scope="module")
def web(): return MiniWeb(World("store", WorldConfig(n_entities=8)))


class Server:
    "A mini-web with moods."
    def __init__(self, web): self.web, self.n, self.busy = web, 0, 0
    def search(self, query, k=3):
        self.n += 1
        if query == "broken": raise WebseerError("the index is broken")
        if self.busy: self.busy -= 1; raise Transient("busy")
        return self.web.search(query, k)
    def fetch(self, url): self.n += 1; return self.web.fetch(url)
    def subject(self, url): return self.web.subject(url)


def ask_all(r, web):
    "Everything an agent might see, failures included, as text."
    out = []
    def seen(f, *args):
        try: out.append(to_json(f(*args)))
        except WebseerError as e: out.append([type(e).__name__, str(e), {k: v for k, v in vars(e).items()}])
    for entity, relation in list(web.world.facts)[:15]:
        for k in (1, 3): seen(r.search, query_text(relation, entity, 0), k)
    for url in [*list(web.world.pages)[:15], "https://nowhere.example/x", "no address", "http://a.example/%zz", "\ud800"]: seen(r.fetch, url), seen(r.subject, url)
    seen(r.search, "broken"), seen(r.search, ""), seen(r.search, "x", 0), seen(r.search, "  two   spaces ", 2), seen(r.search, "half \ud800")
    return out


def test_a_recorded_run_replays_without_the_server(web, tmp_path):
    server = Server(web)
    with running_server(server) as url:
        with Recorded(RemoteRetriever(url, attempts=1), tmp_path/"run.sqlite", "record") as r:
            first = ask_all(r, web)
            n = server.n
            assert n > 40 and ask_all(r, web) == first and server.n == n
        with Recorded(RemoteRetriever(url, attempts=1), None, "live") as live: assert ask_all(live, web) == first
    before = (tmp_path/"run.sqlite").read_bytes()
    for store in (tmp_path/"run.sqlite", Store(tmp_path/"run.sqlite", readonly=True).export(tmp_path/"run.jsonl.gz")):
        with Recorded(None, store, "replay") as r:
            assert ask_all(r, web) == first and r.misses == 0
            totals = r.ledger.totals()
            assert sum(t["requests"] for t in totals) == 0 and sum(t["hits"] for t in totals) == len(first) - 1
        with Recorded(RemoteRetriever(url, attempts=1), store, "replay") as r: assert ask_all(r, web) == first       # a dead backend is not asked
    assert (tmp_path/"run.sqlite").read_bytes() == before


def test_a_tool_sees_the_same_through_a_record(web, tmp_path):
    from webseer.tools import AsyncTools, Tools
    with Recorded(web, tmp_path/"s.sqlite") as recorded:
        calls = [("search", dict(query=query_text(r, e, 0))) for e, r in list(web.world.facts)[:8]]
        calls += [("query_on_page", dict(url=u, question=f"Who is the star of {p.title}?")) for u, p in list(web.world.pages.items())[:8]]
        here = [Tools(web).call(*c) for c in calls]
        assert [Tools(recorded).call(*c) for c in calls] == here
    async def again():
        async with Recorded(None, tmp_path/"s.sqlite", "replay") as r: return [await AsyncTools(r).call(*c) for c in calls]
    assert asyncio.run(again()) == here
    assert not hasattr(Recorded(Asked(), tmp_path/"other.sqlite"), "subject")


def test_misses(tmp_path):
    with Recorded(Asked(), tmp_path/"s.sqlite") as r: r.search("who founded Synlab", 3), r.fetch("http://a.example/1")
    strict = Recorded(None, tmp_path/"s.sqlite", "replay")
    with pytest.raises(NotRecorded, match="who founded Synlabs.*nearest on record is search 'who founded Synlab'"): strict.search("who founded Synlabs")
    with pytest.raises(NotRecorded, match="recorded with k=3"): strict.search("who founded Synlab", 2)
    with pytest.raises(NotRecorded, match=r"http://a.example/2.*nearest on record is page 'http://a.example/1'"): strict.fetch("http://a.example/2")
    with pytest.raises(NotRecorded, match="holds no llm answers at all"): asyncio.run(strict.ask([{"role": "user", "content": "hello"}]))
    with pytest.raises(NotRecorded, match="another backend.*version = None there, '2' here"):
        Recorded(Asked(version="2"), tmp_path/"s.sqlite", "replay").search("who founded Synlab")
    assert strict.misses == 4 and strict.search("who founded Synlab")
    loose = Recorded(None, tmp_path/"s.sqlite", "replay-empty")
    assert loose.search("other") == [] and asyncio.run(loose.ask([]))[0] == "" and asyncio.run(loose.asearch("another")) == []
    with pytest.raises(PageNotFound, match="not on record"): loose.fetch("http://a.example/2")
    assert loose.misses == 4 and sum(t["misses"] for t in loose.ledger.totals()) == 4 and loose.fetch("http://a.example/1").title == "title"
    assert "no mode" in told(Recorded, Asked(), tmp_path/"s.sqlite", "replya") and "needs a backend" in told(Recorded, None, tmp_path/"s.sqlite", "record")
    assert "needs a store" in told(Recorded, Asked()) and "read only" in told(Recorded, Asked(), Store(tmp_path/"s.sqlite", readonly=True), "record")


def test_several_backends_on_record(tmp_path):
    for v in "12":
        with Recorded(Asked(version=v), tmp_path/"s.sqlite") as r: r.search(f"q{v}")
    assert "several backends (asked)" in told(Recorded(None, tmp_path/"s.sqlite", "replay").search, "q1")
    with Recorded(None, tmp_path/"s.sqlite", "replay", identity={"backend": "asked", "version": "2"}) as r:
        assert r.search("q2") and r.describe() == {"search": {"backend": "asked", "version": "2"}}
        with pytest.raises(NotRecorded, match="version"): r.search("q1")


def test_identical_requests_in_flight_are_one(tmp_path):
    backend = Asked(wait=0.05)
    with Recorded(backend, tmp_path/"s.sqlite") as r:
        async def many(): return await asyncio.gather(*(r.asearch(q) for q in ["a b", "a  b ", "c"] * 10))
        got = asyncio.run(many())
        assert sorted(backend.calls) == ["a b", "c"] and got[0] == got[1] == got[3] and got[0] is not got[3]
        backend.calls.clear()
        out = []
        threads = [threading.Thread(target=lambda: out.append(r.search("d"))) for _ in range(12)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert backend.calls == ["d"] and out == [out[0]] * 12

        async def one_gives_up():
            first, second = asyncio.ensure_future(r.asearch("e")), asyncio.ensure_future(r.asearch("e"))
            await asyncio.sleep(0.01)
            first.cancel()
            return await second
        assert asyncio.run(one_gives_up())[0].title == "e" and backend.calls == ["d", "e"]
        assert sum(t["requests"] for t in r.ledger.totals()) == 4


def test_order_does_not_matter(tmp_path):
    queries = ["b", "a ", " a", "a", "c  d", "c d", "b"]
    exports = []
    for i, order in enumerate((queries, queries[::-1])):
        backend = Asked()
        with Recorded(backend, tmp_path/f"{i}.sqlite") as r: answers = {" ".join(q.split()): to_json(r.search(q)) for q in order}
        exports.append((answers, sorted(backend.calls)))
    assert exports[0] == exports[1]


def test_fewer_results_from_a_longer_list(tmp_path):
    stable = Asked(); stable.prefix_stable = True
    with Recorded(stable, tmp_path/"s.sqlite") as r:
        ten = r.search("q", 10)
        assert r.search("q", 4) == ten[:4] and r.search("q", 10) == ten and len(stable.calls) == 1
        assert len(r.search("q", 11)) == 11 and len(stable.calls) == 2
    with Recorded(None, tmp_path/"s.sqlite", "replay") as r: assert r.search("q", 7) == ten[:7]
    export = Store(tmp_path/"s.sqlite", readonly=True).export(tmp_path/"x.jsonl")
    with Recorded(None, export, "replay") as r: assert r.search("q", 7) == ten[:7]


def test_refresh(tmp_path):
    class Counter(Asked):
        async def asearch(self, query, k=3): self.calls.append(query); return [Hit(str(len(self.calls)), "u", "", 1.0)]
    backend = Counter()
    with Recorded(backend, tmp_path/"s.sqlite") as r: assert [r.search("q")[0].title for _ in range(2)] == ["1", "1"]
    with Recorded(backend, tmp_path/"s.sqlite", refresh=True) as r: assert [r.search("q")[0].title for _ in range(2)] == ["2", "3"]
    with Recorded(None, tmp_path/"s.sqlite", "replay", refresh=True) as r: assert r.search("q")[0].title == "3"


def test_which_failures_are_kept(tmp_path):
    backend = Asked()
    backend.failing = {"wrong key": WebseerError("401: wrong key"), "busy": Transient("busy", 2.0), "slow": DeadlineExceeded("slow"),
                       "http://a.example/no": PageNotFound("no"), "http://a.example/inside": Refused("inside", "private")}
    with Recorded(backend, tmp_path/"s.sqlite") as r:
        for _ in range(2):
            for q in ("wrong key", "busy", "slow"): told(r.search, q)
            for u in ("http://a.example/no", "http://a.example/inside"): told(r.fetch, u)
        assert sorted(backend.calls) == sorted(["wrong key", "http://a.example/no", "http://a.example/inside", "busy", "busy", "slow", "slow"])
    with Recorded(None, tmp_path/"s.sqlite", "replay") as r:
        assert told(r.search, "wrong key") == "401: wrong key"
        with pytest.raises(NotRecorded): r.search("busy")
        with pytest.raises(Refused): r.fetch("http://a.example/inside")
    backend.calls.clear()
    backend.failing = {}                                                       # the key was mended: a new session asks again
    with Recorded(backend, tmp_path/"s.sqlite") as r:
        assert r.search("wrong key") and r.fetch("http://a.example/inside")
        told(r.fetch, "http://a.example/no")                                   # what the web said stays said
        assert backend.calls == ["wrong key", "http://a.example/inside"]
    with Recorded(None, tmp_path/"s.sqlite", "replay") as r: assert r.search("wrong key")


def test_failures_that_pass_are_kept_by_choice(web, tmp_path):
    server = Server(web)
    server.busy = 1
    with running_server(server) as url, Recorded(RemoteRetriever(url, attempts=1), tmp_path/"s.sqlite", keep_transient=True) as r:
        first = told(r.search, "anything")
        assert "503" in first and told(r.search, "anything") == first and server.n == 1
    with Recorded(None, tmp_path/"s.sqlite", "replay") as r:
        with pytest.raises(Transient) as e: r.search("anything")
        assert str(e.value) == first


def test_a_bug_in_a_backend_is_not_recorded(tmp_path):
    class Broken(Asked):
        async def asearch(self, query, k=3): raise ZeroDivisionError("oops")
    with Recorded(Broken(), tmp_path/"s.sqlite") as r:
        with pytest.raises(ZeroDivisionError): r.search("q")
        assert list(r.store.items()) == []


def test_a_language_model_is_recorded(tmp_path):
    class Chat:
        model, extra, n = "writer", {"top_p": 0.5}, 0
        async def ask(self, messages, **sampling):
            self.n += 1
            return f"{messages[-1]['content']} {sampling}", {"prompt_tokens": 1000, "completion_tokens": 500, "finish": "stop", "refused": False}
    chat, hello = Chat(), [{"role": "user", "content": "hello  there"}]
    with Recorded(chat, tmp_path/"s.sqlite", ledger=Ledger(prices={"writer": {"prompt_1k": 1, "completion_1k": 4, "request": 0.5}})) as r:
        first = [asyncio.run(r.ask(hello, seed=s)) for s in (1, 2, 1)]
        assert chat.n == 2 and first[0] == first[2] != first[1] and isinstance(first[0], tuple) and r.model == "writer"
        assert r.ledger.totals() == [dict(kind="llm", source="writer", requests=2, hits=1, misses=0, errors=0, bytes=r.ledger.totals()[0]["bytes"],
                                          seconds=r.ledger.totals()[0]["seconds"], tokens=3000, money=2 * (0.5 + 1 + 2))]
    with Recorded(None, tmp_path/"s.sqlite", "replay") as r:
        assert [asyncio.run(r.ask(hello, seed=s)) for s in (1, 2, 1)] == first and r.model == "writer"
        with pytest.raises(NotRecorded): asyncio.run(r.ask([{"role": "user", "content": "hello there"}], seed=1))
    chat.model = "other"
    with Recorded(chat, tmp_path/"s.sqlite") as r: asyncio.run(r.ask(hello, seed=1)); assert chat.n == 3


def test_a_joined_backend_has_an_identity_for_each_part(tmp_path):
    class Joined(Asked):
        stack = "one"
        def describe(self): return {"backend": "joined", "search": {"backend": "engine"}, "fetch": {"backend": "pages", "stack": self.stack}}
    backend = Joined()
    with Recorded(backend, tmp_path/"s.sqlite") as r: r.search("q"), r.fetch("http://a.example/1")
    backend.stack = "two"
    with Recorded(backend, tmp_path/"s.sqlite") as r:
        backend.calls.clear(); r.search("q"), r.fetch("http://a.example/1")
        assert backend.calls == ["http://a.example/1"]                         # another way of reading pages leaves the searches on record
    assert source_of("search", r._identities["search"]) == "engine" and r.describe()["backend"] == "joined"


def test_two_recorders_of_one_store(tmp_path):
    code = """
import sys, json
from webseer.core import to_json
from webseer.retrieval import Hit
from webseer.store import Recorded
class B:
    def search(self, query, k=3): return [Hit(sys.argv[2], "u", "", 1.0)]
with Recorded(B(), sys.argv[1]) as r: print(to_json([r.search(f"q{i}") for i in range(60)]))
"""
    both = [python(code, tmp_path/"s.sqlite", who) for who in "ab"]
    outs = [p.communicate(timeout=60) for p in both]
    assert not any(p.returncode for p in both), outs
    assert outs[0][0] == outs[1][0] and len(json.loads(outs[0][0])) == 60      # the first answer is everybody's answer
    with Store(tmp_path/"s.sqlite", readonly=True) as s:
        (row,) = s.spent()
        assert row["requests"] + row["hits"] == 120 and 60 <= row["requests"] <= 120


# ---------------------------------------------------------------- the ledger

def test_the_ledger_counts(tmp_path):
    backend = Asked()
    backend.failing = {"busy": Transient("busy")}
    for session in range(2):                                                   # totals go on after a restart
        with Recorded(backend, tmp_path/"s.sqlite", ledger=Ledger(prices={"asked": 0.5})) as r:
            r.search(f"q{session}"), r.search(f"q{session}"), r.fetch(f"http://a.example/{session}"), told(r.search, "busy")
    with Store(tmp_path/"s.sqlite") as s:
        page, search = s.spent()
        assert (search["requests"], search["hits"], search["errors"], search["money"]) == (4, 2, 2, 2.0)
        assert search["bytes"] == sum(i["bytes"] for i in s.items("search")) and page["requests"] == 2 and page["seconds"] > 0
        ledger = Ledger()
        ledger.keep_in(s)
        text = ledger.report()
        assert text == ledger._repr_markdown_() and "| all" in text and len({len(l) for l in text.splitlines()}) == 1
        assert "another one" in told(ledger.keep_in, Store(tmp_path/"t.sqlite"))


def test_a_killed_process_is_counted(tmp_path):
    code = """
import sys, time
from webseer.store import *
class B:
    def search(self, query, k=3):
        if query == "hang": print("asked", flush=True); time.sleep(60)
        return []
r = Recorded(B(), sys.argv[1], ledger=Ledger(budget={"requests": 10}))
r.search("one"); r.search("hang")
"""
    p = python(code, tmp_path/"s.sqlite")
    try: assert p.stdout.readline() == "asked\n"
    finally: p.kill(); p.wait()
    with Store(tmp_path/"s.sqlite") as s: assert [r["requests"] for r in s.spent()] == [2] and len(list(s.items())) == 1


@pytest.mark.parametrize("budget,prices,made", [({"requests": 3}, None, 3), ({"money": 0.3}, {"asked": 0.1}, 3), ({"money": 0.35}, {"search": 0.1}, 3),
                                                ({"bytes": 400}, None, 2), ({"seconds": 0.05}, None, 1), ({"requests": 0}, None, 0),
                                                ({"money": 0}, {"asked": 0.1}, 0), ({"requests": 9, "money": 0.2}, {"asked": 0.1}, 2)])
def test_a_budget_stops_before_it_is_exceeded(tmp_path, budget, prices, made):
    backend = Asked(wait=0.06 if "seconds" in budget else 0.0)
    def run(ledger, mode, store):
        with Recorded(backend, store, mode, ledger) as r:
            done = 0
            for i in range(6):
                try: r.search(f"q{i}"); done += 1
                except BudgetSpent as e: assert next(iter(budget)) in str(e) or "money" in str(e); break
            if mode == "record" and done:
                assert r.search("q0")                                          # what is on record is free
                with pytest.raises(BudgetSpent): r.search("other")
            return done
    assert run(Ledger(prices, budget), "live", None) == made == len(backend.calls)
    backend.calls.clear()
    assert run(Ledger(prices, budget), "record", tmp_path/"s.sqlite") == made == len(backend.calls)
    with Recorded(backend, tmp_path/"s.sqlite", ledger=Ledger(prices, budget)) as r:
        with pytest.raises(BudgetSpent): r.search("new session")
    with Recorded(None, tmp_path/"s.sqlite", "replay") as r: assert all(r.search(f"q{i}") for i in range(made))


def test_a_budget_holds_for_many_at_once_and_for_two_processes(tmp_path):
    backend = Asked(wait=0.01)
    r = Recorded(backend, tmp_path/"s.sqlite", ledger=Ledger(budget={"requests": 7}))
    async def many(): return await asyncio.gather(*(r.asearch(f"q{i}") for i in range(30)), return_exceptions=True)
    got = asyncio.run(many())
    assert len(backend.calls) == 7 == sum(isinstance(g, list) for g in got) and all(isinstance(g, (list, BudgetSpent)) for g in got)
    assert len(list(r.store.items())) == 7
    r.close()
    code = """
import sys
from webseer.store import *
class B:
    def search(self, query, k=3): return []
done = 0
with Recorded(B(), sys.argv[1], ledger=Ledger(budget={"requests": 41})) as r:
    for i in range(100):
        try: r.search(sys.argv[2] + str(i)); done += 1
        except BudgetSpent: break
print(done)
"""
    both = [python(code, tmp_path/"t.sqlite", who) for who in "ab"]
    outs = [p.communicate(timeout=60) for p in both]
    assert not any(p.returncode for p in both), outs
    assert sum(int(o) for o, _ in outs) == 41
    with Store(tmp_path/"t.sqlite") as s: assert s.spent()[0]["requests"] == 41 == len(list(s.items()))


def test_two_ledgers_never_both_take_the_last_request(tmp_path):
    stores = [Store(tmp_path/"s.sqlite") for _ in range(4)]
    taken, gate = [], threading.Barrier(4)
    def work(store):
        for last in range(1, 31):
            ledger = Ledger(budget={"requests": last})
            ledger.keep_in(store)
            gate.wait()
            try: ledger.ask("search", "x"); taken.append(last)
            except BudgetSpent: pass
    threads = [threading.Thread(target=work, args=(s,)) for s in stores]
    for t in threads: t.start()
    for t in threads: t.join()
    assert taken == list(range(1, 31)) and stores[0].spent()[0]["requests"] == 30
    for s in stores: s.close()


def test_a_free_source_goes_on_when_the_money_is_spent(tmp_path):
    ledger = Ledger(prices={"search": 1.0}, budget={"money": 1})
    with Recorded(Asked(), tmp_path/"s.sqlite", ledger=ledger) as r:
        r.search("a"), r.fetch("http://a.example/1")
        with pytest.raises(BudgetSpent): r.search("b")
        r.fetch("http://a.example/2")
    ledger = Ledger(prices={"writer": {"prompt_1k": 1.0}}, budget={"money": 1})
    ledger.ask("llm", "writer")
    ledger.answered(make_record("llm", {"messages": []}, ("t", {"prompt_tokens": 9000}), {"model": "writer"}))  # known only afterwards
    with pytest.raises(BudgetSpent): ledger.ask("llm", "writer")
    ledger.ask("page", "free")


@pytest.mark.parametrize("prices,budget,word", [({"a": -1}, {}, "number from 0"), ({"a": {"requests": 1}}, {}, "'request'"), ({"a": "1"}, {}, "number"), ({"a": math.nan}, {}, "number"),
                                                ({}, {"request": 1}, "'requests'"), ({}, {"bytes": None}, "number"), ({}, {"money": 1}, "without prices"),
                                                ({"a": True}, {}, "number")])
def test_wrong_prices_and_budgets(prices, budget, word): assert word in told(Ledger, prices, budget)


def test_hostile_usage_is_not_counted():
    ledger = Ledger()
    for usage in ({"prompt_tokens": -5}, {"prompt_tokens": "7"}, {"prompt_tokens": math.inf}, {"prompt_tokens": math.nan}, {"total_tokens": [1]}, None, [], "x"):
        ledger.answered(make_record("llm", {"messages": []}, ("t", usage)))
    assert ledger.totals()[0]["tokens"] == 0
    ledger.answered(make_record("page", {"url": "u"}, Page("u", "", "", "", {"usage": {"tokens": 40}})))
    assert sum(t["tokens"] for t in ledger.totals()) == 40


# ---------------------------------------------------------------- speed, printed

def test_how_long_a_hit_takes(tmp_path, capsys):
    words = " ".join(f"word{i * 7919 % 5000}" for i in range(7000))
    page = Page("http://a.example/big", "big", words, "<p>")
    hits = [Hit(f"title {i}", f"http://a.example/{i}", words[:200], 1.0) for i in range(10)]
    with Store(tmp_path/"s.sqlite") as s:
        s.put("page", {"url": page.url}, page), s.put("search", {"query": "q", "k": 10}, hits)
        puts = []
        for i in range(100):
            t0 = time.perf_counter(); s.put("search", {"query": f"q{i}", "k": 10}, hits[:9]); puts.append(time.perf_counter() - t0)
    p50 = lambda ts: sorted(ts)[len(ts) // 2] * 1e3
    def timed(f, n=300):
        ts = []
        for _ in range(n): t0 = time.perf_counter(); f(); ts.append(time.perf_counter() - t0)
        return ts
    with Recorded(None, tmp_path/"s.sqlite", "replay") as r:
        search, fetch = timed(lambda: r.search("q", 10)), timed(lambda: r.fetch(page.url))
        async def inside():
            out = []
            for _ in range(300): t0 = time.perf_counter(); await r.asearch("q", 10); out.append(time.perf_counter() - t0)
            return out
        awaited = asyncio.run(inside())
    with capsys.disabled():
        print(f"\nreplay hit p50: search {p50(search):.2f} ms (awaited {p50(awaited):.2f}), {len(words) / 1e3:.0f} kB page {p50(fetch):.2f} ms; "
              f"p99 {sorted(search)[-3] * 1e3:.2f}, {sorted(fetch)[-3] * 1e3:.2f} ms; put p50 {p50(puts):.2f} ms")
