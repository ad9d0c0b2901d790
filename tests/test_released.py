"""Published rollouts: small files of the same shape made here, and the real file where there is one."""
import csv
import json
import math
import os
from pathlib import Path
from statistics import NormalDist

import pytest

pytest.importorskip("scipy")
from webseer import released as L
from webseer.core import WebseerError

SAMPLE = Path(__file__).parents[1].parent / "shared" / "data" / "webseer_bamboogle_first40.json"
REAL = Path(os.environ.get("WEBSEER_RELEASED") or SAMPLE)


def call(name, args):
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": name, "arguments": args}}], "reasoning": None}


def tool(name, text="ok", **kw):
    return {"role": "tool", "tool_call_id": "1", "name": name, "content": text, **kw}


def rollout(question, tools, answers, golds, success, **extra):
    msgs = [{"role": "system", "content": "Find out."}, {"role": "user", "content": f"Question: {question}"}]
    for t in tools:
        msgs += [call(t, json.dumps({"query": "q", "url": "u", "question": "w", "code": "1"})), tool(t)]
    for a in answers:
        msgs += [call("submit_answer", json.dumps({"answer": a})), tool("submit_answer")]
    return {"messages": msgs, "seed": 0, "success": success, "final_answer": answers[-1] if answers else None, "golden_answers": golds, **extra}


@pytest.fixture
def items():
    return [
        rollout("Who built the harbour of Vell?", ["search", "query_on_page"], ["The harbour was built by Ruda Marn."], ["Ruda Marn"], True, recall=1.0),
        rollout("Where was Ruda Marn born?", ["search", "search", "query_on_page"], ["Osk"], ["Tarn"], False, recall=0.0),
        rollout("When was Osk founded?", ["search", "execute_python_code"], ["1702", "1720"], "1720", True),
        rollout("Which river runs through Tarn?", ["search"], ["Liv"], ["Liv"], False, recall=0.5),
        rollout("Who ruled Vell in 1720?", ["search"] * 6, [], ["Queen Ode"], None),
    ]


@pytest.fixture
def path(tmp_path, items):
    p = tmp_path / "a.json"
    p.write_text(json.dumps(items, indent=1), encoding="utf-8")
    return p


def wilson(k, n):
    z, p = NormalDist().inv_cdf(0.975), k / n
    mid, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (mid - half) / (1 + z * z / n), (mid + half) / (1 + z * z / n)


@pytest.mark.parametrize("k, n", [(30, 40), (0, 7), (7, 7), (102, 125), (1, 1)])
def test_wilson_interval_against_the_formula(k, n):
    got = L.proportion(k, n)
    assert (got["low"], got["high"]) == pytest.approx(wilson(k, n), abs=1e-9)


def test_counts_by_hand(path):
    r = L.analyse(path)
    assert r["n"] == 5 and {k: r["judged"][k] for k in ("n", "right", "wrong", "unjudged")} == dict(n=4, right=2, wrong=2, unjudged=1)
    assert r["calls"]["histogram"] == {2: 1, 3: 1, 4: 2, 6: 1} and r["calls"]["total"] == 19 and r["calls"]["mean"] == pytest.approx(3.8)
    assert {t["tool"]: (t["calls"], t["rollouts"]) for t in r["tools"]} == {"search": (11, 5), "query_on_page": (2, 2), "submit_answer": (5, 4), "execute_python_code": (1, 1)}
    assert r["submissions"]["histogram"] == {0: 1, 1: 3, 2: 1}
    assert r["submissions"]["first"]["em"] == pytest.approx(1 / 4) and r["submissions"]["last"]["em"] == pytest.approx(2 / 4)
    assert r["metrics"]["em"]["mean"] == pytest.approx(2 / 5) and r["metrics"]["cover_em"]["mean"] == pytest.approx(3 / 5)
    assert r["metrics"]["f1"]["mean"] == pytest.approx((4 / 8 + 0 + 1 + 1 + 0) / 5)     # harbour was built by ruda marn: 6 tokens
    assert {d["depth"]: (d["right"], d["n"]) for d in r["depth"]} == {2: (0, 1), 3: (1, 1), 4: (1, 2), 6: (0, 0)}
    assert r["words"]["right"] == dict(n=2, mean=4.0, median=4.0, min=1, max=7)
    assert r["stated"]["recall"] == dict(n=3, equal=2)
    faults = {f["fault"]: f["count"] for f in r["faults"]}
    assert faults["rollout without a submission"] == 1 and sum(faults.values()) == 2      # and no answer in the same one


def test_disagreement_and_mcnemar(path):
    d = {x["metric"]: x for x in L.analyse(path)["disagreement"]}
    assert [d["em"][k] for k in ("both_right", "judge_only", "metric_only", "both_wrong")] == [1, 1, 1, 1] and d["em"]["p"] == 1
    assert [d["recall"][k] for k in ("both_right", "judge_only", "metric_only", "both_wrong")] == [2, 0, 1, 1]


def test_mcnemar_p_is_the_binomial_tail(tmp_path):
    items = [rollout(f"q{i}", ["search"], ["It was surely Liv"], ["Liv"], True) for i in range(6)]
    p = tmp_path / "x.json"
    p.write_text(json.dumps(items))
    assert L.analyse(p)["disagreement"][0]["p"] == pytest.approx(2 * 0.5**6)


def test_bootstrap_agrees_with_the_normal_interval():
    xs = [(i * 37 % 101) / 100 for i in range(400)]
    mean = sum(xs) / len(xs)
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in xs) / len(xs) / len(xs))
    assert L.mean_interval(xs) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert L.mean_interval(xs) == L.mean_interval(xs)


@pytest.mark.parametrize("spell", [lambda a: a, json.dumps, lambda a: json.dumps(json.dumps(a))])
def test_argument_spellings_mean_the_same(spell):
    r = L.read_rollout({"messages": [call("submit_answer", spell({"answer": "Liv \"the\" river"})), tool("submit_answer")], "golden_answers": "Liv"})
    assert r.submissions == ['Liv "the" river'] == [r.answer] and not r.calls[0].problem


@pytest.mark.parametrize("args, problem", [('{"query": "x', "unreadable arguments"), ("[1]", "unreadable arguments"), (None, "missing argument"), ("", "missing argument"), ({"q": 1}, "missing argument"), ({"query": None}, "missing argument")])
def test_malformed_calls_are_counted_not_dropped(args, problem):
    r = L.read_rollout({"messages": [call("search", args), tool("search")]})
    assert [(c.tool, c.problem) for c in r.calls] == [("search", problem)]


def test_missing_calls():
    say = {"role": "assistant", "content": "I know it."}
    text = {"role": "assistant", "content": '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>', "tool_calls": []}
    r = L.read_rollout({"messages": [say, text, say, text, tool("search"), call("submit_answer", {"answer": "Liv"}), tool("submit_answer"), say]})
    assert (r.silent, r.in_text, len(r.calls), r.unanswered) == (2, 1, 2, 0)          # closing words after the submission are no fault
    r = L.read_rollout({"messages": [call("search", {"query": "x"})]})
    assert r.unanswered == 1 and r.silent == 0


def test_everything_optional_may_be_missing(tmp_path, items):
    for key in ("seed", "success", "final_answer", "golden_answers", "recall"):
        for x in items: x.pop(key, None)
    items.append({"messages": []})
    items.append({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": None, "tool_calls": None}]})
    p = tmp_path / "bare.json"
    p.write_text(json.dumps(items))
    r = L.analyse(p)
    assert r["judged"]["n"] == 0 and r["judged"]["unjudged"] == 7 and r["metrics"]["em"]["n"] == 0
    assert r["rollouts"][2]["answer"] == "1720"
    assert "No rollout carries a verdict" in L.report(r) and len(L.figures(r, tmp_path / "f")) == 8


def test_several_submissions_and_final_answer():
    x = rollout("q", [], ["Osk", "Tarn"], ["Osk"], True)
    assert not L.read_rollout(x).differs
    x["final_answer"] = "Osk"
    r = L.read_rollout(x)
    assert r.differs and r.answer == "Osk" and r.submissions == ["Osk", "Tarn"]


def test_line_breaks_inside_a_text_split_no_json_line(tmp_path, items):
    p = tmp_path / "breaks.jsonl"
    for x, c in zip(items, "\u2028\u2029\x85\x0b\x0c"): x["messages"][1]["content"] += f" one{c}two"
    p.write_bytes(b"\r\n".join(json.dumps(x, ensure_ascii=False).encode() for x in items) + b"\r\n")
    assert [r.question.split("one")[1] for r in L.load(p)] == [f"{c}two" for c in "\u2028\u2029\x85\x0b\x0c"] and len(L.entries(p)) == 5


@pytest.mark.parametrize("bad, said", [({"a": 1}, "line 5 is an object with the keys a, not a rollout"), ([], "line 5 is a list"), ({"messages": [3]}, "line 5, message 0 is a int")])
def test_a_bad_json_line_is_named_by_its_line(tmp_path, items, bad, said):
    p = tmp_path / "bad.jsonl"
    p.write_text("\n" + "\n\n".join(json.dumps(x) for x in (items[0], bad, items[1])) .replace("}\n\n", "}\n\n\n", 1))
    with pytest.raises(WebseerError) as e: L.load(p)
    assert f"{p}: {said}" in str(e.value) and "\n" not in str(e.value)
    p.write_text("\n\n" + json.dumps(items[0]) + "\n{bad\n")
    with pytest.raises(WebseerError, match="line 4 of the JSON lines is cut off or damaged .* after 1 complete"): L.load(p)
    p.write_text("\n " + json.dumps([items[0], bad]))
    with pytest.raises(WebseerError, match="rollout 1"): L.load(p)
    p.write_text("\n \n" + json.dumps([items[0], items[1]], indent=1)[:-9])
    with pytest.raises(WebseerError, match="cut off in rollout 1, after 1 complete"): L.load(p)


def test_json_lines_bom_and_two_files(tmp_path, items, path):
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + "\n".join(json.dumps(x) for x in items[:2]).encode())
    r = L.analyse([path, str(lines)])
    assert r["n"] == 7 and [f["rollouts"] for f in r["files"]] == [5, 2] and r["questions"] == 5
    assert "not independent" in L.report(r)


def test_truncation_anywhere_is_refused(tmp_path, items):
    whole = json.dumps(items, indent=1)
    for at in range(1, len(whole) - 1, 97):
        p = tmp_path / "cut.json"
        p.write_text(whole[:at])
        with pytest.raises(WebseerError) as e: L.load(p)
        assert "cut.json" in str(e.value) and "download it again" in str(e.value) and ("cut off" in str(e.value) or "damaged" in str(e.value))
    p.write_text(whole[: whole.rindex('"messages"')])
    with pytest.raises(WebseerError, match="in rollout 4, after 4 complete rollouts"): L.load(p)


@pytest.mark.parametrize("content, word", [
    (b"", "empty"), (b" \n", "empty"), (b"[]", "empty list"), (b"{}", "not a list of rollouts"), (b'{"a": 1}', "keys a"), (b"3", "single int"), (b'"x"', "single str"),
    (b"[1]", "a int, not a rollout"), (b'[{"question": "q"}]', "'messages'"), (b'[{"messages": null}]', "'messages'"), (b'[{"messages": [3]}]', "message 0"),
    (b"<html></html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\x1f\x8b\x08\x00", "compressed"), (b"\xff\x80abc\xc3", "UTF-8|utf"),
    (b"qid,answer\n1,x\n", "not JSON"), (b'{"messages": []}\n{"mess', "line 2"), (b"\x93NUMPY", "UTF-8"),
])
def test_foreign_files_get_one_clear_error(tmp_path, content, word):
    p = tmp_path / "foreign.json"
    p.write_bytes(content)
    with pytest.raises(WebseerError, match=word) as e: L.load(p)
    assert "foreign.json" in str(e.value) and "\n" not in str(e.value)


def test_missing_folder_none_and_twice(tmp_path, path):
    for files, word in [(tmp_path / "no.json", "no such file"), (tmp_path, "folder"), ([], "no file given"), ([path, path], "same content")]:
        with pytest.raises(WebseerError, match=word): L.analyse(files)


def test_result_is_plain_json_and_repeatable(path):
    r = L.analyse(path)
    assert json.dumps(r) == json.dumps(L.analyse(str(path)))
    assert L.report(r) == L.report(L.analyse(L.load(path)))


def test_report_says_the_numbers(path):
    text = L.report(L.analyse(path))
    low, high = wilson(2, 4)
    assert f"**2 of 4 judged right: 50.0 %** (95 % Wilson interval {100*low:.1f} to {100*high:.1f} %); 1 without a verdict." in text
    assert "2: 1, 3: 1, 4: 2, 6: 1" in text and "| execute_python_code | 1 |" in text and "| first | 25.0 % |" in text


def test_figures_are_repeatable_and_carry_their_numbers(path, tmp_path):
    r = L.analyse(path)
    for d in ("x", "y"): made = L.figures(r, tmp_path / d)
    assert len({p.stem for p in made}) == 8
    for p in made:
        for s in (".png", ".svg", ".csv"):
            a, b = ((tmp_path / d / p.with_suffix(s).name).read_bytes() for d in ("x", "y"))
            assert a == b and len(a) > 10
    rows = list(csv.DictReader((tmp_path / "x" / "released_calls.csv").open()))
    assert {int(x["calls"]): sum(int(x[k]) for k in ("right", "wrong", "unjudged")) for x in rows} == {2: 1, 3: 1, 4: 2, 5: 0, 6: 1}


def test_long_tails_are_pooled_without_loss():
    rows = [dict(depth=k, n=60 - k, right=k % 7) for k in range(2, 52)]
    pooled = L.pool_depths(rows)
    assert len(pooled) <= 10 and sum(p["n"] for p in pooled) == sum(r["n"] for r in rows) and sum(p["right"] for p in pooled) == sum(r["right"] for r in rows)
    assert [p["depth"] for p in L.pool_depths(rows[:3])] == ["2", "3", "4"]


def test_named_file_that_is_missing(monkeypatch):
    monkeypatch.setenv("WEBSEER_RELEASED", "/nowhere/x.json")
    with pytest.raises(WebseerError, match="WEBSEER_RELEASED"): L.published()


@pytest.mark.skipif(not REAL.is_file(), reason=f"NO PUBLISHED FILE: set WEBSEER_RELEASED to one, or put it at {SAMPLE.parts[-3]}/data/{SAMPLE.name} beside the project")
def test_the_published_file(tmp_path):
    r = L.analyse(REAL)
    assert r["n"] == len(json.loads(REAL.read_text(encoding="utf-8-sig")))
    assert sum(r["calls"]["histogram"].values()) == r["n"] and L.report(r).startswith("# Released") and len(L.figures(r, tmp_path)) == 8
    if REAL.name != SAMPLE.name: return
    assert (r["n"], r["judged"]["right"], r["judged"]["n"]) == (40, 30, 40)
    assert (r["judged"]["low"], r["judged"]["high"]) == pytest.approx(wilson(30, 40), abs=1e-9)
    assert r["calls"]["histogram"] == {3: 31, 4: 3, 5: 1, 6: 1, 7: 2, 8: 1, 9: 1} and r["calls"]["mean"] == pytest.approx(3.675)
    assert r["submissions"]["histogram"] == {1: 40} and r["metrics"]["em"]["mean"] == 0
    assert r["stated"]["recall"] == dict(n=40, equal=40)
    assert {f["fault"]: f["count"] for f in r["faults"] if f["count"]} == {"turn without a call": 1}
