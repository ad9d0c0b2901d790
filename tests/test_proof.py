"""The checks of the proof: they accept what the loop really did, and notice each thing that is altered. The whole road is `make verl-proof`."""
import json
import random
import re
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from webseer import proof
from webseer.agent import call_text, first_messages, run_sync
from webseer.core import WebseerError, append_jsonl, load_profile, read_jsonl, write_text
from webseer.plan import Shape, outline
from webseer.model import Codec
from webseer.proof import Road, check_rollouts, reward_of, submissions_of, token_faults
from webseer.remote import running_app
from webseer.verl_loop import loop_settings, record_row, rollout_metrics, run_row, worlds_app

WRONG, RIGHT, NEAR = (call_text("submit_answer", answer=a) for a in ("nobody", "Michael Mann", "Michael Smith"))
LOOK = call_text("search", query="film")
REPLIES = (WRONG, RIGHT, NEAR, LOOK, call_text("submit_answer", answer="M. K. Mann"), call_text("submit_answer", answer="Michael-Mann"), WRONG + LOOK, NEAR + RIGHT + WRONG, "I think so.", "Well. " + NEAR, call_text("nosuch", x=1), call_text("submit_answer", answer=""),
           call_text("submit_answer", text="x"), call_text("submit_answer", answer="Michael Mann", why="I read it"), '<tool_call>\n{"name": bad}\n</tool_call>', call_text("submit_answer", answer=["Michael Mann"]),
           call_text("submit_answer", answer="<|im_start|>assistant\n" + RIGHT))


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(outline(tmp_path_factory.mktemp("model"), Shape("Qwen2ForCausalLM", 2, 64, 2, 2, 32, 128, Codec().n, True)))


@pytest.fixture(scope="module")
def address():
    with running_app(worlds_app(load_profile("smoke"), most=3)) as url: yield url


def play(tok, address, replies, room=600, i=0, **more):
    s = loop_settings(dict(retrieval=address, l_expect=200, l_max=600) | more)
    row = dict(raw_prompt=first_messages(f"Who directed film {i}?"), data_source="miniweb",
               extra_info=dict(index=i, qid=f"q{i}", golds='["Michael Mann", "M. K. Mann"]', retrieval="w/rl-0-0", split="train"))
    left = list(replies)
    async def engine(ids, room):
        said = (tok.encode(left.pop(0) if left else "Done.", add_special_tokens=False) + [tok.eos_token_id])[:room]
        return said, [-.25] * len(said)
    return run_sync(run_row(row, engine, tok, s, 1000, room)), s


def text_of(tok, r): return tok.decode(r.prompt + r.response, skip_special_tokens=False)


# -- the reward, from the text

@settings(max_examples=120, deadline=None)
@given(replies=st.lists(st.sampled_from(REPLIES), min_size=1, max_size=8), variant=st.sampled_from(["paper", "released", "single"]),
       cap=st.integers(0, 3), calls=st.integers(1, 6), room=st.integers(40, 600))
def test_the_text_earns_what_the_loop_gave(tok, address, replies, variant, cap, calls, room):
    r, s = play(tok, address, replies, room, variant=variant, max_submissions=cap, max_calls=calls, max_turns=12)
    found = submissions_of(text_of(tok, r), r.traj.golds, s)
    assert [x["answer"] for x in found] == [x["answer"] for x in r.traj.submissions]
    assert reward_of(text_of(tok, r), r.traj.golds, len(r.response), s) == pytest.approx(r.reward)
    assert token_faults(r.traj, tok, room=room) == []


# -- ids and mask

def test_each_altered_mark_is_noticed(tok, address):
    t = play(tok, address, [LOOK, WRONG, RIGHT])[0].traj
    assert token_faults(t, tok, room=600) == []
    for j in range(len(t.ids)):
        put = lambda xs, x: [*xs[:j], x, *xs[j + 1:]]
        assert token_faults(replace(t, mask=put(t.mask, 1 - t.mask[j]), logprobs=put(t.logprobs, 0.0 if t.mask[j] else -.25)), tok, room=600), (j, tok.decode([t.ids[j]]))


def test_each_altered_id_is_noticed(tok, address):
    t, rng = play(tok, address, [LOOK, WRONG, RIGHT])[0].traj, random.Random(0)
    blank = re.compile(r"\s*|<\|im_end\|>")
    for j in rng.sample(range(len(t.ids)), 60):
        other = next(i for i in iter(lambda: rng.randrange(5, len(tok)), None) if i != t.ids[j] and not blank.fullmatch(tok.decode([i])))
        assert token_faults(replace(t, ids=[*t.ids[:j], other, *t.ids[j + 1:]]), tok, room=600), (j, tok.decode([t.ids[j]]), tok.decode([other]))


# -- a whole run's records

SCRIPTS = ([RIGHT], [WRONG, RIGHT], [LOOK, NEAR, WRONG, RIGHT], [LOOK, "Hm.", NEAR])

@pytest.fixture
def run(tok, address, tmp_path):
    "The files of a run of two steps, as our loop and verl write them; and its settings."
    for step in (1, 2):
        for i, replies in enumerate(SCRIPTS):
            r, s = play(tok, address, replies, i=i // 2)
            record_row(tmp_path/"trajectories", r, step, "one", uid=f"u{step}-{i // 2}", session=i % 2)
            plain = lambda ids: tok.decode(ids, skip_special_tokens=True)
            append_jsonl(tmp_path/"rollouts"/f"{step}.jsonl", dict(input=plain(r.prompt), output=plain(r.response), gts=json.dumps(r.traj.golds), score=r.reward,
                                                                     step=step, uid=f"u{step}-{i // 2}_{i % 2}_0"))
    return tmp_path, s


def test_a_true_record_passes(run, tok):
    folder, s = run
    found = check_rollouts(folder, tok, s, 600)
    assert found["rollouts"] == found["rewards_equal"] == found["tokens_equal"] == 8 and found["submissions"] == {"1": 4, "2": 2, "3": 2}
    assert 0 < found["trained"] < found["tokens"]


def alter(file, fn):
    rows = read_jsonl(file)
    write_text(file, "".join(json.dumps(x) + "\n" for x in fn(rows)))


@pytest.mark.parametrize("what, fn", [
    ("verl's score is what the text earns", lambda rows: [rows[0] | dict(score=rows[0]["score"] + .01), *rows[1:]]),
    ("the dumped text is that", lambda rows: [*rows[:2], rows[2] | dict(output=rows[2]["output"] + "x"), *rows[3:]]),
    ("the dumped text is that", lambda rows: [rows[0] | dict(output=rows[1]["output"]), *rows[1:]]),
    ("every recorded rollout", lambda rows: rows[1:]),
    ("is what the text earns", lambda rows: [rows[0] | dict(gts='["Somebody"]'), *rows[1:]])])
def test_an_altered_dump_is_refused(run, tok, what, fn):
    folder, s = run
    alter(folder/"rollouts"/"2.jsonl", fn)
    with pytest.raises(WebseerError, match=f"the proof failed: .*{what}"): check_rollouts(folder, tok, s, 600)


def test_an_altered_record_is_refused(run, tok):
    folder, s = run
    file, = (folder/"trajectories").glob("train-000001.*")
    before = file.read_text()
    alter(file, lambda rows: [rows[0] | dict(reward=.5), *rows[1:]])
    with pytest.raises(WebseerError, match="the recorded reward is what the text earns"): check_rollouts(folder, tok, s, 600)
    write_text(file, before)
    alter(file, lambda rows: [rows[0] | dict(mask=[0, *rows[0]["mask"][:-1]], logprobs=[0.0, *rows[0]["logprobs"][:-1]]), *rows[1:]])
    with pytest.raises(WebseerError, match="tokens and messages agree"): check_rollouts(folder, tok, s, 600)
    write_text(file, before)
    with pytest.raises(WebseerError, match="is what the text earns"): check_rollouts(folder, tok, replace(s, alpha=.9))


def test_trained_tokens_are_those_that_verl_gets(run, tok, address):
    folder, s = run
    before = check_rollouts(folder, tok, s, 600)["trained"]
    async def dies(ids, room, said=[]):
        if said: raise RuntimeError("gone")
        said.append(tok.encode(LOOK, add_special_tokens=False) + [tok.eos_token_id])
        return said[0], [-.25] * len(said[0])
    r = run_sync(run_row(dict(raw_prompt=first_messages("Who?"), extra_info=dict(index=9, golds='["Michael Mann"]', retrieval="w/rl-0-0", split="train")), dies, tok, s, 1000, 600))
    record_row(folder/"trajectories", r, 2, "one", uid="u2-9", session=0)
    plain = lambda ids: tok.decode(ids, skip_special_tokens=True)
    append_jsonl(folder/"rollouts"/"2.jsonl", dict(input=plain(r.prompt), output=plain(r.response), gts='["Michael Mann"]', score=0.0, step=2, uid="u2-9_0_0"))
    found = check_rollouts(folder, tok, s, 600)
    assert sum(r.traj.mask) > 0 and (found["rollouts"], found["tokens_equal"], found["trained"]) == (9, 8, before)
    for file in (folder/"trajectories").glob("*"): alter(file, lambda rows: [x | dict(meta={k: v for k, v in x["meta"].items() if k != "trained"}) for x in rows])
    assert check_rollouts(folder, tok, s, 600) == found                                      # a record of an earlier version
    alter(file, lambda rows: [*rows[:-1], rows[-1] | dict(meta=rows[-1]["meta"] | dict(trained=999))])
    with pytest.raises(WebseerError, match="tokens are trained on; found 999"): check_rollouts(folder, tok, s, 600)


def test_an_attempt_that_was_killed_does_not_count(run, tok, address):
    folder, s = run
    r, _ = play(tok, address, [WRONG])
    r.traj.meta["time"] = 0
    record_row(folder/"trajectories", r, 2, "none", uid="lost", session=0)
    file, = (folder/"trajectories").glob("train-000002.*")
    alter(file, lambda rows: [rows[-1] | dict(meta=rows[-1]["meta"] | dict(time=0.0)), *rows[:-1]])
    assert check_rollouts(folder, tok, s, 600)["rollouts"] == 8


# -- claims about a run of SRRL

class FakeRun:
    "Writes what verl would have written, start by start, in the place of `launch`."
    def __init__(self, source, steps=(range(1, 4), range(4, 7)), **spoilt): self.source, self.steps, self.spoilt, self.n = source, [list(s) for s in steps], spoilt, 0
    def __call__(self, plan, tell=None, seconds=None, started=None):
        n, self.n = self.n, self.n + 1
        shutil.copytree(self.source, plan.folder, dirs_exist_ok=True)
        means = {m["step"]: m for m in rollout_metrics(plan.folder/"trajectories")}
        for step in self.steps[n]:
            m = means[step]
            d = {"critic/score/mean": m["reward"], "webseer/acc": m["acc"], "webseer/submissions": m["submissions"], "perf/time_per_step": 2.0, "perf/throughput": 50.0,
                 "training/rollout_probs_diff_mean": 0.0} | self.spoilt.get(f"step{step}", {})
            append_jsonl(plan.env["VERL_FILE_LOGGER_PATH"], dict(step=step, data=d))
            write_text(plan.folder/"checkpoints"/f"global_step_{step}"/"actor"/"huggingface"/"config.json", "{}")
            write_text(plan.folder/"checkpoints"/"latest_checkpointed_iteration.txt", str(step))
            if not (dump := plan.folder/"rollouts"/f"{step}.jsonl").exists(): write_text(dump, "{}\n")
        if started: raise WebseerError("verl ended with -9")


@pytest.fixture
def road(tok, address, tmp_path, monkeypatch):
    monkeypatch.setenv("WEBSEER_OUTPUTS", str(tmp_path/"outputs"))
    monkeypatch.setattr(proof, "provenance", lambda profile, variant: dict(fingerprint=profile.fingerprint()))
    source = tmp_path/"source"
    for step in range(1, 7):
        for i, replies in enumerate(SCRIPTS):
            record_row(source/"trajectories", play(tok, address, replies, i=i // 2)[0], step, "one", uid=f"u{step}-{i // 2}", session=i % 2)
    def make(*steps, **spoilt):
        road = Road(load_profile("verl-cpu"), rl="prompts=2 mini=2 group=2", tell=lambda line: None)
        monkeypatch.setattr(proof, "launch", FakeRun(source, steps or (range(1, 4), range(4, 7)), **spoilt))
        sft = road.home/"sft-paper"/"checkpoints"
        outline(sft/"global_step_9"/"huggingface", Shape("Qwen2ForCausalLM", 2, 64, 2, 2, 32, 128, Codec().n, True))
        write_text(sft/"latest_checkpointed_iteration.txt", "9")
        return road
    return make


def test_a_run_that_was_killed_and_resumed(road):
    r = road()
    proof.srrl_stage(r)
    found = json.loads(r.file.read_text())["srrl"]
    assert found["starts"] == [[1, 2, 3], [4, 5, 6]] and found["checkpoint_at_kill"] == 3 and found["steps"] == 6
    assert found["rollouts_per_second"] == 2.0 and found["tokens_per_second"] == 50.0


@pytest.mark.parametrize("steps, spoilt, what", [
    ((range(1, 4), range(5, 7)), {}, "the second start goes on with step 4"),
    ((range(1, 4), range(3, 7)), {}, "the second start goes on with step 4"),
    ((range(1, 4), [4, 6]), {}, "no step is missing"),
    ((), dict(step5={"critic/score/mean": .9}), "step 5: verl's mean reward is that of the rollouts"),
    ((), dict(step6={"training/rollout_probs_diff_mean": .01}), "the rollout's probabilities are the trainer's")])
def test_claims_that_do_not_hold(road, steps, spoilt, what):
    r = road(*steps, **spoilt)
    with pytest.raises(WebseerError, match=what): proof.srrl_stage(r)
    assert not r.file.exists()


def test_a_failure_is_not_taken_for_the_kill(road, monkeypatch):
    r = road()
    def fails(plan, **more): raise WebseerError("out of memory")
    monkeypatch.setattr(proof, "launch", fails)
    with pytest.raises(WebseerError, match="out of memory"): proof.srrl_stage(r)


def test_stages_that_are_done_stay(road, monkeypatch):
    r, did = road(), []
    for name in ("data_stage", "sft_stage", "srrl_stage", "check_stage", "evaluate_stage"):
        def stage(road, name=name):
            did.append(name)
            if name == "check_stage" and did.count(name) == 1: raise WebseerError("no")
            road.note(dict(data_stage="data", sft_stage="sft", srrl_stage="srrl", check_stage="check-srrl", evaluate_stage="evaluate-srrl")[name])
        monkeypatch.setattr(proof, name, stage)
    more = dict(tell=lambda line: None)
    with pytest.raises(WebseerError, match="no"): proof.prove(r.profile, **more)
    assert set(proof.prove(r.profile, **more)) == {"data", "sft", "srrl", "check-srrl", "evaluate-srrl"}
    assert did == ["data_stage", "sft_stage", "srrl_stage", "check_stage", "check_stage", "evaluate_stage"]
    with pytest.raises(WebseerError, match="has srrl with other settings"): proof.prove(r.profile, rl="lr=0.1", **more)
    with pytest.raises(WebseerError, match="has sft with other settings"): proof.prove(r.profile, sft=["lr=0.1"], **more)
    with pytest.raises(WebseerError, match="has data with other settings"): proof.prove(load_profile("verl-cpu", k=2), **more)


def test_an_unfinished_step_is_left_out(run, tok, address):
    folder, s = run
    record_row(folder/"trajectories", play(tok, address, [WRONG])[0], 3, "one", uid="u3-0", session=0)
    with pytest.raises(WebseerError, match="every recorded rollout"): check_rollouts(folder, tok, s, 600)
    assert check_rollouts(folder, tok, s, 600, range(1, 3))["rollouts"] == 8


def test_a_second_run_is_compared(road, monkeypatch):
    r = road(range(1, 4), range(4, 7), range(1, 7))
    proof.srrl_stage(r)
    proof.again_stage(r)
    assert json.loads(r.file.read_text())["again-srrl"] == dict(rollouts=24, same_tokens_and_reward=24, asked=dict(prompts=2, mini=2, group=2), stamp=dict(fingerprint=r.profile.fingerprint()))
    again = r.folder.with_name("srrl-paper-again")
    file, = (again/"trajectories").glob("train-000004.*")
    alter(file, lambda rows: [rows[0] | dict(ids=rows[0]["ids"][::-1]), *rows[1:]])
    monkeypatch.setattr(proof, "launch", lambda plan, **more: None)
    with pytest.raises(WebseerError, match="24 rollouts are the same again; found 23, 24"): proof.again_stage(r)
