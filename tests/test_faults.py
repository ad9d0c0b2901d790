"""Thousands of requests through client and server while every fifth answer is spoilt: all end, rightly or with a typed error, none twice.

2,000 requests over aiohttp's transport and 1,000 over httpx's own; with `WEBSEER_SLOW=1` 10,000 over each.
"""
import asyncio
import collections
import json
import logging
import os
import random
import re
import socket
import struct
import sys
import time

import httpx
import pytest

from webseer.core import WebseerError
from webseer.gateway import make_gateway
from webseer.remote import DeadlineExceeded, RemoteRetriever, Transient, running_app
from webseer.retrieval import Hit, Page

SLOW = bool(os.environ.get("WEBSEER_SLOW"))
ATTEMPTS, TIMEOUT = 3, 5.0                                                   # of the client
FAULTS = {"429": .060, "500": .040, "503": .020, "reset": .025, "hang up": .015, "garbage": .010, "truncated": .0195, "not http": .010, "stall": .0005}
assert abs(sum(FAULTS.values()) - .2) < 1e-9


def fault(id, attempt):
    "What happens to this attempt, None for nothing: known to the test as well as to the server."
    return random.Random(f"{id}/{attempt}").choices([*FAULTS, None], [*FAULTS.values(), 1 - sum(FAULTS.values())])[0]


def hits(query, k): return [Hit(f"{query} {i}", f"http://a.example/{query}/{i}", f"extract {i} of {query}", 1 / (1 + i)) for i in range(k)]
def page(url): return Page(url, f"title of {url}", f"text of {url}\n" * 20, f"<p>{url}</p>")

class Echo:
    "Answers that say what was asked."
    async def asearch(self, query, k): return hits(query, k)
    async def afetch(self, url): return page(url)


class Spoilt:
    "An application behind a server that fails as planned, and a log of what it did."
    def __init__(self, app): self.app, self.attempts, self.clean, self.kinds = app, collections.Counter(), collections.Counter(), collections.Counter()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST": return await self.app(scope, receive, send)
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect": return
            body += message.get("body", b"")
            if not message.get("more_body"): break
        asked = json.loads(body)
        id = asked.get("query") or asked["url"]
        self.attempts[id] += 1
        kind = fault(id, self.attempts[id])
        self.kinds[kind] += 1
        transport = receive.__self__.transport                               # uvicorn's: some faults lie below HTTP

        async def answer(status, content, **headers):
            await send({"type": "http.response.start", "status": status, "headers": [(k.replace("_", "-").encode(), str(v).encode()) for k, v in
                                                                                   {"content-type": "application/json", "content-length": len(content), **headers}.items()]})
            await send({"type": "http.response.body", "body": content})

        if kind == "429": return await answer(429, b'{"error": "too many"}', retry_after=random.Random(id).uniform(0, .05))
        if kind in ("500", "503"): return await answer(int(kind), b'{"error": "spoilt"}')
        if kind == "garbage": return await answer(200, random.Random(id).randbytes(80))
        if kind == "stall":
            while (await receive())["type"] != "http.disconnect": pass       # until the client has had enough
            return
        if kind in ("reset", "hang up", "not http"):
            if kind == "reset": transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if kind == "not http": transport.write(b"\x00\xffneither head nor body\r\n\r\n")
            return transport.abort() if kind == "reset" else transport.close()

        async def again():
            return {"type": "http.request", "body": body, "more_body": False}
        async def half(message):
            if message["type"] == "http.response.body":
                await send({**message, "body": message["body"][:len(message["body"]) // 2], "more_body": True})
                transport.close()
            else: await send(message)
        await self.app(scope, again, half if kind == "truncated" else send)
        if kind is None: self.clean[id] += 1


@pytest.mark.parametrize("transport,n", [("aiohttp", 10_000 if SLOW else 2_000), ("pools", 10_000 if SLOW else 1_000)])
def test_every_request_ends_once_and_rightly(transport, n, monkeypatch, capsys):
    if transport == "pools": monkeypatch.setitem(sys.modules, "httpx_aiohttp", None)
    server = Spoilt(make_gateway(Echo()))
    ids = [f"query {i}" if i % 3 else f"http://b.example/{i}" for i in range(n)]
    complaints = []

    async def go(url):
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        async with RemoteRetriever(url, timeout=TIMEOUT, deadline=60, attempts=ATTEMPTS, concurrency=64) as remote:
            async def one(id):
                call = remote.asearch(id, 2) if id.startswith("query") else remote.afetch(id)
                try: return await call
                except WebseerError as e: return e
            return await asyncio.wait_for(asyncio.gather(*(one(id) for id in ids)), 540)      # nothing hangs

    with running_app(server) as url:
        monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", True)            # it reports each answer that is cut off
        t0, c0 = time.monotonic(), time.process_time()
        ends = asyncio.run(go(url))
        seconds, cpu = time.monotonic() - t0, time.process_time() - c0
        metrics = httpx.get(url + "/metrics").text

    failed = 0
    for id, end in zip(ids, ends):
        plan = [fault(id, i) for i in range(1, ATTEMPTS + 1)]
        tries = plan.index(None) + 1 if None in plan else ATTEMPTS
        assert server.attempts[id] == tries, (id, plan, server.attempts[id])               # none lost, none asked more often than needed
        assert server.clean[id] == (None in plan)                                           # a good answer is given once, and taken
        if None not in plan:
            failed += 1
            assert isinstance(end, (Transient, DeadlineExceeded)) and url in str(end)
        elif id.startswith("query"): assert end == hits(id, 2)
        else: assert end == page(id)
    assert len(ends) == n and set(server.attempts) == set(ids) and complaints == []
    assert set(server.kinds) >= set(FAULTS) - {"stall"} and failed
    share = 1 - server.kinds[None] / server.kinds.total()
    assert .17 < share < .23
    answered = sum(float(x) for x in re.findall(r'webseer_requests_total\{route="/(?:search|get_content)",status="200"\} (\S+)', metrics))
    assert answered == server.kinds[None] + server.kinds["truncated"] and re.search(r"^webseer_requests_in_flight 1.0$", metrics, re.M)   # the one that asks
    with capsys.disabled():
        print(f"\n{transport}: {n} requests, {server.kinds.total()} attempts, {share:.1%} spoilt ({', '.join(f'{k} {c}' for k, c in sorted(server.kinds.items(), key=str) if k)}), "
              f"{n - failed} right, {failed} typed errors, {seconds:.1f} s, {cpu:.1f} s of CPU for both sides")
