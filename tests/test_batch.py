"""The queue: what is finished stays finished, once, whatever ends the run; and question sets in all their spellings."""
import asyncio
import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given, settings, strategies as st

from webseer import batch
from webseer.agent import Budget, ScriptedPolicy, call_text, run_sync
from webseer.batch import FIELDS, Ledger, question_key, read_questions, results, run_questions, run_queue, summary_table, write_results
from webseer.core import WebseerError, keyed_rng, to_json
from webseer.retrieval import MiniWeb, ask_fair
from webseer.tools import Tools
from webseer.traj import Traj, load_trajs
from webseer.world import World

name = str


def queue(items, work, folder, **more): return run_sync(run_queue(items, work, folder, name, progress=False, **more))


# question sets

@pytest.mark.parametrize("row, qid, golds, hops", [
    (dict(id="n1", question="Who?", golden_answers=["A", "B"]), "n1", ("A", "B"), 0),                        # FlashRAG, Search-R1
    (dict(_id="h", question="Who?", answer="A", level="hard"), "h", ("A",), 0),                              # HotpotQA, 2Wiki
    (dict(id="m", question="Who?", answer="A", answer_aliases=["B", "A"]), "m", ("A", "B"), 0),              # MuSiQue
    (dict(question_id="t", question="Who?", answer=dict(value="A", aliases=["B"], type="x")), "t", ("A", "B"), 0),   # TriviaQA
    (dict(id=5, question="Who?", possible_answers='["A", "B"]'), "5", ("A", "B"), 0),                        # PopQA
    (dict(Prompt="Who?", Answer="A"), "set-1", ("A",), 0), (dict(problem="Who?", answer=4), "set-1", ("4",), 0),     # FRAMES, SimpleQA
    (dict(question="Who?", reward_model=dict(ground_truth=dict(target=["A"]))), "set-1", ("A",), 0),         # verl
    (dict(qid="w", text="Who?", golds=["A"], hops=2, world="s", path=[["e", "r", "v"]]), "w", ("A",), 2)])
def test_spellings(tmp_path, row, qid, golds, hops):
    f = tmp_path/"set.any"
    for text in (json.dumps(row), json.dumps([row]), json.dumps(dict(version=1, data=[row])), "\ufeff" + json.dumps(row, indent=1)):
        f.write_text(text, encoding="utf-8")
        q, = read_questions(f)
        assert (q.qid, q.text, q.golds, q.hops) == (qid, "Who?", golds, hops)
    if "path" in row: assert q.path == (("e", "r", "v"),) and q.world == "s"


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow"); import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist([dict(id="a", question="Who?", golden_answers=["A"]), dict(id="b", question="When?", golden_answers=[])]), tmp_path/"x")
    with pytest.raises(WebseerError, match=r"x, row 2: the field golden_answers holds no answer"): read_questions(tmp_path/"x")
    (tmp_path/"x").write_bytes((tmp_path/"x").read_bytes()[:-9])
    with pytest.raises(WebseerError, match="not readable as parquet"): read_questions(tmp_path/"x")


@pytest.mark.parametrize("text, said", [
    ('{"question": "Who?", "answer": "A"}\n\n{"question": "Who?", "ans": 1}', r"line 3: no answer \(it has question, ans\)"),
    ('{"question": "Who?", "answer": "A"}\n{"question": "W', "line 2: not JSON"), ('[{"question": 3, "answer": "A"}]', "entry 1: the field question is no text: '3'"),
    ('[1]', "entry 1: a int, not an object"), ('[', "not JSON"), ('', "holds no questions"), ('[' * 100_000, "nested too deeply"),
    ('{"id": [], "question": "Who?", "answer": "A"}', "the field id is neither"), ('{"hops": -1, "question": "Who?", "answer": "A"}', "the field hops is no count"),
    ('{"id": 1, "golden_answers": ["a"]}', r"entry 1: no question \(it has id, golden_answers\)"), ('{"id": 1, "tags": ["a"]}', r"entry 1: no question \(it has id, tags\)"),
    ('{"id": 1, "answer": "a", "paragraphs": [{"text": "A page."}]}', r"entry 1: no question \(it has id, answer, paragraphs\)"),
    ('{"question": "Who?", "answer": "a", "hops": 1e999}', "entry 1: the field hops is no count: 'inf'"),
    ('{"question": "Who?", "answer": 1e999}', "entry 1: the field answer holds no answer: 'inf'"),
    ('{"question": "Who?", "answer": "%s"}' % ("[" * 60_000), "entry 1: the field answer is nested too deeply"),
    ('{"question": "Who?", "answer": "%s1%s"}' % ("[" * 600, "]" * 600), "entry 1: the field answer is nested deeper than 20 levels"),
    *(('{"question": "Who?", "answer": "a", "%s": %s1%s}' % (n, "[" * 600, "]" * 600), f"entry 1: the field {n} is nested deeper than 20 levels")
      for n in ("golds", "aliases", "_id", "num_hops", "path", "kind", "world")),
    ('{"question": "Who?", "answer": "a"}\n{"question": "Who?", "answer": %s}' % ("[" * 9000 + "]" * 9000), "line 2: nested too deeply"),
    ('{"id": 1, "question": "Who?", "answer": "A"}\n{"id": "1", "question": "When?", "answer": "A"}', "line 2: the identifier '1' was used before, at line 1")])
def test_bad_sets(tmp_path, text, said):
    f = tmp_path/"set.jsonl"; f.write_text(text)
    with pytest.raises(WebseerError, match=said) as e: read_questions(f)
    assert str(f) in str(e.value) and "\n" not in str(e.value)


def test_unreadable(tmp_path):
    for path in (tmp_path/"none", tmp_path):
        with pytest.raises(WebseerError, match="cannot be read"): read_questions(path)
    (tmp_path/"x").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(WebseerError, match="byte 14: not UTF-8"): read_questions(tmp_path/"x")


json_like = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=6) | st.integers(),
                         lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from([n for f in FIELDS.values() for n in f]) | st.text(max_size=3), x, max_size=5), max_leaves=12)

@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), json_like.map(lambda x: json.dumps(x).encode()), st.lists(json_like, max_size=3).map(lambda x: "\n".join(map(json.dumps, x)).encode())))
def test_any_file(tmp_path_factory, data):
    f = tmp_path_factory.getbasetemp()/"any"; f.write_bytes(data)
    try: qs = read_questions(f, "number")
    except WebseerError as e: assert "\n" not in str(e)
    else:
        assert len({q.qid for q in qs}) == len(qs)
        for q in qs:
            assert q.text.strip() and q.golds and all(isinstance(g, str) and g.strip() for g in q.golds) and q.hops >= 0
            json.dumps([q.qid, q.text, q.golds], ensure_ascii=False).encode()


def test_a_large_number_is_an_answer(tmp_path):
    (tmp_path/"x").write_text('{"question": "How many?", "answer": 1%s}' % ("0" * 400))
    assert read_questions(tmp_path/"x")[0].golds == ("1" + "0" * 400,)


hard = st.sampled_from(["1e999", "-1e999", "NaN", "1" + "0" * 400, "1" + "0" * 5000, "1e308", "-0.0", '"\\ud800"', '"["', '"%s"' % ("[" * 9000), "[]", "{}", '""', "null", '"[1e999]"']
                       + [f % (a * n + b + c * n) for n in (3, 30, 600, 990, 3000) for a, b, c in (("[", "1", "]"), ("[[", "", "]]"))  for f in ("%s", '"%s"')]
                       + ['{"a":' * n + "1" + "}" * n for n in (30, 600, 990)] + ['{"value":' * n + '"A"' + "}" * n for n in (2, 30, 600)])
fields = st.sampled_from([n for f in FIELDS.values() for n in f] + ["path", "kind", "world", "data", "\\ud800", "\\n"])
rows = st.tuples(st.booleans(), st.lists(st.tuples(fields, hard | json_like.map(json.dumps)), max_size=5)).map(
    lambda x: "{" + ", ".join((['"question": "Who?", "answer": "A"'] if x[0] else []) + [f'"{k}": {v}' for k, v in x[1]]) + "}")

@settings(max_examples=400, deadline=None)
@given(st.lists(rows | hard, min_size=1, max_size=3), st.sampled_from(["%s", "[%s]", '{"data": [%s]}']))
def test_any_row(tmp_path_factory, made, form):
    "Whatever JSON a row holds: a question that can be written to a file, or one sentence that names the place."
    f = tmp_path_factory.getbasetemp()/"rows"; f.write_text(form % ("\n" if form == "%s" else ", ").join(made))
    try: qs = read_questions(f, "number")
    except WebseerError as e:
        assert str(f) in str(e) and "\n" not in str(e) and len(str(e)) < 900
        str(e).encode()
    else:
        for q in qs:
            assert q.golds and all(g.strip() for g in q.golds) and isinstance(q.hops, int) and q.hops >= 0
            assert question_key(q) and json.loads(to_json(q))["text"] == q.text



# the queue

def test_each_once_in_order(tmp_path):
    done, most = [], [0, 0]
    async def work(x, note):
        most[0] += 1; most[1] = max(most)
        await asyncio.sleep((x * 7 % 5) / 500)
        most[0] -= 1
        done.append(x)
        return dict(x=x, text="half a pair: \ud800")
    assert queue(range(40), work, tmp_path/"q", concurrency=6)["done"] == 40
    out = queue(range(60), work, tmp_path/"q", concurrency=6)
    assert (out["done"], out["before"]) == (20, 40) and sorted(done) == list(range(60)) != done and most[1] == 6
    assert write_results(tmp_path/"final.jsonl", tmp_path/"q", range(60), name) == 60
    rows = [json.loads(l) for l in (tmp_path/"final.jsonl").read_text().splitlines()]
    assert [r["x"] for r in rows] == list(range(60)) and rows[0]["text"] == "half a pair: ?"


def test_groups(tmp_path, monkeypatch):
    sizes, durable = [], batch._durable
    def count(path, rows): sizes.append(len(rows)); time.sleep(.01); durable(path, rows)
    monkeypatch.setattr(batch, "_durable", count)
    async def work(x, note): return x
    queue(range(400), work, tmp_path, concurrency=100)
    assert sum(sizes) == 400 and max(sizes) >= 50 and len(Ledger(tmp_path).at) == 400


def test_failures_are_retried(tmp_path):
    seen, broken = [], {"3", "5"}
    async def work(x, note):
        seen.append(x)
        note(dict(half=x))
        if str(x) in broken: raise WebseerError(f"{x}: no answer")
        return x
    out = queue(range(8), work, tmp_path)
    assert out["failed"] == {"3": "3: no answer", "5": "5: no answer"} and out["done"] == 6
    assert [(p["key"], p["why"], p["partial"]) for p in map(json.loads, (tmp_path/"partial.jsonl").read_text().splitlines())] == [("3", "3: no answer", dict(half=3)), ("5", "5: no answer", dict(half=5))]
    with pytest.raises(WebseerError, match="2 of 8 items are not finished, the first is '3'"): write_results(tmp_path/"f", tmp_path, range(8), name)
    assert not (tmp_path/"f").exists() and [v for _, v, _ in results(tmp_path, range(8), name)] == [0, 1, 2, 4, 6, 7]
    broken.clear(); seen.clear()
    assert queue(range(8), work, tmp_path)["failed"] == {} and sorted(seen) == [3, 5] and Ledger(tmp_path).failed == {}


def test_too_many_failures_stop(tmp_path):
    up = [True]; calls = []
    async def work(x, note):
        calls.append(x)
        if not up[0] or x % 2: raise WebseerError("http://127.0.0.1:9: nobody listens")
        if x == 100: up[0] = False
        return x
    with pytest.raises(WebseerError, match=r"10 items in a row failed; what was finished is kept in .* The last one failed with: http://127.0.0.1:9: nobody listens$") as e:
        queue(range(10_000), work, tmp_path, concurrency=4, max_failures=10)
    assert "\n" not in str(e.value) and len(calls) < 130 and {str(x) for x in range(0, 101, 2)} <= set(Ledger(tmp_path).at)


def test_a_mistake_in_the_program_stops(tmp_path):
    async def work(x, note):
        if x == 5: raise ZeroDivisionError
        return x
    with pytest.raises(ZeroDivisionError): queue(range(10), work, tmp_path, concurrency=1)
    assert set(Ledger(tmp_path).at) == set("01234")


def test_torn_and_broken_records(tmp_path):
    async def work(x, note): return x * 10
    queue(range(5), work, tmp_path)
    f = tmp_path/"records.jsonl"; whole = f.read_bytes(); lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):
        f.write_bytes(whole[:-cut])
        out = queue(range(5), work, tmp_path)
        assert (out["before"], out["done"]) == ((5, 0) if cut == 1 else (4, 1)) and [v for _, v, _ in results(tmp_path, range(5), name)] == [0, 10, 20, 30, 40]
    f.write_bytes(lines[0] + b"garbage\n" + lines[1])
    with pytest.raises(WebseerError, match="records.jsonl, line 2: no record of a queue"): queue(range(5), work, tmp_path)


def test_refusals(tmp_path):
    async def work(x, note): return x
    queue([1], work, tmp_path/"a", identity=dict(model="m"))
    with pytest.raises(WebseerError, match="begun with other settings .model = 'm' there, 'n' now"): queue([1], work, tmp_path/"a", identity=dict(model="n"))
    with pytest.raises(WebseerError, match="two items have the key '1'"): queue([1, 1], work, tmp_path/"b")
    with pytest.raises(WebseerError, match="concurrency=0"): queue([1], work, tmp_path/"b", concurrency=0)
    (tmp_path/"file").write_text("")
    with pytest.raises(WebseerError, match="file cannot be used"): queue([1], work, tmp_path/"file")
    assert queue([], work, tmp_path/"c")["done"] == 0


CHILD = """
import asyncio, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)                # a process in the background inherits that it is ignored
from webseer.agent import run_sync
from webseer.batch import run_queue
async def work(x, note):
    note(dict(begun=x)); print(x, flush=True)
    await asyncio.sleep(0 if x < 10 else 60)
    return x
run_sync(run_queue(range(20), work, sys.argv[1], str, concurrency=2, progress=False))
"""

def child(folder):
    p = subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD), folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while p.stdout.readline().strip() not in ("11", ""): pass
    return p


def test_interrupt_and_second_process(tmp_path):
    async def work(x, note): return x
    p = child(tmp_path)
    try:
        with pytest.raises(WebseerError, match=f"in use by process {p.pid}"): queue(range(20), work, tmp_path)
        p.send_signal(signal.SIGINT)
        assert p.wait(60) != 0 and "KeyboardInterrupt" in p.stderr.read()
    finally: p.kill(); p.stdout.close(); p.stderr.close()
    assert set(Ledger(tmp_path).at) == {str(i) for i in range(10)}
    side = [json.loads(l) for l in (tmp_path/"partial.jsonl").read_text().splitlines()]
    assert [(s["key"], s["why"], s["partial"]) for s in side] == [("10", "cancelled", dict(begun=10)), ("11", "cancelled", dict(begun=11))]
    out = queue(range(20), work, tmp_path)
    assert (out["before"], out["done"]) == (10, 10)


def test_the_lock_goes_with_a_killed_process(tmp_path):
    async def work(x, note): return x
    p = child(tmp_path)
    p.kill(); p.wait(); p.stdout.close(); p.stderr.close()
    assert queue(range(20), work, tmp_path)["before"] == 10


FULL = """
import resource, sys
from webseer.agent import run_sync
from webseer.batch import run_queue
from webseer.core import WebseerError
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
async def work(x, note): return "x" * 100
try: run_sync(run_queue(range(100), work, sys.argv[1], str, concurrency=3, progress=False))
except WebseerError as e: print(e)
"""

def test_a_full_disk_stops_the_run(tmp_path):
    out = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert out.stdout.startswith(f"could not write {tmp_path/'records.jsonl'}") and out.stdout.count("\n") == 1 and not out.stderr
    done = len(Ledger(tmp_path).at)
    async def work(x, note): return "x" * 100
    assert 10 < done < 30 and queue(range(100), work, tmp_path)["done"] == 100 - done


# rollouts

def questions(n):
    w = MiniWeb(World(1))
    return Tools(w), [ask_fair(w, keyed_rng("test batch", i), qid=f"q{i}") for i in range(n)]


def test_run_questions(tmp_path):
    tools, qs = questions(12)
    seeds = []
    def script(traj):
        seeds.append(traj.seed); n = int(traj.qid[1:])
        yield "Thinking."
        yield call_text("search", query=traj.question)
        if n % 3 == 2: return
        yield call_text("submit_answer", answer=traj.golds[0] if n % 3 == 0 else "unknown")
    s = run_sync(run_questions(ScriptedPolicy(script), tools, qs, tmp_path, Budget(max_turns=3), samples=2, progress=False))
    assert (s["questions"], s["rollouts"], s["failed"], s["stops"]) == (12, 16, 8, dict(submitted=16))     # a script that ends is a WebseerError
    assert s["em"] == s["any_right"] == .5 and s["faults"] == dict(no_call=16) and s["calls"] == dict(malformed=16, search=16, submit_answer=16)
    assert len(set(seeds)) == 24 and s["completion_tokens"] is None and s["seconds_per_rollout"]["p95"] >= s["seconds_per_rollout"]["p50"] >= 0
    ts = load_trajs(tmp_path/"run.jsonl")
    assert [(t.qid, t.meta["sample"]) for t in ts] == [(f"q{i}", k) for i in range(12) if i % 3 < 2 for k in (0, 1)]
    assert json.loads((tmp_path/"summary.json").read_text()) == json.loads(json.dumps(s)) and "| em | 0.5 |" in summary_table(s)


def test_tools_of_each_question_may_tell_what_they_are(tmp_path):
    tools, qs = questions(2)
    script = lambda traj: (x for x in [call_text("submit_answer", answer="x")])
    def of(q): return tools
    run = lambda: run_sync(run_questions(ScriptedPolicy(script), of, qs, tmp_path, progress=False))
    of.describe = lambda: dict(tools.describe(), k=3)
    run(); run()
    of.describe = lambda: dict(tools.describe(), k=5)
    with pytest.raises(WebseerError, match="begun with other settings .tools = .*'k': 3.* there, .*'k': 5.* now"): run()


def test_cancelled_rollouts_are_kept_aside(tmp_path):
    tools, qs = questions(3)
    class Hang(ScriptedPolicy):
        async def act(self, traj):
            if len(traj.messages) > 2:
                hanging.append(traj.qid)
                await asyncio.sleep(600)
            return await super().act(traj)
    hanging = []
    async def main():
        task = asyncio.create_task(run_questions(Hang(lambda t: (x for x in [call_text("search", query="x")])), tools, qs, tmp_path, progress=False))
        while len(hanging) < 3 and not task.done(): await asyncio.sleep(.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
    run_sync(main())
    ts = [Traj.from_dict(json.loads(l)["partial"]) for l in (tmp_path/"queue"/"partial.jsonl").read_text().splitlines()]
    assert [t.stop for t in ts] == ["cancelled"] * 3 and all(t.messages[-1]["role"] == "tool" for t in ts)
    assert not (tmp_path/"queue"/"records.jsonl").exists() and not (tmp_path/"run.jsonl").exists()


def test_edited_question_is_a_new_one(tmp_path):
    tools, qs = questions(2)
    script = lambda traj: (x for x in [call_text("submit_answer", answer="x")])
    run_sync(run_questions(ScriptedPolicy(script), tools, qs, tmp_path, progress=False))
    from dataclasses import replace
    new = [qs[0], replace(qs[1], golds=("x",))]
    assert question_key(new[1]) != question_key(qs[1])
    assert run_sync(run_questions(ScriptedPolicy(script), tools, new, tmp_path, progress=False))["em"] == .5


def endpoint(state):
    "A chat server that submits an answer, or fails as `state` says."
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    async def chat(request):
        state["asked"] += 1
        if state["asked"] > state["up"]: return JSONResponse(dict(error=dict(message="the model `m` does not exist")), 404)
        call = dict(id="c", type="function", function=dict(name="submit_answer", arguments='{"answer": "x"}'))
        return JSONResponse(dict(choices=[dict(message=dict(role="assistant", content=None, tool_calls=[call]), finish_reason="tool_calls")],
                                 usage=dict(prompt_tokens=100, completion_tokens=7)))
    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


def test_endpoint_that_goes_away_and_comes_back(tmp_path):
    from webseer.endpoint import EndpointPolicy
    from webseer.remote import running_app
    tools, qs = questions(40)
    state = dict(asked=0, up=15)
    with running_app(endpoint(state)) as url:
        run = lambda: run_sync(run_questions(EndpointPolicy(url, "m", api_key_env=None), tools, qs, tmp_path, concurrency=4, max_failures=6, progress=False))
        with pytest.raises(WebseerError, match=r"6 items in a row failed; .*404.*does not exist") as e: run()
        kept = len(Ledger(tmp_path/"queue").at)
        assert "\n" not in str(e.value) and 12 <= kept <= 15                   # an answer under way when the run stops is lost
        state |= dict(asked=0, up=10 ** 9)
        s = run()
    assert state["asked"] == 40 - kept and s["rollouts"] == 40 and s["failed"] == 0
    assert (s["prompt_tokens"], s["completion_tokens"]) == (4000, 280) and s["seconds_per_turn"]["p50"] > 0
