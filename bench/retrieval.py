"""The local backend, its server and a replayed search, each beside the bare library and beside a blocking server, in one run.

    python bench/retrieval.py [--docs 100000] [--seconds 6] [--workers 4] [--folder outputs/bench]

The corpus is synthetic: invented words with Zipf frequencies, documents of 40 to 200 words in sentences, seeded. Half of the 500
queries are three to six rarer words of one document, half add five of the fifty most frequent words, as a sentence would.

Beside it: `bm25s` called bare, the index built and saved by the library itself, in two ways: `tokenize` and `retrieve`, as its manual says;
and `tokenize`, `get_scores` and the k best of the scores that are not zero, as a careful caller would. And a Flask application under
gunicorn with one blocking request per worker, once over the bare library (`retrieve`), once over webseer's own index, so that the
layout of the server can be told from the speed of the search. The HTTP servers are measured twice: answering from the index at
once, and waiting 300 ms for each answer first, as a server does that asks a live search engine. Server and load generator are
processes of their own on one machine, so they share its cores; on a busy machine trust the processor times.
"""
import argparse, asyncio, json, os, resource, shutil, socket, sqlite3, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

HERE, K = Path(__file__).resolve(), 10


# the corpus and the queries

def words_of(numbers): return [f"{'bcdfghklmnprtvz'[n % 15]}{'aeiou'[n // 15 % 5]}{n // 75:x}q" for n in numbers]

def make_corpus(path, n, seed=0, vocabulary=200_000):
    "Write the corpus as JSONL; return the queries."
    rng = np.random.default_rng(seed)
    cumulated = np.cumsum(1 / np.arange(1, vocabulary + 1) ** 1.05)
    names = words_of(range(vocabulary))
    draw = lambda size: np.searchsorted(cumulated, rng.random(size) * cumulated[-1])
    queries = []
    with open(path, "w") as f:
        for i in range(n):
            ws = draw(rng.integers(40, 201))
            text = [names[w] for w in ws]
            sentences = " ".join(" ".join(text[j:j+12]).capitalize() + "." for j in range(0, len(text), 12))
            f.write(json.dumps({"id": str(i), "title": " ".join(text[:3]), "text": sentences, "url": f"https://corpus.example/{i}"}) + "\n")
            rare = [names[w] for w in dict.fromkeys(ws.tolist()) if w > 500]
            if len(queries) < 500 and i % max(1, n // 500) == 0 and len(rare) >= 6:
                q = list(rng.permutation(rare)[:rng.integers(3, 7)])
                if len(queries) % 2: q = list(rng.permutation(q + [names[w] for w in rng.integers(0, 50, 5)]))
                queries.append(" ".join(q))
    return queries

def rows(path):
    with open(path) as f: yield from map(json.loads, f)


# bare bm25s

def bare_tokens(texts):
    import bm25s, Stemmer
    return bm25s.tokenize(texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False)

def bare_build(corpus, folder):
    import bm25s
    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index(bare_tokens([r["title"] + "\n" + r["text"] for r in rows(corpus)]), show_progress=False)
    index.save(str(folder), show_progress=False)

def bare_load(folder):
    import bm25s
    return bm25s.BM25.load(str(folder), mmap=True, show_progress=False)

class BareQuery:
    def __init__(self, folder):
        import Stemmer
        self.index, self.stemmer = bare_load(folder), Stemmer.Stemmer("english")
    def tokens(self, queries):
        import bm25s
        return bm25s.tokenize(queries, stopwords="en", stemmer=self.stemmer, show_progress=False, return_ids=False)
    def __call__(self, queries, k=K): return self.index.retrieve(self.tokens(queries), k=k, show_progress=False)
    def careful(self, query, k=K):
        scores = self.index.get_scores(self.tokens([query])[0])
        found = np.flatnonzero(scores)
        found = found[np.argpartition(scores[found], -k)[-k:]] if len(found) > k else found
        return found[np.argsort(-scores[found], kind="stable")]


# the two servers

def our_server(folder, latency):
    "webseer.remote.make_app over the index, one process."
    from webseer.local import LocalIndex
    from webseer.remote import serve
    index = LocalIndex(folder)
    class Waiting:
        async def asearch(self, query, k=3):
            await asyncio.sleep(latency)
            return await index.asearch(query, k)
        async def afetch(self, url): return await index.afetch(url)
    serve(Waiting() if latency else index, port=0, tell=lambda s: print(s.split()[2], flush=True))

def blocking_app(folder, latency, bare):
    "The layout of the released tool server: Flask, each worker does one request from beginning to end."
    import flask
    from webseer.local import LocalIndex
    app, library, index = flask.Flask("blocking"), BareQuery(Path(folder).parent/"bare"), LocalIndex(folder)
    db = sqlite3.connect(f"file:{Path(folder)/'docs.sqlite'}?mode=ro&immutable=1", uri=True, check_same_thread=False)

    def by_library(query, k):
        found, scores = library([query], k)
        for i, s in zip(found[0].tolist(), scores[0].tolist()):
            title, url, text = db.execute("SELECT title, url, text FROM docs WHERE row = ?", (i,)).fetchone()
            yield {"title": title, "url": url, "content": text[:300], "score": s}

    def by_webseer(query, k): return [{"title": h.title, "url": h.url, "content": h.snippet, "score": h.score} for h in index.search(query, k)]

    @app.post("/search")
    def _():
        body = flask.request.get_json()
        time.sleep(latency)
        return flask.jsonify(hits=list((by_library if bare else by_webseer)(body["query"], body["k"])), success=True)
    return app

class Server:
    "A server in processes of its own."
    def __init__(self, kind, folder, latency, workers):
        if kind == "webseer":
            self.p = subprocess.Popen([sys.executable, HERE, "--part", "serve", str(folder), str(latency)], stdout=subprocess.PIPE, text=True)
            self.url = self.p.stdout.readline().strip()
        else:
            with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            app = f"{HERE.stem}:blocking_app({str(folder)!r}, {latency}, {kind == 'bare'})"
            self.p = subprocess.Popen([sys.executable, "-m", "gunicorn", "-k", "sync", "-w", str(workers), "-b", f"127.0.0.1:{port}",
                                       "--chdir", str(HERE.parent), "--log-level", "error", app])
            for _ in range(600):
                try: socket.create_connection(("127.0.0.1", port), 1).close(); break
                except OSError: time.sleep(0.1)
    def pids(self):
        "The server's process and its workers."
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.p.pid)], capture_output=True, text=True).stdout.split()
        return [self.p.pid, *children]
    def memory(self):
        "MB of all its processes, shared pages divided among those that share them."
        lines = [l for pid in self.pids() for l in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
        return sum(int(l.split()[1]) for l in lines if l.startswith("Pss:")) / 1000
    def cpu(self):
        "Seconds of processor time so far."
        stats = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.pids()]
        return sum(int(s[11]) + int(s[12]) for s in stats) / os.sysconf("SC_CLK_TCK")
    def __enter__(self): return self
    def __exit__(self, *_): self.p.terminate(); self.p.wait(20)

async def load(url, queries, seconds, concurrency):
    "Closed loop: each of the callers asks again as soon as it is answered."
    import aiohttp
    times, bad, end = [], 0, time.perf_counter() + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency), timeout=aiohttp.ClientTimeout(60)) as s:
        async def caller(i):
            nonlocal bad
            while (t := time.perf_counter()) < end:
                try:
                    async with s.post(url + "/search", json={"query": queries[i % len(queries)], "k": K}) as r:
                        ok = len((await r.json())["hits"]) > 0
                except (aiohttp.ClientError, asyncio.TimeoutError, KeyError): ok = False
                bad += not ok
                times.append(time.perf_counter() - t)
                i += concurrency
        begun = time.perf_counter()
        await asyncio.gather(*map(caller, range(concurrency)))
        wall = time.perf_counter() - begun
    print(json.dumps({"per_second": (len(times) - bad) / wall, "p50": pct(times, 50), "p99": pct(times, 99), "bad": bad, "done": len(times)}))


# measuring

def pct(seconds, q): return float(np.percentile(seconds, q)) * 1e3
def rss(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
def size(folder): return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 1e6

def part(*args):
    "Run one part of this script in a process of its own; its last line is its result."
    out = subprocess.run([sys.executable, HERE, "--part", *map(str, args)], capture_output=True, text=True)
    if out.returncode: sys.exit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])

def build(kind, corpus, folder):
    begun = time.perf_counter()
    if kind == "bare": bare_build(corpus, folder)
    else:
        from webseer.local import build_index
        build_index(corpus, folder, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": time.perf_counter() - begun, "cpu": time.process_time(), "peak": peak}))

def memory(kind, folder, queries):
    import bm25s, Stemmer                                                   # noqa: F401  (both sides need them)
    from webseer.local import LocalIndex
    start = rss()
    begun = time.perf_counter()
    if kind == "bare": ask = BareQuery(folder)
    else:
        index = LocalIndex(folder)
        ask = lambda qs: index.search(qs[0], K)
    ask(queries[:1])
    first, loaded = time.perf_counter() - begun, rss() - start
    for q in queries: ask([q])
    print(json.dumps({"first": first, "loaded": loaded, "after": rss() - start}))

def latencies(folder, queries):
    "Single queries, the engines taking turns, then all queries as one batch."
    from webseer.local import LocalIndex
    index, bare = LocalIndex(folder), BareQuery(Path(folder).parent/"bare")
    engines = {"bare": lambda q: bare([q]), "careful": bare.careful, "rank": lambda q: index.rank(q, K), "search": lambda q: index.search(q, K)}
    times, cpu = {n: [] for n in engines}, dict.fromkeys(engines, 0.0)
    for q in queries[:50]:
        for f in engines.values(): f(q)
    for round_ in range(3):
        for i, q in enumerate(queries):
            for n in (names := list(engines))[i % 4:] + names[:i % 4]:
                c, t = time.process_time(), time.perf_counter()
                engines[n](q)
                times[n].append(time.perf_counter() - t); cpu[n] += time.process_time() - c
    out = {n: {"p50": pct(t, 50), "p99": pct(t, 99), "mean": float(np.mean(t)) * 1e3, "cpu": cpu[n] / len(t) * 1e3}
           for n, t in times.items()}
    batches = {"bare": lambda: bare(queries), "careful": lambda: [bare.careful(q) for q in queries],
               "rank": lambda: [index.rank(q, K) for q in queries], "search": lambda: index.search_many(queries, K)}
    def timed(f):
        t = time.perf_counter(); f()
        return time.perf_counter() - t
    for n, f in batches.items(): out[n]["batch"] = len(queries) / min(timed(f) for _ in range(3))
    found, scores = bare(queries)
    out["same"] = sum(np.allclose([s for _, s in index.rank(q, K)], s[s > 0], rtol=1e-4) for q, s in zip(queries, scores))
    print(json.dumps(out))

def replays(folder, queries, store):
    "A recorded search against one look-up in the same file by hand."
    from webseer.local import LocalIndex
    from webseer.store import Recorded, Store
    index = LocalIndex(folder)
    with Store(store) as s:
        record = Recorded(index, s, "record")
        for q in queries: record.search(q, K)
    replay, times, by_hand = Recorded(None, Store(store, readonly=True), "replay"), [], []
    db = sqlite3.connect(f"file:{store}?mode=ro", uri=True)
    by_key = "SELECT b.data FROM answers a JOIN blobs b ON b.sha256 = a.blob WHERE a.key = ?"
    keys = [k for k, in db.execute("SELECT key FROM answers")]
    for _ in range(3):
        for q, k in zip(queries, keys):
            t = time.perf_counter(); hits = replay.search(q, K); times.append(time.perf_counter() - t)
            t = time.perf_counter(); db.execute(by_key, (k,)).fetchone(); by_hand.append(time.perf_counter() - t)
    assert hits == index.search(queries[-1], K)
    print(json.dumps({"p50": pct(times, 50), "p99": pct(times, 99), "hand50": pct(by_hand, 50), "hand99": pct(by_hand, 99)}))

def line(name, *cells): print((f"{name:44}" + "".join(f"{c:>20}" for c in cells)).rstrip(), flush=True)
def n(x, unit="", digits=1): return f"{x:,.{digits}f}{unit and ' ' + unit}"
def times(x): return f"{x:.2f} x"


def main(a):
    tmp = Path(a.folder) if a.folder else Path(tempfile.mkdtemp(prefix="webseer-bench-"))
    tmp.mkdir(parents=True, exist_ok=True)
    corpus, index, bare = tmp/"corpus.jsonl", tmp/"index", tmp/"bare"
    for p in (index, bare): shutil.rmtree(p, ignore_errors=True)
    queries = make_corpus(corpus, a.docs)
    (tmp/"queries.json").write_text(json.dumps(queries))
    import bm25s
    print(f"{a.docs:,} documents, {corpus.stat().st_size / 1e6:.0f} MB of JSONL, {len(queries)} queries, k = {K}; "
          f"bm25s {bm25s.__version__}, numpy {np.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")

    ours, theirs = part("build", "webseer", corpus, index), part("build", "bare", corpus, bare)
    line("in process", "webseer", "bare bm25s", "webseer/bare")
    line("build", n(ours["seconds"], "s"), n(theirs["seconds"], "s"), times(ours["seconds"] / theirs["seconds"]))
    line("  processor time", n(ours["cpu"], "s"), n(theirs["cpu"], "s"), times(ours["cpu"] / theirs["cpu"]))
    line("  peak memory", n(ours["peak"], "MB", 0), n(theirs["peak"], "MB", 0), times(ours["peak"] / theirs["peak"]))
    line("  on disk: postings", n(size(index/"bm25"), "MB"), n(size(bare), "MB"), times(size(index/"bm25") / size(bare)))
    line("  on disk: documents, addresses, terms", n((index/"docs.sqlite").stat().st_size / 1e6, "MB"), "-", "")
    ours, theirs = part("memory", "webseer", index, tmp/"queries.json"), part("memory", "bare", bare, tmp/"queries.json")
    line("open and first query", n(ours["first"] * 1e3, "ms"), n(theirs["first"] * 1e3, "ms"), times(ours["first"] / theirs["first"]))
    line("resident memory added by opening", n(ours["loaded"], "MB"), n(theirs["loaded"], "MB"), times(ours["loaded"] / theirs["loaded"]))
    grown = ours["after"], theirs["after"]
    line(f"  and after {len(queries)} queries (mapped pages incl.)", *(n(x, "MB") for x in grown), times(grown[0] / grown[1]))
    m = part("latency", index, tmp/"queries.json")
    print()
    line("", "retrieve", "get_scores, best k", "webseer", "to retrieve", "to get_scores")
    them = "bare", "careful"
    for what, name in (("rank", "numbers and scores"), ("search", "with titles, addresses, snippets")):
        line(f"one query, {name}")
        for q, label in (("p50", "p50"), ("p99", "p99"), ("mean", "mean"), ("cpu", "mean processor time")):
            line(f"  {label}", *(n(m[e][q], "ms", 3) for e in (*them, what)), *(times(m[what][q] / m[e][q]) for e in them))
        line("  batch of all, queries/s", *(n(m[e]["batch"], "", 0) for e in (*them, what)), *(times(m[what]["batch"] / m[e]["batch"]) for e in them))
    print(f"the ten best scores are the library's for {m['same']} of {len(queries)} queries\n")

    kinds = ("webseer", "bare", "own")
    line(f"HTTP, {a.concurrency} callers, k = {K}", "webseer", f"{a.workers} x Flask", f"{a.workers} x Flask", "", "")
    line("", "1 process", "bare library", "webseer index", "to bare", "to own")
    for latency in (0, 0.3):
        best = {}
        for _ in range(a.rounds):
            for kind in kinds:
                with Server(kind, index, latency, a.workers) as s:
                    part("load", s.url, tmp/"queries.json", 1, a.concurrency)  # warm up
                    before = s.cpu()
                    r = part("load", s.url, tmp/"queries.json", a.seconds, a.concurrency) | {"memory": s.memory()}
                    r["cpu"] = (s.cpu() - before) / max(r["done"], 1) * 1e3
                if kind not in best or r["per_second"] > best[kind]["per_second"]: best[kind] = r
        line(f"each answer takes {latency * 1000:.0f} ms upstream")
        for what, key, unit, digits in (("requests/s", "per_second", "", 0), ("p50", "p50", "ms", 1), ("p99", "p99", "ms", 1),
                                        ("processor time for a request", "cpu", "ms", 2), ("memory (shared pages divided)", "memory", "MB", 0)):
            line(f"  {what}", *(n(best[k][key], unit, digits) for k in kinds), *(times(best["webseer"][key] / best[k][key]) for k in kinds[1:]))
        line("  failed requests", *(best[k]["bad"] for k in kinds))

    print()
    r = part("replay", index, tmp/"queries.json", tmp/"store.sqlite")
    line("replay of a recorded search", "webseer", "SQL by hand", "ratio")
    for q, h in (("p50", "hand50"), ("p99", "hand99")): line(f"  {q}", n(r[q], "ms", 3), n(r[h], "ms", 3), times(r[q] / r[h]))
    if not a.folder: shutil.rmtree(tmp)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        what, args = sys.argv[2], sys.argv[3:]
        asked = lambda f: json.loads(Path(f).read_text())
        if what == "serve": our_server(args[0], float(args[1]))
        if what == "build": build(*args)
        if what == "memory": memory(args[0], args[1], asked(args[2]))
        if what == "latency": latencies(args[0], asked(args[1]))
        if what == "load": asyncio.run(load(args[0], asked(args[1]), float(args[2]), int(args[3])))
        if what == "replay": replays(args[0], asked(args[1]), args[2])
        sys.exit()
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--docs", type=int, default=100_000, help="documents of the corpus")
    ap.add_argument("--seconds", type=float, default=6, help="length of each HTTP measurement")
    ap.add_argument("--rounds", type=int, default=2, help="HTTP measurements of each server, of which the better one counts")
    ap.add_argument("--concurrency", type=int, default=64, help="callers at once")
    ap.add_argument("--workers", type=int, default=4, help="workers of the blocking server")
    ap.add_argument("--folder", default=None, help="where to keep corpus and indexes; default: a temporary folder")
    main(ap.parse_args())
