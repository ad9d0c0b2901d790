"""The audit against numbers worked out by hand; every expected value is computed here from the definitions, not by the module."""
import json
import math
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch")
from webseer import audit as A
from webseer import released
from webseer.agent import first_messages
from webseer.core import WebseerError
from webseer.traj import Traj


def say(*answers, written=10, observed=5, golds=("Oscar Wilde",), group="g", reply=4):
    "One submission per reply; the last reply is followed by nothing."
    turns = [A.Turn(written, [a], observed) for a in answers]
    turns[-1].observed = 0
    return A.Course(group, list(golds), turns, reply)


def only(**changes): return A.replace(A.RELEASED, **changes)


# -- one course, both variants

def test_sentence_then_bare_answer():
    c = say("It is Oscar Wilde", "Oscar Wilde")
    p, r = A.read(c, A.PAPER), A.read(c, A.RELEASED)
    assert p.scores == pytest.approx([2 * 2 / (4 + 2), 1]) and p.reward == pytest.approx(0.8 * 0.8) and p.length == 20 and p.ended == "correct"
    assert r.scores == [1] and r.reward == 1 and r.length == 10 + 4 and r.ended == "correct" and r.trailing == 4


def test_better_then_worse():
    c = say("Wilde", "Shaw")
    p, r = A.read(c, A.PAPER), A.read(c, A.RELEASED)
    assert p.scores == pytest.approx([2 / 3, 0]) and p.reward == 0
    assert r.scores == [0.5, 0] and r.reward == pytest.approx(0.5 * 0.8) and r.ended == p.ended == "recording" and r.trailing == 0


def test_nearly_is_not_correct_for_the_paper():
    gold = "one two three four five six seven eight nine ten"
    p, r = (A.read(say(gold + " more", gold, golds=[gold]), v) for v in (A.PAPER, A.RELEASED))
    assert p.scores == pytest.approx([20 / 21, 1]) and r.scores == [1]
    nine = gold.removesuffix(" ten")                                 # recall 0.9 is not above 0.9
    assert A.read(say(nine, gold, golds=[gold]), A.RELEASED).scores == [0.9, 1]


def test_alias_and_hyphen():
    golds = ("New York", "Big Apple")
    assert A.read(say("big apple", golds=golds), A.PAPER).reward == pytest.approx(0.8)
    assert A.read(say("big apple", golds=golds), A.RELEASED).reward == 0
    assert A.read(say("new-york", golds=golds), A.PAPER).reward == 0
    assert A.read(say("new-york", golds=golds), A.RELEASED).reward == 1
    assert A.read(say("new-york", golds=golds), only(hyphens=False)).reward == 0
    assert A.read(say("big apple", golds=golds), only(aliases="all")).reward == 1


def test_most_submissions():
    c = say(*["Shaw"] * 6, "Oscar Wilde")
    p, r = A.read(c, A.PAPER), A.read(c, A.RELEASED)
    assert p.submissions == 7 and p.reward == pytest.approx(0.8**7)
    assert r.submissions == 5 and r.reward == 0 and r.ended == "submissions" and r.replies == 5
    assert A.read(c, only(most=20)).reward == pytest.approx(0.8**6)
    many = A.read(say(*["Shaw"] * 30), A.replace(A.PAPER, turns=99, carried=99))
    assert many.submissions == 20 and many.ended == "submissions"


def test_replies_and_the_call_that_is_not_carried_out():
    at = lambda n: A.Course("g", ["Oscar Wilde"], [A.Turn(3, [], 7) for _ in range(n - 1)] + [A.Turn(3, ["Oscar Wilde"], 0)], 4)
    assert A.read(at(19), A.RELEASED).reward == 1
    r = A.read(at(20), A.RELEASED)
    assert r.reward == 0 and r.submissions == 0 and r.ended == "turns" and r.replies == 20 and r.length == 20 * 3 + 19 * 7
    assert A.read(at(30), A.PAPER).reward == pytest.approx(0.8) and A.read(at(31), A.PAPER).reward == 0
    assert A.read(at(31), A.PAPER).replies == 30


def test_length_term_floor_and_cut():
    limits = dict(l_expect=100, l_max=200)
    one = lambda written, observed=0: A.Course("g", ["Oscar Wilde"], [A.Turn(written, [], observed), A.Turn(10, ["Oscar Wilde"], 0)], 4)
    p, r = A.replace(A.PAPER, **limits), only(**limits)
    assert A.read(one(20, 120), p).reward == pytest.approx(0.8)                                     # 30 tokens of its own
    assert A.read(one(20, 120), r).reward == pytest.approx(1 - (154 - 100) / 100)                   # 20 + 120 + 10 + reply 4
    assert A.read(one(140), p).reward == pytest.approx(0.8 - 0.5)
    assert A.read(one(500), p).reward == pytest.approx(0.8 - 1)
    cut = A.read(one(500), r)
    assert (cut.reward, cut.ended, cut.length, cut.written, cut.submissions) == (-1, "length", 200, 200, 0)
    full = A.read(one(20, 300), r)                                                                  # tool text alone fills it
    assert (full.ended, full.length, full.written, full.replies, full.submissions) == ("length", 200, 20, 1, 0)
    assert A.read(one(185, 0), r).length == 199 and A.read(one(190, 0), r).submissions == 1        # exactly full still counts
    assert A.read(one(190, 0), r).length == 200 and A.read(one(191, 0), r).submissions == 0
    loose = A.read(one(500), only(cut=False, **limits))
    assert loose.reward == pytest.approx(1 - (514 - 100) / 100) and loose.penalty < -4
    assert A.read(one(500), only(cut=False, floor=True, **limits)).reward == pytest.approx(0)


def test_corners_are_the_rewards_of_chapter_5():
    from webseer.rewards import reward, score_answer
    for answers in (["Shaw"], ["Oscar Wilde"], ["Shaw", "I say Oscar Wilde"], ["Wilde", "Shaw", "Bernard"], ["Oscar-Wilde", "Wilde"]):
        c = say(*answers, written=13000, observed=900)
        for name, v, cfg in (("paper", A.PAPER, {}), ("released", A.RELEASED, dict(golds=c.golds))):
            r = A.read(c, v)
            subs = [dict(answer=a, **score_answer(a, c.golds)) for a in answers[:r.submissions]]
            assert r.reward == reward(name, subs, r.length, cfg)[0]


# -- effects and rows

def test_effect_of_the_score_by_hand():
    cs = [say("Shaw, Oscar Wilde"), say("Shaw", "Oscar Wilde"), say("Shaw", group="h"), say("Shaw", group="h"), say("Oscar Wilde", group="alone")]
    e = A.effect(cs, only(metric="f1"), A.RELEASED)
    f1 = 2 * 2 / (3 + 2)                                             # 0.8, as much as the second attempt's 1 * 0.8
    assert e["rollouts"] == 5 and e["groups"] == 2 and e["reward_mean"] == pytest.approx((1 - f1) / 5) and e["reward_largest"] == pytest.approx(0.2)
    assert e["reward_affected"] == 1 / 5
    assert e["adv_mean"] == pytest.approx(2 * (0.1 / (0.2 / math.sqrt(2) + 1e-6)) / 4, rel=1e-6)     # +-0.707 becomes 0, of four rollouts in groups
    assert e["sign"] == 2 / 4 and e["order"] == 0                    # a tie is no exchange
    longer = [say("Shaw, Bernard, Oscar Wilde"), say("Shaw", "Oscar Wilde")]
    assert A.effect(longer, only(metric="f1"), A.RELEASED)["order"] == 1


def test_common_factor_cancels():
    cs = [say("Oscar Wilde"), say("Shaw", "Oscar Wilde"), say("Wilde")]
    e = A.effect(cs, only(free=0), A.RELEASED)
    assert e["reward_affected"] == 1 and e["adv_largest"] < 1e-5 and e["sign"] == 0
    assert A.effect(cs[:1], only(free=0), A.RELEASED)["sign"] is None


def test_advantages_by_hand():
    got = A.group_advantages([1.0, 5.0, 0.0, 0.25], ["a", "b", "a", "a"])
    mean = 1.25 / 3
    sd = math.sqrt(((1 - mean)**2 + mean**2 + (0.25 - mean)**2) / 2)
    assert got[1] is None and [got[i] for i in (0, 2, 3)] == pytest.approx([(x - mean) / (sd + 1e-6) for x in (1, 0, 0.25)])


EXPECT = {  # for the two courses below: mean under the paper's switch, under the released code, mean reward change
    "answer score": ((0.5 + 1) / 2, 1, 0.5 / 2), "hyphens": (1, 1, 0), "gold aliases": (1, 1, 0), "which submission counts": (1, 1, 0),
    "exponent of α": ((0.8 + 0.64) / 2, 0.9, (0.2 + 0.16) / 2), "what L counts": (15, 21.5, 0), "floor of the length term": (0, 0, 0),
    "floor, were nothing cut": (0, 0, 0), "cut at L_max": (21.5, 21.5, 0), "threshold": (1.5, 1.5, 0), "most submissions": (1.5, 1.5, 0), "replies": (1.5, 1.5, 0),
    "all of these at once": ((0.5 * 0.8 + 0.64) / 2, 0.9, (0.6 + 0.16) / 2)}


def test_switch_rows_by_hand():
    """One rollout submits six words, two of them right: F1 2*2/(6+2) = 0.5, recall 1. The other is right at the second attempt."""
    cs = [say("Shaw Joyce Yeats Synge Oscar Wilde"), say("Shaw", "Oscar Wilde")]
    rows = {r["setting"]: r for r in A.switch_rows(cs, "two")}
    assert set(rows) == set(EXPECT)
    for name, (paper, rel, change) in EXPECT.items():
        assert (rows[name]["paper_mean"], rows[name]["released_mean"], rows[name]["reward_mean"]) == pytest.approx((paper, rel, change)), name
    assert rows["answer score"]["affected"] == 0.5 and rows["answer score"]["largest"] == 0.5 and rows["answer score"]["order"] == 1 and rows["answer score"]["sign"] == 1
    assert rows["exponent of α"]["affected"] == 1
    assert all(r["source"] and r["n"] == 2 for r in rows.values())


def test_every_difference_of_the_variants_has_a_row_and_the_known_words():
    from webseer.rewards import CONSTANTS
    switched = {k for s in A.SETTINGS[:-1] for k, _ in s.switch}
    assert switched == {k for k in vars(A.PAPER) if getattr(A.PAPER, k) != getattr(A.RELEASED, k)}
    words = {c[2] for c in CONSTANTS}
    assert sum(s.released in words for s in A.SETTINGS) >= 8
    assert all("re_rag_tool.py" in s.source for s in A.SETTINGS if s.name in ("answer score", "gold aliases", "exponent of α", "threshold"))


def test_feedback():
    assert A.told(["Wilde", "Shaw"], ["Oscar Wilde"]) == [("incorrect, F1 = 0.67", "incorrect, f1 = 0.50"), ("incorrect, F1 = 0.00", "incorrect, f1 = 0.50")]
    assert A.told(["It is Oscar Wilde"], ["Oscar Wilde"]) == [("incorrect, F1 = 0.67", "correct")]
    assert A.told(["Oscar-Wilde"], ["Oscar Wilde", "Wilde"]) == [("incorrect, F1 = 0.00", "correct")]
    number, verdict, worse = A.feedback_rows([say("Wilde", "Shaw", "Shaw"), say("It is Oscar Wilde", "Oscar Wilde")], "x")
    assert number["n"] == verdict["n"] == 4                           # the second of the other course is never made under the released rule
    assert number["mean"] == pytest.approx((0.17 + 0.5 + 0.5 + (1 - 0.67)) / 4) and verdict["mean"] == pytest.approx(1 / 4)
    assert (worse["n"], worse["paper_mean"], worse["released_mean"]) == (1, 1, 0)


def test_weights_and_loss_by_hand():
    assert A.token_weights([1, 3]) == pytest.approx([0.25, 0.25]) and A.token_weights([1, 3], A.micro_batch_loss) == pytest.approx([0.5, 1 / 6])
    cs = [say("Oscar Wilde", written=30), say("Shaw", written=10), say("Shaw", written=20, group="other")]
    rows = {r["setting"]: r for r in A.loss_rows(cs, "x", limits=(10**5, 10**6))}
    w = rows["aggregation: weight of a token"]
    assert w["n"] == 3 and w["released_mean"] == pytest.approx((60 / 90 + 60 / 30 + 60 / 60) / 3) and w["largest"] == pytest.approx(1)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)                                # rewards 1 and 0
    loss = rows["aggregation: loss at ratio 1"]
    assert loss["n"] == 1 and loss["paper_mean"] == pytest.approx(-(30 * a - 10 * a) / 40) and loss["released_mean"] == pytest.approx(0)
    sd = rows["deviation in the advantage"]
    assert (sd["paper_mean"], sd["released_mean"]) == (pytest.approx(0.5 / (0.5 + 1e-6)), pytest.approx(a))
    one = rows["a group of one rollout"]
    assert (one["n"], one["paper_mean"], one["released_mean"]) == (1, 0, 0)
    # |d/dlogp (e^d - d - 1)| = |1 - e^d|; for d ~ N(0, s): E|1 - e^d| = 2 e^(s²/2) Phi(s) - e^(s²/2)
    s = A.DRIFT
    expected = 1e-4 * math.exp(s * s / 2) * (1 + math.erf(s / math.sqrt(2)) - 1) / a
    many = [say("Oscar Wilde", written=40000), say("Shaw", written=40000)]
    assert {r["setting"]: r for r in A.loss_rows(many, "x", (10**6, 10**7))}["KL term"]["released_mean"] == pytest.approx(expected, rel=0.03)


# -- trajectories

def call(i, name, **args): return dict(role="assistant", content="hm ", tool_calls=[dict(id=str(i), type="function", function=dict(name=name, arguments=json.dumps(args)))])
def result(i, name, text): return dict(role="tool", tool_call_id=str(i), name=name, content=text)


def dialogue(*answers):
    ms = [*first_messages("Who?"), call(0, "search", query="who"), result(0, "search", "- somebody")]
    for i, a in enumerate(answers, 1): ms += [call(i, "submit_answer", answer=a), result(i, "submit_answer", "Received.")]
    return Traj("Who?", ["Oscar Wilde"], "q1", world=3, messages=ms[:-1])


def test_course_counts_characters_by_hand():
    c = A.course(dialogue("Shaw", "Oscar Wilde"), len)
    body = lambda name, args: len("hm ") + len('<tool_call>\n{"name": "", "arguments": }\n</tool_call><|im_end|>') + len(name) + len(json.dumps(args))
    opening = len("\n<|im_start|>assistant\n")
    seen = lambda text: len("\n<|im_start|>user\n<tool_response>\n\n</tool_response><|im_end|>") + len(text)
    assert [t.written for t in c.turns] == [body("search", dict(query="who")), body("submit_answer", dict(answer="Shaw")), body("submit_answer", dict(answer="Oscar Wilde"))]
    assert [t.observed for t in c.turns] == [seen("- somebody") + opening, seen("Received.") + opening, 0]
    assert [t.answers for t in c.turns] == [[], ["Shaw"], ["Oscar Wilde"]] and c.group == ("3", "q1") and c.reply == seen("correct")


def test_empty_answers_are_no_submissions():
    assert [t.answers for t in A.course(dialogue(" ", "Shaw"), len).turns] == [[], [], ["Shaw"]]


def test_newline_mask():
    from webseer.model import Codec
    from webseer.sft import encode_messages
    codec, t = Codec(), dialogue("Shaw")
    (ids, mask), (ids2, mask2) = encode_messages(codec, t.messages), A.newline_mask(codec, t.messages)
    text = lambda ids, mask: codec.decode([i for i, m in zip(ids, mask) if m])
    assert text(ids2, mask2) == text(ids, mask).replace("<|im_end|>", "<|im_end|>\n") and codec.decode(ids2) == codec.decode(ids) + "\n"
    sft, rl, behind = A.mask_rows([t], "x")
    assert sft["mean"] == 2 and rl["mean"] == 0 and behind["largest"] == 0
    assert A.mask_rows([dialogue("Oscar Wilde")], "x")[2]["mean"] == len(codec.encode("\n<|im_start|>user\n<tool_response>\ncorrect\n</tool_response><|im_end|>"))


def test_sample_is_blind_reproducible_and_complete():
    a, b = A.sample(3, 4), A.sample(3, 4)
    assert [t.to_dict() for k in a for t in a[k]] == [t.to_dict() for k in b for t in b[k]] and len(a["probes"]) == len(a["reasoner"]) == 12
    for k in a:
        for t in a[k]:
            assert all(m["content"] == "Received." for m in t.messages if m.get("name") == "submit_answer") and "(withheld)" not in json.dumps(t.messages)
            assert t.stop != "correct" and [s["answer"] for s in t.submissions] == [x for u in A.course(t, len).turns for x in u.answers]
    assert a["probes"][0].golds[0] in a["probes"][0].golds[1] and a["probes"][4].golds[1] in a["probes"][4].golds[0]      # every other question: longer name first
    assert [t.messages for t in A.sample(1, 2, seed=1)["reasoner"]] != [t.messages for t in A.sample(1, 2)["reasoner"]]
    with pytest.raises(WebseerError, match="group of 99"): A.sample(1, 99)


# -- the whole

@pytest.fixture(scope="module")
def rows(): return A.audit(A.sample(4, 6), published=False)


def test_audit_table_and_figure(rows, tmp_path):
    import csv
    assert {r["data"] for r in rows} == {"probes", "reasoner"}
    text = A.report(rows)
    names = {s.name for s in A.SETTINGS}
    assert all(f"| {n} |" in text for n in names) and text.count("## ") == 3 and "unknown (run as: the last)" in text and "24 rollouts" in text
    paths = A.figure(rows, tmp_path/"new")
    assert [p.name for p in paths] == ["audit.png", "audit.svg", "audit.csv"] and all(p.stat().st_size > 1000 for p in paths)
    drawn = list(csv.DictReader(paths[2].open()))
    assert {r["setting"] for r in drawn} == names and len(drawn) == 2 * len(names)
    again = A.figure(rows, tmp_path/"again")
    assert all(p.read_bytes() == q.read_bytes() for p, q in zip(paths, again))
    with pytest.raises(WebseerError, match="nothing to draw"): A.figure([r for r in rows if r["area"] == "loss"], tmp_path)


def test_own_trajectories():
    rows = A.audit([dialogue("Shaw", "Oscar Wilde"), dialogue("It is Oscar Wilde")], published=False)
    by = {r["setting"]: r for r in rows}
    assert {r["data"] for r in rows} == {"given"} and by["answer score"]["groups"] == 1
    assert (by["all of these at once"]["paper_mean"], by["all of these at once"]["released_mean"]) == (pytest.approx((0.64 + 0.8 * 2 / 3) / 2), pytest.approx(0.9))


def published_file(tmp_path, *answers, golds=("Oscar Wilde",)):
    def one(a):
        tool = dict(id="1", type="function", function=dict(name="submit_answer", arguments=json.dumps(dict(answer=a))))
        return dict(messages=[dict(role="system", content="s"), dict(role="user", content="Question: Who?"), dict(role="assistant", content="x" * 40, tool_calls=[tool]),
                              dict(role="tool", name="submit_answer", content="Correct!", signal=True)], success=True, recall=1.0, final_answer=a, golden_answers=list(golds))
    path = tmp_path/"p.json"
    path.write_text(json.dumps([one(a) for a in answers]))
    return path


def test_published_by_hand(tmp_path):
    path = published_file(tmp_path, "It is Oscar Wilde", "Oscar Wilde", "Shaw")
    cs, left = A.published_courses(path)
    assert left == 0 and [len(c.turns) for c in cs] == [1] * 3 and len({c.group for c in cs}) == 3
    spoken = 40 + len('<tool_call>\n{"name": "submit_answer", "arguments": {"answer": "Shaw"}}\n</tool_call>')
    assert cs[2].turns[0] == A.Turn(math.ceil(spoken / 4), ["Shaw"], 0) and cs[2].reply == 2
    by = {r["setting"]: r for r in A.audit([dialogue("Shaw")], published=path) if r["data"] == "published"}
    assert by["answer score"]["paper_mean"] == pytest.approx((2 / 3 + 1 + 0) / 3) and by["answer score"]["released_mean"] == pytest.approx(2 / 3)
    assert by["all of these at once"]["reward_mean"] == pytest.approx((1 - 0.8 * 2 / 3 + 0.2) / 3) and by["answer score"]["sign"] is None
    assert by["a group of one rollout"]["released_mean"] == pytest.approx(2 / 3) and by["verdict"]["mean"] == pytest.approx(1 / 3)
    assert "line break after a reply (fine-tuning)" not in by


def test_published_with_two_submissions(tmp_path):
    path = published_file(tmp_path, "Shaw")
    data = json.loads(path.read_text())
    again = [json.loads(json.dumps(m)) for m in data[0]["messages"][2:]]
    data[0]["messages"][3]["content"] = "n" * 30
    again[0]["tool_calls"][0]["function"]["arguments"] = json.dumps(dict(answer="Oscar Wilde"))
    data[0]["messages"] += again
    path.write_text(json.dumps(data))
    c = A.published_courses(path)[0][0]
    assert [t.answers for t in c.turns] == [["Shaw"], ["Oscar Wilde"]] and [t.observed for t in c.turns] == [math.ceil(30 / 4), 0]
    assert A.read(c, A.PAPER).reward == pytest.approx(0.64) and A.read(c, A.RELEASED).reward == pytest.approx(0.8)


def test_published_missing_is_loud(monkeypatch, tmp_path):
    monkeypatch.setattr(released, "published", lambda: None)
    with pytest.warns(UserWarning, match="NOT RUN: no published rollouts"): rows = A.audit([dialogue("Shaw")])
    assert [r["n"] for r in rows if r["data"] == "published"] == [0] and "NOT RUN" in A.report(rows)
    assert A.figure(rows, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not [r for r in A.audit([dialogue("Shaw")], published=False) if r["data"] == "published"]


def test_published_without_golds_is_counted(tmp_path):
    path = published_file(tmp_path, "Shaw", golds=())
    with pytest.raises(WebseerError, match="nothing to compare"), pytest.warns(UserWarning, match="1 published"): A.audit([dialogue("Shaw")], published=path)


@pytest.mark.skipif(released.published() is None, reason="NOT RUN: no published rollouts at hand (set WEBSEER_RELEASED)")
def test_the_published_rollouts():
    """Against the file itself, by another route: word bags counted here."""
    import re, string
    from collections import Counter
    data = json.loads(released.published().read_text())
    bag = lambda s: Counter(w for w in re.sub("[" + re.escape(string.punctuation) + "]", "", s.lower()).split() if w not in ("a", "an", "the"))
    f1, rec = [], []
    for x in data:
        p, g = bag(x["final_answer"]), bag(x["golden_answers"][0])
        n = sum((p & g).values())
        f1.append(2 * n / (sum(p.values()) + sum(g.values()))); rec.append(n / sum(g.values()))
    by = {r["setting"]: r for r in A.audit([dialogue("Shaw")], published=released.published()) if r["data"] == "published"}
    got = by["answer score"]
    assert (got["n"], got["paper_mean"]) == (len(data), pytest.approx(sum(f1) / len(data), abs=0.01))
    assert got["released_mean"] == pytest.approx(sum(rec) / len(data), abs=0.02)
    assert by["verdict"]["paper_mean"] == pytest.approx(sum(x == 1 for x in f1) / len(data)) and by["verdict"]["released_mean"] == pytest.approx(sum(r > 0.9 for r in rec) / len(data), abs=0.03)


@pytest.mark.parametrize("trajs, words", [
    ([], "'given' holds no trajectory"), ({"mine": []}, "'mine' holds no trajectory"),
    ([Traj("Who?", [], messages=[*first_messages("Who?"), call(0, "search", query="x")])], "no gold answer"),
    ([Traj("Who?", ["!?"], messages=[*first_messages("Who?"), call(0, "search", query="x")])], "no gold answer"),
    ([Traj("Who?", ["x"], messages=first_messages("Who?"))], "holds no reply"),
    ([Traj("Who?", ["x"], messages=[*first_messages("Who?"), dict(role="assistant", content="", tool_calls=[dict(function=dict(name="submit_answer", arguments="{"))])])], "message 2 .* cannot be read"),
    ([Traj("Who?", ["x"], messages=[dict(content="?")])], "message 0 .* cannot be read"),
])
def test_bad_input_is_one_sentence(trajs, words):
    with pytest.raises(WebseerError, match=words): A.audit(trajs, published=False)

def test_unknown_constant_is_named():
    with pytest.raises(WebseerError, match="did you mean 'gold aliases'"): A._known("gold alias")


def test_import_is_light():
    import subprocess, sys
    code = "import sys, webseer.audit; print([m for m in ('torch', 'matplotlib', 'pandas', 'scipy', 'verl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(A.__file__).parents[1]).stdout.strip() == "[]"
