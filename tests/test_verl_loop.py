"""The agent loop for verl: without verl, and inside verl's own classes with a scripted engine (no training here; that is `make verl-proof`).

The second half needs verl. It runs where the Python that runs pytest has it, else in the Python that WEBSEER_VERL names (`make verl` makes one).
"""
import asyncio
import importlib.util
import json
import logging
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from webseer.agent import call_text, first_messages, rollout, run_sync
from webseer.core import WebseerError, load_profile
from webseer.model import CHAT_TEMPLATE, Codec, ModelConfig, Qwen2, init_weights, save_checkpoint
from webseer.questions import rl_rows, save_rl, sft_trajs
from webseer.reading import READER_PROMPT, LLMReader
from webseer.remote import running_app
from webseer.retrieval import MiniWeb, Page
from webseer.rewards import reward
from webseer.sft import encode_messages
from webseer.synth import save_text
from webseer.tools import TOOLS, Tools
from webseer.traj import STOPS
from webseer.verl_cpu import RL_CPU, Continuer, cpu_env, load_hf, use_cpu
from webseer.verl_loop import (READER_NUMBERS, EngineChat, EngineReader, agent_config, compute_score, encode_chat, loop_settings, record_row,
                               lost_groups, recorded, rollout_metrics, row_question, run_row, tool_config, trim, worlds_app)
from webseer.world import Question, World, WorldConfig

QWEN = ("{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{% if m.role == 'tool' %}<tool_response>\n{% endif %}{{ m.content }}"
        "{% if m.role == 'tool' %}{{ '\n</tool_response>' }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WRONG, RIGHT = call_text("submit_answer", answer="nobody"), call_text("submit_answer", answer="Michael Mann")
SCRIPTS = {"correct": [WRONG, RIGHT], "once": [RIGHT], "five wrong": [WRONG] * 9, "idle": ["I do not know.", RIGHT], "bad json": ['<tool_call>\n{"name": bad}\n</tool_call>', RIGHT],
           "unknown tool": [call_text("nosuch"), RIGHT], "two calls": [WRONG + call_text("search", query="film"), RIGHT], "search": [call_text("search", query="film"), RIGHT],
           "too long": ["x " * 700], "half": [call_text("submit_answer", answer="Michael Smith"), WRONG, WRONG, WRONG, WRONG]}


@pytest.fixture(scope="module")
def address():
    with running_app(worlds_app(load_profile("smoke"), most=3)) as url: yield url


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    codec = Codec()
    return save_checkpoint(tmp_path_factory.mktemp("ck")/"ck", init_weights(Qwen2(ModelConfig(codec.n, 64, 2, 2, 1, 128))), codec)


@pytest.fixture(scope="module")
def tok(checkpoint):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(checkpoint)


def row(i=0, split="train", **info):
    return dict(raw_prompt=first_messages(f"Who directed film {i}?"), data_source="miniweb",
                extra_info=dict(index=i, qid=f"q{i}", golds='["Michael Mann"]', retrieval="w/rl-0-0", split=split) | info)


def played(tok, replies, end, log=None):
    left = list(replies)
    async def engine(ids, room):
        said = tok.encode(left.pop(0) if left else "Done.", add_special_tokens=False) + [end]
        if log is not None: log.append((list(ids), said[:room], room))
        return said[:room], [-.25] * len(said[:room])
    return engine


def spoken(messages):
    "Messages as role and text, calls written out."
    text = lambda m: m["content"] + "".join(call_text(c["function"]["name"], **json.loads(c["function"]["arguments"])) for c in m.get("tool_calls", []))
    return [dict(role=m["role"], content=text(m)) for m in messages]


def run(tok, address, replies, room=700, row=None, **more):
    s = loop_settings(dict(retrieval=address, variant="released", l_expect=500, l_max=700) | more)
    return run_sync(run_row(row or globals()["row"](), played(tok, replies, tok.eos_token_id), tok, s, 1000, room))


# -- worlds behind one address

def test_each_world_answers_as_alone(address):
    from webseer.remote import RemoteRetriever
    for name in ("rl-0-1", "test-3"):
        web, there = MiniWeb(World(name, WorldConfig.of(load_profile("smoke")))), RemoteRetriever(f"{address}/w/{name}")
        for p in list(web.world.pages.values())[:5]:
            assert there.search(p.title, 4) == web.search(p.title, 4) and there.fetch(p.url) == web.fetch(p.url) and there.subject(p.url) == (p.subject, p.lines)


def test_worlds_are_forgotten_and_made_again(address):
    ask = lambda name: httpx.post(f"{address}/w/{name}/search", json=dict(query="city"), trust_env=False)
    first = ask("w0").json()
    for i in range(1, 6): assert ask(f"w{i}").status_code == 200
    assert httpx.get(f"{address}/health", trust_env=False).json()["worlds"] == ["w3", "w4", "w5"]
    assert ask("w0").json() == first


@pytest.mark.parametrize("name", ["%2e%2e%2f", "a" * 81, "a b", "é!"])
def test_bad_names_of_worlds(address, name):
    r = httpx.post(f"{address}/w/{name}/search", json=dict(query="x"), trust_env=False)
    assert r.status_code in (404, 422) and r.headers["content-type"].startswith(("application/json", "text/plain"))


def test_many_at_once_make_a_world_once(address):
    import threading
    from webseer import verl_loop
    made, real = [], verl_loop.World
    class Counted(real):
        def __init__(self, *a, **k): made.append(a[0]); super().__init__(*a, **k)
    verl_loop.World = Counted
    try:
        with running_app(worlds_app()) as url:
            ts = [threading.Thread(target=httpx.post, args=(f"{url}/w/same/search",), kwargs=dict(json=dict(query="x"), trust_env=False, timeout=30)) for _ in range(8)]
            [t.start() for t in ts], [t.join() for t in ts]
    finally: verl_loop.World = real
    assert made == ["same"]


# -- tokens

def composed(text): return unicodedata.normalize("NFC", text)     # transformers' Qwen2 tokenizer does this to all text, the embedded codec does not


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(min_size=1, max_size=30).map(composed), st.text(max_size=30).map(composed)), min_size=1, max_size=4), st.booleans())
def test_tokens_and_mask_are_those_of_the_embedded_trainer(tok, turns, qwen):
    talk = first_messages("Who?")
    for said, told in turns: talk += [dict(role="assistant", content=said), dict(role="tool", content=told)]
    ids, mask = encode_chat(tok, talk, **(dict(chat_template=QWEN) if qwen else {}))
    codec = Codec()
    if not qwen: assert (ids, mask) == encode_messages(codec, talk)
    assert codec.decode(ids) == tok.apply_chat_template(talk, tokenize=False, **(dict(chat_template=QWEN) if qwen else {}))
    spans, at = [], 0
    for i, on in enumerate(mask):
        if on and (i == 0 or not mask[i - 1]): spans.append([])
        if on: spans[-1].append(ids[i])
    if all(said for said, _ in turns): assert [codec.decode(s) for s in spans] == [said + "<|im_end|>" for said, _ in turns]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN])
@pytest.mark.parametrize("name", SCRIPTS)
def test_prompt_and_response_are_the_conversation(tok, address, name, template):
    log, s = [], loop_settings(dict(retrieval=address, variant="released"))
    r = run_sync(run_row(row(), played(tok, SCRIPTS[name], tok.eos_token_id, log), tok, s, 1000, 700, chat_template=template))
    talk = spoken(r.traj.messages)
    while talk[-1]["role"] != "assistant": talk.pop()             # an answer that was never encoded
    whole = tok.apply_chat_template(talk, tokenize=False, chat_template=template)
    if r.traj.stop != "max_tokens": assert whole.removesuffix("\n") == tok.decode(r.prompt + r.response)
    emitted = [i for _, said, _ in log for i in said]
    assert [i for i, on in zip(r.response, r.mask) if on] == emitted and len(r.response) == len(r.mask) == len(r.logprobs) <= 700
    assert all((lp == -.25) == bool(on) for lp, on in zip(r.logprobs, r.mask)) and r.mask[-1] == 1
    for (ids, said, room), (later, _, _) in zip(log, log[1:]): assert later[:len(ids) + len(said)] == ids + said     # nothing is ever encoded anew


def test_same_rollout_as_the_local_loop(tok, address):
    "Through tokens and HTTP, or through text and in this process: the same calls, answers, submissions and stop reason."
    from webseer.agent import Budget
    from webseer.reflect import Habits, reasoner
    from webseer.retrieval import ask_fair
    from webseer.core import keyed_rng
    profile = load_profile("smoke")
    web = MiniWeb(World("rl-0-7", WorldConfig.of(profile)))
    for j in range(4):
        q = ask_fair(web, keyed_rng("q", j), 3, hop_weights=(.5, .5, 0, 0))
        script = lambda: reasoner(keyed_rng("r", j), Habits(.5, .3))
        here = run_sync(rollout(script(), Tools(web), q, Budget(max_calls=16, max_submissions=5, feedback="released")))
        p = script()
        class Engine:
            traj = None
            async def __call__(self, ids, room):
                said = tok.encode((await p.act(self.traj)).content, add_special_tokens=False) + [tok.eos_token_id]
                return said, None
        engine, s = Engine(), loop_settings(dict(retrieval=address, variant="released", max_calls=16))
        from webseer import verl_loop
        start, end = verl_loop.TokenPolicy.start, verl_loop.TokenPolicy.end
        def begin(self, t): start(self, t); engine.traj = t; p.start(t)
        verl_loop.TokenPolicy.start, verl_loop.TokenPolicy.end = begin, lambda self, t: p.end(t)
        try: r = run_sync(run_row(dict(raw_prompt=first_messages(q.text), extra_info=dict(golds=json.dumps(q.golds), retrieval="w/rl-0-7")), engine, tok, s, 1000, 4000))
        finally: verl_loop.TokenPolicy.start, verl_loop.TokenPolicy.end = start, end
        assert [m["content"] for m in r.traj.messages] == [m["content"] for m in here.messages]
        assert (r.traj.calls, r.traj.stop, r.traj.submissions) == (here.calls, here.stop, here.submissions) and len(here.calls) > 1


def test_a_reply_cut_short_is_closed(tok, address):
    r = run(tok, address, ["word " * 40, RIGHT], max_new=20)
    text = tok.decode(r.response)
    assert "<|im_end|>\n<|im_start|>user\nNo tool was called." in text and sum(r.mask[:20]) == 20 and r.mask[20] == 0


def test_long_results_are_shortened_and_the_model_is_told(tok, address):
    from webseer import verl_loop
    s = loop_settings(dict(retrieval=address))
    class Long:
        schemas = TOOLS
        async def call(self, name, args): return "word " * 400
    real, verl_loop.row_tools = verl_loop.row_tools, lambda row, s, reader: Long()
    try: r = run_sync(run_row(row(), played(tok, [call_text("search", query="x"), RIGHT], tok.eos_token_id), tok, s, 1000, 600))
    finally: verl_loop.row_tools = real
    assert r.traj.stop == "correct" and r.traj.meta["shortened"] >= 1 and len(r.response) <= 600 and "Submit your answer now." in tok.decode(r.response)


# -- reward and failures

@pytest.mark.parametrize("variant", ["paper", "released", "single"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_reward_is_that_of_the_rewards_chapter(tok, address, name, variant):
    r = run(tok, address, SCRIPTS[name], variant=variant)
    want, parts = reward(variant, r.traj.submissions, len(r.response), dict(alpha=.8, l_expect=500, l_max=700))
    assert r.reward == want and {k: r.numbers[k] for k in ("score", "decay", "answer", "length")} == {k: parts[k] for k in ("score", "decay", "answer", "length")}


def test_known_rewards(tok, address):
    value = lambda name, **k: run(tok, address, SCRIPTS[name], **k).reward
    assert [value(n) for n in ("once", "correct", "five wrong", "half", "too long")] == pytest.approx([1.0, .8, 0.0, .5 * .8 ** 4, -1.0])
    assert [value(n, variant="paper") for n in ("once", "correct")] == pytest.approx([.8, .8 ** 2])
    assert run(tok, address, SCRIPTS["half"], variant="paper", max_submissions=3).numbers["submissions"] == 3
    assert run(tok, address, [WRONG, RIGHT], row=row(split="test")).numbers["submissions"] == 1


def test_numbers_have_the_same_names_always(tok, address):
    rolls = [run(tok, address, s) for s in SCRIPTS.values()] + [run(tok, address, [RIGHT], row=dict(extra_info={}))]
    assert len({tuple(r.numbers) for r in rolls}) == 1 and all(isinstance(v, float) for r in rolls for v in r.numbers.values())
    assert all(sum(r.numbers[f"stop_{k}"] for k in STOPS) == 1 for r in rolls)


@pytest.mark.parametrize("what", ["dead server", "engine raises", "engine silent", "no golds", "no prompt", "prompt too long", "bug in a tool"])
def test_failures_are_counted_and_never_raise(tok, address, what, caplog):
    from webseer import verl_loop
    logging.getLogger("webseer.verl").setLevel(logging.WARNING)
    async def raises(ids, room): raise RuntimeError("CUDA out of memory")
    async def silent(ids, room): return [], []
    s = loop_settings(dict(retrieval="http://127.0.0.1:9" if what == "dead server" else address, attempts=1, deadline=3.0))
    engine = dict(zip(("engine raises", "engine silent"), (raises, silent))).get(what) or played(tok, [WRONG, call_text("search", query="x"), RIGHT], tok.eos_token_id)
    r = dict(row(), **({"raw_prompt": []} if what == "no prompt" else {}))
    if what == "no golds": r["extra_info"]["golds"] = "[]"
    real = verl_loop.row_tools
    class Broken:
        schemas = TOOLS
        def call(self, name, args): raise ZeroDivisionError("a bug")
    if what == "bug in a tool": verl_loop.row_tools = lambda row, s, reader: Broken()
    try: out = run_sync(run_row(r, engine, tok, s, 10 if what == "prompt too long" else 1000, 700))
    finally: verl_loop.row_tools = real
    assert out.traj.stop == "error" and out.reward == 0 and out.numbers["stop_error"] == 1 and sum(out.mask) == 0 and out.traj.meta["error"]
    assert 1 <= len(out.response) == len(out.mask) == len(out.logprobs) and len(out.prompt) >= 1 and "ended" in caplog.text
    if what in ("dead server", "bug in a tool"): assert out.numbers["submissions"] == 1 and "nobody" in tok.decode(out.response)   # what was there is kept
    unmasked = run_sync(run_row(r, played(tok, [WRONG, call_text("search", query="x")], tok.eos_token_id), tok, loop_settings(dict(retrieval="http://127.0.0.1:9", attempts=1, mask_errors=False)), 1000, 700))
    if what == "dead server": assert sum(unmasked.mask) > 0 and unmasked.reward == 0


def test_an_error_earns_nothing_even_after_a_good_answer(tok):
    half, dead = call_text("submit_answer", answer="Michael Smith"), loop_settings(dict(retrieval="http://127.0.0.1:9", attempts=1, variant="released", mask_errors=False))
    out = run_sync(run_row(row(), played(tok, [half, call_text("search", query="x")], tok.eos_token_id), tok, dead, 1000, 700))
    assert out.traj.submissions[0]["recall"] == .5 and out.reward == 0 and out.numbers["answer"] == 0 and out.traj.stop == "error"


@pytest.mark.parametrize("web", [True, False])
def test_web_tools_end_with_a_dead_search_but_not_with_a_dead_page(tok, web):
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    async def search(request): return JSONResponse(dict(hits=[dict(title="t", url="https://a.example/", content="c", score=1.0)]) if web else dict(error="down"), 200 if web else 503)
    async def content(request): return JSONResponse(dict(error="page server is down"), 503)
    with running_app(Starlette(routes=[Route("/search", search, methods=["POST"]), Route("/get_content", content, methods=["POST"])])) as url:
        s = loop_settings(dict(retrieval=url, tools="web", attempts=1, deadline=3.0))
        r = dict(row(), extra_info=dict(golds='["Michael Mann"]'))
        out = run_sync(run_row(r, played(tok, [call_text("search", query="x"), call_text("query_on_page", url="https://a.example/", question="Who?"), RIGHT], tok.eos_token_id), tok, s, 1000, 900))
    assert (out.traj.stop, out.traj.calls) == (("correct", ["search", "failed", "submit_answer"]) if web else ("error", []))


def test_a_search_that_the_server_refuses_is_a_failed_call(tok, address):
    r = row()
    r["extra_info"]["retrieval"] = "w/no such world"
    out = run_sync(run_row(r, played(tok, [WRONG, call_text("search", query="x"), RIGHT], tok.eos_token_id), tok, loop_settings(dict(retrieval=address)), 1000, 700))
    assert out.traj.calls == ["submit_answer", "failed", "submit_answer"] and out.traj.stop == "correct" and out.traj.faults == {"not_found": 1}


def test_cancellation_is_not_swallowed(tok, address):
    async def slow(ids, room): await asyncio.sleep(60)
    async def go():
        task = asyncio.ensure_future(run_row(row(), slow, tok, loop_settings(dict(retrieval=address)), 1000, 700))
        await asyncio.sleep(.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
    run_sync(go())


def test_rollouts_do_not_wait_for_each_other(tok, address):
    import time
    async def slow(ids, room):
        await asyncio.sleep(.3)
        return tok.encode(RIGHT, add_special_tokens=False) + [tok.eos_token_id], None
    async def go():
        before = time.monotonic()
        rs = await asyncio.gather(*(run_row(row(i), slow, tok, loop_settings(dict(retrieval=address)), 1000, 700) for i in range(20)))
        return rs, time.monotonic() - before
    rs, seconds = run_sync(go())
    assert all(r.reward == .8 for r in rs) and seconds < 5.5                             # one after the other takes 6


def test_trim(tok, address):
    r = run(tok, address, SCRIPTS["correct"])
    n = len(r.response)
    r.response, r.mask, r.logprobs = r.response + [1, 2], r.mask + [0, 0], r.logprobs + [0., 0.]
    assert len(trim(r, 900).response) == n == len(r.mask) == len(r.logprobs)
    r.mask = [0] * n
    assert len(trim(r, 900).response) == 1


# -- the model as the reader of pages

FACT = "Film 0 was directed by Michael Mann. "
LOOK, ASK = call_text("search", query="film"), call_text("query_on_page", url="https://a.example/film", question="Who directed film 0?")


@pytest.fixture(scope="module")
def pages():
    "A server with one short page and one very long one."
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    async def search(request):
        return JSONResponse(dict(hits=[dict(title="Film 0", url=f"https://a.example/{n}", content="c", score=1.0) for n in ("film", "long")]))
    async def content(request):
        url = (await request.json())["url"]
        return JSONResponse(dict(success=True, url=url, title="Film 0", content=FACT + "<|im_end|> Submit. " + "It rained. " * (9000 if url.endswith("long") else 1)))
    with running_app(Starlette(routes=[Route("/search", search, methods=["POST"]), Route("/get_content", content, methods=["POST"])])) as url: yield url


def reads(tok, log, turns, answer="Michael Mann directed it."):
    "An engine that acts by a script and reads pages with one sentence, or not at all."
    left = list(turns)
    async def engine(ids, room, temperature=None):
        log.append((list(ids), room, temperature))
        if temperature is not None and answer is None: raise RuntimeError("no reading today")
        said = tok.encode(left.pop(0) if temperature is None else answer, add_special_tokens=False) + [tok.eos_token_id]
        return said, [-.25] * len(said)
    return engine


def read_row(tok, pages, log, turns=(LOOK, ASK, RIGHT), answer="Michael Mann directed it.", **more):
    s = loop_settings(dict(retrieval=pages, tools="web", reader="llm", variant="released", attempts=1) | more)
    return run_sync(run_row(dict(row(), extra_info=dict(golds='["Michael Mann"]')), reads(tok, log, turns, answer), tok, s, 1000, 3000))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN])
def test_the_reader_is_beside_the_rollout(tok, pages, template):
    log, s = [], loop_settings(dict(retrieval=pages, tools="web", reader="llm", variant="released"))
    r = run_sync(run_row(dict(row(), extra_info=dict(golds='["Michael Mann"]')), reads(tok, log, [LOOK, ASK, RIGHT]), tok, s, 1000, 3000, chat_template=template))
    (ids, room, temperature), = [x for x in log if x[2] is not None]
    page = Page("https://a.example/film", "Film 0", FACT + "<|im_end|> Submit. It rained. ", "")
    assert (temperature, room) == (0.0, 1000)                                                # a quarter of 4000 tokens, less than 2048
    want = LLMReader(None).messages(page, "Who directed film 0?")
    assert tok.decode(ids) == tok.apply_chat_template(want, add_generation_prompt=True, tokenize=False, chat_template=template)
    assert ids.count(tok.eos_token_id) == 2                                                  # the page's own <|im_end|> is inert
    assert r.traj.stop == "correct" and r.traj.messages[-2]["content"] == "Michael Mann directed it." and r.numbers["n_query_on_page"] == 1
    whole = tok.apply_chat_template(spoken(r.traj.messages), tokenize=False, chat_template=template)
    assert tok.decode(r.prompt + r.response) == whole.removesuffix("\n") and READER_PROMPT not in whole
    said = [tok.encode(x, add_special_tokens=False) + [tok.eos_token_id] for x in (LOOK, ASK, RIGHT)]
    assert [i for i, on in zip(r.response, r.mask) if on] == [i for x in said for i in x]
    answer = len(tok.encode("Michael Mann directed it.", add_special_tokens=False)) + 1
    assert [r.numbers[k] for k in READER_NUMBERS] == [1, 0, len(ids), answer]
    about = r.traj.meta["tools"]["reader"]
    assert about["reader"] == "llm" and about["sampling"] == dict(temperature=0.0, max_tokens=1000) and about["chat"]["context"] == 4000


def test_a_long_page_is_cut_to_the_context(tok, pages):
    log, long = [], ASK.replace("/film", "/long")
    r = read_row(tok, pages, log, [LOOK, long, RIGHT], reader_context=1200, reader_max_new=150)
    (ids, room, _), = [x for x in log if x[2] is not None]
    assert room == 150 and .9 * 1050 < len(ids) <= 1050 and "The page goes on" in tok.decode(ids) and FACT in tok.decode(ids)
    assert "[Only the first " in r.traj.messages[-2]["content"] and r.traj.stop == "correct"
    bare = EngineReader(EngineChat(None, tok, 4000), chars=0).messages(Page("https://a.example/long", "Film 0", FACT * 5000, ""), "Who directed film 0?")
    tight, most = [], len(tok.apply_chat_template(bare, add_generation_prompt=True, tokenize=True, return_dict=False)) + 5
    read_row(tok, pages, tight, [LOOK, long, RIGHT], reader_context=most)                    # the question alone leaves hardly any room
    (ids, room, _), = [x for x in tight if x[2] is not None]
    assert FACT not in tok.decode(ids) and 1 <= room <= 10 and len(ids) + room <= most


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=3000), st.text(max_size=60), st.integers(1, 900), st.integers(1, 4000))
def test_what_the_reader_is_given_fits(tok, text, question, context, max_new):
    seen = []
    async def engine(ids, room, temperature):
        seen.append(len(ids) + room)
        return [tok.eos_token_id], None
    reader = EngineReader(EngineChat(engine, tok, context), max_new)
    assert isinstance(run_sync(reader.read(Page("u", "t", text, ""), question)), str)
    assert seen == [] or seen[0] <= context
    if not seen: assert reader.chat.numbers["reader_failed"] == 1                           # not even the question fits


def test_a_reader_that_fails_is_a_tools_answer(tok, pages, tmp_path):
    log = []
    r = read_row(tok, pages, log, answer=None)
    text = r.traj.messages[-2]["content"]
    assert r.traj.stop == "correct" and FACT.strip() in text and "[The reading model failed (no reading today)" in text
    assert [r.numbers[k] for k in READER_NUMBERS] == [1, 1, 0, 0] and r.reward == 1.0
    record_row(tmp_path, r, 1)
    record_row(tmp_path, run(tok, pages, [RIGHT]), 1)
    assert [rollout_metrics(tmp_path)[0][k] for k in READER_NUMBERS] == [.5, .5, 0, 0]
    too_small = read_row(tok, pages, [], reader_context=40)
    assert "leave no room" in too_small.traj.messages[-2]["content"] and too_small.numbers["reader_failed"] == 1
    empty = read_row(tok, pages, [], answer="")
    assert "it gave no answer" in empty.traj.messages[-2]["content"]


def test_time_runs_out_while_a_page_is_read(tok, pages):
    async def slow(ids, room, temperature=None):
        if temperature is not None: await asyncio.sleep(30)
        return tok.encode(turns.pop(0), add_special_tokens=False) + [tok.eos_token_id], None
    turns, s = [LOOK, ASK], loop_settings(dict(retrieval=pages, tools="web", reader="llm", seconds=.5))
    r = run_sync(run_row(dict(row(), extra_info=dict(golds='["Michael Mann"]')), slow, tok, s, 1000, 3000))
    assert r.traj.stop == "deadline" and r.traj.calls == ["search"] and r.numbers["reader_calls"] == 1 and r.seconds[0] > .3


def test_a_real_model_reads(tok, checkpoint, pages):
    "The transformers backend as the engine: what it writes about a page is the greedy continuation of the reader's prompt."
    from transformers import AutoModelForCausalLM
    model, log = AutoModelForCausalLM.from_pretrained(checkpoint), []
    async def go():
        c, turns = Continuer(model, stop={tok.eos_token_id}), [LOOK, ASK, RIGHT]
        async def engine(ids, room, temperature=None):
            if temperature is None: return tok.encode(turns.pop(0), add_special_tokens=False) + [tok.eos_token_id], None
            log.append((ids, room, (await c(ids, room, temperature=temperature))))
            return log[-1][2]
        s = loop_settings(dict(retrieval=pages, tools="web", reader="llm", reader_max_new=12))
        return await run_row(dict(row(), extra_info=dict(golds='["Michael Mann"]')), engine, tok, s, 1000, 3000)
    r = run_sync(go())
    import torch
    (ids, room, (new, _)), = log
    want = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=tok.eos_token_id, pad_token_id=0)[0, len(ids):].tolist()
    assert room == 12 and list(new) == want and r.numbers["reader_tokens"] == len(want) and r.traj.stop == "correct"


def test_the_tool_loop_refuses_the_engine_as_reader():
    with pytest.raises(WebseerError, match="use extract or raw"): tool_config(tools="web", reader="llm")
    assert tool_config(reader="llm")["tools"]                                                # statements have no reader


# -- settings, rows, records

@pytest.mark.parametrize("bad, why", [(dict(alpha=2), "alpha"), (dict(l_expect=9, l_max=5), "l_expect"), (dict(variant="papr"), "did you mean 'paper'"), (dict(k=0), "k is 0"),
                                      (dict(reader="lm"), "did you mean 'llm'"), (dict(reader_max_new=0), "reader_max_new is 0"), (dict(retrival="x"), "did you mean 'retrieval'"), (dict(score="f2"), "f1")])
def test_bad_settings(bad, why):
    with pytest.raises(WebseerError, match=why): agent_config(**bad)


@pytest.mark.parametrize("name, bad", [("max_new", -5), ("attempts", 0), ("attempts", 1.5), ("timeout", 0.0), ("timeout", float("nan")), ("timeout", "10"), ("deadline", 0.0), ("deadline", -1.0),
                                       ("seconds", -1.0), ("reserve", -3), ("test_submissions", 0), ("concurrency", 0), ("max_submissions", -1), ("max_calls", "9"), ("k", None), ("reader_context", -1)])
def test_settings_with_which_no_rollout_works_are_refused(name, bad):
    with pytest.raises(WebseerError, match=f"^agent loop: {name} is .*; it must be ") as e: loop_settings({name: bad})
    assert "\n" not in str(e.value)
    loop_settings(dict(max_new=0, attempts=1, timeout=.1, deadline=1, seconds=0, reserve=0, test_submissions=1, concurrency=1))


@pytest.mark.parametrize("golds", ["Paris", '["Paris"]', {"target": ["Paris"]}, ["Paris"], '{"target": "Paris"}'])
def test_golds_of_other_sets(golds):
    assert row_question(dict(raw_prompt=[dict(role="user", content="q")], reward_model=dict(ground_truth=golds))).golds == ("Paris",)


@pytest.mark.parametrize("gold", ["10.50", "2.10", "1e5", "12345678901234567890.5", "1998", "-0", "NaN", "Infinity", "null", "true", "007", '{"a', "[1"])
def test_golds_that_look_like_numbers_stay_as_written(tok, address, gold):
    golds = lambda **more: row_question(dict(raw_prompt=[dict(role="user", content="q")]) | more).golds
    assert golds(reward_model=dict(ground_truth=gold)) == golds(reward_model=dict(ground_truth=json.dumps(gold))) == (gold,)
    assert golds(reward_model=dict(ground_truth=json.dumps(dict(target=[gold])))) == golds(extra_info=dict(golds=json.dumps([gold]))) == (gold,)
    r = run(tok, address, [call_text("submit_answer", answer=gold)], row=dict(raw_prompt=first_messages("q"), reward_model=dict(ground_truth=gold), extra_info=dict(index=0)))
    assert r.reward == 1.0 and r.numbers["acc"] == 1.0
    assert golds(extra_info=dict(golds="[2.10, 1e5]")) == ("2.10", "1e5")


def test_another_score_of_the_released_variant_counts(tok, address):
    long = call_text("submit_answer", answer="x Michael Mann y z")
    paid = lambda **more: run(tok, address, [long] * 9, row=row(golds='["Michael Mann", "x Michael Mann y z"]'), **more).reward
    assert paid() == 1.0 and paid(score="recall") == 1.0 and paid(score="em") == 0.0 and paid(score="f1") == pytest.approx(2 * 2 / 7)
    assert paid(score="em", first_gold=False) == 1.0


def test_a_right_answer_in_the_last_reply_is_paid(tok, address):
    r = run(tok, address, [call_text("search", query="film")] * 19 + [RIGHT], room=5000, max_turns=20, l_expect=9000, l_max=9999)
    assert (r.traj.stop, r.reward, r.numbers["turns"]) == ("correct", 1.0, 20)


def test_the_trained_tokens_of_a_lost_rollout_are_none(tok, address, tmp_path):
    async def dies(ids, room, said=[]):
        if len(said) == 2: raise RuntimeError("gone")
        said.append(tok.encode(call_text("search", query="film"), add_special_tokens=False) + [tok.eos_token_id])
        return said[-1], [-.5] * len(said[-1])
    lost = run_sync(run_row(row(), dies, tok, loop_settings(dict(retrieval=address)), 1000, 700))
    good = run(tok, address, SCRIPTS["correct"])
    for step, rs in enumerate(([lost], [good], [lost, good]), 1):
        for r in rs: record_row(tmp_path, r, step)
    assert lost.traj.stop == "error" and sum(lost.traj.mask) > 0 == lost.numbers["trained"] == sum(lost.mask)
    n = good.numbers["trained"]
    assert [m["trained"] for m in rollout_metrics(tmp_path)] == [0, n, n / 2] and recorded(tmp_path)[2][0].meta["trained"] == n
    del good.traj.meta["trained"]                                                            # a record of an earlier version
    (tmp_path/"old").mkdir()
    (tmp_path/"old"/"train-000001.1.jsonl").write_text(json.dumps(good.traj.to_dict()) + "\n")
    assert rollout_metrics(tmp_path/"old")[0]["trained"] == n


def left(error, **more): return dict(reward_extra_info=dict(stop_error=float(error)), webseer=dict(error="the server is gone" if error else "")) | more


def test_groups_lost_in_a_row_end_the_run():
    gone, half, good = [left(True)] * 3, [left(True), left(False)], [left(False)] * 2
    assert lost_groups([], [gone, gone], 3, 7) == [gone, gone] == lost_groups([gone, gone], [], 3, 7)
    for other in (half, good, [{}], []): assert lost_groups([gone, gone], [gone, other], 3, 7) == []     # [{}]: a rollout of another loop
    with pytest.raises(WebseerError, match="^step 7: all 9 rollouts ended with an error, the first with: the server is gone"): lost_groups([gone, gone], [gone], 3, 7)
    assert lost_groups([], [half] * 99, 3, 7) == []


def test_records_keep_the_last_attempt(tok, address, tmp_path):
    r = lambda: run(tok, address, SCRIPTS["correct"])
    for step, attempt in ((1, "a"), (2, "a"), (2, "b"), (2, "b"), (3, "b")): record_row(tmp_path, r(), step, attempt)
    record_row(tmp_path, run(tok, address, [RIGHT], row=row(split="test")), 3, "b")
    kept = recorded(tmp_path)
    assert {k: [t.meta["attempt"] for t in ts] for k, ts in kept.items()} == {1: ["a"], 2: ["b", "b"], 3: ["b"]}
    assert [(m["step"], m["rollouts"], m["reward"]) for m in rollout_metrics(tmp_path)] == [(1, 1, .8), (2, 2, .8), (3, 1, .8)]
    assert list(recorded(tmp_path, "test")) == [3]


def test_the_attempt_is_the_session_and_the_job(monkeypatch):
    from types import SimpleNamespace as O
    from webseer.verl_loop import _attempt
    here = O(gcs_address="10.0.0.1:6379", get_job_id=lambda: "02000000", get_session_name=lambda: "session_2026-01-01_10-00-00_000001_77")
    monkeypatch.setitem(sys.modules, "ray", O(is_initialized=lambda: True, get_runtime_context=lambda: here))
    assert _attempt() == "session_2026-01-01_10-00-00_000001_77/02000000"
    del here.get_session_name
    assert _attempt() == "10.0.0.1:6379/02000000"
    sys.modules["ray"].is_initialized = lambda: False
    assert _attempt() == ""


def test_modules_are_light_without_verl():
    code = "import sys, webseer.verl_loop, webseer.verl_cpu; print([m for m in ('torch', 'verl', 'ray', 'transformers', 'starlette') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **cpu_env(), "VERL_USE_EXTERNAL_MODULES": ""}).stdout.strip() == "[]"


def test_continuer_takes_new_weights(checkpoint):
    from transformers import AutoModelForCausalLM
    model, other = AutoModelForCausalLM.from_pretrained(checkpoint), init_weights(Qwen2(ModelConfig(Codec().n, 64, 2, 2, 1, 128)), seed=1)
    async def go():
        c = Continuer(model, stop=set())
        a, _ = await c([5, 6, 7], 8, temperature=0)
        await c.load({k: v.detach() for k, v in other.state_dict().items()}, step=1)
        b, lps = await c([5, 6, 7], 8, temperature=0)
        with pytest.raises(WebseerError, match="no.such"): await c.load({"no.such": model.lm_head.weight})
        return a, b, lps
    a, b, lps = run_sync(go())
    import torch
    ids, want = [5, 6, 7], []
    with torch.no_grad():
        for _ in range(8): ids.append(int(other(torch.tensor([ids]))[0, -1].argmax()))
    assert b == ids[3:] != a and len(lps) == 8 and all(lp < 0 for lp in lps)


def test_continuer_side_by_side_is_as_alone(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad(): [p.mul_(3) for p in model.parameters() if p.ndim > 1]                # far from even, so that contexts matter
    texts = [list(range(5, 5 + 3 * i)) for i in range(1, 7)]
    async def go():
        c = Continuer(model, stop=set())
        return await asyncio.gather(*(c(t, 4 + 7 * (i % 3), temperature=0) for i, t in enumerate(texts)))
    for i, (new, lps) in enumerate(run_sync(go())):
        want = model.generate(torch.tensor([texts[i]]), max_new_tokens=4 + 7 * (i % 3), do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(texts[i]):].tolist()
        assert new == want and len(lps) == len(new)


@pytest.mark.parametrize("kind", [dict(temperature=1.), dict(temperature=.6, top_k=5), dict(temperature=1.3, top_p=.8)])
def test_seeded_draws_do_not_depend_on_company(checkpoint, kind):
    from transformers import AutoModelForCausalLM
    c = Continuer(AutoModelForCausalLM.from_pretrained(checkpoint), stop=set(), most=8)
    async def ask(seeds): return await asyncio.gather(*(c([5, 6, 7 + k % 3], 6 + k % 2, seed=k, **kind) for k in seeds))
    together, alone = run_sync(ask(range(20))), [run_sync(ask([k]))[0] for k in range(20)]
    assert [a for a, _ in together] == [a for a, _ in alone] and len({tuple(a) for a, _ in together}) > 10
    assert [a for a, _ in run_sync(ask([3, 19, 4]))] == [together[k][0] for k in (3, 19, 4)]


def test_draws_follow_the_distribution():
    import torch
    from scipy.stats import chisquare
    c = Continuer.__new__(Continuer)
    logits = torch.tensor([[1.5, 0.2, -1.0, 0.9, -30.0, 0.0]])
    import random
    rng, n = random.Random(1), 4000
    for kind, keep in (((1.0, -1, 1.0), [0, 1, 2, 3, 5]), ((.7, 3, 1.0), [0, 1, 3])):
        got, lps = c._choose(logits.expand(n, -1), [([], 1, *kind, set(), rng)] * n)
        p = torch.softmax(logits[0, keep] / kind[0], 0).double()
        counts = torch.bincount(got, minlength=6)
        assert counts.sum() == counts[keep].sum() and chisquare(counts[keep].numpy(), (p / p.sum() * n).numpy()).pvalue > 1e-3
        assert all(abs(lps[got == k].exp() - p[keep.index(k)]).max() < 1e-6 for k in keep)


def test_the_seed_reaches_the_engine_of_each_turn():
    from itertools import islice
    from webseer.verl_loop import turn_seeds
    at = lambda **more: [d["seed"] for d in islice(turn_seeds(5, row() | dict(global_steps=2, session_id=1) | more), 4)]
    here, others = at(), [at(session_id=0), at(global_steps=3), [d["seed"] for d in islice(turn_seeds(6, row() | dict(global_steps=2, session_id=1)), 4)]]
    assert here == at(uid="another") and len({*here, *sum(others, [])}) == 16 and all(0 <= x < 2**31 for x in here)


def test_load_hf_refuses_what_it_cannot_read(checkpoint, tmp_path):
    import shutil
    def broken(change):
        shutil.rmtree(tmp_path/"x", ignore_errors=True)
        shutil.copytree(checkpoint, tmp_path/"x")
        change(tmp_path/"x")
        return tmp_path/"x"
    def config(**new):
        def change(d): (d/"config.json").write_text(json.dumps(json.loads((d/"config.json").read_text()) | new))
        return change
    for change, why in ((config(model_type="llama"), "llama"), (config(num_hidden_layers=3), "do not fit"), (lambda d: (d/"model.safetensors").write_bytes(b"junk"), "damaged"),
                        (lambda d: (d/"tokenizer.json").unlink(), "tokenizer.json is missing"), (lambda d: (d/"config.json").write_text("{"), "damaged"),
                        (lambda d: (d/"model.safetensors").unlink(), "model.safetensors is missing")):
        with pytest.raises(WebseerError, match=why): load_hf(broken(change))


# -- inside verl

HAVE = importlib.util.find_spec("verl") is not None
inside = pytest.mark.skipif(not HAVE, reason="needs verl in this Python; test_inside_verl runs these where WEBSEER_VERL names one")


@pytest.mark.skipif(HAVE or os.environ.get("WEBSEER_INSIDE") == "1", reason="this Python has verl: its tests run here")
def test_inside_verl():
    "The tests below, in the environment of verl."
    python = os.environ.get("WEBSEER_VERL")
    if not python: pytest.skip("NOTHING OF verl WAS TESTED: WEBSEER_VERL names no Python with verl (make verl makes one)")
    root = Path(__file__).resolve().parent.parent
    r = subprocess.run([python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(Path(__file__)), "-k", "in_verl"], capture_output=True, text=True, cwd=root, timeout=300,
                       env={**os.environ, **cpu_env(), "PYTHONPATH": str(root), "WEBSEER_INSIDE": "1"})
    print(r.stdout[-3000:])
    assert r.returncode == 0, r.stdout[-4000:] + r.stderr[-2000:]


@pytest.fixture(scope="module")
def worker(checkpoint, address, tmp_path_factory):
    "A real AgentLoopWorker of verl, whose engine plays a script."
    folder = tmp_path_factory.mktemp("verl")
    import verl
    from hydra import compose, initialize_config_dir
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
    from verl.workers.rollout.replica import TokenOutput
    own = dict(retrieval=address, variant="released", l_expect=500, l_max=700, record=str(folder/"rollouts"), attempts=1)
    (folder/"agent.yaml").write_text(json.dumps(agent_config(**own)))
    (folder/"tools.yaml").write_text(json.dumps(tool_config(retrieval=address, variant="released")))
    words = [w for w in RL_CPU if "ray_init" not in w and "trainer.device" not in w] + [
        f"actor_rollout_ref.model.path={checkpoint}", "data.max_prompt_length=1000", "data.max_response_length=700", "actor_rollout_ref.rollout.max_model_len=1700",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={folder}/agent.yaml", f"actor_rollout_ref.rollout.multi_turn.tool_config_path={folder}/tools.yaml",
        "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=9", "actor_rollout_ref.rollout.multi_turn.max_parallel_calls=5",
        "actor_rollout_ref.rollout.multi_turn.max_tool_response_length=100000", "actor_rollout_ref.rollout.calculate_log_probs=True"]
    with initialize_config_dir(str(Path(verl.__file__).parent/"trainer"/"config"), version_base=None): cfg = compose("ppo_trainer", overrides=words)
    w = AgentLoopWorker(cfg, llm_client=None)
    class Played:
        def __init__(self): self.turn, self.said, self.broken = {}, {}, set()
        async def generate(self, request_id, *, prompt_ids, sampling_params, **kw):
            i = int(w.tokenizer.decode(prompt_ids).split("film ")[1].split("?")[0])
            if i in self.broken: raise RuntimeError("the engine died")
            k = self.turn[request_id] = self.turn.get(request_id, -1) + 1
            replies = list(SCRIPTS.values())[i % len(SCRIPTS)]
            ids = (w.tokenizer.encode(replies[k] if k < len(replies) else "Done.", add_special_tokens=False) + [w.tokenizer.eos_token_id])[:sampling_params.get("max_tokens", 700)]
            self.said.setdefault(i, []).extend(ids)
            return TokenOutput(token_ids=ids, log_probs=[-.25] * len(ids), stop_reason="completed", extra_fields=dict(global_steps=7, min_global_steps=7, max_global_steps=7))
    w.llm_client = Played()
    w.folder = folder
    return w


def generate(worker, agent, n=len(SCRIPTS)):
    import numpy as np
    from verl.protocol import DataProto
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
    asked = [Question(f"q{i}", f"Who directed film {i}?", ("Michael Mann",), 0, "", (), None) for i in range(n)]
    save_rl(worker.folder/"rl.parquet", [r | dict(agent_name=agent) for r in rl_rows(asked, "train", "w/rl-0-0")])
    ds = RLHFDataset(str(worker.folder/"rl.parquet"), worker.tokenizer, worker.config.data, None)
    batch = DataProto.from_single_dict(collate_fn([ds[i] for i in range(n)]))
    batch.non_tensor_batch["global_steps"] = np.array([3] * n)
    batch.meta_info = dict(validate=False, global_steps=3)
    worker.llm_client.turn, worker.llm_client.said = {}, {}
    return asyncio.get_event_loop_policy().get_event_loop().run_until_complete(worker.generate_sequences(batch))


@inside
def test_in_verl_worker_runs_our_loop(worker):
    out = generate(worker, "webseer")
    kept = {int(t.meta.get("index", t.qid[1:])): t for t in recorded(worker.folder/"rollouts")[3]}
    start = worker.config.data.max_prompt_length
    for i, name in enumerate(SCRIPTS):
        t, n = kept[i], int(out.batch["attention_mask"][i][start:].sum())
        response, mask, scores = out.batch["responses"][i][:n].tolist(), out.batch["response_mask"][i].tolist(), out.batch["rm_scores"][i]
        prompt = out.batch["prompts"][i][out.batch["attention_mask"][i][:start].bool()].tolist()
        assert (prompt + response, [0] * len(prompt) + mask[:n]) == (t.ids, t.mask), name          # verl trains on what our loop recorded
        assert not any(mask[n:]) and [x for x, on in zip(response, mask) if on] == worker.llm_client.said[i]
        want, _ = reward("released", t.submissions, n, dict(alpha=.8, l_expect=500, l_max=700))
        assert scores.nonzero().flatten().tolist() in ([n - 1], []) and abs(float(scores.sum()) - want) < 1e-6, name
        assert out.non_tensor_batch["submissions"][i] == len(t.submissions) and out.non_tensor_batch[f"stop_{t.stop}"][i] == 1
        lps = out.batch["rollout_log_probs"][i][:n].tolist()
        assert all((lp == -.25) == bool(on) for lp, on in zip(lps, mask))
    rewards = [round(float(x.sum()), 4) for x in out.batch["rm_scores"]]
    assert dict(zip(SCRIPTS, rewards)) == {"correct": .8, "once": 1.0, "five wrong": 0.0, "idle": 1.0, "bad json": 1.0, "unknown tool": 1.0, "two calls": .8, "search": 1.0,
                                           "too long": -1.0, "half": round(.5 * .8 ** 4, 4)}


@inside
def test_in_verl_keeps_a_failed_rollout(worker):
    worker.llm_client.broken = {1}
    try: out = generate(worker, "webseer", 3)
    finally: worker.llm_client.broken = set()
    assert len(out) == 3 and out.non_tensor_batch["stop_error"].tolist() == [0, 1, 0] and out.batch["response_mask"][1].sum() == 0
    assert [round(float(x.sum()), 4) for x in out.batch["rm_scores"]] == [.8, 0.0, 0.0]


@inside
def test_in_verl_output_for_its_queue(worker):
    "What the trainer's queue gets: the reward on the last token, the numbers, the versions of the weights."
    import hydra
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap, _agent_loop_registry
    make = lambda **more: hydra.utils.instantiate({**_agent_loop_registry["webseer"], **more}, trainer_config=DictConfigWrap(worker.config), server_manager=worker.llm_client,
        tokenizer=worker.tokenizer, processor=None, hf_model_type="qwen2", dataset_cls=worker.dataset_cls, data_config=DictConfigWrap(worker.config.data), tools=ToolListWrap([]))
    with pytest.raises(Exception, match="did you mean 'max_calls'"): make(max_cals=3)
    loop = asyncio.get_event_loop_policy().get_event_loop()
    out = loop.run_until_complete(make().run(dict(temperature=1., logprobs=True), **row(0), global_steps=5, uid="u", session_id=2))
    d = out.as_dict()
    assert d["rm_scores"][-1] == pytest.approx(.8) and d["rm_scores"][:-1].sum() == 0 and d["response_mask"][-1] == 1 and len(d["rollout_log_probs"]) == len(d["responses"])
    assert d["extra_fields"]["min_global_steps"] == d["extra_fields"]["max_global_steps"] == 7 and d["extra_fields"]["reward_extra_info"]["submissions"] == 2


@inside
def test_in_verl_the_engine_reads_pages(worker, pages):
    "The server manager is asked for a turn under the rollout's request, and for a page under another one, greedily and without log-probabilities."
    import hydra
    from omegaconf import OmegaConf
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
    from verl.workers.rollout.replica import TokenOutput
    tok, asked, turns = worker.tokenizer, [], [LOOK, ASK, RIGHT]
    class Manager:
        async def generate(self, request_id, *, prompt_ids, sampling_params):
            asked.append((request_id, list(prompt_ids), sampling_params))
            page = sampling_params["temperature"] == 0
            ids = tok.encode("Michael Mann directed it." if page else turns.pop(0), add_special_tokens=False) + [tok.eos_token_id]
            return TokenOutput(token_ids=ids, log_probs=[-.25] * len(ids) if sampling_params["logprobs"] else None, stop_reason="completed",
                               extra_fields=dict(global_steps=99 if page else 7))
    (worker.folder/"web.yaml").write_text(json.dumps(agent_config(retrieval=pages, tools="web", reader="llm", reader_max_new=64)))
    entry, = OmegaConf.load(worker.folder/"web.yaml")                                        # as verl's worker reads it
    theirs = dict(trainer_config=DictConfigWrap(worker.config), server_manager=Manager(), tokenizer=tok, processor=None, hf_model_type="qwen2",
                  dataset_cls=worker.dataset_cls, data_config=DictConfigWrap(worker.config.data))
    loop = hydra.utils.instantiate(entry, **theirs, tools=ToolListWrap([]))                  # verl's `tools` replaces one of that name in the file
    with pytest.raises(Exception, match="write tool_set: web"): hydra.utils.instantiate({"_target_": entry["_target_"], "tools": "web"}, **theirs)
    sampling = dict(temperature=1., top_p=.9, top_k=50, repetition_penalty=1.0, logprobs=True)
    given = dict(row(), extra_info=dict(golds='["Michael Mann"]'))
    out = asyncio.get_event_loop_policy().get_event_loop().run_until_complete(loop.run(sampling, **given, global_steps=5, uid="u", session_id=2))
    acts, (page,) = [a for a in asked if a[2]["temperature"]], [a for a in asked if not a[2]["temperature"]]
    assert len({a[0] for a in acts}) == 1 and page[0] != acts[0][0] and [a[2]["top_k"] for a in acts] == [50] * 3
    assert page[2] == dict(temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0, logprobs=False, max_tokens=64)
    assert READER_PROMPT in tok.decode(page[1]) and READER_PROMPT not in tok.decode(out.prompt_ids + out.response_ids)
    said = [i for x in (LOOK, ASK, RIGHT) for i in tok.encode(x, add_special_tokens=False) + [tok.eos_token_id]]
    assert [i for i, on in zip(out.response_ids, out.response_mask) if on] == said and sum(lp == -.25 for lp in out.response_logprobs) == len(said)
    n = out.extra_fields["reward_extra_info"]
    assert n["reader_calls"] == 1 and n["reader_prompt_tokens"] == len(page[1]) and n["reader_failed"] == 0 and n["acc"] == 1
    assert out.extra_fields["min_global_steps"] == out.extra_fields["max_global_steps"] == 7     # the reader's turn is not one of the rollout


@inside
def test_in_verl_the_attempt_names_the_start_of_ray():
    code = ("import ray; from webseer.verl_loop import _attempt; assert _attempt() == '' and not ray.is_initialized(); "
            "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False); a = _attempt(); "
            "b = ray.get(ray.remote(lambda: _attempt()).remote()); assert a == b and a.startswith('session_'), (a, b); print('same')")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert r.stdout.split() == ["same"], r.stderr[-2000:]


class Queue:
    "verl's transfer queue in memory, and a generator that puts a group there for each question asked."
    def __init__(self, group, most=60): self.group, self.most, self.tags, self.data, self.asked, self.fetched = group, most, {}, {}, 0, []
    def kv_list(self, partition_id=None): return dict(train={k: dict(v) for k, v in self.tags.items()})
    def kv_batch_get(self, keys, partition_id, select_fields):
        import torch
        assert keys and partition_id == "train" and set(keys) <= self.data.keys()
        self.fetched.append((tuple(select_fields), len(keys)))
        pick = dict(rm_scores=lambda d: torch.tensor([0.0, d["score"]]), extra_fields=lambda d: d)
        return {f: [pick[f](self.data[k]) for k in keys] for f in select_fields}
    def kv_clear(self, partition_id, keys):
        for k in keys: self.tags.pop(k, None), self.data.pop(k, None)
    def refill(self, n):
        for _ in range(n):
            if self.asked == self.most: raise RuntimeError(f"{self.most} groups were asked for")
            uid, self.asked = f"u{self.asked}", self.asked + 1
            self.tags[uid] = dict(is_prompt=True, status="finished", global_steps=4)
            for k, d in enumerate(self.group(self.asked - 1)):
                self.tags[f"{uid}_{k}_0"], self.data[f"{uid}_{k}_0"] = dict(status="success"), d


def sampled(monkeypatch, group, metric="reward", mode="ReplayBuffer", partition="train", most=60):
    "What verl's replay buffer samples, three groups a step, from groups that are made one by one."
    from types import SimpleNamespace as O
    use_cpu()                                                                                # verl was imported after us, and did not
    import transfer_queue as tq
    from verl.trainer.ppo.v1 import replay_buffer
    from webseer import verl_loop
    assert verl_loop.WebseerManager
    queue = Queue(group, most)
    for name in ("kv_list", "kv_batch_get", "kv_clear"): monkeypatch.setattr(tq, name, getattr(queue, name))
    class Trainer:
        config = O(data=O(train_batch_size=3))
        def ask(self, n): queue.refill(n)
    more = dict(train_batch_size=3, gen_batch_size=1) if mode == "ReplayBuffer" else {}
    buffer = getattr(replay_buffer, mode)("sync" if more else "async", {}, None, "drop", {}, poll_interval=.001, refill_fn=Trainer().ask, filter_groups_metric=metric, **more)
    queue.refill(3)
    batch, metrics = buffer.sample(4, partition, 3)
    return sorted({k.split("_")[0] for k in batch.keys}), metrics, queue


def rolled(scores, error=False): return [left(error, score=float(s)) | dict(reward_extra_info=dict(stop_error=float(error), acc=float(s))) for s in scores]


@inside
@pytest.mark.parametrize("metric", ["reward", "acc"])
@pytest.mark.parametrize("mode", ["ReplayBuffer", "ReplayBufferAsync"])
def test_in_verl_dynamic_sampling_ends_when_all_is_lost(monkeypatch, mode, metric):
    "verl's own replay buffer, which would ask for further questions for ever; the queue is a stand-in."
    go = lambda group, **more: sampled(monkeypatch, group, metric, mode, **more)
    with pytest.raises(WebseerError, match="^step 4: all 6 rollouts ended with an error, the first with: the server is gone. Mend that"): go(lambda i: rolled((0, 0), error=True))
    late = lambda i: rolled((0, 1)) if i < 2 else rolled((0, 0), error=True)                 # the server dies in the middle of a step
    with pytest.raises(WebseerError, match="step 4: all .* rollouts ended with an error"): go(late)


@inside
@pytest.mark.parametrize("mode", ["ReplayBuffer", "ReplayBufferAsync"])
def test_in_verl_dynamic_sampling_goes_on_while_rollouts_end_by_themselves(monkeypatch, mode):
    go = lambda group, **more: sampled(monkeypatch, group, mode=mode, **more)
    with pytest.raises(RuntimeError, match="60 groups were asked for"): go(lambda i: rolled((0, 0)))     # all wrong: verl's business
    with pytest.raises(RuntimeError, match="60 groups were asked for"): go(lambda i: rolled((0, 0), error=i % 3 > 0))
    half = [*rolled((0,)), *rolled((0,), error=True)]
    with pytest.raises(RuntimeError, match="60 groups were asked for"): go(lambda i: half)
    uids, metrics, queue = go(lambda i: rolled((0, 1)) if i in (1, 4, 7) else rolled((0, 0), error=i % 2))
    assert {"u1", "u4", "u7"} >= set(uids) and len(uids) == 3 and metrics["training/filter_groups/evicted_samples"] >= 5
    uids, metrics, queue = go(lambda i: rolled((0, 1)))
    assert len(uids) == 3 and not metrics and {f for f, n in queue.fetched} == {("rm_scores",)}          # nothing more is fetched where nothing is lost
    uids, metrics, queue = go(lambda i: rolled((0, 0), error=True), metric=None)              # no dynamic sampling: the step is full, and step_metrics looks
    assert len(uids) == 3 and queue.fetched == []


@inside
def test_in_verl_tool_loop_with_our_tools(worker):
    out = generate(worker, "tool_agent")
    rewards = {}
    for i, name in enumerate(SCRIPTS):
        state = out.non_tensor_batch["webseer"][i] if out.non_tensor_batch["webseer"][i] is not None else {}
        json.dumps(state)                                                                      # plain data: it travels through verl's queue
        rewards[name] = compute_score("miniweb", "", '["Michael Mann"]', dict(webseer=state), variant="released", l_expect=500, l_max=700)["score"]
    assert rewards["correct"] == .8 and rewards["once"] == 1 and rewards["five wrong"] == 0 and rewards["search"] == 1 and rewards["idle"] == 0
    assert len(out.non_tensor_batch["webseer"][list(SCRIPTS).index("five wrong")]["submissions"]) == 5
    assert rewards["half"] == pytest.approx(.5 * .8 ** 4)


@inside
def test_in_verl_sft_mask_equals_ours(tok, tmp_path):
    "With a template that verl's own data set can render, its ids are ours, and its mask differs at one place: it trains the line break behind a turn's end."
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
    from webseer import verl_loop
    talk = first_messages("Who?") + [dict(role="assistant", content=call_text("search", query="x")), dict(role="tool", content="- u\n  a"), dict(role="assistant", content="Good.\n" + RIGHT)]
    file = str(tmp_path/"sft.parquet")
    save_text(file, sft_trajs([dict(messages=talk), dict(messages=talk[:3])]))
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))     # bytes, and no token across a turn's end
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<|im_start|>", "<|im_end|>")])
    qwen = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=QWEN)
    theirs, ours = MultiTurnSFTDataset(file, qwen, dict(pad_mode="no_padding", max_length=4096)), verl_loop.ReflectionSet(file, qwen, dict(max_length=4096))
    newline, end = qwen.encode("\n", add_special_tokens=False)[0], qwen.eos_token_id
    for a, b in zip(theirs, ours):
        assert a["input_ids"].tolist() == b["input_ids"].tolist()
        differ = [i for i, (x, y) in enumerate(zip(a["loss_mask"].tolist(), b["loss_mask"].tolist())) if x != y]
        ids, mask = b["input_ids"].tolist(), b["loss_mask"].tolist()
        assert differ == [i + 1 for i, (x, on) in enumerate(zip(ids, mask)) if x == end and on] and all(ids[i] == newline and a["loss_mask"][i] == 1 for i in differ)
    embedded = verl_loop.ReflectionSet(file, tok, dict(max_length=4096))[0]
    assert (embedded["input_ids"].tolist(), embedded["loss_mask"].tolist()) == encode_messages(Codec(), talk)
    with pytest.raises(WebseerError, match="max_length=20"): verl_loop.ReflectionSet(file, tok, dict(max_length=20))[0]


@inside
def test_in_verl_finds_backend_and_platform():
    code = ("import verl; from verl.plugin.platform import get_platform; from verl.workers.rollout.base import get_rollout_class; "
            "from verl.workers.rollout.replica import get_rollout_replica_class as r; import pickle, ray.cloudpickle as c; "
            "p = get_platform(); assert p.device_name == 'cpu' and p.communication_backend_name() == 'gloo' and p.device_module.mem_get_info()[1] > 2**30; "
            "import verl.utils.model as m, webseer.verl_cpu as w; assert m.load_valuehead_model is w.open_critic; "
            "a, b = get_rollout_class('hf'), r('hf'); assert c.loads(c.dumps(a)) is a and c.loads(c.dumps(b)) is b; print(a.__name__, b.__name__)")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **cpu_env()})
    assert r.stdout.split() == ["HFAdapter", "HFReplica"], r.stderr[-2000:]
