"""Analysis on small invented run folders: numbers against plain Python, and everything that may be missing."""
import json, math, subprocess, sys
from pathlib import Path
from statistics import mean, stdev

import pytest

from webseer import analysis
from webseer.core import WebseerError


def row(stage, mode, seed, world, q, correct, calls=4, **more):
    return dict(qid=f"q{q}", world=world, hops=1 + q % 2, kind="chain", stage=stage, mode=mode, seed=seed, answer="a", correct=correct,
                em=correct, f1=float(correct), recall=correct, cover_em=correct, calls=calls, n_search=1, n_query=1, n_check=1,
                n_submit=1, malformed=0, stop="submitted", tokens=90) | more

def put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))

def answers(stage, seed, world, q):
    "An arbitrary but fixed right/wrong pattern; the stages differ."
    return int((q*7 + world*3 + seed*5 + 2*len(stage)) % 5 < {"sft": 2, "single": 3, "srrl": 4}.get(stage, 0))

@pytest.fixture
def run(tmp_path):
    "Three stages, two seeds, three worlds of six questions, all modes."
    top = tmp_path/"outputs"/"toy"
    cells = [(w, q) for w in range(3) for q in range(6)]
    for s in (0, 1):
        for stage in ("sft", "single", "srrl"):
            for mode in ("greedy", "sampled"):
                put(top/f"seed{s}/eval/{stage}.{mode}.jsonl", [row(stage, mode, s, w, q, answers(stage, s, w, q), 3 + q % 4) for w, q in cells])
            put(top/f"seed{s}/eval/{stage}.feedback.jsonl", [row(stage, "feedback", s, w, q, 0, subs=[0, q % 2][:1 + q % 3]) for w, q in cells])
            put(top/f"seed{s}/eval/{stage}.budget.jsonl", [row(stage, "budget", s, w, q, int(b > 4), max_calls=b) for b in (3, 6) for w, q in cells])
            put(top/f"seed{s}/{stage}/metrics.jsonl", [dict(step=i, loss=1/(i + 1)) if stage == "sft" else dict(step=i, reward=.5, first_acc=.5,
                best_acc=.6, calls=5, entropy=.2, live=None if i == 3 else .5) for i in range(8)])
        put(top/f"seed{s}/eval/sft.passk.jsonl", [dict(qid=f"q{q}", world=w, hops=1, n=16, c=q*3) for w, q in cells])
    put(top/"baselines"/"rows.jsonl", [row("one_page", "scripted", 0, w, q, q % 2) for w, q in cells])
    return top


def test_import_is_light():
    code = "import sys, webseer.analysis; print([m for m in ('matplotlib', 'pandas', 'scipy', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(analysis.__file__).parents[1], check=True)
    assert out.stdout.strip() == "[]"

def test_rows_repeat_and_torn_tail(run):
    rows = analysis.load_rows(run)
    assert len(rows) == 2*3*18*(2 + 1 + 2) + 18
    path = run/"seed0/eval/sft.greedy.jsonl"
    path.write_text(path.read_text() + json.dumps(row("sft", "greedy", 0, 0, 0, 1, calls=99)) + '\n{"qid": "q')
    again = analysis.load_rows(run)
    assert len(again) == len(rows) and again.calls.max() == 99            # the later row wins

def test_foreign_rows_are_named(run):
    put(run/"seed1/eval/srrl.greedy.jsonl", [row("srrl", "greedy", 1, 0, 0, 1), {"question": "?"}])
    with pytest.raises(WebseerError, match=r"srrl\.greedy\.jsonl, row 2: no calls, correct"): analysis.load_rows(run)

def test_paired_difference_by_hand(run):
    rows = analysis.load_rows(run)
    got = analysis.paired_difference(rows, "srrl", "sft")
    by_seed = {s: mean(answers("srrl", s, w, q) - answers("sft", s, w, q) for w in range(3) for q in range(6)) for s in (0, 1)}
    assert got["per_seed"] == pytest.approx(by_seed) and got["diff"] == pytest.approx(mean(by_seed.values()))
    assert got["sd"] == pytest.approx(stdev(by_seed.values())) and (got["n"], got["clusters"]) == (36, 6)
    assert got["low"] <= got["diff"] <= got["high"]

def test_only_shared_questions_are_paired(run):
    rows = analysis.load_rows(run)
    less = rows[~((rows.stage == "srrl") & (rows["mode"] == "greedy") & ((rows.seed == 1) | (rows.qid == "q0")))]
    got = analysis.paired_difference(less, "srrl", "sft")
    assert got["n"] == 15 and list(got["per_seed"]) == [0] and math.isnan(got["sd"])
    assert got["diff"] == pytest.approx(mean(answers("srrl", 0, w, q) - answers("sft", 0, w, q) for w in range(3) for q in range(1, 6)))

@pytest.mark.parametrize("total, count, want", [([], [], math.nan), ([3], [4], .75), ([0, 0, 0], [4, 4, 2], 0), ([1, 3], [10, 10], .2)])
def test_interval_edge_cases(total, count, want):
    got, low, high = analysis.cluster_interval(total, count)
    assert got == pytest.approx(want, nan_ok=True)
    assert (math.isnan(low) and math.isnan(high)) if len(total) < 2 else low <= got <= high

def test_interval_covers():
    "About 95 of 100 intervals hold the truth when clusters differ (few clusters: a little less)."
    import numpy as np
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(100):
        p = np.clip(.6 + .1*rng.standard_normal(30), 0, 1)
        _, low, high = analysis.cluster_interval(rng.binomial(30, p), np.full(30, 30), resamples=999)
        hits += low <= .6 <= high
    assert 86 <= hits <= 100

def test_table_and_markdown(run):
    rows = analysis.load_rows(run)
    table = analysis.results_table(rows).set_index(["mode", "stage"])
    seeds = [mean(answers("single", s, w, q) for w in range(3) for q in range(6)) for s in (0, 1)]
    assert table.loc[("greedy", "single"), "accuracy"] == pytest.approx(mean(seeds))
    assert table.loc[("greedy", "single"), "sd"] == pytest.approx(stdev(seeds))
    assert table.loc[("feedback", "srrl"), "best"] == pytest.approx(1/3)    # q = 1 and 5 of six have a right second try
    text = analysis.results_markdown(rows, "toy")
    assert f"{mean(seeds)*100:.1f} ± {stdev(seeds)*100:.1f}" in text and "Missing here: untrained." in text
    assert all(len(set(l.count("|") for l in block.splitlines())) == 1 for block in text.split("\n\n") if block.startswith("|"))

def test_buckets_pair_the_right_questions(run):
    acc, diff = analysis.bucket_tables(analysis.load_rows(run), analysis.load_passk(run), "greedy")
    by = diff.set_index("bucket")["mean"].to_dict()
    assert by["0"] == pytest.approx(mean(answers("single", s, w, 0) - answers("srrl", s, w, 0) for w in range(3) for s in (0, 1)))
    assert dict(zip(diff.bucket, diff.n)) == {"0": 6, "(0, .2]": 6, "(.2, .5]": 6, "(.5, .8]": 12, "(.8, 1]": 6}

def test_everything_is_drawn_and_stable(run, monkeypatch):
    import matplotlib; matplotlib.use("Agg")
    monkeypatch.setenv("WEBSEER_FIGURES", str(run.parent.parent/"figures"))
    made = analysis.make_figures(run)
    assert {p.name for p in made} == {f"{n}.{e}" for n in analysis.FIGURES for e in ("png", "svg", "csv")} | {"results.md", "results.csv", "differences.csv"}
    assert all(p.parent.name == "toy" for p in made)
    before = {p: p.read_bytes() for p in made}
    analysis.make_figures(run)
    assert before == {p: p.read_bytes() for p in made}
    assert not any(b"<dc:date>" in before[p] for p in made if p.suffix == ".svg")

def keep_rl_metrics(run):
    import shutil
    for s in (0, 1): shutil.rmtree(run/f"seed{s}/eval")
    (run/"baselines"/"rows.jsonl").unlink()

def keep_scripted(run):
    import shutil
    for s in (0, 1): shutil.rmtree(run/f"seed{s}")

def keep_one_question(run):
    import shutil
    shutil.rmtree(run/"seed1"); keep_rl_metrics_of = run/"seed0"
    for p in keep_rl_metrics_of.glob("eval/*"):
        p.unlink() if "srrl.greedy" not in p.name else p.write_text(p.read_text().splitlines()[0] + "\n")

@pytest.mark.parametrize("cut, drawn", [(keep_rl_metrics, {"learning_curves"}), (keep_scripted, {"evidence_ladder"}),
    (keep_one_question, {"learning_curves", "tool_depth", "accuracy_by_depth_and_hops", "evidence_ladder"})])
def test_draws_what_is_there(run, tmp_path, cut, drawn):
    import matplotlib; matplotlib.use("Agg")
    cut(run)
    made = analysis.make_figures(run, tmp_path/"fig")
    assert {p.stem for p in made if p.suffix == ".png"} == drawn
    text = (tmp_path/"fig/results.md").read_text()
    assert all(f"- `{n}`:" in text for n in set(analysis.FIGURES) - drawn)

def test_nothing_at_all_is_one_error(tmp_path):
    with pytest.raises(WebseerError, match="neither evaluation rows nor training metrics"): analysis.make_figures(tmp_path)

def test_metrics_of_runs_under_verl(run, tmp_path):
    from webseer.core import append_jsonl
    for variant, rewards in (("paper", (.1, .2)), ("released", (.3,))):
        for step, reward in enumerate(rewards): append_jsonl(tmp_path/"verl"/f"srrl-{variant}"/"metrics.jsonl", dict(step=step, reward=reward))
    append_jsonl(tmp_path/"verl"/"sft-paper"/"metrics.jsonl", dict(step=0, loss=6.))
    both = analysis.load_metrics(tmp_path)
    assert list(both.stage) == ["sft", "srrl", "srrl"] and list(both.reward.dropna()) == [.1, .2] and set(both.seed) == {0}
    assert list(analysis.load_metrics(tmp_path, "released").reward) == [.3]
    append_jsonl(run/"verl"/"srrl-paper"/"metrics.jsonl", dict(step=0, reward=9.))
    assert not (analysis.load_metrics(run).reward == 9.).any() and list(analysis.load_metrics(run, "paper").reward) == [9.]

def test_profile_name(run, monkeypatch):
    monkeypatch.setenv("WEBSEER_OUTPUTS", str(run.parent))
    run.rename(run.parent/"smoke")
    assert len(analysis.load_metrics("smoke")) == 2*3*8
    with pytest.raises(WebseerError, match="smoke"): analysis.load_rows("smok")
