"""Reflection data from any two policies: rules, stitching, filters, the file, the report, and a run that is killed twenty times."""
import json
import multiprocessing
import random
import signal
import time

import pytest
from hypothesis import given, settings, strategies as st

from tests import synth_driver as driver
from webseer import synth
from webseer.agent import INSTRUCTION, ScriptedPolicy, call_text, parse_reply, render, run_sync
from webseer.batch import Ledger
from webseer.core import WebseerError, keyed_rng, write_text
from webseer.retrieval import MiniWeb, Hit, Page, ask_fair
from webseer.synth import (BRIDGES, VERDICTS, SynthConfig, attempt, closed_book, copies, gives_answer, grade, load_sft, make_report, mix_down, question_copies, read_verdict,
                           report_text, sft_row, synthesise, text_row, valid, verifier_prompt)
from webseer.tools import TOOLS, Tools, WebTools
from webseer.traj import Traj, events, load_trajs
from webseer.world import Question, World

# rules

C, P, I = VERDICTS

@pytest.mark.parametrize("rule, truth, verdict, ok", [("paper", t, v, ok) for t, v, ok in [
    (C, C, 1), (C, P, 0), (C, I, 0), (C, None, 0), (I, C, 0), (I, P, 0), (I, I, 1), (I, None, 0)]] + [("released", t, v, ok) for t, v, ok in [
    (C, C, 1), (C, P, 0), (C, I, 0), (C, None, 0), (P, C, 0), (P, P, 1), (P, I, 0), (P, None, 0), (I, C, 0), (I, P, 1), (I, I, 1), (I, None, 0)]])
def test_validity(rule, truth, verdict, ok): assert valid(verdict, truth, rule) == bool(ok)


@pytest.mark.parametrize("answer, golds, paper, released", [
    ("Paris", ["Paris"], C, C), ("the  PARIS!", ["Paris"], C, C), ("It is Paris, I think", ["Paris"], I, C),                    # substring
    ("Lyon", ["Paris"], I, I), ("Ville de Paris", ["Ville Lumiere Paris", "Paris"], I, P), ("Lutetia", ["Paris", "Lutetia"], C, I),   # first gold only
    ("a b c d e f g h i", ["x b y z w v u t s"], I, I), ("one two three four six", ["one two three four five"], I, C),          # F1 .11 and .8
    ("well known", ["well-known"], I, C), ("b", ["b c d e f g h i j"], I, I), ("", ["Paris"], I, I)])
def test_truth(answer, golds, paper, released): assert (grade(answer, golds), grade(answer, golds, "released")) == (paper, released)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(["correct", "incorrect", "partly", "not", "isn't", "wrong", "answer", "the", "verdict:", "*", ".", "\n", "{", '"']) | st.text(max_size=5)))
def test_any_verdict_text(words):
    v = read_verdict(" ".join(words))
    assert v in (None, *VERDICTS)
    if not any(w in " ".join(words).lower() for w in ("correct", "right", "true", "wrong", "false", "part")): assert v is None


@pytest.mark.parametrize("text", ["correct", '{"verdict": "correct"}', "The answer is correct.", "right", "True", "**Verdict:** correct", "<answer>correct</answer>", "\\boxed{correct}",
    "correct, no doubt", "There is no doubt that it is correct", "correct (not wrong)", "The claim is correct, not incorrect", "Is the answer correct? Yes, it is correct.",
    "I checked whether the answer is correct, and it is correct.", "I was asked to say correct or incorrect. It is correct.", "Correct. The question asks for correct or incorrect.",
    "The proposed answer is correct because no other source contradicts it", "Smith is the most likely author, so the answer is correct.", "It is correct. Mostly I relied on one page."])
def test_said_to_be_correct(text): assert read_verdict(text) == C


@pytest.mark.parametrize("text", ["Partly Correct.", "partially_correct", "PARTIALLY CORRECT", "partly incorrect", "Partly.", "it is not entirely right", "isn't quite right",
    "not actually fully correct", "half right", "mostly correct", "correct in part", "Correct, but only in part.", "The answer is partly correct."])
def test_said_to_be_partly_correct(text): assert read_verdict(text) == P


@pytest.mark.parametrize("text", ["**Incorrect**", "Incorrect. The correct answer is 1843.", "incorrect - the correct answer is Paris", "Incorrect, correct answer is Paris", "Verdict: wrong",
    "The proposed answer is not correct", "the correct answer is Paris, so it is incorrect", "incorrect since the true population is 5", "incorrect because the right name is X",
    "The answer wasn't correct", "The answer wasn’t correct", "The answer isn't correct.", "not actually correct", "cannot be correct", "can not be right", "could not be correct", "doesn't look right",
    "The answer does not seem to be correct", "That can't be right", "never correct", "far from correct", "not the correct one", "Correct? No, it is wrong.", "The answer is wrong: no evidence supports it.",
    "The answer is not Paris, so it is incorrect", "I could not verify that it is correct, so it is incorrect"])
def test_said_to_be_incorrect(text): assert read_verdict(text) == I


@pytest.mark.parametrize("text", ["Paris", "", "this is not wrong", "correct?", "correct or incorrect", "correct or incorrect?", "either correct or incorrect", "correct/incorrect", "correct | incorrect",
    "'correct' or 'incorrect'", "'correct', 'partly correct' or 'incorrect'", "correct and/or incorrect", "correct or not", "It is neither right nor wrong", "not necessarily correct",
    "could not verify that it is correct", "I couldn't confirm it is correct", "There is no evidence that this is correct", "There is not enough evidence to call it correct", "Nothing confirms that it is correct",
    "No source says it is correct", "Unable to determine whether the answer is correct", "It is unclear if this is wrong", "I doubt this is correct", "I am not sure it is correct", "not verified as correct",
    "might be correct", "may not be correct", "probably correct", "unlikely to be correct", "I cannot say that it is incorrect",
    *(verifier_prompt("Who is it?", "Ada", rule) for rule in ("paper", "released"))])
def test_an_echo_or_a_doubt_is_no_verdict(text): assert read_verdict(text) is None


def test_long_texts_are_read_at_once():
    before = time.perf_counter()
    for piece in ("may ", "correct ", "correct, ", "not ", "not be ", "no ", " ", "verdict ", "correct/", "doubt", "partly correct "): read_verdict(piece * 20_000)
    assert time.perf_counter() - before < 5


# known reports

def few(n):
    w = MiniWeb(World(1))
    return Tools(w), [ask_fair(w, keyed_rng("test synth", i), qid=f"q{i}") for i in range(n)]


def scripts(answers, verdicts, search=True):
    "A reasoner that proposes `answers` in turn (None: the gold), a verifier whose k-th sample ever says verdicts[k]."
    told, said = [], iter(verdicts)
    def propose(traj):
        for a in answers:
            notice = yield f"Looking for it.\n" + call_text("search", query=traj.question)
            told.append((yield f"Found.\n" + call_text("submit_answer", answer=a or traj.golds[0])))
    def judge(traj):
        assert traj.question.count(traj.meta["proposal"]) and traj.meta["of"] in traj.question
        if search: yield "Let me see.\n" + call_text("search", query=traj.meta["of"])
        yield "I have seen it.\n" + call_text("submit_answer", answer=next(said))
    return ScriptedPolicy(propose), ScriptedPolicy(judge), told


def one(answers, verdicts, search=True, **cfg):
    tools, (q,) = few(1)
    reasoner, verifier, told = scripts(answers, verdicts, search)
    rec = run_sync(attempt(q, reasoner, verifier, tools, SynthConfig(**cfg)))
    assert not reasoner._runs and not verifier._runs                             # every policy was ended
    return rec, told


def test_confirmed_at_once():
    rec, _ = one([None], ["correct"])
    t = Traj.from_dict(rec["traj"])
    assert (rec["kept"], rec["rounds"], rec["verified"], t.calls, t.stop) == (True, 1, 1, ["search", "search", "submit_answer"], "submitted")
    a = t.golds[0]
    assert [m["content"] for m in t.messages if m["role"] == "assistant"] == [
        "Looking for it.\n", f"Found.\nI think the answer is {a}. Before I submit it, I will verify it.\nLet me see.\n", "The evidence confirms it.\n"]
    assert [t.messages[m]["content"][i:j] for m, i, j in t.spliced] == ["I think the answer is ", ". Before I submit it, I will verify it.\n", "The evidence confirms it.\n"]
    assert [e.source for e in events(t) if e.kind == "thought"] == ["model", "model", "spliced", "model", "spliced", "model", "spliced"]


def test_contradicted_then_confirmed():
    rec, told = one(["Nobody", None], ["correct", "incorrect", "maybe", "correct"])
    assert rec["kept"] and rec["rounds"] == 2 and [(s["round"], s["retry"], s["verdict"], s["valid"]) for s in rec["samples"]] == [
        (0, 0, C, False), (0, 1, I, True), (1, 0, None, False), (1, 1, C, True)]
    assert told == [synth.CONTRADICTED.format(answer="Nobody")]
    t = Traj.from_dict(rec["traj"])
    texts = [m["content"] for m in t.messages if m["role"] == "assistant"]
    assert texts[2].startswith(BRIDGES["incorrect"] + "\nLooking for it.") and len(texts) == 5 and t.calls == ["search"] * 4 + ["submit_answer"]
    assert not any(synth.CONTRADICTED.split("{")[0] in m["content"] for m in t.messages)      # told in private
    judge = j = synth.judge_report(rec["samples"])
    assert judge["proposals"] == 2 and j["disagreement"] == 1. and j["no_verdict"] == .5 and j["classes"][C]["precision"] == 0 and j["classes"][I]["recall"] == 0


def test_every_round_sample_and_attempt_has_its_own_seed():
    tools, qs = few(2)
    seeds = []
    def propose(traj):
        seeds.append(traj.seed)
        for _ in range(3): yield call_text("submit_answer", answer="Nobody"); seeds.append(traj.seed)
    def judge(traj):
        seeds.append(traj.seed)
        yield call_text("search", query="x")
        yield call_text("submit_answer", answer="correct" if traj.seed % 3 else "incorrect")
    run = lambda seed: [run_sync(attempt(q, ScriptedPolicy(propose), ScriptedPolicy(judge), tools, SynthConfig(max_rounds=3, seed=seed), n)) for q in qs for n in (0, 1)]
    recs = run(0)
    assert len(seeds) == sum(r["rounds"] + len(r["samples"]) for r in recs) and len(set(seeds)) == len(seeds) > 20
    first = list(seeds); seeds.clear(); run(0)
    assert seeds == first
    seeds.clear(); run(1)
    assert not set(seeds) & set(first)


@pytest.mark.parametrize("answers, verdicts, cfg, why, rounds", [
    (["Nobody"] * 9, ["incorrect"] * 9, dict(max_rounds=3), "rounds spent", 3), (["Nobody"], ["correct"] * 9, dict(retries=4), "no valid verdict", 1),
    (["Nobody"], [], dict(p_verify=0), "wrong answer", 1), ([None], [], dict(p_verify=0), "kept", 1), ([None], ["partly correct"] * 2 + ["correct"], dict(retries=2), "no valid verdict", 1),
    (["Nobody", None], ["partly correct", "correct"], dict(rule="released"), "kept", 2), (["Nobody", None], ["partly correct", "correct"], dict(retries=1), "no valid verdict", 1),
    ([None], ["correct"], dict(verifier_turns=1, retries=1), "no valid verdict", 1), ([None], ["correct"], dict(reasoner_turns=1), "max_turns", 0)])
def test_ends(answers, verdicts, cfg, why, rounds):
    rec, _ = one(answers, verdicts, **cfg)
    assert (rec["why"], rec["rounds"], rec["kept"], rec["traj"] is not None) == (why, rounds, why == "kept", why == "kept")


def test_the_verifier_must_search():
    assert one([None], ["correct"] * 11, search=False)[0]["why"] == "no valid verdict"
    rec, _ = one(["Nobody", None], ["incorrect", "correct"], search=False, must_search=False)
    t = Traj.from_dict(rec["traj"])
    assert rec["kept"] and t.calls == ["search", "search", "submit_answer"] and not any(s["searched"] for s in rec["samples"])
    conversation(t)
    assert t.messages[-1]["content"].startswith("Found.\nI think") and "contradicts" in t.messages[4]["content"]


def test_clumsy_turns_are_left_out():
    def propose(traj):
        yield "I wonder."
        yield "<think>first</think>" + call_text("serch", query="x") + call_text("search", query="y")
        yield call_text("submit_answer", answer=" ")
        yield "And now.\n" + call_text("search", query="z") + call_text("submit_answer", answer=traj.golds[0]) + call_text("search", query="never")
    def judge(traj):
        yield "<tool_call>{"
        yield "<think>hm <tool_call></think>Well." + call_text("search", query="v")
        yield call_text("submit_answer", answer="correct")
    tools, (q,) = few(1)
    rec = run_sync(attempt(q, ScriptedPolicy(propose), ScriptedPolicy(judge), tools))
    t = Traj.from_dict(rec["traj"]); conversation(t)
    assert t.calls == ["search"] * 3 + ["submit_answer"] and [json.loads(c["function"]["arguments"]).get("query") for m in t.messages for c in m.get("tool_calls", [])] == ["y", "z", "v", None]
    assert t.messages[2]["content"] == "<think>first</think>" and t.messages[6]["content"].endswith("hm Well.")
    assert rec["use"]["reasoner"]["faults"] == dict(no_call=1, several_calls=2, unknown_tool=1, empty_answer=1) and rec["use"]["verifier"]["faults"] == dict(unclosed=1)


class Pages:
    "An engine with one page per query."
    def search(self, query, k): return [Hit(query, f"https://a.example/{query}", "extract", 1.)]
    def fetch(self, url): return Page(url, "title", "text", "<p>text</p>")


def test_the_reasoner_may_read_what_the_verifier_found():
    def propose(traj):
        yield call_text("search", query="mine")
        yield call_text("submit_answer", answer="wrong")
        yield call_text("query_on_page", url="https://a.example/yours", question="What?")
        yield call_text("query_on_page", url="https://a.example/mine", question="What?")
        yield call_text("submit_answer", answer="gold")
    def judge(traj):
        yield call_text("query_on_page", url="https://a.example/mine", question="What?")      # never returned to the verifier
        yield call_text("search", query="yours")
        yield call_text("submit_answer", answer="correct" if traj.meta["proposal"] == "gold" else "incorrect")
    q = Question("q", "What?", ("gold",), 1, "", (), None)
    rec = run_sync(attempt(q, ScriptedPolicy(propose), ScriptedPolicy(judge), WebTools(Pages())))
    assert rec["traj"]["calls"] == ["search", "search", "query_on_page", "query_on_page", "search", "submit_answer"]
    assert rec["use"]["verifier"]["faults"] == dict(not_allowed=2)


# runs

def conversation(t):
    "A valid conversation whose turns parse."
    assert [m["role"] for m in t.messages[:2]] == ["system", "user"] and t.messages[1]["content"] == t.question and not t.ids and not t.mask
    ids = []
    for before, m in zip(t.messages[1:], t.messages[2:]):
        if m["role"] == "assistant":
            assert before["role"] in ("user", "tool") and not ids
            said = parse_reply(render([m]).removeprefix("<|im_start|>assistant\n"))
            assert said.error is None and said.calls == [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in m["tool_calls"]]
            ids = [c["id"] for c in m["tool_calls"]]
        else: assert m["role"] == "tool" and m["tool_call_id"] == ids.pop(0)
    assert len(ids) == 1 and t.messages[-1]["role"] == "assistant"              # the submission, which ends it
    names = [c["function"]["name"] for m in t.messages for c in m.get("tool_calls", [])]
    assert [c.replace("check", "query_on_page") for c in t.calls] == names and names.count("submit_answer") == 1 and names[-1] == "submit_answer"
    assert all(e.fault == "" for e in events(t))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run of 500 questions."
    folder = tmp_path_factory.mktemp("whole")
    driver.write_questions(folder/"questions.jsonl", 500)
    return folder, driver.run(folder)


def test_trajectories_replay(whole):
    folder, rep = whole
    ts, tools = load_trajs(folder/"out"/"trajectories.jsonl"), Tools(driver.web())
    assert len(ts) == rep["kept"] > 100 and {t.meta["rounds"] for t in ts} == {1, 2, 3}
    ours = "".join(x for b in BRIDGES.values() for x in ([b] if isinstance(b, str) else b)) + "\n"
    for t in ts:
        conversation(t)
        assert t.submissions[0]["em"] == 1 and t.meta["proposals"][-1][1] == "correct" and all(truth == "incorrect" for _, truth in t.meta["proposals"][:-1])
        assert all(t.messages[m]["content"][i:j].rstrip("\n") in ours for m, i, j in t.spliced)
        written = [e.text.strip() for e in events(t) if e.kind == "thought" and e.source == "model"]
        proposed = [a for a, _ in t.meta["proposals"]]
        for x in written: assert all(l in ("So be it.", *proposed) or l.startswith("Now the ") for l in x.splitlines())
        answers = {m["tool_call_id"]: m["content"] for m in t.messages if m["role"] == "tool"}
        for m in t.messages:
            for c in m.get("tool_calls", [])[:1]:
                if c["id"] in answers: assert tools.call(c["function"]["name"], json.loads(c["function"]["arguments"])) == answers[c["id"]]


def test_report_agrees_with_the_records(whole):
    folder, rep = whole
    led = Ledger(folder/"out"/"attempts")
    recs = [r["value"] for r in led.rows(led.at)]
    first = [s for r in recs for s in r["samples"] if s["retry"] == 0]
    flagged, wrong = [s for s in first if s["verdict"] == I], [s for s in first if s["truth"] == I]
    both = [s for s in flagged if s["truth"] == I]
    v = rep["verifier"]["classes"][I]
    assert (v["precision"], v["recall"]) == (len(both) / len(flagged), len(both) / len(wrong)) and .5 < v["recall"] < 1
    assert rep["attempts"] == len(recs) == 500 == rep["accepted"] + sum(rep["why_not"].values()) and rep["kept"] == rep["accepted"] - sum(rep["dropped"].values())
    assert rep["mix"]["multi"] == int(1.5 * rep["mix"]["single"]) or rep["mix"]["single"] == int(rep["mix"]["multi"] / 1.5)
    assert rep["use"]["reasoner"]["rollouts"] == sum(r["rounds"] for r in recs) + sum(r["why"] in ("max_turns", "max_calls") for r in recs)
    assert rep["use"]["verifier"]["rollouts"] == sum(len(r["samples"]) for r in recs) and sum(rep["verifier"]["retries"].values()) == sum(r["verified"] for r in recs)
    assert "| incorrect |" in (folder/"out"/"report.md").read_text() and rep["failed"] == 0


def test_file_gives_back_what_went_in(whole, tmp_path):
    datasets, pd = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    folder, _ = whole
    ts = [t.to_dict() for t in load_trajs(folder/"out"/"trajectories.jsonl")]
    want, path = [sft_row(t) for t in ts], str(folder/"out"/"sft.parquet")
    assert load_sft(path) == want and want[0]["tools"] == TOOLS and want[0]["messages"][0]["content"] == INSTRUCTION
    decode = lambda r: {**r, **{k: json.loads(r[k]) for k in ("messages", "tools", "meta")}}
    assert [decode(r) for r in datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path))] == want
    assert [decode({**r, "golds": list(r["golds"])}) for r in pd.read_parquet(path).to_dict("records")] == want
    text = datasets.Dataset.from_parquet(str(folder/"out"/"sft_text.parquet"), cache_dir=str(tmp_path))
    assert [dict(r) for r in text] == [text_row(t) for t in ts]
    assert all(a["role"] != b["role"] for r in text for a, b in zip(r["messages"], r["messages"][1:]))


def test_chat_template_renders_rows_as_the_loop_did(whole):
    transformers, model = pytest.importorskip("transformers"), pytest.importorskip("webseer.model")
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=model.build_tokenizer(), chat_template=model.CHAT_TEMPLATE)
    folder, _ = whole
    for t, row in zip(load_trajs(folder/"out"/"trajectories.jsonl")[:40], load_sft(folder/"out"/"sft.parquet")):
        assert tok.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) == render(t.messages)
        plain = text_row(t.to_dict())["messages"]
        assert tok.apply_chat_template(plain, tokenize=False) == render(t.messages)


def test_bad_files(tmp_path):
    write_text(tmp_path/"x", "PAR1 no")
    with pytest.raises(WebseerError, match="not readable as parquet"): load_sft(tmp_path/"x")
    pa = pytest.importorskip("pyarrow"); import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist([dict(messages=[dict(role="user", content="x")])]), tmp_path/"y")
    with pytest.raises(WebseerError, match="has no column tools"): load_sft(tmp_path/"y")
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(synth.COLUMNS, "x")]), tmp_path/"z")
    with pytest.raises(WebseerError, match="must hold JSON text"): load_sft(tmp_path/"z")


# filters

@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from("bcdefgh"), max_size=6).map(" ".join), max_size=12), st.sampled_from([.3, .5, .75, .9, 1.]))
def test_copies_are_all_found_and_no_others(texts, near):
    want, firsts, exact = {}, [], {}
    for i, t in enumerate(texts):
        s = set(t.split())
        if t in exact: want[i] = want[exact[t]] if exact[t] in want else exact[t]; continue
        exact[t] = i
        best = max(((len(s & f) / len(s | f), -j) for j, f in firsts if s and f), default=(0, 0))
        if best[0] >= near: want[i] = -best[1]
        elif s: firsts.append((i, s))
    assert {i: j for i, (j, _) in copies(texts, near).items()} == want


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.floats(.05, 20), st.integers(0, 3))
def test_mix(multi, single, ratio, seed):
    trajs = [dict(qid=f"q{i}", question="?", meta=dict(sample=0, rounds=2 if i < multi else 1)) for i in range(multi + single)]
    random.Random(seed).shuffle(trajs)
    kept = mix_down(trajs, ratio, seed)
    m = sum(trajs[i]["meta"]["rounds"] > 1 for i in kept); s = len(kept) - m
    assert kept == sorted(set(kept)) and (m == multi or s == single)             # one kind stays whole
    if multi and single: assert m and s and abs(m - ratio * s) <= max(1, ratio)
    else: assert len(kept) == multi + single


def asked(qid, text, golds, world=None): return Question(qid, text, golds, 1, "", (), world)


def test_copies_are_the_same_question():
    bags = ["Who is the mentor of the spouse of Sordal?", "Who is the spouse of the mentor of Sordal?", "Of Sordal, who is the mentor of the spouse?"]
    found = lambda near=.9, **worlds: {i: j for i, (j, _) in question_copies([asked(str(i), t, g, w) for i, (t, g, w) in enumerate(worlds["of"])], near).items()}
    a, b = ("Ada",), ("Bob", "Ada B.")
    assert found(of=[(bags[0], a, None), (bags[1], b, None), (bags[2], a, None), (bags[1], ("ada b!",), None)]) == {2: 0, 3: 1}
    assert found(of=[(t, a, 0) for t in bags]) == {}                                              # a world's questions are all made of the same words
    assert found(of=[(bags[0], a, 0), (bags[0], a, 1), (bags[0], a, None), (bags[0].upper(), b, "1")]) == {3: 1}      # one text in one world has one right answer
    assert found(None, of=[(bags[0], a, None), (bags[2], a, None), (bags[0] + "!", b, None), (bags[0], a, 7)]) == {2: 0}
    from webseer.questions import drop_copies
    for items in ([asked(str(i), t, g, w) for i, (t, g, w) in enumerate((t, g, w) for t in bags for g in (a, b) for w in (None, 0, 1))], few(40)[1]):
        for near in (.9, None):
            gone = question_copies(items, near)
            assert [q for i, q in enumerate(items) if i not in gone] == drop_copies(items, near)[0]
            assert sum(s == 1 for _, s in gone.values()) == drop_copies(items, near)[1]["copies"]


def test_a_run_keeps_questions_that_only_look_alike(tmp_path):
    reasoner, verifier = gold_scripts()
    spouse = "Who is the spouse of Sordal?"
    qs = [asked("w0", spouse, ("Ada",), 0), asked("w1", spouse, ("Bob",), 1), asked("w2", spouse.upper(), ("Bob",), 1), asked("c1", "Who is the mentor of the spouse of Sordal?", ("Cid",)),
          asked("c2", "Who is the spouse of the mentor of Sordal?", ("Dan",)), asked("c3", "Who is the spouse of Sordal's mentor?", ("Eve",))]
    run = lambda near: run_sync(synthesise(qs, reasoner, verifier, Tools(MiniWeb(World(1))), tmp_path, SynthConfig(near=near), progress=False))
    for near in (.5, .9, None): assert (rep := run(near))["dropped"] == dict(duplicate=1) and rep["kept"] == 5


def gold_scripts():
    "A reasoner that searches and is right, a verifier that searches and agrees."
    def propose(traj):
        yield call_text("search", query=traj.question)
        yield call_text("submit_answer", answer=traj.golds[0])
    def judge(traj):
        yield call_text("search", query="y")
        yield call_text("submit_answer", answer="correct")
    return ScriptedPolicy(propose), ScriptedPolicy(judge)


def test_tools_may_be_a_function_of_the_question(tmp_path):
    from webseer.world import WorldConfig
    webs = {w: MiniWeb(World(w, WorldConfig(n_entities=24))) for w in (1, 2)}
    qs = [ask_fair(web, keyed_rng("two worlds", i), qid=f"{w}-{i}") for w, web in webs.items() for i in range(3)]
    tools, used = {w: Tools(web) for w, web in webs.items()}, []
    def of(q): used.append(q.qid); return tools[int(q.qid[0])]
    rep = run_sync(synthesise(qs, *gold_scripts(), of, tmp_path/"a", progress=False))
    assert rep["attempts"] == rep["kept"] == 6 and set(used) == {q.qid for q in qs}
    run_sync(synthesise(qs[:3], *gold_scripts(), tools[1], tmp_path/"b", progress=False))
    assert (tmp_path/"a"/"trajectories.jsonl").read_text().startswith((tmp_path/"b"/"trajectories.jsonl").read_text())      # results of the right world
    sessions = []
    def web(q): sessions.append(WebTools(Pages())); return sessions[-1]
    assert run_sync(attempt(asked("q", "What?", ("gold",)), *gold_scripts(), web))["kept"] and len(sessions) == 2             # reasoner and verifier


@pytest.mark.parametrize("reply, golds, right", [("The answer is Paris.", ["Paris"], 1), ("It was built in 1912, I believe.", ["1912"], 1), ("Parisians know it.", ["Paris"], 0), ("Paris", ["Lyon", "paris"], 1),
    ("<think>Paris or Lyon?</think>Lyon.", ["Paris"], 0), ("<think>Paris", ["Paris"], 0), ("<think>Lyon?</think>The capital is **Paris**", ["Paris"], 1), ("", ["Paris"], 0),
    ("There is no way to know.", ["no"], 0), ("I do not know.", ["no"], 0), ("No.", ["no"], 1), ("**No**, it isn't.", ["No"], 1), ("The answer is no.", ["no"], 1), ("Yes, they are.", ["yes"], 1), ("Yes men say so.", ["yes"], 0),
    ("Is it true that he left?", ["true"], 0), ("It has 4 members and 2 heads.", ["4"], 0), ("The number is 4.", ["4"], 1), ("4", ["4"], 1), ("Answer: 12", ["12"], 1), ("It was born in 12 places.", ["12"], 0),
    ("This is vitamin C, as in lemons.", ["C"], 0), ("It is C, as in lemons.", ["C"], 1), ("...", ["?", "!"], 0)])
def test_an_answer_in_a_sentence(reply, golds, right): assert bool(gives_answer(reply, golds)) == bool(right)


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_closed_book_finds_what_is_only_said(rule):
    "Without tools a model may not submit at all; a submission is graded as before."
    ask = lambda said, golds=("Paris", "Lutetia"): run_sync(closed_book(asked("q", "Capital?", golds), ScriptedPolicy(lambda traj: (x for x in said)), SynthConfig(closed_book=1, rule=rule)))
    assert ask(["The answer is Paris.", "I have no tools."]) | dict(use=0) == dict(right=1, answers=["The answer is Paris."], use=0)
    assert ask(["I do not know.", "No idea at all."], ("no",))["right"] == 0 and ask(["Lutetia it is.", "Yes."])["right"] == (rule == "paper")
    assert ask([call_text("submit_answer", answer="It is Paris")])["right"] == (rule == "released") and ask([call_text("submit_answer", answer="Paris")])["right"] == 1
    assert ask(["It is Paris.", call_text("submit_answer", answer="Lyon")])["right"] == 0


def test_what_failed_is_reported(tmp_path):
    class Down:
        passing = ()
        def start(self, t): pass
        async def act(self, t): raise WebseerError(f"no server | {t.question[:3]}")
        def end(self, t): pass
    tools, qs = few(3)
    qs = [asked(q.qid, f"{'abb'[i]} {q.text}", q.golds) for i, q in enumerate(qs)]
    rep = run_sync(synthesise(qs, Down(), Down(), tools, tmp_path, progress=False))
    text = (tmp_path/"report.md").read_text()
    assert rep["failed"] == 3 and rep["attempts"] == 0 and report_text(rep) == text and "| failed | 3 |" in text
    told, = [l for l in text.splitlines() if l.startswith("| most frequent failures |")]
    assert told.index("2 times: ") < told.index("1 times: ") and "no server" in told
    assert "| failed | 0 |\n| most frequent failures | - |" in report_text(make_report([]))


def test_leaks_copies_and_identical_trajectories(tmp_path):
    tools, qs = few(12)
    qs = [asked(q.qid, q.text, q.golds) for q in qs]                              # of no world, where near ones can be copies
    twin = Question("twin", qs[4].text.upper(), qs[4].golds, 1, "", (), None)
    near = Question("near", qs[5].text.rstrip("?") + ", please?", qs[5].golds, 1, "", (), None)
    def propose(traj):
        closed = [s["function"]["name"] for s in traj.tools] == ["submit_answer"]
        assert closed == (traj.meta.get("role") == "closed book")
        if closed: yield call_text("submit_answer", answer=traj.golds[0] if traj.qid in ("q1", "q2") and traj.seed % 2 else "no idea")
        yield call_text("search", query="x")
        yield call_text("submit_answer", answer=traj.golds[0])
    def judge(traj):
        yield call_text("search", query="y")
        yield call_text("submit_answer", answer="correct")
    cfg = SynthConfig(closed_book=8, near=.7, attempts=2)
    run = lambda cfg: run_sync(synthesise([*qs, twin, near], ScriptedPolicy(propose), ScriptedPolicy(judge), tools, tmp_path, cfg, progress=False))
    rep = run(cfg)
    assert rep["dropped"]["duplicate"] >= 1 and rep["dropped"]["near_duplicate"] >= 1 and rep["dropped"]["closed_book"] == 2
    fresh = 14 - rep["dropped"]["duplicate"] - rep["dropped"]["near_duplicate"] - 2
    assert rep["attempts"] == rep["accepted"] == 2 * fresh and rep["use"]["closed book"]["rollouts"] == 8 * (fresh + 2)
    qids = [r["qid"] for r in load_sft(tmp_path/"sft.parquet")]
    assert rep["dropped"]["identical"] >= fresh and len(qids) == rep["kept"] and not {"q1", "q2", "twin", "near"} & set(qids)
    from dataclasses import replace
    rep = run(replace(cfg, closed_book=0, near=None, attempts=1))                # chosen anew; only what is new is sampled
    assert rep["attempts"] == 13 and rep["dropped"].get("closed_book") is None


@pytest.mark.parametrize("bad, said", [(dict(rule="x"), "known: paper, released"), (dict(retries=0), "retries=0"), (dict(max_rounds=1.5), "max_rounds=1.5"),
                                       (dict(p_verify=2), "p_verify=2"), (dict(near=0), "near=0"), (dict(mix=-1), "mix=-1"), (dict(closed_book=-1), "closed_book=-1")])
def test_settings_are_checked(bad, said):
    with pytest.raises(WebseerError, match=said): SynthConfig(**bad)


def test_embedded_model_is_refused(tmp_path):
    class Embedded: sampler = None
    with pytest.raises(WebseerError, match="use an EndpointPolicy"): run_sync(synthesise([], Embedded(), Embedded(), None, tmp_path))


def test_a_server_that_fails_is_no_verdict(tmp_path):
    "Over a real server: what failed is tried again; tokens are counted by role."
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from webseer.endpoint import EndpointPolicy
    from webseer.remote import running_app
    tools, qs = few(6); golds = {q.text: q.golds[0] for q in qs}; bad, seeds = {qs[2].text}, []
    async def chat(request):
        body = await request.json()
        task = next(m["content"] for m in body["messages"] if m["role"] == "user")
        verifying = "Proposed answer" in task
        seeds.append(body["seed"])
        if verifying and any(b in task for b in bad): return JSONResponse(dict(error=dict(message="broken")), 400)
        if body["messages"][-1]["role"] == "user": name, args = "search", dict(query="x")
        else: name, args = "submit_answer", dict(answer="**Correct.**" if verifying else golds[task])
        call = dict(id="c", type="function", function=dict(name=name, arguments=json.dumps(args)))
        return JSONResponse(dict(choices=[dict(message=dict(role="assistant", content="", tool_calls=[call]), finish_reason="tool_calls")],
                                 usage=dict(prompt_tokens=50, completion_tokens=5)))
    with running_app(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])) as url:
        run = lambda: run_sync(synthesise(qs, p := EndpointPolicy(url, "m", api_key_env=None), p, tools, tmp_path, SynthConfig(near=None), progress=False))
        rep = run()
        assert rep["failed"] == 1 and rep["attempts"] == rep["accepted"] == 5 and "broken" in next(iter(rep["failures"]))
        half, = map(json.loads, (tmp_path/"attempts"/"partial.jsonl").read_text().splitlines())
        assert half["partial"]["phases"][0]["stop"] == "submitted"
        bad.clear()
        rep = run()
    assert rep["failed"] == 0 and rep["accepted"] == 6 and len(set(seeds)) == len(seeds) - 3       # the retried attempt repeats its seeds
    assert {w: (u["turns"], u["prompt_tokens"], u["completion_tokens"]) for w, u in rep["use"].items()} == dict(reasoner=(12, 600, 60), verifier=(12, 600, 60))


# killed twenty times

def test_killed_twenty_times(whole, tmp_path):
    folder, rep = whole
    (tmp_path/"questions.jsonl").write_bytes((folder/"questions.jsonl").read_bytes())
    rng, counts, records = random.Random(4), [], tmp_path/"out"/"attempts"/"records.jsonl"
    processes = multiprocessing.get_context("forkserver")                       # its children are processes of their own, but need not import anything
    processes.set_forkserver_preload(["tests.synth_driver"])
    for kill in range(20):
        here, there = processes.Pipe(duplex=False)
        p = processes.Process(target=driver.child, args=(str(tmp_path), .01, there))
        p.start()
        assert here.poll(60) and here.recv() == "begin"
        time.sleep(rng.uniform(.1, .6))
        assert p.is_alive(), "the run ended before it could be killed"
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL
        counts.append(records.read_bytes().count(b"\n") if records.exists() else 0)
    assert 20 < counts[-1] < 500 and len(set(counts)) > 5, counts              # work was done between the kills, and left to do
    again = driver.run(tmp_path)
    keys = [json.loads(l)["key"] for l in records.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 500                                   # nothing was finished twice
    assert load_sft(tmp_path/"out"/"sft.parquet") == load_sft(folder/"out"/"sft.parquet")
    for name in ("sft.parquet", "sft_text.parquet", "trajectories.jsonl"): assert (tmp_path/"out"/name).read_bytes() == (folder/"out"/name).read_bytes()
    assert {k: v for k, v in again.items() if "seconds" not in k} == {k: v for k, v in rep.items() if "seconds" not in k}
    print(f"finished attempts after each kill: {counts}")
