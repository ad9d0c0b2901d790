"""A rejection-sampling run over a mini-web with scripted models, which a test may kill.

The questions come from `folder/questions.jsonl`. Every choice of the scripts depends on the seed of their rollout, so the same rollout goes the same way again.
"""
import asyncio
import threading
from pathlib import Path

import pyarrow.parquet  # noqa: F401; imported here so that a kill hits the work and not these
import tqdm.auto        # noqa: F401

from webseer.agent import ScriptedPolicy, call_text, run_sync
from webseer.batch import read_questions
from webseer.core import append_jsonl, keyed_rng
from webseer.retrieval import MiniWeb, ask_fair
from webseer.synth import SynthConfig, synthesise
from webseer.tools import Tools
from webseer.world import World, WorldConfig, query_text

tqdm.auto.tqdm.set_lock(threading.RLock())                                      # tqdm's own lock is a semaphore that a killed process leaves behind
CONFIG = SynthConfig(retries=2, max_rounds=3, mix=1.5, near=None, seed=3)


def web(): return MiniWeb(World("driver", WorldConfig(n_entities=24)))


def write_questions(path, n):
    "n different questions of the mini-web."
    w, seen, rows = web(), set(), []
    for i in range(20 * n):
        q = ask_fair(w, keyed_rng("driver", i), hop_weights=(.2, .3, .5, 0))
        if q.text in seen or len(rows) == n: continue
        seen.add(q.text)
        rows.append(dict(qid=f"q{len(rows)}", question=q.text, golden_answers=list(q.golds), hops=q.hops, path=[list(p) for p in q.path], world=q.world))
    append_jsonl(path, rows)


class Slow(ScriptedPolicy):
    "A script that takes its time."
    def __init__(self, script, seconds): super().__init__(script); self.seconds = seconds
    async def act(self, traj):
        if self.seconds: await asyncio.sleep(self.seconds)
        return await super().act(traj)
    def describe(self): return dict(script=self.script.__name__)


def look(traj, rng):
    "Search for each step of the path; now and then a clumsy turn."
    for e, r, _ in traj.meta["path"]:
        if rng.random() < .1: yield "Hm, let me think about it."
        yield f"Now the {r} of {e}.\n" + call_text("search", query=query_text(r, e, rng.randrange(2)))


def propose(traj):
    rng = keyed_rng("propose", traj.seed)
    while True:
        yield from look(traj, rng)
        answer = traj.golds[0] if rng.random() < .6 else rng.choice(["Nobody", "Atlantis", "1066"])
        yield ("So be it.\n" if rng.random() < .5 else "") + call_text("submit_answer", answer=answer)


def judge(traj):
    rng = keyed_rng("judge", traj.seed)
    if rng.random() < .9: yield from look(traj, rng)
    truth = traj.golds[0]
    yield call_text("submit_answer", answer=truth if rng.random() < .7 else rng.choice(["correct", "Incorrect.", "partly correct", "42"]))


def run(folder, seconds=0., concurrency=8, begin=lambda: None):
    "The whole run; each turn of a script takes `seconds`."
    qs, tools = read_questions(Path(folder)/"questions.jsonl"), Tools(web())
    begin()
    return run_sync(synthesise(qs, Slow(propose, seconds), Slow(judge, seconds), tools, Path(folder)/"out", CONFIG, concurrency, progress=False))


def child(folder, seconds, pipe):
    "The run in a process of its own."
    run(folder, seconds, begin=lambda: pipe.send("begin"))
