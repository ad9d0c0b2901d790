"""Plans for verl: the published settings, the refusals, and dry runs in verl's own Python.

Dry runs need verl (WEBSEER_VERL names its Python); all of them share one process of it, because verl takes seconds to import.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from webseer import launch as L
from webseer import plan as P
from webseer.batch import sole_user
from webseer.core import WebseerError, load_profile, read_jsonl, write_json, write_text

ROOT = Path(__file__).parents[1]
# from the config.json files of Qwen2.5
SIZES = {"3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
         "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
         "14b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False)}
QWEN = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", max_position_embeddings=32768)
R = "actor_rollout_ref.rollout."


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    "Model folders without weights, and data."
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from webseer.model import Codec, ModelConfig, Qwen2, save_checkpoint
    here, codec = tmp_path_factory.mktemp("launch"), Codec()
    for name in ("3b", "7b", "14b"): P.outline(here/name, P.HUB[f"Qwen/Qwen2.5-{name.upper()}-Instruct"])
    save_checkpoint(here/"tiny", Qwen2(ModelConfig(codec.n, 64, 2, 2, 1, 64)), codec)
    pq.write_table(pa.Table.from_pylist([rl_row(i) for i in range(32)]), here/"rl.parquet")
    pq.write_table(pa.Table.from_pylist([dict(messages=TALK)] * 64), here/"sft.parquet")
    return here


TALK = [dict(role="system", content="S"), dict(role="user", content="Q"), dict(role="assistant", content="Let me see."), dict(role="tool", content="a page"),
        dict(role="assistant", content="It is so.")]


def rl_row(i=0, **changes):
    golds = json.dumps(["Ann"])
    return dict(data_source="miniweb", prompt=[dict(role="system", content="S"), dict(role="user", content="Who?")], agent_name="webseer", ability="search",
                reward_model=dict(style="rule", ground_truth=golds), extra_info=dict(index=i, split="train", qid=str(i), golds=golds, retrieval="")) | changes


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("WEBSEER_OUTPUTS", str(tmp_path/"outputs"))
    monkeypatch.chdir(ROOT)
    return tmp_path/"outputs"


def rl(shop, *changes, profile="paper-14b", variant="released", model=None, **more):
    return P.plan_rl(load_profile(profile), variant, list(changes), train=more.pop("train", shop/"rl.parquet"), val=more.pop("val", shop/"rl.parquet"),
                     model=model or shop/profile.split("-")[-1], **more)


def sft(shop, *changes, profile="paper-14b", variant="released", model=None, **more):
    return P.plan_sft(load_profile(profile), variant, list(changes), train=more.pop("train", shop/"sft.parquet"), val=more.pop("val", shop/"sft.parquet"),
                      model=model or shop/profile.split("-")[-1], **more)


def only(plan):
    found = P.problems(plan)
    assert len(found) == 1, found
    return next(iter(found.items()))


# ---- settings

def test_released_rl_settings_are_the_scripts():
    v = {k: x.value for k, x in P.resolve("srrl", load_profile("paper-14b"), "released").items()}
    want = dict(algorithm="grpo", lr=1e-6, prompts=24, mini=12, group=6, kl=1e-4, kl_loss=True, kl_type="low_var_kl", clip_low=0.2, clip_high=0.28, temperature=0.6, top_k=50,
                max_turns=20, max_submissions=5, max_prompt=1024, max_response=30000, l_expect=21808, l_max=30000, alpha=0.8, steps=200, epochs=3, save_freq=10, sp=2, tp=1,
                rollout_memory=0.7, log_prob_micro=4, ref_log_prob_micro=1, gpus=6, entropy=0, micro_batch=1, kl_in_reward=False, first_gold=True)
    assert {k: v[k] for k in want} == want


def test_paper_rl_settings_and_what_stands_in():
    r = P.resolve("srrl", load_profile("paper-14b"), "paper")
    want = dict(prompts=12, group=8, max_turns=30, steps=100, max_submissions=20)
    assert {k: r[k].value for k in want} == want and all(r[k].origin == "paper" for k in want)
    assert r["lr"].value == 1e-6 and r["lr"].origin.startswith("unknown in the paper") and not r["first_gold"].value


def test_sft_settings_make_old_defaults_explicit():
    p = P.plan_sft(load_profile("paper-7b"), "released")
    words = set(p.words)
    assert {"optim.betas=[0.9,0.95]", "optim.weight_decay=0.01", "optim.clip_grad=1.0", "optim.lr_warmup_steps_ratio=0.1",
            "optim.lr_scheduler_type=cosine", "data.use_dynamic_bsz=false",
            "data.max_length=16384", "data.train_batch_size=64", "optim.lr=1e-06", "trainer.total_epochs=4", "engine.ulysses_sequence_parallel_size=4", "engine.strategy=fsdp2",
            "data.truncation=error", "trainer.n_gpus_per_node=8"} <= words
    assert p["micro_batch"] == 4 and P.plan_sft(load_profile("paper-3b"), "released")["micro_batch"] == 8


def test_table_has_every_setting_once_with_its_origin():
    rows = P.settings_table(load_profile("paper-14b"), "paper")
    assert len(rows) == len(P.SFT) + len(P.RL) and all(r["origin"] for r in rows)
    lr = next(r for r in rows if r["stage"] == "srrl" and r["key"] == "lr")
    assert lr["paper"] == "unknown" and lr["released"] == 1e-6 and lr["verl"] == "actor_rollout_ref.actor.optim.lr"


def test_verl_settings_do_not_change_a_profile_s_fingerprint():
    assert load_profile("laptop").fingerprint() == load_profile("laptop", verl_gpus="8", verl_algorithm="ppo").fingerprint() == load_profile("paper-14b").fingerprint()


@pytest.mark.parametrize("changes, message", [
    (["promts=3"], "did you mean 'prompts'"), (["lr=fast"], "no float"), (["lr"], "write key=value"), (["group=2.5"], "no int"), (["group=Infinity"], "no int"), (["kl_loss=3"], "no bool"),
    (["verl_rolout=hf"], "did you mean 'verl_rollout'"), (["verl_algorithm=gpro"], "did you mean 'grpo'"), (["verl_gpus=0"], "at least 1"), (["tools=pages"], "agent loop: tools is 'pages'")])
def test_wrong_changes(shop, changes, message):
    with pytest.raises(WebseerError, match=re.escape(message)): rl(shop, *changes)


@pytest.mark.parametrize("word, message", [
    ("sp=0", "sp (--set) is 0: it must be at least 1"), ("micro_batch=-4", "at least 1"), ("gpus=0", "at least 1"), ("batch=0", "at least 1"), ("epochs=0", "at least 1"),
    ("max_length=0", "at least 1"), ("batch=null", "batch (--set) is null, which is no int: give a whole number"), ("sp=null", "is null"), ("gpus=none", "is null"),
    ("steps=lots", "no int"), ("betas=[0.9]", "no list: give a list of numbers, 2 of them"), ("betas=[0.9,1]", "less than 1"), ("save_freq=soon", "or after_each_epoch"),
    ("save_freq=0", "-1 for never"), ("test_freq=0.5", "give a whole number of updates, -1 for never, or after_each_epoch"), ("lr=NaN", "no float"), ("warmup=2", "at most 1")])
def test_values_that_nothing_can_come_of(shop, word, message):
    with pytest.raises(WebseerError, match=re.escape(message)) as e: sft(shop, word)
    assert str(e.value).startswith("setting ") and "\n" not in str(e.value)


@pytest.mark.parametrize("word, message", [
    ("mini=null", "is null"), ("prompts=null", "is null"), ("log_prob_micro=null", "is null"), ("tp=0", "at least 1"), ("group=0", "at least 1"), ("temperature=-1", "at least 0.01"),
    ("clip_low=-1", "at least 0"), ("max_new=-5", "at least 0"), ("top_k=0", "give -1 for all"), ("rollout_memory=1.5", "at most 1"), ("test_freq=0", "-1 for never"),
    ("save_freq=after_each_epoch", "-1 for never"), (R + "log_prob_micro_batch_size_per_gpu=0", "log_prob_micro (--set) is 0"), ("nodes=2", "set verl_nodes"), ("offload=false", "set verl_offload")])
def test_values_that_nothing_can_come_of_in_srrl(shop, word, message):
    with pytest.raises(WebseerError, match=re.escape(message)): rl(shop, word)


def test_whole_numbers_reach_verl_as_such(shop):
    words = sft(shop, "batch=64.0", "steps=1e2", "save_freq=5.0").words
    assert {"data.train_batch_size=64", "trainer.total_training_steps=100", "trainer.save_freq=5"} <= set(words)
    assert rl(shop, "entropy=0.001", "keep=null", "save_freq=-1")["entropy"] == 0.001
    with pytest.raises(WebseerError, match="sp .profile paper-14b. is 0"): P.resolve("srrl", load_profile("paper-14b", verl_rl="sp=0"), "paper")


def test_verl_s_name_of_a_setting_is_the_setting(shop):
    p = rl(shop, "data.max_response_length=60000", "+" + R + "log_prob_micro_batch_size_per_gpu=2")
    assert p["max_response"] == 60000 and p.get(R + "max_model_len") == 61024 and p["log_prob_micro"] == 2 and not p.raw
    assert p.values["max_response"].origin == "--set" and "phase update" in P.problems(p)["memory"]
    assert "phase score" in P.problems(rl(shop, R + "log_prob_micro_batch_size_per_gpu=16"))["memory"]
    assert "sp = 3" in P.problems(rl(shop, "actor_rollout_ref.actor.ulysses_sequence_parallel_size=3"))["shared-heads"]
    with pytest.raises(WebseerError, match="is our setting lr, which is given, too"): rl(shop, "actor_rollout_ref.actor.optim.lr=1e-5", "lr=1e-6")
    with pytest.raises(WebseerError, match="set lr to another value"): sft(shop, "~optim.lr=1")


@pytest.mark.parametrize("make, word, use", [
    (sft, "data.train_files=/other.parquet", "--train"), (rl, "data.val_files=/other.parquet", "--val"), (sft, "model.path=/m", "--model"), (rl, "actor_rollout_ref.model.path=/m", "--model"),
    (sft, "trainer.nnodes=4", "verl_nodes"), (rl, "+trainer.nnodes=4", "verl_nodes"), (rl, "trainer.default_local_dir=/x", "--folder"), (rl, R + "name=hf", "verl_rollout"),
    (rl, "actor_rollout_ref.actor.fsdp_config.param_offload=false", "verl_offload"), (rl, "trainer.logger=[console]", "verl_loggers")])
def test_what_the_launcher_decides(shop, make, word, use):
    with pytest.raises(WebseerError, match=f"is the launcher's: use {use}$"): make(shop, word)


def test_changes_are_checked_before_there_is_data():
    p = load_profile("paper-14b")
    profile, changes = P.settle(p, "srrl", "paper", ["verl_nodes=2", "trainer.save_freq=7.0", "data.shuffle=false"])
    assert profile.verl_nodes == 2 and changes == {"save_freq": 7.0, "data.shuffle": False} and P.settle(profile, "srrl", "paper", changes)[1] == changes
    for stage, variant, word, message in (("sft", "paper", "lrr=1", "unknown setting 'lrr'"), ("sft", "papr", "lr=1", "did you mean 'paper'"), ("rl", "paper", "lr=1", "unknown stage"),
                                          ("srrl", "paper", "tools=pages", "agent loop"), ("sft", "paper", "sp=0", "at least 1")):
        with pytest.raises(WebseerError, match=re.escape(message)): P.settle(p, stage, variant, [word])


def test_published_machine_settings_are_rows_that_the_profile_decides(shop):
    v = rl(shop).values
    for key, said, now in (("rollout", "sglang_async", "vllm"), ("offload", True, True), ("offload_optimizer", True, True), ("offload_ref", True, True), ("nodes", 1, 1)):
        assert (v[key].setting.released, v[key].value) == (said, now) and v[key].origin.startswith("profile paper-14b")
    assert rl(shop).get("data.return_raw_chat") is True and rl(shop).get("data.filter_overlong_prompts") is False
    assert sft(shop).get("model.trust_remote_code") is False and sft(shop).get("engine.offload_policy") is False


def test_a_relative_model_folder_is_named_from_the_root(shop, monkeypatch, tmp_path):
    (tmp_path/"settings.ini").write_bytes((ROOT/"settings.ini").read_bytes())
    (tmp_path/"14b").symlink_to(shop/"14b")
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path/"14b")
    assert rl(shop, model="14b").get("actor_rollout_ref.model.path") == here and sft(shop, model="14b").get("model.path") == here
    assert P.plan_rl(load_profile("paper-14b", verl_start="14b"), "paper").model == here and P.plan_sft(load_profile("paper-14b", verl_model="14b"), "paper").model == here


def test_heads_of_the_7b_model_under_sequence_parallelism(shop):
    assert "28 attention heads with 4 heads of keys cannot be shared by sp = 8 GPUs: set sp to 1 or 2 or 4" in P.problems(sft(shop, "sp=8", profile="paper-7b"))["shared-heads"]
    assert not P.problems(sft(shop, "sp=4", profile="paper-7b"))


def test_unknown_stage_variant_profile_list(shop, monkeypatch):
    with pytest.raises(WebseerError, match="did you mean 'released'"): rl(shop, variant="relased")
    with pytest.raises(WebseerError, match="unknown stage 'rl'"): P.resolve("rl", load_profile("laptop"), "paper")
    with pytest.raises(WebseerError, match="verl_rl of profile"): P.resolve("srrl", load_profile("paper-14b", verl_rl="lr"), "paper")
    with pytest.raises(WebseerError, match="profile paper-14b"): P.resolve("srrl", load_profile("paper-14b", verl_rl="lrr=1"), "paper")


def test_changes_reach_the_right_place(shop):
    p = rl(shop, "lr=2e-6", "verl_offload=false", "+critic.foo=1", "trainer.save_freq=7", "max_submissions=3")
    assert p.get("actor_rollout_ref.actor.optim.lr") == 2e-6 and p.origins["actor_rollout_ref.actor.optim.lr"] == "--set"
    assert p.get("actor_rollout_ref.actor.fsdp_config.param_offload") is False and p.get("critic.foo") == 1 and p.get("trainer.save_freq") == 7
    assert p.loop["max_submissions"] == 3 and len({k.lstrip("+") for k in p.overrides}) == len(p.overrides)


@pytest.mark.parametrize("name, want", [
    ("grpo", {"algorithm.adv_estimator": "grpo", "actor_rollout_ref.actor.use_kl_loss": True}),
    ("dapo", {"algorithm.adv_estimator": "grpo", "algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "reward", "actor_rollout_ref.actor.use_kl_loss": False,
              "actor_rollout_ref.actor.clip_ratio_high": 0.28}),
    ("reinforce_plus_plus", {"algorithm.adv_estimator": "reinforce_plus_plus"}), ("rloo", {"algorithm.adv_estimator": "rloo"}),
    ("ppo", {"algorithm.adv_estimator": "gae", "critic.optim.lr": 1e-5, "critic.strategy": "fsdp2", "critic.ulysses_sequence_parallel_size": 2})])
def test_algorithms(shop, name, want):
    p = rl(shop, f"verl_algorithm={name}")
    assert {k: p.get(k) for k in want} == want
    assert name != "ppo" or p.memory.parts["optimizer"] > 1.9 * rl(shop).memory.parts["optimizer"]


def test_the_reader_is_the_profile_s_whatever_is_published(shop):
    v = rl(shop).values["reader"]
    assert v.published == dict(paper="llm", released="llm") and v.value == "llm" and v.origin == "profile paper-14b"
    p = P.plan_rl(load_profile("gpu1", reader="raw"), "paper", model=shop/"tiny")
    assert p.loop["reader"] == "raw" and "the note" in p.values["reader"].origin
    assert rl(shop, "reader=raw").loop["reader"] == "raw"
    with pytest.raises(WebseerError, match="agent loop: reader is 'book'"): rl(shop, "reader=book")


def test_the_figures_file_is_always_written(shop):
    p = P.plan_rl(load_profile("paper-14b", verl_loggers="wandb"), "paper", model=shop/"14b")
    assert p.get("trainer.logger") == ["wandb", "file"]


def test_dapo_says_that_nothing_bounds_it(shop):
    assert any("sets no limit" in n for n in rl(shop, "verl_algorithm=dapo").notes) and not any("limit" in n for n in rl(shop).notes)


def test_a_hub_model_of_unknown_shape_is_said_to_be_unchecked():
    assert any("not checked" in n for n in P.plan_rl(load_profile("paper-14b"), "paper", model="somebody/some-model").notes)


def test_a_setting_beats_the_algorithm(shop):
    assert rl(shop, "verl_algorithm=dapo", "kl_loss=true").get("actor_rollout_ref.actor.use_kl_loss") is True


# ---- refusals, each by its name

@pytest.mark.parametrize("name, changes, message", [
    ("sequence-parallel", ["verl_attention=sdpa"], "verl_attention=flash_attention_2"),
    ("tool-text", [R + "multi_turn.max_tool_response_length=256"], "cut to 256 characters"),
    ("single-turn", [R + "agent.default_agent_loop=single_turn_agent"], "never calls a tool"),
    ("single-turn", [R + "agent.agent_loop_config_path=null"], "is not registered"),
    ("parallel-calls", [R + "multi_turn.max_parallel_calls=1"], "only the first call"),
    ("tensor-parallel", ["tp=3"], "40 attention heads cannot be shared by tp = 3"),
    ("rollout-name", ["verl_rollout=sglang_async"], "did you mean 'sglang'"),
    ("tensor-parallel", ["tp=5"], "6 GPUs cannot be divided into rollout engines of tp = 5"),
    ("shared-heads", ["sp=6", "prompts=12", "mini=12"], "40 attention heads with 8 heads of keys cannot be shared by sp = 6 GPUs: set sp to 1 or 2"),
    ("shared-heads", ["+critic.ulysses_sequence_parallel_size=3"], "sp = 3"),
    ("estimator", ["algorithm=dapo"], "set verl_algorithm=dapo"), ("estimator", ["algorithm=ppo"], "set verl_algorithm=ppo"),
    ("estimator", ["algorithm=gae"], "needs PPO's critic"),
    ("rollout-name", [R + "mode=sync"], "leave it at async"),
    ("legacy-reward", ["custom_reward_function.path=/x.py"], "write reward.custom_reward_function.path"),
    ("legacy-reward", ["reward_model.reward_manager=naive"], "write reward.reward_model.reward_manager"),
    ("misspelled", ["+actor_rollout_ref.model.enable_activation_offloading=true"], "misspelling"),
    ("reward-manager", ["reward.reward_manager.name=dapo"], "does not see"),
    ("top-k-correction", ["algorithm.rollout_correction.rollout_is=token"], "top_k=-1"),
    ("top-k-correction", ["algorithm.rollout_correction.bypass_mode=true", "top_k=-1", "top_p=0.9"], "top_p = 0.9"),
    ("trailing-tokens", ["verl_algorithm=reinforce_plus_plus", R + "agent.default_agent_loop=tool_agent"], "loses the reward"),
    ("trailing-tokens", ["verl_algorithm=ppo", R + "agent.default_agent_loop=tool_agent", "verl_memory=200"], "gae loses the reward"),
    ("model", ["verl_architecture=Qwen3ForCausalLM"], "is a Qwen2ForCausalLM"),
    ("model", ["verl_params=7.6"], "14.77 thousand million parameters"),
    ("memory", ["verl_offload=false"], "phase generate"),
    ("memory", ["log_prob_micro=16"], "phase score"),
    ("memory", ["max_response=60000", "rollout_memory=0.8"], "phase update"),
    ("memory", ["rollout_memory=0.38"], "less than one rollout"),
    ("division", ["prompts=13", "group=5", "mini=13"], "cannot be shared by 6 GPUs"),
    ("division", ["mini=48"], "more than the 24 questions"),
    ("division", ["sp=4"], "groups of sp = 4"),
    ("ignored-key", ["algorithm.filter_groups.max_num_gen_batches=10"], "is ignored by verl 0.9.1"),
    ("ignored-key", ["data.gen_batch_size=48"], "is ignored by verl 0.9.1"),
    ("ignored-key", ["verl_algorithm=dapo", "trainer.v1.sampler.custom_sampler.path=/x.py"], "leave out trainer.v1.sampler.custom_sampler"),
    ("group-metric", ["verl_algorithm=dapo", "algorithm.filter_groups.metric=acd"], "did you mean 'acc'"),
    ("old-trainer", ["trainer.use_v1=false"], "leave trainer.use_v1 at true"),
    ("critic-attention", ["critic.enable=true", "verl_attention=sdpa", "sp=1"], "then webseer opens it"),
    ("micro-batches", ["log_prob_micro=5"], "the 48 sequences of a GPU cannot be divided into micro batches of 5: set log_prob_micro"),
    ("micro-batches", ["micro_batch=7"], "the 24 sequences of a GPU"),
    ("failed-groups", ["trainer.v1.sampler.sync_refill_failed_groups=false"], "would end the run"),
])
def test_refusals_of_srrl(shop, name, changes, message):
    found = P.problems(rl(shop, *changes))
    said = found[name]
    assert message in said and said.count(". ") == 0 and "\n" not in said
    assert set(found) <= {name, "memory"}


def test_nothing_is_refused_that_is_right(shop):
    for profile in ("paper-14b", "paper-7b", "paper-3b"):
        for variant in P.VARIANTS:
            for plan in (rl(shop, profile=profile, variant=variant), sft(shop, profile=profile, variant=variant)): assert not P.problems(plan), plan
    assert not P.problems(rl(shop, "top_k=-1", "algorithm.rollout_correction.rollout_is=token"))
    assert not P.problems(rl(shop, profile="gpu1", model=shop/"tiny"))


def test_one_gpu_wants_one_copy(shop):
    p = rl(shop, R + "tensor_model_parallel_size=2", profile="gpu1", model=shop/"tiny")
    assert "wants 2 GPUs for one copy" in P.problems(p)["tensor-parallel"]


@pytest.mark.parametrize("name, changes, message", [
    ("sequence-parallel", ["verl_attention=eager"], "with eager"), ("division", ["batch=3"], "2 data-parallel groups"),
    ("micro-batches", ["micro_batch=3"], "the 32 sequences of a GPU"), ("memory", ["micro_batch=8"], "lower micro_batch"),
    ("model", ["verl_params=7.6"], "7.6"), ("truncation", ["truncation=left"], "on the right all the same"),
    ("pad-mode", ["data.pad_mode=right"], "leave it at no_padding")])
def test_refusals_of_sft(shop, name, changes, message):
    got, said = only(sft(shop, *changes))
    assert got == name and message in said


def test_missing_files(shop):
    assert "validation file" in only(rl(shop, val=shop/"none.parquet"))[1]
    assert "training file" in only(sft(shop, train=shop/"none.parquet"))[1]
    with pytest.raises(WebseerError, match="validation file"): L.check(rl(shop, val=shop/"none.parquet"))


def test_models_that_are_none(shop, tmp_path, outputs):
    with pytest.raises(WebseerError, match="does not exist"): rl(shop, model=tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    with pytest.raises(WebseerError, match="no config.json"): sft(shop, model=tmp_path/"empty")
    write_text(tmp_path/"broken"/"config.json", "{")
    with pytest.raises(WebseerError, match="damaged"): sft(shop, model=tmp_path/"broken")
    write_text(tmp_path/"other"/"config.json", '{"architectures": ["BertModel"]}')
    with pytest.raises(WebseerError, match="not the configuration of a decoder"): sft(shop, model=tmp_path/"other")
    with pytest.raises(WebseerError, match="run `webseer launch sft` first"): P.plan_rl(load_profile("paper-14b"), "paper")
    assert P.plan_rl(load_profile("paper-14b"), "paper", model="somebody/some-model").shape is None


def test_srrl_starts_from_the_last_sft_checkpoint(shop):
    p = load_profile("paper-14b")
    folder = P.run_folder(p, "sft", "paper")/"checkpoints"
    for step in (72, 144): write_json(folder/f"global_step_{step}"/"huggingface"/"config.json", QWEN | SIZES["14b"])
    write_text(folder/"latest_checkpointed_iteration.txt", "72")
    assert P.plan_rl(p, "paper").model.endswith("global_step_72/huggingface")


def test_heads_for_vllm_on_the_cpu(shop, tmp_path):
    write_json(tmp_path/"narrow"/"config.json", QWEN | SIZES["3b"] | dict(hidden_size=32, num_attention_heads=2))
    found = P.problems(rl(shop, "verl_rollout=vllm", profile="verl-cpu", model=tmp_path/"narrow"))
    assert "heads of 16 dimensions" in found["head-width"]
    assert "leave it at fsdp2" in P.problems(sft(shop, "engine.strategy=fsdp", profile="verl-cpu", model=shop/"tiny"))["old-fsdp"]
    assert "offload_policy" in P.problems(rl(shop, "actor_rollout_ref.actor.fsdp_config.offload_policy=true", profile="verl-cpu", model=shop/"tiny"))["offload-policy"]


# ---- memory

def test_memory_counts():
    from dataclasses import replace
    s, v = P.HUB["Qwen/Qwen2.5-14B-Instruct"], {k: x.value for k, x in P.resolve("srrl", load_profile("paper-14b"), "released").items()}
    m = P.rl_memory(s, v, 6)
    assert m.parts["optimizer"] == pytest.approx(8 * s.params / 6 / 2**30) and m.parts["rollout weights"] == pytest.approx(2 * s.params / 2**30)
    assert m.parts["logits"] == pytest.approx(8 * 31024 / 2 * 152064 / 2**30) and m.cache_tokens == int((56 - m.parts["rollout weights"]) * 2**30 / (4 * 48 * 1024))
    assert m.phases["update"] == pytest.approx(sum(m.parts[k] for k in ("weights", "gradients", "optimizer", "gathered", "activations", "logits")) + P.OVERHEAD)
    more = [P.rl_memory(s, v, 12), P.rl_memory(s, v | dict(sp=4), 6), P.rl_memory(replace(s, layers=24), v, 6), P.rl_memory(s, v | dict(max_response=15000), 6)]
    assert all(x.phases["update"] < m.phases["update"] for x in more)
    stays = P.rl_memory(s, v, 6, offload=False)
    assert stays.phases["generate"] == pytest.approx(m.phases["generate"] + m.parts["weights"] + m.parts["optimizer"])
    assert not P.rl_memory(s, v | dict(kl_loss=False), 6, offload=False).host
    assert P.rl_memory(s, v | dict(checkpointing=False), 6).peak > 2 * m.peak


@pytest.mark.parametrize("name, params", [("3b", 3.09), ("7b", 7.62), ("14b", 14.77)])
def test_shape_of_a_folder_and_of_the_hub(shop, name, params):
    assert SIZES[name].items() <= json.loads((shop/name/"config.json").read_text()).items()
    s = P.model_shape(shop/name)
    assert s == P.HUB[f"Qwen/Qwen2.5-{name.upper()}-Instruct"] and s.params / 1e9 == pytest.approx(params, abs=0.01)


def test_params_are_those_of_the_real_model(shop):
    from webseer.model import load_checkpoint
    real = sum(p.numel() for n, p in load_checkpoint(shop/"tiny")[0].named_parameters() if p.ndim == 2)
    assert P.model_shape(shop/"tiny").params == real


# ---- what is shown and written

def test_show_tells_everything(shop):
    p = rl(shop)
    text = P.show(p, tell=None)
    for part in ("variant released", "6 GPUs of 80 GiB", "lr", "peak", "without offload", "4,467,456 tokens, 2 updates",
                 "data.train_batch_size=24", "VERL_FILE_LOGGER_PATH="): assert part in text
    assert "refused [tool-text]" in P.show(rl(shop, R + "multi_turn.max_tool_response_length=9"), tell=None)


@pytest.fixture
def fake(tmp_path):
    "A program in the place of verl's Python: it notes how it was called, logs two steps, and ends as told."
    path = tmp_path/"python"
    path.write_text(f"#!{sys.executable}\n" + """
import json, os, sys, time
here = os.path.dirname(os.path.abspath(__file__))
call = dict(args=sys.argv[1:], file=os.environ.get("VERL_FILE_LOGGER_PATH"), ray=os.environ.get("RAY_ADDRESS"))
with open(os.path.join(here, "calls.jsonl"), "a") as f: f.write(json.dumps(call) + "\\n")
if sys.argv[1] == "-c": sys.exit(0)
n = int(os.environ.get("START", 1))
if os.environ.get("VERL_FILE_LOGGER_PATH"):
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as f:
        for s in (n, n + 1): f.write(json.dumps({"step": s, "data": {"critic/score/mean": s / 10}}) + "\\n")
print("RuntimeError: out of luck" if os.environ.get("FAIL") else "fine")
if os.environ.get("SLOW"):
    print("working", flush=True)
    time.sleep(60)
sys.exit(int(os.environ.get("FAIL", 0)))
""")
    path.chmod(0o755)
    return path


def calls(fake): return [c for c in read_jsonl(fake.parent/"calls.jsonl") if c["args"][0] != "-c"]


def test_scripts_run_the_same_command(shop, fake, tmp_path, monkeypatch):
    odd = tmp_path/"a folder, with 'odd' signs"
    (odd/"data").mkdir(parents=True)
    for f in ("rl.parquet", "sft.parquet"): (odd/"data"/f).write_bytes((shop/f).read_bytes())
    for plan in (rl(shop, folder=odd/"rl", train=odd/"data"/"rl.parquet"), sft(shop, folder=odd/"sft", train=odd/"data"/"sft.parquet")):
        L.write(plan)
        for _ in range(2): subprocess.run([plan.folder/"run.sh"], env={**os.environ, "WEBSEER_VERL": str(fake)}, check=True, capture_output=True)
        first, second = calls(fake)[-2:]
        assert [w for w in first["args"] if "VERL_FILE_LOGGER_PATH" not in w] == [w for w in plan.command()[1:] if "VERL_FILE_LOGGER_PATH" not in w]
        assert (first["file"], second["file"]) == tuple(str(plan.folder/"metrics"/f"verl-00{i}.jsonl") for i in (0, 1))
        told = [w for w in second["args"] if "VERL_FILE_LOGGER_PATH" in w]
        assert plan.stage == "sft" or told[0].endswith(f"VERL_FILE_LOGGER_PATH='{second['file']}'") or second["file"].replace("'", "\\'") in told[0]


@pytest.mark.parametrize("name", ["run.sh", "slurm.sh"])
def test_scripts_hold_the_folder_too(shop, fake, tmp_path, name):
    plan = sft(shop, folder=tmp_path/"run")
    L.write(plan)
    (tmp_path/"scontrol").write_text("#!/bin/bash\necho n1\n")
    (tmp_path/"srun").write_text("#!/bin/bash\nshift\nexec \"$@\"\n")
    for f in ("scontrol", "srun"): (tmp_path/f).chmod(0o755)
    env = {**os.environ, "WEBSEER_VERL": str(fake), "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1"}
    start = lambda **more: subprocess.Popen(["bash", plan.folder/name], env=env | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                            start_new_session=True)
    with sole_user(plan.folder):
        second = start()
        assert "is in use by process" in second.communicate(timeout=30)[1] and second.returncode == 1 and not (tmp_path/"calls.jsonl").exists()
    first = start(SLOW="1")
    try:
        assert any(line == "working\n" for line in first.stdout)
        with pytest.raises(WebseerError, match=f"is in use by process {first.pid}"), sole_user(plan.folder): pass
    finally: os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert any(is_free(plan.folder) or time.sleep(0.1) for _ in range(100))
    assert start().wait(30) == 0


@pytest.mark.parametrize("nodes", [1, 3])
def test_slurm_script(shop, fake, tmp_path, nodes):
    bin_ = tmp_path/"bin"
    bin_.mkdir()
    (bin_/"scontrol").write_text("#!/bin/bash\nprintf 'n1\\nn2\\nn3\\n' | head -n " + str(nodes) + "\n")
    (bin_/"srun").write_text(f"#!/bin/bash\necho \"$@\" >> {tmp_path}/srun.txt\nwhile [[ $1 == -* ]]; do if [[ $1 == -w ]]; then shift; fi; shift; done\n\"$@\"\n")
    (bin_/"sleep").write_text("#!/bin/bash\n")
    (tmp_path/"ray").write_text(f"#!/bin/bash\necho \"$@\" >> {tmp_path}/ray.txt\n")
    for f in (*bin_.iterdir(), tmp_path/"ray"): f.chmod(f.stat().st_mode | stat.S_IXUSR)
    env = {**os.environ, "WEBSEER_VERL": str(fake), "PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-3]"}
    for plan in (rl(shop, f"verl_nodes={nodes}"), sft(shop, f"verl_nodes={nodes}", "batch=96")):
        L.write(plan)
        text = (plan.folder/"slurm.sh").read_text()
        assert f"#SBATCH --nodes={nodes}\n" in text and "#SBATCH --requeue" in text and f"--gpus-per-node={plan.gpus}" in text
        subprocess.run(["bash", plan.folder/"slurm.sh"], env=env, check=True, capture_output=True)
        got = calls(fake)[-1]
        if plan.stage == "srrl":
            starts = (tmp_path/"ray.txt").read_text().split("\n")[:-1]
            assert len(starts) == nodes and sum("--head" in s for s in starts) == 1 and sum("--address=n1:6379" in s for s in starts) == nodes - 1
            assert got["ray"] == "n1:6379" and got["args"][:2] == ["-m", "verl.trainer.main_ppo"]
        else: assert ("--rdzv_endpoint=n1:29500" in got["args"]) == (nodes > 1) and f"--nnodes={nodes}" in got["args"]


def test_plan_file_holds_the_whole_plan(shop):
    p = rl(shop)
    L.write(p)
    d = json.loads((p.folder/"plan.json").read_text())
    assert d["words"] == p.words and d["settings"]["prompts"] == 24 and d["loop"]["max_submissions"] == 5
    agent = json.loads((p.folder/"agent.yaml").read_text())
    assert agent[0]["name"] == "webseer" and agent[0]["_target_"] == "webseer.verl_loop.WebseerAgentLoop" and agent[0]["l_max"] == 30000


# ---- launching and resuming

def test_launch_resumes_and_keeps_all_metrics(shop, fake, monkeypatch):
    monkeypatch.setenv("WEBSEER_VERL", str(fake))
    monkeypatch.setattr(L, "check", lambda *a, **k: ["skipped"])
    plan = lambda *c: rl(shop, *c, profile="verl-cpu", model=shop/"tiny")
    said = []
    monkeypatch.setenv("FAIL", "3")
    with pytest.raises(WebseerError, match="ended with 3: RuntimeError: out of luck.*goes on from the last checkpoint"): L.launch(plan(), tell=said.append)
    monkeypatch.delenv("FAIL")
    monkeypatch.setenv("START", "2")
    folder = L.launch(plan(), tell=said.append)
    assert [r["reward"] for r in read_jsonl(folder/"metrics.jsonl")] == [0.1, 0.2, 0.3] and "fine" in said
    assert calls(fake)[-1]["args"][-1:] and plan().get("trainer.resume_mode") == "auto" and plan().get("trainer.default_local_dir") == str(folder/"checkpoints")
    L.launch(plan("steps=9"), tell=said.append)                                  # going on for longer is no other run
    with pytest.raises(WebseerError, match=r"begun with other settings \(actor_rollout_ref.actor.optim.lr = 0.0002 there, 0.5 now"): L.launch(plan("lr=0.5"), tell=said.append)


def test_a_run_can_be_given_a_time(shop, fake, monkeypatch):
    monkeypatch.setenv("WEBSEER_VERL", str(fake))
    monkeypatch.setenv("SLOW", "1")
    monkeypatch.setattr(L, "check", lambda *a, **k: ["skipped"])
    plan, begun = rl(shop, profile="verl-cpu", model=shop/"tiny"), []
    with pytest.raises(WebseerError, match="ended after 1 s without a checkpoint"): L.launch(plan, tell=lambda l: None, seconds=1, started=begun.append)
    assert begun[0].poll() == -15
    at = plan.folder/"checkpoints"/"global_step_3"/"actor"/"huggingface"
    write_text(at/"config.json", "{}")
    write_text(plan.folder/"checkpoints"/"latest_checkpointed_iteration.txt", "3")
    assert L.launch(plan, tell=lambda l: None, seconds=1) == plan.folder


def test_the_same_plan_can_be_launched_twice(shop, fake, monkeypatch):
    monkeypatch.setenv("WEBSEER_VERL", str(fake))
    monkeypatch.setattr(L, "check", lambda *a, **k: ["skipped"])
    plan = rl(shop, profile="verl-cpu", model=shop/"tiny")
    for start in ("1", "3"):
        monkeypatch.setenv("START", start)
        L.launch(plan, tell=lambda line: None)
    assert [r["reward"] for r in L.read_metrics(plan.folder)] == [0.1, 0.2, 0.3, 0.4]        # verl opens its file anew: each start needs its own
    assert any("verl-001.jsonl" in w for w in calls(fake)[-1]["args"])


def test_an_orphan_of_a_killed_launcher_keeps_the_folder(shop, fake, monkeypatch):
    "SIGKILL leaves us no time to end verl; a second start must not train into the same folder."
    monkeypatch.setenv("WEBSEER_VERL", str(fake))
    monkeypatch.setenv("SLOW", "1")
    monkeypatch.setattr(L, "check", lambda *a, **k: ["skipped"])
    again = lambda: L.launch(rl(shop, profile="verl-cpu", model=shop/"tiny"), tell=lambda line: None)
    folder = P.run_folder(load_profile("verl-cpu"), "srrl", "released")
    code = ("import sys; from webseer import launch as L, plan as P; from webseer.core import load_profile\n"
            "L.check = lambda *a, **k: ['skipped']\ndata, model = sys.argv[1:]\n"
            "L.launch(P.plan_rl(load_profile('verl-cpu'), 'released', train=data, val=data, model=model), tell=lambda line: print(line, flush=True))")
    launcher = subprocess.Popen([sys.executable, "-c", code, str(shop/"rl.parquet"), str(shop/"tiny")], stdout=subprocess.PIPE, text=True)
    try:
        assert any(line == "working\n" for line in launcher.stdout)
        with pytest.raises(WebseerError, match="is in use by process") as busy: again()      # both live
        verl = int(re.search(r"in use by process (\d+): wait for it, end it", str(busy.value))[1])
        assert verl != launcher.pid and os.getpgid(verl) == verl
    finally: launcher.kill()
    launcher.wait()
    with pytest.raises(WebseerError, match=f"is in use by process {verl}"): again()          # verl alone lives
    os.kill(verl, signal.SIGTERM)
    assert any(is_free(folder) or time.sleep(0.1) for _ in range(100))
    monkeypatch.delenv("SLOW")
    assert again() == folder and len(calls(fake)) == 2


def is_free(folder):
    with contextlib.suppress(WebseerError), sole_user(folder): return True


def test_a_folder_that_cannot_be_locked(tmp_path):
    write_text(tmp_path/"file", "")
    with pytest.raises(WebseerError, match="cannot be used"), sole_user(tmp_path/"file"): pass
    with sole_user(tmp_path/"a"), pytest.raises(WebseerError, match="is in use by process"), sole_user(tmp_path/"a"): pass


def test_dry_run_starts_and_leaves_nothing(shop, fake, monkeypatch, outputs):
    monkeypatch.setenv("WEBSEER_VERL", str(fake))
    monkeypatch.setattr(L, "check", lambda *a, **k: ["skipped"])
    p = rl(shop, profile="verl-cpu", model=shop/"tiny")
    L.launch(p, dry_run=True, tell=lambda l: None)
    assert not (fake.parent/"calls.jsonl").exists() and not p.folder.exists()


def test_several_nodes_are_handed_over(shop, fake, monkeypatch, tmp_path):
    "Nothing here can start them, so the scripts are written and nothing is run."
    monkeypatch.setenv("WEBSEER_VERL", str(fake))
    monkeypatch.setattr(L, "check", lambda *a, **k: ["skipped"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, plan in (("s", sft(shop, "verl_nodes=2", folder=tmp_path/"a b"/"s")), ("r", rl(shop, "verl_nodes=2", folder=tmp_path/"a b"/"r"))):
        said = []
        L.launch(plan, dry_run=True, tell=said.append)
        assert not plan.folder.exists()
        assert L.launch(plan, tell=said.append) == plan.folder and "nothing was started: 2 nodes" in said[-1] and "slurm.sh'" in said[-1]
        assert (plan.folder/"slurm.sh").exists() and (plan.folder/"run.sh").exists() == (name == "r") and (plan.folder/"params.json").exists()
        assert f'#SBATCH --output="{plan.folder}/slurm-%j.log"\n' in (plan.folder/"slurm.sh").read_text()
        with sole_user(plan.folder), pytest.raises(WebseerError, match="is in use"): L.launch(plan, tell=said.append)
    assert not (tmp_path/"calls.jsonl").exists()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(L, "ready", lambda plan: None)
    L.launch(rl(shop, "verl_nodes=2", folder=tmp_path/"a b"/"r"), tell=lambda l: None)
    assert len(calls(fake)) == 1


def test_what_may_change_on_resume(shop, tmp_path):
    begun = lambda p: {k: v for k, v in L._identity(p).items()}
    old = begun(rl(shop))
    for word in ("rollout_memory=0.5", "log_prob_micro=2", "ref_log_prob_micro=2", "verl_offload=false", "val_before_train=true", "checkpointing=false", "activation_offload=true",
                 "max_tokens_gpu=16384"): assert begun(rl(shop, word)) == old, word
    for word in ("lr=1e-5", "group=12", "sp=1"): assert begun(rl(shop, word)) != old, word
    dynamic = "actor_rollout_ref.actor.use_dynamic_bsz=true"
    assert begun(rl(shop, dynamic)) != begun(rl(shop, dynamic, "max_tokens_gpu=16384"))
    data = tmp_path/"rl.parquet"
    data.write_bytes((shop/"rl.parquet").read_bytes())
    for which in ("train", "val"):
        first = begun(rl(shop, **{which: data}))
        data.write_bytes(data.read_bytes() + b"x")
        assert first != begun(rl(shop, **{which: data}))


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    "A program in the place of nvidia-smi: eight GPUs of 40 GiB."
    tool = tmp_path/"bin"/"nvidia-smi"
    write_text(tool, "#!/bin/bash\nfor i in {0..7}; do if [[ $1 == -L ]]; then echo \"GPU $i: A (UUID: GPU-$i)\"; else echo \"$i, GPU-a$i, 40960\"; fi; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_the_gpus_at_hand_are_compared_with_the_estimate(shop, gpus, fake):
    gpus.setenv("WEBSEER_VERL", str(fake))
    with pytest.raises(WebseerError, match=r"the estimate is \d+ GiB per GPU and this machine's have 40: set verl_memory=40 and see what --dry-run advises"): L.ready(rl(shop))
    small = rl(shop, profile="gpu1", model=shop/"tiny")
    L._check_gpus(small)
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0,3,GPU-a5,99,1")
    assert L._gpus() == [40.0] * 3
    with pytest.raises(WebseerError, match="wants 6 GPUs and this machine has 3: set gpus=3"): L.ready(rl(shop))
    gpus.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert L._gpus() == [0.0]
    L._check_gpus(small)


def test_no_gpu_no_launch(shop, monkeypatch, fake):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("WEBSEER_VERL", str(fake))
    with pytest.raises(WebseerError, match="wants 6 GPUs and this machine has none"): L.ready(rl(shop))


def test_finding_verl(monkeypatch, tmp_path):
    monkeypatch.setenv("WEBSEER_VERL", str(tmp_path/"none"))
    with pytest.raises(WebseerError, match="which is no program"): P.find_verl()
    monkeypatch.delenv("WEBSEER_VERL")
    monkeypatch.setattr(P, "root", lambda: tmp_path)
    monkeypatch.setattr(P.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WebseerError, match="make verl"): P.find_verl()
    (tmp_path/".venv-verl"/"bin").mkdir(parents=True)
    (tmp_path/".venv-verl"/"bin"/"python").touch()
    assert P.find_verl().endswith(".venv-verl/bin/python")


# ---- metrics

def test_metrics_of_sft_and_torn_files(tmp_path):
    line = lambda step, d: json.dumps(dict(step=step, data=d)) + "\n"
    whole = line(1, {"train/loss": 3.0, "train/lr": 1e-6, "train/global_tokens": 10}) + line(1, {"val/loss": 4.0}) + line(2, {"train/loss": 2.0})
    write_text(tmp_path/"metrics"/"verl-000.jsonl", whole + '{"step": 3, "da')
    rows = L.read_metrics(tmp_path)
    assert [(r["step"], r["loss"], r["val_loss"]) for r in rows] == [(0, 3.0, 4.0), (1, 2.0, None)]
    with pytest.raises(WebseerError, match="no metrics in"): L.read_metrics(tmp_path/"other")


def test_saved_metrics_are_json(tmp_path):
    write_text(tmp_path/"metrics"/"verl-000.jsonl", '{"step": 1, "data": {"train/loss": 3.0}}\n{"step": 1, "data": {"val/loss": NaN}}\n')
    def never(word): raise AssertionError(word)
    [row] = [json.loads(line, parse_constant=never) for line in L.save_metrics(tmp_path).read_text().splitlines()]
    assert row["loss"] == 3.0 and row["val_loss"] is None


def test_metrics_have_the_columns_of_the_embedded_trainer(tmp_path):
    from webseer.verl_loop import numbers_of
    from webseer.traj import Traj
    n = numbers_of(Traj("q", ["a"], calls=["search", "malformed", "submit_answer"], stop="max_turns", submissions=[dict(em=1)]), 10, 4)
    d = {"critic/score/mean": 0.5, "actor/entropy": 0.1, "actor/kl_loss": 0.01, "actor/pg_clipfrac": 0.02, "actor/grad_norm": 1.0,
         "actor/lr": 1e-6, "prompt_length/mean": 5, "response_length/mean": 7} | {f"webseer/{k}": v for k, v in n.items()}
    lines = [dict(step=0, data={"val-core/x": 1}), dict(step=1, data=d)]
    write_text(tmp_path/"metrics"/"verl-000.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    [row] = L.read_metrics(tmp_path)
    embedded = ("step", "reward", "first_acc", "best_acc", "calls", "submissions", "live", "malformed", "length", "truncated", "n_search",
                "n_query", "n_check", "entropy", "kl", "clip_frac", "grad_norm", "lr")
    assert set(embedded) <= set(row) and row["first_acc"] == 1 and row["length"] == 12 and row["malformed"] == pytest.approx(1 / 3) and row["truncated"] == 1
    from webseer.rl import warnings
    warnings([row | dict(live=0.5)])


# ---- data cells

def test_conversations():
    call = lambda args: dict(function=dict(name="search", arguments=args))
    assert L.messages_of(json.dumps(TALK))[2]["content"] == "Let me see."
    for cell, message in (("{", "not JSON"), ("[]", "no list"), (None, "no list"), ([dict(role="judge", content="")], "has no role"), ([dict(role="user", content=3)], "is no text"),
                          ([dict(role="user", content="x")], "nothing to learn"), ([dict(role="assistant", content="", tool_calls=[dict(function=None)])], "no function with a name")):
        with pytest.raises(WebseerError, match=message): L.messages_of(cell)
    assert L.has_nulls([dict(role="assistant", tool_calls=[call(dict(query="x", url=None))])]) and not L.has_nulls([dict(role="assistant", tool_calls=None)])


def test_every_prompt_that_may_be_too_long_is_measured():
    class Tok:
        def apply_chat_template(self, prompt, **more): return [0] * sum(c != " " for m in prompt for c in m["content"])
    rows = [rl_row(i, prompt=[dict(role="user", content="b " * 60)]) for i in range(70)] + [rl_row(70, prompt=[dict(role="user", content="a" * 95)])]
    with pytest.raises(WebseerError, match="row 71, field prompt: it has 95 tokens, more than max_prompt = 90"): L._longest_prompt("x", rows, Tok(), 90)
    assert L._longest_prompt("x", rows, Tok(), 95) == 95


# ---- verl itself

try: PYTHON = P.find_verl()
except WebseerError: PYTHON = None
needs_verl = pytest.mark.skipif(PYTHON is None, reason="verl is not installed (make verl, or WEBSEER_VERL)")
ONE = """
import json, sys
from webseer import launch as L
compose, kept = L._compose, {}
def once(d):
    key = str([w for w in d["words"] if "_files=" not in w])                      # the parquet file alone differs: one configuration does for all
    if key not in kept: kept[key] = compose(d)
    return kept[key]
L._compose = once
for i in range(int(sys.argv[2])): L.check_inside(f"{sys.argv[1]}/{i}.json", f"{sys.argv[1]}/{i}.answer")
"""


@pytest.fixture(scope="session")
def dry(shop, tmp_path_factory):
    "All dry runs, in one process of verl."
    if PYTHON is None: pytest.skip("verl is not installed")
    import pyarrow as pa, pyarrow.parquet as pq
    from webseer.remote import running_server
    from webseer.retrieval import MiniWeb
    from webseer.world import World
    tmp = tmp_path_factory.mktemp("dry")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("WEBSEER_OUTPUTS", str(tmp/"outputs"))
        m.chdir(ROOT)
        plans = {}

        def data(name, rows):
            pq.write_table(pa.Table.from_pylist(rows), tmp/name)
            return tmp/name

        for profile in ("paper-14b", "paper-7b", "gpu1"):
            for variant in P.VARIANTS:
                model = shop/("tiny" if profile == "gpu1" else profile[6:])
                plans["sft", profile, variant] = sft(shop, profile=profile, variant=variant, model=model)
                plans["srrl", profile, variant] = rl(shop, profile=profile, variant=variant, model=model)
        for name in P.ALGORITHMS:
            for profile, variant in (("gpu1", "released"), ("verl-cpu", "paper")):
                plans["algorithm", name, profile] = rl(shop, f"verl_algorithm={name}", profile=profile, variant=variant, model=shop/"tiny")
        plans["cpu", "sft"] = sft(shop, profile="verl-cpu", model=shop/"tiny")
        plans["cpu", "srrl"] = rl(shop, profile="verl-cpu", model=shop/"tiny")
        # what verl alone can tell
        plans["unknown"] = rl(shop, "actor_rollout_ref.rollout.temprature=0.6")
        plans["unknown leaf"] = rl(shop, "trainer.max_assistant_turns=3")
        plans["known already"] = rl(shop, "+data.shuffle=false")
        plans["estimator"] = rl(shop, "algorithm=grop")
        plans["offloading"] = rl(shop, "+actor_rollout_ref.model.enable_activation_offlod=true")
        plans["gone"] = rl(shop, R + "multi_turn.max_turns=20")
        plans["architecture"] = rl(shop, "verl_architecture=Qwen3ForCausalLM")
        plans["type"] = rl(shop, "actor_rollout_ref.actor.loss_agg_mode=token-average")
        plans["validate"] = rl(shop, "actor_rollout_ref.rollout.log_prob_micro_batch_size=4")
        plans["no class"] = rl(shop, R + "agent.agent_loop_config_path=" + str(tmp/"bad.yaml"))
        write_text(tmp/"bad.yaml", "- {name: webseer, _target_: nowhere.Loop}\n")
        write_text(tmp/"odd.yaml", "- {name: webseer, _target_: webseer.verl_loop.WebseerAgentLoop, max_submision: 3}\n")
        plans["odd loop"] = rl(shop, R + "agent.agent_loop_config_path=" + str(tmp/"odd.yaml"))
        plans["no loop"] = rl(shop, R + "agent.default_agent_loop=websear")
        bare = tmp/"bare"
        write_json(bare/"config.json", json.loads((shop/"14b"/"config.json").read_text()))
        plans["no tokenizer"] = rl(shop, model=bare)
        # wrong parquet
        rows = [rl_row(i) for i in range(32)]
        plans["no column"] = rl(shop, train=data("a.parquet", [{k: v for k, v in r.items() if k != "agent_name"} for r in rows]))
        plans["no rows"] = rl(shop, val=_empty(pa, pq, tmp))
        plans["few rows"] = rl(shop, train=data("c.parquet", rows[:3]))
        plans["no gold"] = rl(shop, train=data("d.parquet", rows[:5] + [rl_row(5, reward_model=dict(style="rule", ground_truth=""))] + rows[6:]))
        plans["other loop"] = rl(shop, val=data("e.parquet", [rl_row(0, agent_name="webser")]))
        plans["prompt"] = rl(shop, train=data("f.parquet", rows[:9] + [rl_row(9, prompt=[dict(role="user", content="Q"), dict(role="system", content="S")])] + rows[10:]))
        plans["long prompt"] = rl(shop, train=data("g.parquet", rows[:7] + [rl_row(7, prompt=[dict(role="user", content="x" * 2000)])] + rows[8:]))
        write_text(tmp/"h.parquet", "PAR1 not really")
        plans["no parquet"] = rl(shop, train=tmp/"h.parquet")
        call = lambda name, **args: dict(id="1", type="function", function=dict(name=name, arguments=args))
        structured = [dict(messages=[dict(role="user", content="Q"), dict(role="assistant", content="", tool_calls=[call("search", query="x")]),
                                     dict(role="tool", content="y"), dict(role="assistant", content="", tool_calls=[call("submit_answer", answer="z")])])] * 64
        plans["nulls"] = sft(shop, train=data("i.parquet", structured))
        whole = [dict(messages=[dict(role="user", content="Q"), dict(role="assistant", content="", tool_calls=[call("search", query="x")])])] * 64
        # a template that looks at a message's place: verl's stock data set renders message by message
        placed = shutil.copytree(shop/"tiny", tmp/"placed")
        config = json.loads((placed/"tokenizer_config.json").read_text())
        write_json(placed/"tokenizer_config.json", config | dict(chat_template=config["chat_template"].replace('m.role == "system"', "loop.first")))
        own = ("data.custom_cls.path=null", "data.custom_cls.name=null")
        plans["calls beside"] = sft(shop, model=placed, train=data("j.parquet", whole))
        plans["verl's own"] = sft(shop, *own, model=placed)
        plans["verl's own is right"] = sft(shop, *own, profile="verl-cpu", model=shop/"tiny")
        plans["long"] = sft(shop, "max_length=40", train=data("k.parquet", [dict(messages=TALK)] * 63 + [dict(messages=[*TALK[:2], dict(role="assistant", content="y" * 99)])]))
        plans["nobody"] = sft(shop, val=data("l.parquet", [dict(messages=TALK[:2])]))
        plans["few val"] = sft(shop, val=data("n.parquet", [dict(messages=TALK)] * 63))
        # the row of most tokens is not among those of most bytes
        letters = [dict(messages=[*TALK[:2], dict(role="assistant", content="\n" * 200)])] * 70
        plans["many tokens"] = sft(shop, "max_length=290", train=data("o.parquet", letters + [dict(messages=[*TALK[:2], dict(role="assistant", content="y" * 300)])]))
        # structured calls far behind the first rows
        plans["late call"] = sft(shop, model=placed, train=data("p.parquet", [dict(messages=TALK)] * 400 + whole[:1]))
        plans["role"] = sft(shop, val=data("m.parquet", [dict(messages=TALK), dict(messages=[dict(role="judge", content="x"), *TALK[1:]])]))
        with running_server(MiniWeb(World("dry"))) as address:
            dead = {"dead": rl(shop, retrieval="http://127.0.0.1:9"), "alive": rl(shop, retrieval=address)}
            for i, (key, p) in enumerate((plans | dead).items()):
                d = L.as_dict(p) | dict(ask_retrieval=key in dead)
                path = p.get(R + "agent.agent_loop_config_path") if p.stage == "srrl" else None
                if path and not Path(path).exists():
                    d["agent_yaml"] = str(tmp/f"{i}.yaml")
                    write_text(tmp/f"{i}.yaml", L.agent_yaml(p))
                write_json(tmp/f"{i}.json", d)
            env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp/"cache"), "VERL_USE_EXTERNAL_MODULES": "webseer.verl_cpu", "HF_HUB_OFFLINE": "1"}
            r = subprocess.run([PYTHON, "-c", ONE, str(tmp), str(len(plans) + len(dead))], env=env, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-2000:]
        return {key: json.loads((tmp/f"{i}.answer").read_text()) for i, key in enumerate(plans | dead)}


def _empty(pa, pq, tmp):
    pq.write_table(pa.Table.from_pylist([rl_row()]).slice(0, 0), tmp/"b.parquet")
    return tmp/"b.parquet"


@needs_verl
def test_the_embedded_template_suits_verls_own_data_set(dry):
    assert dry["verl's own is right"]["error"] is None and "ids and mask equal ours" in "\n".join(dry["verl's own is right"]["done"])


@needs_verl
def test_the_rows_compared_are_those_of_verl_s_first_batch():
    "Over all ranks, as verl's trainer makes its sampler."
    code = """
from torch.utils.data import DistributedSampler as D
from webseer.launch import _first_rows
for n, batch, dp in ((100, 16, 4), (67, 64, 2), (64, 64, 1)):
    rows = []
    for rank in range(dp):
        s = D(range(n), shuffle=True, num_replicas=dp, rank=rank, drop_last=True)
        s.set_epoch(epoch=0)
        rows += list(s)[:batch // dp]
    assert sorted(rows) == _first_rows(n, batch, True)
assert _first_rows(100, 16, False) == list(range(16))
assert _first_rows(100, 16, True) != list(range(16))
"""
    assert subprocess.run([PYTHON, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True).returncode == 0


@needs_verl
@pytest.mark.parametrize("variant", P.VARIANTS)
@pytest.mark.parametrize("profile", ["paper-14b", "paper-7b", "gpu1"])
@pytest.mark.parametrize("stage", ["sft", "srrl"])
def test_dry_runs_of_full_profiles(dry, stage, profile, variant):
    said = dry[stage, profile, variant]
    assert said["error"] is None, said
    text = "\n".join(said["done"])
    assert ("ids and mask equal ours" in text) if stage == "sft" else ("WebseerAgentLoop" in text and "prompts up to" in text)


@needs_verl
@pytest.mark.parametrize("key", [("cpu", "sft"), ("cpu", "srrl"), "alive"])
def test_other_dry_runs(dry, key): assert dry[key]["error"] is None


@needs_verl
@pytest.mark.parametrize("name", P.ALGORITHMS)
def test_dry_runs_of_every_algorithm(dry, name):
    keys = [k for k in dry if k[:2] == ("algorithm", name)]
    assert len(keys) == 2
    for k in keys:
        assert dry[k]["error"] is None, (k, dry[k])
        assert ("critic" in "\n".join(dry[k]["done"])) == (name == "ppo")


@needs_verl
@pytest.mark.parametrize("key, message", [
    ("unknown", "verl does not know the setting actor_rollout_ref.rollout.temprature; did you mean actor_rollout_ref.rollout.temperature?"),
    ("estimator", "verl has no estimator 'grop': did you mean 'grpo'"), ("few val", "n.parquet has 63 rows, less than a batch of 64"), ("few val", "webseer data sft --test SHARE"),
    ("many tokens", "row 71, field messages: it has"), ("late call", "row 401, field messages"),
    ("unknown leaf", "actor_rollout_ref.rollout.multi_turn.max_assistant_turns"),
    ("known already", "write it without the +"), ("gone", "did you mean actor_rollout_ref.rollout.multi_turn.max_"),
    ("architecture", "14b is a Qwen2ForCausalLM, but the profile is for Qwen3ForCausalLM"),
    ("offloading", "no setting enable_activation_offlod; did you mean enable_activation_offload?"),
    ("type", "token-average"), ("validate", "log_prob_micro_batch_size"),
    ("no class", "nowhere.Loop cannot be imported"), ("odd loop", "did you mean 'max_submissions'"), ("no loop", "did you mean 'webseer'"), ("no tokenizer", "14b|tokenizer"),
    ("no column", "no column 'agent_name'"), ("no rows", "has no rows"), ("few rows", "has 3 rows, less than the 24"), ("no gold", "row 6, field reward_model: it has no ground_truth"),
    ("other loop", "row 1, field agent_name: 'webser'"), ("prompt", "row 10, field prompt"), ("long prompt", "row 8, field prompt: it has 20"), ("no parquet", "is no parquet file"),
    ("nulls", "row 1, field messages: parquet has added null fields"), ("calls beside", "written by the assistant and carries no loss: write calls as text"),
    ("verl's own", "row 1, field messages"), ("long", "row 64, field messages: it has 1"), ("nobody", "nothing to learn"), ("role", "row 2, field messages: message 1 has no role"),
    ("dead", "the retrieval server at http://127.0.0.1:9 cannot be searched")])
def test_what_a_dry_run_finds(dry, key, message):
    said = dry[key]["error"]
    assert said and re.search(re.escape(message) if "|" not in message else message, said), said
    assert "\n" not in said and len(said) < 700


@needs_verl
def test_check_from_here(shop):
    "The whole way: a process of its own, the answer read back."
    from webseer.remote import running_server
    from webseer.retrieval import MiniWeb
    from webseer.world import World
    with running_server(MiniWeb(World("dry"))) as address:
        done = L.check(rl(shop, retrieval=address))
    assert len(done) == 7 and "no" not in done[0].split()[:1] and any("hits for one search" in d for d in done)


def test_import_is_light():
    code = "import sys, webseer.launch, webseer.plan; print([m for m in ('torch', 'verl', 'ray', 'hydra', 'pyarrow', 'numpy', 'webseer.model') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
