"""Metrics and rewards against numbers worked out by hand or by another route."""
import math
from collections import Counter

import pytest

from webseer import rewards as R
from webseer.core import WebseerError


def sub(answer, golds):
    return dict(answer=answer, **R.score_answer(answer, golds))


@pytest.mark.parametrize("text, plain", [
    ("The Eiffel Tower!", "eiffel tower"), ("  an  apple,\ta day ", "apple day"), ("O'Brien's", "obriens"), ("Theatre", "theatre"),
    ("well-known", "wellknown"), ("U.S.A.", "usa"), ("1,234.5", "12345"), ("São Paulo", "são paulo"), ("A", "a"), ("", ""), (None, ""), ("!?", ""),
    ("the-end", "theend"),
])
def test_normalise_by_hand(text, plain):
    assert R.normalise(text) == plain


def test_hyphens_as_blanks_only_when_asked():
    assert R.normalise("the-end of X-rays", hyphens=True) == "end of x rays"


@pytest.mark.parametrize("pred, gold, em, f1, recall, cover", [
    ("Paris", "paris", 1, 1, 1, 1),
    ("the city of Paris", "Paris", 0, 2 / 4, 1, 1),           # city of paris: P 1/3, R 1
    ("New York", "New York City", 0, 4 / 5, 2 / 3, 0),
    ("York New", "New York", 0, 1, 1, 0),
    ("new new york york", "New York", 0, 4 / 6, 1, 1),        # P 2/4, R 1; the bag counts repeats, "new york" stands inside
    ("London", "Paris", 0, 0, 0, 0),
    ("new", "New New York", 0, 2 / 4, 1 / 3, 0),              # one of the gold's two "new"
    ("Germany", "German", 0, 0, 0, 1),                        # substring, as the literature counts
    (None, "Paris", 0, 0, 0, 0),
])
def test_metrics_by_hand(pred, gold, em, f1, recall, cover):
    got = R.score_answer(pred, [gold])
    assert got == pytest.approx(dict(em=em, f1=f1, recall=recall, cover_em=cover))


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    hmean = pytest.importorskip("scipy.stats").hmean
    words = ["red", "red", "blue", "green", "gold", "grey"]
    for i in range(1, len(words)):
        for j in range(len(words) - 1):
            p, g = words[:i], words[j:]
            shared = sum(min(n, Counter(g)[w]) for w, n in Counter(p).items())
            want = float(hmean([shared / len(p), shared / len(g)])) if shared else 0.0
            assert R.f1(" ".join(p), [" ".join(g)]) == pytest.approx(want)


def test_best_alias_counts_everywhere():
    golds = ["William Shakespeare", "Shakespeare", "the Bard"]
    assert R.score_answer("Bard", golds) == dict(em=1, f1=1, recall=1, cover_em=1)
    assert R.f1("Shakespeare", golds[:1]) == pytest.approx(2 / 3)
    assert R.score_answer("Paris", "Paris")["em"] == 1


@pytest.mark.parametrize("golds", [[], None, [""], ["!?"], ""])
def test_missing_golds_are_refused(golds):
    with pytest.raises(WebseerError, match="gold"):
        R.em("Paris", golds)


def test_paper_reward_by_hand():
    assert R.webseer_paper([1.0], 0, alpha=0.9)[0] == pytest.approx(0.9)
    assert R.webseer_paper([0.0, 0.0, 0.6], 0, alpha=0.5)[0] == pytest.approx(0.075)
    assert R.webseer_paper([1.0], 175, alpha=1, l_expect=100, l_max=200)[0] == pytest.approx(0.25)
    assert R.webseer_paper([1.0], 10**6, alpha=1, l_expect=100, l_max=200)[0] == 0
    assert R.webseer_paper([0.9, 0.1], 0, alpha=0.5, pick="best")[0] == pytest.approx(0.225)
    assert R.webseer_paper([0.9, 0.1], 0, alpha=0.5, pick="first")[0] == pytest.approx(0.225)
    assert R.webseer_paper([0.9, 0.1], 0, alpha=0.5)[0] == pytest.approx(0.025)


def test_released_reward_by_hand():
    assert R.webseer_released([1.0], 0)[0] == 1
    assert R.webseer_released([0.5, 0.2, 0.1], 0)[0] == pytest.approx(0.5 * 0.64)
    assert R.webseer_released([], 21808 + 4096)[0] == pytest.approx(-0.5)
    assert R.webseer_released([1.0], 21808 + 3 * 8192)[0] == pytest.approx(-2.0)


def test_reward_equals_sum_of_its_parts_and_stays_in_range():
    for name in R.REWARDS:
        for answers in ([], ["Wilde"], ["Shaw", "Oscar Wilde"], ["Oscar Wilde", "Shaw", "x"]):
            for n in (0, 450, 500, 5000):
                value, parts = R.REWARDS[name]([sub(a, ["Oscar Wilde"]) for a in answers], n, dict(alpha=0.8, l_expect=400, l_max=500))
                assert value == pytest.approx(parts["answer"] + parts["length"]) and parts["attempts"] == len(answers)
                assert value <= 1 and (name == "released" or value >= -1)


def test_variants_differ_where_paper_and_code_do():
    subs = [sub(a, ["Oscar Wilde"]) for a in ("perhaps Oscar Wilde or Bernard Shaw", "Bernard Shaw")]
    paper, released, single = (R.REWARDS[k](subs, 0, dict(alpha=0.8))[0] for k in ("paper", "released", "single"))
    assert paper == 0 and released == pytest.approx(0.8) and single == pytest.approx(4 / 8)


def test_released_can_rescore_with_first_gold_only():
    subs = [sub("NYC", ["New York", "NYC"])]
    assert R.reward("released", subs, 0)[0] == 1 and R.reward("released", subs, 0, dict(golds=["New York", "NYC"]))[0] == 0


@pytest.mark.parametrize("golds", [["Ada"], ["Ada", "x Ada y"], ["!?", "Ada"], "Ada"])
def test_released_with_golds_goes_by_the_score_that_is_asked_for(golds):
    subs = [sub("x Ada y", ["Ada", "x Ada y"]), sub("-Ada-", ["Ada"])]
    pay = lambda n=1, **cfg: R.reward("released", subs[:n], 0, dict(golds=golds) | cfg)[0]
    assert pay() == pay(score="recall") == 1 and pay(score="f1") == 0.5 and pay(score="em") == 0 and pay(score="cover_em") == 1
    assert pay(2, score="em") == 0.8 and R.reward("released", subs[:1], 0, dict(score="em"))[0] == 1    # without golds: as it was scored
    hyphen = [sub("Jean-Luc", ["Jean Luc"])]
    assert R.reward("released", hyphen, 0, dict(golds=["Jean Luc"]))[0] == 1 and R.reward("released", hyphen, 0, dict(golds=["Jean Luc"], score="f1"))[0] == 0


def test_score_setting_is_honoured():
    subs = [sub("It is Oscar Wilde", ["Oscar Wilde"])]
    assert R.reward("single", subs, 0)[0] == pytest.approx(2 / 3) and R.reward("single", subs, 0, dict(score="em"))[0] == 0
    assert R.reward("paper", subs, 0, dict(score="recall", alpha=0.5))[0] == 0.5


@pytest.mark.parametrize("name, subs, n, cfg, word", [
    ("papr", [], 0, {}, "paper"), ("paper", [], 0, dict(aplha=1), "alpha"), ("paper", [], 0, dict(alpha=1.5), "alpha"), ("released", [], 0, dict(alpha=0), "alpha"),
    ("single", [], 0, dict(l_expect=5, l_max=5), "l_max"), ("paper", [], -1, {}, "n_tokens"), ("paper", [], float("nan"), {}, "n_tokens"),
    ("paper", [dict(answer="x")], 0, {}, "f1"), ("paper", [], 0, dict(score="rouge"), "rouge"), ("paper", [], 0, dict(pick="any"), "pick"),
    ("paper", [dict(f1=float("nan"))], 0, {}, "score"), ("released", [dict(recall=1.2)], 0, {}, "score"),
])
def test_bad_settings_get_one_clear_error(name, subs, n, cfg, word):
    with pytest.raises(WebseerError, match=word):
        R.reward(name, subs, n, cfg)


def test_feedback_text():
    half = dict(f1=0.5, recall=0.25)
    assert R.feedback_text(half, "paper") == "incorrect, F1 = 0.50"
    assert R.feedback_text(half, "released") == "incorrect, f1 = 0.25"
    assert R.feedback_text([dict(f1=0.1, recall=0.75), half], "released") == "incorrect, f1 = 0.75"
    assert R.feedback_text(dict(f1=1.0, recall=1.0), "paper") == R.feedback_text(dict(f1=0.2, recall=0.95), "released") == "correct"
    assert "1.00" not in R.feedback_text(dict(f1=0.999, recall=1.0), "paper")
    with pytest.raises(WebseerError, match="variant"):
        R.feedback_text(half, "papers")


def test_rollout_ends_as_each_variant_says():
    wrong, near = dict(f1=0.0, recall=0.0), dict(f1=0.3, recall=0.95)
    assert not R.finished([wrong] * 4, "released") and R.finished([wrong] * 5, "released")
    assert not R.finished([wrong] * 19, "paper") and R.finished([wrong] * 20, "paper") and R.finished([wrong], "single")
    assert R.finished([near, wrong], "released") and not R.finished([near, wrong], "paper") and not R.finished([], "single")


def test_vulnerability_table():
    people = ["Ada Byron", "Mary Somerville", "Grace Hopper"]
    rows = {r["probe"]: r for r in R.vulnerability("Grace Hopper", people, dict(alpha=0.5))}
    listed = rows["list all candidates"]
    assert (listed["em"], listed["recall"], listed["cover_em"], listed["released"]) == (0, 1, 1, 1) and listed["f1"] == pytest.approx(4 / 8)
    assert rows["right, tokens repeated"]["set_f1"] == 1 > rows["right, tokens repeated"]["f1"]
    turns = rows["one candidate per submission"]
    assert (turns["paper"], turns["released"], turns["single"]) == (0.125, 0.25, 0)
    exposure = {r["number"]: r for r in R.exposure(list(rows.values()))}
    assert exposure["em"]["best ignorant probe"] == "none" and exposure["released"]["it gets, of honest"] == 1


def test_every_constant_has_a_source_or_is_called_unknown():
    for name, paper, code, here in R.CONSTANTS:
        assert paper and here and (".py" in code or ".sh" in code), name
    md = R.table(R.CONSTANTS, ["constant", "paper", "code", "here"])
    assert len(md.splitlines()) == len(R.CONSTANTS) + 2 and md.count("unknown") >= 5
    assert math.isclose(R.DEFAULTS["l_max"] - R.DEFAULTS["l_expect"], 8192)
