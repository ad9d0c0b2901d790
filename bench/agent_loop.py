"""The agent loop over an endpoint at scale: wall time over the ideal, beside a bare client and beside a loop that blocks, in one run.

    python bench/agent_loop.py [--trajectories 2000] [--concurrency 64 128 512] [--processes 2] [--uvloop]

Trajectories of six turns, five tool calls (search and query_on_page in turn) and a submission, against a chat server that answers after
50 ms and a retrieval server that answers after 20 ms. Both are stubs in processes of their own that write prepared bytes, but they, the
loop and whatever else runs share the machine's cores, so beside the ideal (trajectories x 0.4 s / concurrency, as if nothing cost
processor time) two floors are given, measured in the same run: the same requests, with the same bodies in the same order, sent by
webseer's HTTP client with no loop around it (`client`), and by aiohttp itself (`aiohttp`). With --processes, the trajectories are dealt out to
that many processes, whose concurrencies add up. `blocking` is the released way: each trajectory asks with `requests.post` and waits, four
processes play one trajectory each at a time; a few are measured and the time is scaled per trajectory.
"""
import argparse, asyncio, functools, json, multiprocessing, os, re, subprocess, sys, time
from pathlib import Path

import orjson

HERE = Path(__file__).resolve()
CHAT, RETRIEVAL, TURNS = 0.050, 0.020, 6                                   # seconds, seconds, replies of a trajectory
IDEAL = TURNS * CHAT + (TURNS - 1) * RETRIEVAL                             # seconds of one trajectory
NUMBER = "000000"                                                          # stands for the trajectory's number; as long as any number
WORDS = "The lighthouse of this harbour was built by a family of masons whose names the parish register gives in full. "


# the stubs

def http(body): return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body

def call(turn):
    "(name, arguments) of a turn's call."
    if turn == TURNS - 1: return "submit_answer", {"answer": f"Mason {NUMBER}"}
    if turn % 2 == 0: return "search", {"query": f"lighthouse builder {NUMBER} turn {turn}"}
    return "query_on_page", {"url": f"http://web.example/{NUMBER}/{turn}", "question": f"Who built lighthouse {NUMBER}?"}

def chat_answers():
    def one(turn):
        name, args = call(turn)
        m = {"role": "assistant", "content": f"I need a fact about lighthouse {NUMBER} that I do not have yet, so this is my step {turn}.", "tool_calls": [
            {"id": f"call-{NUMBER}-{turn}", "type": "function", "function": {"name": name, "arguments": json.dumps(args)}}]}
        return http(orjson.dumps({"id": f"chat-{NUMBER}", "object": "chat.completion", "created": 1, "model": "stub", "usage": {"prompt_tokens": 900 + 300 * turn, "completion_tokens": 40},
                                  "choices": [{"index": 0, "message": m, "finish_reason": "tool_calls"}]}))
    return [one(t) for t in range(TURNS)]

HITS = http(orjson.dumps({"success": True, "hits": [{"id": i, "title": f"Lighthouse {NUMBER}", "url": f"http://web.example/{NUMBER}/{i}", "content": WORDS[:100],
                                                     "highlight": {"content": [WORDS[:100]]}, "score": 1.0 / (i + 1)} for i in range(3)]}))
PAGE = http(orjson.dumps({"success": True, "content": WORDS * 15, "title": f"Lighthouse {NUMBER}", "html": "", "url": f"http://web.example/{NUMBER}/1",
                          "subject": f"lighthouse {NUMBER}", "lines": [f"The builder of lighthouse {NUMBER} is Mason {NUMBER}.", *[WORDS.strip()] * 14]}))
FIND, LENGTH = re.compile(rb"\b(\d{6})\b"), re.compile(rb"content-length: *(\d+)", re.I)

class Stub(asyncio.Protocol):
    "As little HTTP as an answer needs."
    def __init__(self, wait, choose): self.wait, self.choose, self.rest = wait, choose, b""
    def connection_made(self, transport): self.transport, self.later = transport, asyncio.get_running_loop().call_later
    def data_received(self, data):
        self.rest += data
        end = self.rest.find(b"\r\n\r\n")
        if end < 0 or len(self.rest) < (size := end + 4 + int(LENGTH.search(self.rest, 0, end)[1])): return
        asked, self.rest = self.rest[:size], self.rest[size:]
        self.later(self.wait, self.transport.write, self.choose(asked, end).replace(NUMBER.encode(), FIND.search(asked, end)[1]))

def serve():
    "Both stubs, each on a core if there are enough of them."
    chats = chat_answers()
    def chat(asked, end): return chats[asked.count(b'"assistant"', end)]
    def retrieve(asked, end): return HITS if asked.startswith(b"POST /search") else PAGE
    def run(wait, choose, say):
        async def main():
            server = await asyncio.get_running_loop().create_server(lambda: Stub(wait, choose), "127.0.0.1", 0, backlog=4096)
            say.send(server.sockets[0].getsockname()[1])
            await server.serve_forever()
        asyncio.run(main())
    out = []
    for wait, choose in ((CHAT, chat), (RETRIEVAL, retrieve)):
        here, there = multiprocessing.Pipe()
        p = multiprocessing.get_context("fork").Process(target=run, args=(wait, choose, there), daemon=True)
        p.start()
        out.append((p, f"http://127.0.0.1:{here.recv()}"))
    return out

def cpu_of(pid):
    "Seconds of processor time of a process so far."
    s = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(s[11]) + int(s[12])) / os.sysconf("SC_CLK_TCK")


# what is measured; each runs in a process of its own and returns (seconds of wall time, seconds of processor time)

def questions(first, n):
    from types import SimpleNamespace
    return [SimpleNamespace(text=f"Who built lighthouse {i:06}?", golds=[f"Mason {i:06}"], qid=str(i), hops=0, world=None) for i in range(first, first + n)]

async def loop(chat, retrieval, first, n, concurrency):
    "webseer's agent loop."
    from webseer.agent import Budget, rollouts
    from webseer.endpoint import EndpointPolicy
    from webseer.remote import RemoteRetriever
    from webseer.tools import AsyncTools
    async with EndpointPolicy(chat, "stub", api_key_env=None, concurrency=concurrency) as policy, RemoteRetriever(retrieval, concurrency=concurrency) as web:
        jobs = [(AsyncTools(web), q) for q in questions(first, n)]
        begun = time.perf_counter(), time.process_time()
        ts = await rollouts(policy, jobs, Budget(), concurrency)
        took = time.perf_counter() - begun[0], time.process_time() - begun[1]
    assert all(t.stop == "submitted" and len(t.calls) == TURNS and len(t.turns) == TURNS and t.submissions[0]["em"] == 1 and not t.faults for t in ts), ts[0]
    return took

@functools.cache
def requests_of(chat, retrieval):
    "(address, body) of every request of a trajectory, in order, as the loop sends them."
    from webseer.agent import Budget, rollout
    from webseer.endpoint import EndpointPolicy
    from webseer.remote import RemoteRetriever
    from webseer.tools import AsyncTools
    sent = []
    class Policy(EndpointPolicy):
        async def act(self, traj):
            sent.append((chat + "/v1/chat/completions", orjson.dumps(self.request(traj))))
            return await super().act(traj)
    class Retriever(RemoteRetriever):
        async def _post(self, path, data):
            sent.append((f"{retrieval}/{path}", orjson.dumps(data)))
            return await super()._post(path, data)
    async def go():
        async with Policy(chat, "stub", api_key_env=None) as policy, Retriever(retrieval) as web:
            assert (await rollout(policy, AsyncTools(web), questions(0, 1)[0], Budget())).stop == "submitted"
    asyncio.run(go())
    return sent

async def bare(post, sent, first, n, concurrency):
    gate = asyncio.Semaphore(concurrency)
    async def one(i):
        number = f"{i:06}".encode()
        async with gate:
            for url, body in sent: orjson.loads(await post(url, body.replace(NUMBER.encode(), number)))
    begun = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(one, range(first, first + n)))
    return time.perf_counter() - begun[0], time.process_time() - begun[1]

async def client(chat, retrieval, first, n, concurrency):
    "The same requests through `webseer.remote.make_client`."
    from webseer.remote import make_client
    async with make_client(chat, 60, is_async=True, connections=concurrency) as c:
        async def post(url, body): return (await c.post(url, content=body, headers={"content-type": "application/json"})).content
        return await bare(post, SENT, first, n, concurrency)

async def library(chat, retrieval, first, n, concurrency):
    "The same requests through aiohttp alone."
    import aiohttp
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency), timeout=aiohttp.ClientTimeout(60)) as c:
        async def post(url, body):
            async with c.post(url, data=body, headers={"content-type": "application/json"}) as r: return await r.read()
        return await bare(post, SENT, first, n, concurrency)

KINDS = dict(loop=loop, client=client, aiohttp=library)

def part(kind, uvloop, *args):
    global SENT
    if kind != "loop": SENT = requests_of(*args[:2])
    if uvloop:
        import uvloop
        return uvloop.run(KINDS[kind](*args))
    return asyncio.run(KINDS[kind](*args))

def measure(kind, chat, retrieval, n, concurrency, processes, uvloop):
    "Wall time and processor time of all processes; each warms up (imports, compiles) before the clock starts, and they start together."
    share = [(n // processes + (i < n % processes), concurrency // processes) for i in range(processes)]
    firsts = [sum(s[0] for s in share[:i]) for i in range(processes)]
    ps = [subprocess.Popen([sys.executable, HERE, "--part", kind, str(int(uvloop)), chat, retrieval, str(f), str(m), str(c)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
          for f, (m, c) in zip(firsts, share)]
    for p in ps: assert p.stdout.readline() == "ready\n"
    for p in ps: print("go", file=p.stdin, flush=True)
    took = [json.loads(p.stdout.readline()) for p in ps]
    for p in ps: p.wait()
    return max(w for w, _ in took), sum(c for _, c in took)


# the released way

def blocking_one(job):
    "One trajectory: each request waits for its answer."
    import requests
    from webseer.agent import first_messages
    from webseer.tools import TOOLS
    chat, retrieval, i = job
    messages = first_messages(f"Who built lighthouse {i:06}?", TOOLS)
    for _ in range(TURNS):
        m = requests.post(chat + "/v1/chat/completions", json=dict(model="stub", messages=messages, tools=TOOLS)).json()["choices"][0]["message"]
        c, = m["tool_calls"]
        name, args = c["function"]["name"], json.loads(c["function"]["arguments"])
        messages.append(m)
        if name == "submit_answer": return args["answer"] == f"Mason {i:06}"
        body = requests.post(f"{retrieval}/{'search' if name == 'search' else 'get_content'}", json=args).json()
        messages.append(dict(role="tool", tool_call_id=c["id"], content="\n".join(h["content"] for h in body["hits"]) if name == "search" else body["content"][:400]))

def blocking(chat, retrieval, n, workers):
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        assert all(pool.map(blocking_one, [(chat, retrieval, i) for i in range(workers * 2)], chunksize=1))             # imports
        begun = time.perf_counter()
        assert all(pool.map(blocking_one, [(chat, retrieval, i) for i in range(n)], chunksize=1))
        return time.perf_counter() - begun


def main(a):
    import aiohttp, httpx
    stubs = serve()
    (chat_p, chat), (web_p, web) = stubs
    try:
        print(f"{a.trajectories:,} trajectories of {TURNS} turns and {TURNS - 1} tool calls ({a.trajectories * (2 * TURNS - 1):,} requests); {CHAT * 1e3:.0f} ms a turn, {RETRIEVAL * 1e3:.0f} ms a "
              f"tool call; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; Python {sys.version.split()[0]}, httpx {httpx.__version__}, aiohttp {aiohttp.__version__}"
              f"{', uvloop' if a.uvloop else ''}\n")
        print(f"{'':10}{'concurrency':>12}{'processes':>10}{'wall':>10}{'ideal':>10}{'wall/ideal':>12}{'CPU/trajectory':>16}{'stubs':>10}{'wall/client':>13}{'CPU/client':>12}")
        rates = {}
        for concurrency in a.concurrency:
            for processes in dict.fromkeys([1, a.processes]):
                best = {}
                for _ in range(a.rounds):
                    for kind in a.kinds:
                        before = cpu_of(chat_p.pid) + cpu_of(web_p.pid)
                        wall, cpu = measure(kind, chat, web, a.trajectories, concurrency, processes, a.uvloop)
                        if kind not in best or wall < best[kind][0]: best[kind] = wall, cpu, cpu_of(chat_p.pid) + cpu_of(web_p.pid) - before
                ideal = a.trajectories * IDEAL / concurrency
                for kind in a.kinds:
                    wall, cpu, stub = best[kind]
                    base = best.get("client")
                    print(f"{kind:10}{concurrency:12}{processes:10}{wall:8.2f} s{ideal:8.2f} s{wall / ideal:12.2f}{cpu / a.trajectories * 1e3:13.2f} ms{stub / a.trajectories * 1e3:7.2f} ms"
                          + (f"{wall / base[0]:13.2f}{cpu / base[1]:12.2f}" if base else ""), flush=True)
                rates[concurrency, processes] = best["loop"][0] / a.trajectories if "loop" in best else 0
        if a.blocking:
            took = blocking(chat, web, a.blocking, a.workers) / a.blocking
            print(f"\nblocking requests, {a.workers} processes with one trajectory each: {took * 1e3:.1f} ms per trajectory ({a.blocking} measured; all {a.trajectories:,} would take {took * a.trajectories:.0f} s)")
            for (c, p), t in rates.items():
                if t: print(f"  the loop at concurrency {c} in {p} process{'es' * (p > 1)} is {took / t:.1f} x as fast")
        print(f"\nload {os.getloadavg()[0]:.1f} after")
    finally:
        for p, _ in stubs: p.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        kind, uv, chat, web, first, n, concurrency = sys.argv[2:]
        part(kind, int(uv), chat, web, 0, 4, 4)
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(part(kind, int(uv), chat, web, int(first), int(n), int(concurrency))), flush=True)
        sys.exit()
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--trajectories", type=int, default=2000)
    ap.add_argument("--concurrency", type=int, nargs="+", default=[64, 128, 512], help="trajectories under way, of all processes together")
    ap.add_argument("--processes", type=int, default=1, help="also with the trajectories dealt out to so many processes")
    ap.add_argument("--kinds", nargs="+", default=["loop", "client", "aiohttp"], choices=[*KINDS], help="what to measure")
    ap.add_argument("--rounds", type=int, default=1, help="measurements of each, of which the fastest counts")
    ap.add_argument("--blocking", type=int, default=80, help="trajectories played the blocking way (0: none)")
    ap.add_argument("--workers", type=int, default=4, help="processes of the blocking way")
    ap.add_argument("--uvloop", action="store_true", help="run the clients on uvloop")
    main(ap.parse_args())
