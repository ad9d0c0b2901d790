"""Our trainer's advantages, policy loss, aggregation and KL terms against verl's own functions, on random inputs, to 1e-6.

verl's side runs in a process of its own, in the Python that WEBSEER_VERL names (else this one, if it has verl); inputs and
results travel as one npz file each way. A function that `webseer.rl` does not have is skipped by name; WEBSEER_RL names a
file of candidate functions that is tested in its stead."""
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import webseer.rl as rl  # noqa: E402

if os.environ.get("WEBSEER_RL"):
    spec = importlib.util.spec_from_file_location("rl_candidate", os.environ["WEBSEER_RL"])
    candidate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(candidate)
else: candidate = None

PYTHON = os.environ.get("WEBSEER_VERL") or (sys.executable if importlib.util.find_spec("verl") else None)
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs verl: run `make verl`, or set WEBSEER_VERL to a Python that has it. NOTHING was compared")

AGG = {"token": "token-mean", "sequence": "seq-mean-token-mean", "token-sum": "token-sum", "sequence-sum": "seq-mean-token-sum",
       "sequence-sum-norm": "seq-mean-token-sum-norm"}
KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "k3+", "low_var_kl+")
SEEDS = range(4)

VERL = r'''
import json, sys, warnings; warnings.filterwarnings("ignore")
import numpy as np, torch
import verl.trainer.ppo.core_algos as C
from verl.trainer.config import AlgoConfig
from verl.workers.config import FSDPActorConfig
z = np.load(sys.argv[1]); out = {}
t = lambda k: torch.tensor(z[k])
def put(k, x): out[k] = x.detach().double().numpy() if torch.is_tensor(x) else np.asarray(x)
for s in json.loads(str(z["seeds"])):
    mask, index, R = t(f"{s}/mask"), z[f"{s}/index"], t(f"{s}/rewards")
    tok = torch.zeros_like(mask)
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
    tok[torch.arange(len(R)), last] = R                               # the reward stands on the last trained token
    kw = dict(token_level_rewards=tok, response_mask=mask)
    put(f"{s}/std", C.compute_grpo_outcome_advantage(index=index, norm_adv_by_std_in_grpo=True, **kw)[0])
    put(f"{s}/mean", C.compute_grpo_outcome_advantage(index=index, norm_adv_by_std_in_grpo=False, **kw)[0])
    put(f"{s}/loo", C.compute_rloo_outcome_advantage(index=index, **kw)[0])
    put(f"{s}/rfpp-baseline", C.compute_reinforce_plus_plus_baseline_outcome_advantage(index=index, **kw)[0])
    for g in (1.0, 0.97): put(f"{s}/rfpp-{g}", C.compute_reinforce_plus_plus_outcome_advantage(config=AlgoConfig(gamma=g), **kw)[0])
    full = mask.sum(1) > 0
    ac = lambda c: FSDPActorConfig(strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=.2, clip_ratio_high=.28, clip_ratio_c=c)
    holed = t(f"{s}/holed")                                            # also has a sequence without any trained token
    for c in (3.0, 1e9):
        for mode in json.loads(str(z["agg"])):
            x = t(f"{s}/new").requires_grad_()
            loss, _ = C.compute_policy_loss_vanilla(t(f"{s}/old"), x, t(f"{s}/adv"), holed, mode, ac(c))
            loss.backward(); put(f"{s}/loss/{c}/{mode}", loss); put(f"{s}/grad/{c}/{mode}", x.grad)
    for mode in json.loads(str(z["agg"])): put(f"{s}/agg/{mode}", C.agg_loss(t(f"{s}/new"), holed, mode))
    put(f"{s}/agg/part", C.agg_loss(t(f"{s}/new"), holed, "token-mean", batch_num_tokens=97))
    put(f"{s}/agg/part-seq", C.agg_loss(t(f"{s}/new"), holed, "seq-mean-token-mean", global_batch_size=31))
    for k in json.loads(str(z["kl"])):
        x = t(f"{s}/new").requires_grad_(); v = C.kl_penalty(x, t(f"{s}/ref"), k)
        v.sum().backward(); put(f"{s}/kl/{k}", v); put(f"{s}/klgrad/{k}", x.grad)
np.savez(sys.argv[2], **out)
'''


def case(seed):
    """Ragged groups (one of a single rollout, one all zero, one all equal), masks with holes and of unequal length."""
    rng = np.random.default_rng(seed)
    index = np.array(["a"] * 4 + ["b"] + ["c"] * 3 + ["d"] * 3 + ["e"] * 5)
    R = rng.normal(size=len(index))
    R[index == "c"] = 0.0
    R[index == "d"] = 0.64
    order = rng.permutation(len(index))
    index, R = index[order], R[order]
    B, T = len(index), 23
    mask = np.zeros((B, T))
    for row in mask:                                            # replies and tool answers in turn, then padding
        at, end = 0, rng.integers(1, T + 1)
        while at < end:
            n = int(rng.integers(1, 6)); row[at:min(end, at + n)] = 1; at += n + int(rng.integers(1, 5))
    mask[0] = 0; mask[0, 3] = 1                                 # one token is trained
    holed = mask.copy(); holed[B // 2] = 0                      # none is
    old = rng.normal(size=(B, T)) * .5 - 1.5
    new = old + rng.normal(size=(B, T)) * .7                    # ratios from about 0.1 to 8: both clips bite
    ref = new + rng.normal(size=(B, T)) * 2
    ref[1, 0], ref[1, 1] = new[1, 0] + 30, new[1, 1] + 3        # beyond verl's bounds on the exponent and on the value
    adv = np.repeat(rng.normal(size=(B, 1)) * 2, T, 1)
    return dict(index=index, rewards=R, mask=mask, holed=holed, old=old, new=new, ref=ref, adv=adv)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    cases = {s: case(s) for s in SEEDS}
    np.savez(folder/"in.npz", seeds=json.dumps(list(SEEDS)), agg=json.dumps(list(AGG.values())), kl=json.dumps(KL),
             **{f"{s}/{k}": v for s, c in cases.items() for k, v in c.items()})
    other = os.environ.get("WEBSEER_VERL")                      # an environment of its own must not see this one's packages
    env = {k: v for k, v in os.environ.items() if not (other and k in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"))}
    run = subprocess.run([PYTHON, "-c", VERL, str(folder/"in.npz"), str(folder/"out.npz")], capture_output=True, text=True, cwd=folder, env=env, timeout=240)
    assert run.returncode == 0, f"verl's side failed in {PYTHON}:\n{run.stderr[-3000:]}"
    tensors = {s: {k: v if k == "index" else torch.tensor(v) for k, v in c.items()} for s, c in cases.items()}
    return tensors, dict(np.load(folder/"out.npz"))


def need(name):
    f = getattr(candidate, name, None) or getattr(rl, name, None)
    if f is None: pytest.skip(f"webseer.rl has no {name}: NOT compared with verl")
    return f


def same(ours, theirs, what):
    ours = ours.detach().numpy() if torch.is_tensor(ours) else np.asarray(ours)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} and {theirs.shape}"
    assert np.isfinite(theirs).all(), f"{what}: verl's are not finite"
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9, err_msg=what)


@pytest.mark.parametrize("kind", ["loo", "std"])
def test_trainer_advantages_of_full_groups(both, kind):
    """What the trainer calls: a matrix, one row per question."""
    cases, verl = both
    for s, c in cases.items():
        for g in ("a", "c", "d", "e"):
            rows = np.flatnonzero(c["index"] == g)
            adv, live = (getattr(candidate, "advantages", None) or rl.advantages)(c["rewards"][rows][None], kind)
            same(adv[0][:, None] * c["mask"][rows], verl[f"{s}/{kind}"][rows], f"seed {s}, group {g}, {kind}")
            assert bool(live[0]) == (g in "ae")


@pytest.mark.parametrize("kind", ["loo", "std", "mean"])
def test_ragged_groups(both, kind):
    """Groups of 1, 3, 3, 4 and 5 rollouts in any order, one of them all zero, one all equal."""
    f = need("group_advantages")
    cases, verl = both
    for s, c in cases.items():
        adv, live = f(c["rewards"], list(c["index"]), kind)
        same(adv[:, None] * c["mask"], verl[f"{s}/{kind}"], f"seed {s}, {kind}")
        assert live.tolist() == [g in "ae" for g in c["index"]]
        single = list(c["index"]).index("b")
        assert abs(float(adv[single] - c["rewards"][single])) <= 1.1e-6 * abs(float(c["rewards"][single]))


def test_reinforce_plus_plus(both):
    f = need("reinforce_pp")
    cases, verl = both
    for s, c in cases.items():
        for gamma in (1.0, 0.97): same(f(c["rewards"], c["mask"], gamma=gamma), verl[f"{s}/rfpp-{gamma}"], f"seed {s}, gamma {gamma}")
        same(f(c["rewards"], c["mask"], list(c["index"])), verl[f"{s}/rfpp-baseline"], f"seed {s}, baseline")
        assert np.abs(verl[f"{s}/rfpp-1.0"]).max() > 0.1


def test_clip_higher_as_the_trainer_uses_it(both):
    """Both of the trainer's aggregations, value and gradient, without dual clip and without empty sequences."""
    cases, verl = both
    for s, c in cases.items():
        rows = np.flatnonzero(c["holed"].sum(1).numpy() > 0)      # the trainer never holds an empty sequence
        for how in ("token", "sequence"):
            x = c["new"].clone().requires_grad_()
            loss = rl.aggregate(-rl.clipped((x - c["old"]).exp(), c["adv"], .2, .28)[rows], c["holed"][rows], how)
            loss.backward()
            same(loss, verl[f"{s}/loss/{1e9}/{AGG[how]}"], f"seed {s}, {how}")
            same(x.grad, verl[f"{s}/grad/{1e9}/{AGG[how]}"], f"seed {s}, {how}, gradient")


def test_micro_batches_add_up(both):
    """The totals that the trainer passes give the same as verl's global token and sequence counts."""
    cases, verl = both
    for s, c in cases.items():
        parts = [slice(0, 5), slice(5, 6), slice(6, None)]
        for how, key, kw in (("token", "part", dict(n_tokens=97)), ("sequence", "part-seq", dict(n_seqs=31))):
            same(sum(rl.aggregate(c["new"][p], c["holed"][p], how, **kw) for p in parts), verl[f"{s}/agg/{key}"], f"seed {s}, {how}")


@pytest.mark.parametrize("dual", [3.0, None])
@pytest.mark.parametrize("how", list(AGG))
def test_policy_loss(both, how, dual):
    """Clip-higher with and without dual clip, every aggregation, with an empty sequence; value and gradient."""
    f = need("policy_loss")
    cases, verl = both
    for s, c in cases.items():
        x = c["new"].clone().requires_grad_()
        loss = f(x, c["old"], c["adv"], c["holed"], dual=dual, how=how)
        loss.backward()
        key = f"{dual or 1e9}/{AGG[how]}"
        same(loss, verl[f"{s}/loss/{key}"], f"seed {s}, {key}")
        same(x.grad, verl[f"{s}/grad/{key}"], f"seed {s}, {key}, gradient")
    assert any(abs(verl[f"{s}/loss/3.0/{AGG[how]}"] - verl[f"{s}/loss/{1e9}/{AGG[how]}"]) > 1e-4 for s in cases), "dual clip never bites: a useless input"


@pytest.mark.parametrize("how", list(AGG))
def test_aggregation(both, how):
    f = need("aggregate")
    if how not in ("token", "sequence"): need("AGGREGATIONS")
    cases, verl = both
    for s, c in cases.items():
        if how == "sequence" and not (candidate or hasattr(rl, "AGGREGATIONS")):
            full = c["holed"].sum(1) > 0                          # without it an empty sequence counts
            same(f(c["new"][full], c["holed"][full], how), verl[f"{s}/agg/{AGG[how]}"], f"seed {s}, {how}")
        else: same(f(c["new"], c["holed"], how), verl[f"{s}/agg/{AGG[how]}"], f"seed {s}, {how}")


def test_low_variance_kl_as_the_trainer_uses_it(both):
    """Within verl's bounds (d at most 20, value at most 10)."""
    f = need("low_variance_kl")
    cases, verl = both
    for s, c in cases.items():
        inside = torch.tensor(verl[f"{s}/kl/k3"] < 10) & ((c["ref"] - c["new"]).abs() < 20)
        assert inside.float().mean() > .8 and not inside.all()
        same(f(c["new"], c["ref"])[inside], verl[f"{s}/kl/k3"][inside.numpy()], f"seed {s}")


@pytest.mark.parametrize("kind", KL)
def test_kl_terms(both, kind):
    """Value and gradient of every estimate, beyond the bounds, too; with + the gradient is that of the squared one."""
    f = need("kl_term")
    cases, verl = both
    for s, c in cases.items():
        x = c["new"].clone().requires_grad_()
        v = f(x, c["ref"], kind)
        v.sum().backward()
        same(v, verl[f"{s}/kl/{kind}"], f"seed {s}, {kind}")
        same(x.grad, verl[f"{s}/klgrad/{kind}"], f"seed {s}, {kind}, gradient")
