"The whole line at toy size: determinism, resuming, bad input. Numbers here mean nothing; that they repeat does."
import dataclasses, errno, filecmp, json

import pytest
import torch

from webseer import evaluate, model as M, reflect, rl, sft
from webseer.core import WebseerError, load_profile, read_jsonl, run_dir


def toy():
    return dataclasses.replace(load_profile("smoke"), n_worlds=3, per_world=6, sft_steps=6, sft_tokens=500, d_model=32, n_layers=2, d_ff=64, rl_steps=2, rl_questions=2,
                               rl_group=3, max_calls=5, test_worlds=2, test_questions=4, passk=2, eval_budgets=(3, 5), checkpoint_every=1)


def line(p):
    reflect.make_data(p, 0, workers=1); sft.train(p, 0)
    for stage in ("single", "srrl"): rl.train(p, 0, stage)
    return evaluate.run(p, 0, workers=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run: (outputs folder, profile, summary)."
    with pytest.MonkeyPatch.context() as m:
        folder = tmp_path_factory.mktemp("outputs"); m.setenv("WEBSEER_OUTPUTS", str(folder))
        return folder, toy(), line(toy())


@pytest.fixture
def there(finished, monkeypatch):
    "The profile of the finished run, with its outputs folder in use."
    monkeypatch.setenv("WEBSEER_OUTPUTS", str(finished[0]))
    return finished[1]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    "The same profile and an empty outputs folder."
    monkeypatch.setenv("WEBSEER_OUTPUTS", str(tmp_path))
    return toy()


def test_two_runs_of_a_seed_are_identical(finished, empty):
    a, b = finished[0] / "smoke" / "seed0", run_dir(empty, 0)
    assert line(empty) == finished[2] and a != b
    files = [f.relative_to(a) for f in [*a.rglob("*.jsonl"), *a.rglob("model.safetensors")]]
    assert len(files) > 15
    for f in files: assert filecmp.cmp(a / f, b / f, shallow=False), f


def test_another_seed_gives_another_model(empty):
    weights = []
    for seed in (0, 1):
        reflect.make_data(empty, seed, workers=1); weights.append(M.load_checkpoint(sft.train(empty, seed))[0].model.norm.weight)
    assert not torch.equal(*weights)


def test_a_finished_stage_is_not_trained_again(there):
    state = run_dir(there, 0) / "srrl" / "state.pt"; before = state.stat().st_mtime_ns
    rl.train(there, 0, "srrl")
    assert state.stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_refused(there):
    with pytest.raises(WebseerError, match="rl_lr"): rl.train(dataclasses.replace(there, rl_lr=.5), 0, "srrl")


def test_training_without_what_comes_before_says_so(empty):
    with pytest.raises(WebseerError, match="no reflection data"): sft.train(empty, 0)
    with pytest.raises(WebseerError, match="no checkpoint"): rl.train(empty, 0, "single")
    with pytest.raises(WebseerError, match="nothing to evaluate"): evaluate.run(empty, 0)


def test_a_full_disk_leaves_the_previous_state(empty, monkeypatch):
    reflect.make_data(empty, 0, workers=1); sft.train(empty, 0, steps=3); state = run_dir(empty, 0) / "sft" / "state.pt"; before = state.read_bytes()

    def full(obj, path):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        with pytest.raises(WebseerError, match="previous one is untouched"): sft.train(empty, 0)
    assert state.read_bytes() == before and not list(state.parent.glob("*.tmp"))
    sft.train(empty, 0)                                                         # and the run goes on
    assert [r["step"] for r in read_jsonl(state.parent / "metrics.jsonl")] == list(range(6))


def test_a_damaged_state_is_named(empty):
    reflect.make_data(empty, 0, workers=1); sft.train(empty, 0, steps=3)
    (run_dir(empty, 0) / "sft" / "state.pt").write_bytes(b"x")
    with pytest.raises(WebseerError, match="damaged"): sft.train(empty, 0)


def test_prompts_and_observations_carry_no_loss(there):
    codec = M.Codec(); seen = 0
    for f in (run_dir(there, 0) / "srrl" / "rollouts").glob("*.jsonl"):
        for t in (json.loads(l) for l in f.read_text().splitlines()):
            seen += 1
            assert len(t["ids"]) == len(t["mask"]) == len(t["logprobs"])
            assert all(lp == 0 for lp, on in zip(t["logprobs"], t["mask"]) if not on)
            outside = codec.decode([i for i, on in zip(t["ids"], t["mask"]) if not on])
            assert t["question"] in outside                                    # the prompt is masked
            replies = [m for m in t["messages"][2:-1] if m["role"] != "assistant"]   # (the last one may come after the last turn)
            assert all(m["content"] in outside for m in replies)               # and so is every answer of a tool
    assert seen


def untrained(folder, seed):
    "A checkpoint of the toy's size."
    codec = M.Codec()
    return M.save_checkpoint(folder, M.init_weights(M.Qwen2(M.ModelConfig.of(toy(), codec.n)), seed), codec)


def test_results_of_one_checkpoint_are_not_handed_back_for_another(tmp_path):
    from webseer.agent import Budget, run_sync
    from webseer.batch import run_questions
    _, tools, qs = evaluate.test_world(toy(), 0)
    for seed in (0, 1): untrained(tmp_path / f"ck{seed}", seed)
    def run(name, change=lambda model: None, **more):
        model, codec, _ = M.load_checkpoint(tmp_path / name)
        change(model)
        return run_sync(run_questions(M.ModelPolicy(model, codec, **more), tools, qs[:2], tmp_path / "run", Budget(max_calls=3, max_tokens=600), progress=False))
    first, lines = run("ck0"), (tmp_path / "run" / "run.jsonl").read_bytes()
    assert run("ck0", seed=7)["em"] == first["em"]                             # greedy: the seed decides nothing
    with torch.no_grad():
        def nudge(model): model.model.norm.weight[0] += 1e-3
        for name, change, more in (("ck1", lambda m: None, {}), ("ck0", nudge, {}), ("ck0", lambda m: None, dict(temperature=1.))):
            with pytest.raises(WebseerError, match="run/queue was begun with other settings .policy = .*'weights'"): run(name, change, **more)
    assert (tmp_path / "run" / "run.jsonl").read_bytes() == lines


def test_a_policy_tells_what_its_turns_depend_on(tmp_path):
    model, codec, _ = M.load_checkpoint(untrained(tmp_path / "ck", 0))
    of = lambda *a: json.loads(json.dumps(M.ModelPolicy(model, codec, *a).describe()))
    assert of(0., 1) == of(0., 2) and "seed" not in of() and of(1., 1) != of(1., 2) != of(.5, 2) and of(0., 0, 24) != of(0., 0, 25)
    before, policy = of(), M.ModelPolicy(model, codec)
    with torch.no_grad(): model.model.norm.weight[0] += 1e-3
    assert policy.describe()["weights"] != before["weights"]                    # training changes weights in place
