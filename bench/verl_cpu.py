"""SFT and SRRL with an unforked verl on a machine without a GPU, from questions to evaluation, with every claim checked.

    python bench/verl_cpu.py --verl .venv-verl/bin/python --out outputs/verl-cpu            all of it, about eight minutes on two cores
    python bench/verl_cpu.py --verl .venv-verl/bin/python --vllm .venv-vllm/bin/python ...  and once with rollouts by a real vLLM

Runs in webseer's own environment; verl (and vLLM) live in theirs and are started as programs. Everything is written below --out; what was found
stands in report.json there. A stage that is complete is not run again.
"""
import argparse, contextlib, json, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

from webseer.core import WebseerError, keyed_rng, load_profile, read_jsonl, to_json, write_json, write_text
from webseer.rewards import reward, score_answer
from webseer.verl_cpu import RL_CPU, SFT_CPU, cpu_env, load_hf
from webseer.verl_loop import (agent_config, encode_chat, recorded, rollout_metrics, save_rows, sft_rows, worlds_app)

SFT_STEPS, SFT_BATCH, RL_STEPS, KILL_AFTER, BATCH, GROUP = 450, 12, 6, 3, 4, 4
PROMPT, RESPONSE, L_EXPECT = 96, 480, 240      # tokens
LOOP = dict(variant="paper", max_submissions=4, max_calls=12, max_turns=16, max_new=24, l_expect=L_EXPECT, l_max=RESPONSE)


class Proof:
    "Where things are, and what was found."
    def __init__(self, args):
        self.out, self.verl, self.vllm, self.args = Path(args.out).resolve(), args.verl, args.vllm, args
        self.out.mkdir(parents=True, exist_ok=True)
        os.environ["WEBSEER_OUTPUTS"] = str(self.out/"webseer")
        self.profile = load_profile("smoke", n_worlds=24, per_world=60)
        self.ray = Path(tempfile.mkdtemp(prefix="ray-", dir=args.tmp))      # short: Ray's sockets have long names
        self.report = json.loads((self.out/"report.json").read_text()) if (self.out/"report.json").exists() else {}

    def note(self, stage, **found):
        self.report[stage] = found
        write_json(self.out/"report.json", self.report)
        print(f"{stage}: {to_json(found)}", flush=True)

    def run(self, python, words, log, env, kill=None):
        "Run a program to its end; with `kill`, end it hard as soon as that returns true. Returns seconds."
        start, log = time.time(), self.out/log
        with open(log, "wb") as f:
            p = subprocess.Popen([python, *words], stdout=f, stderr=subprocess.STDOUT, env={**os.environ, **env}, cwd=self.out, start_new_session=True)
            try:
                while p.poll() is None:
                    time.sleep(.2)
                    if kill and kill():
                        os.killpg(p.pid, signal.SIGKILL)
                        p.wait()
                        return time.time() - start
                    if time.time() - start > self.args.patience: raise WebseerError(f"{log.name} shows no end after {self.args.patience} s")
            finally:
                with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
                self.sweep()
        if p.returncode:
            tail = log.read_text(errors="replace").splitlines()[-25:]
            raise WebseerError(f"{' '.join(words[:3])} ended with {p.returncode}; the end of {log}:\n" + "\n".join(tail))
        return time.time() - start

    def sweep(self):
        "End what Ray left of our session (its daemons leave our process group): processes that have our temporary folder in their command."
        me = str(self.ray).encode()
        for d in Path("/proc").iterdir():
            if not d.name.isdigit() or int(d.name) == os.getpid(): continue
            with contextlib.suppress(OSError):
                if me in (d/"cmdline").read_bytes() or b"RAY_TMPDIR=" + me in (d/"environ").read_bytes(): os.kill(int(d.name), signal.SIGKILL)

    def env(self, **kw): return cpu_env(self.out, **kw) | {"RAY_TMPDIR": str(self.ray)}


def data(p):
    "Reflection data and questions."
    from webseer.model import Codec, ModelConfig, Qwen2, init_weights, save_checkpoint
    from webseer.reflect import make_data
    from webseer.traj import load_trajs
    start = time.time()
    report = make_data(p.profile, workers=2)
    trajs = [t for f in sorted((p.out/"webseer"/"smoke"/"seed0"/"reflect").glob("world*.jsonl")) for t in load_trajs(f)]
    keyed_rng("order").shuffle(trajs)
    save_rows(p.out/"sft_val.parquet", sft_rows(trajs[:16]))
    save_rows(p.out/"sft_train.parquet", sft_rows(trajs[16:]))
    codec = Codec()
    save_checkpoint(p.out/"untrained", init_weights(Qwen2(ModelConfig.of(p.profile, codec.n))), codec)
    save_rows(p.out/"rl_train.parquet", rl_rows(p.profile, "train", BATCH * RL_STEPS))
    save_rows(p.out/"rl_val.parquet", rl_rows(p.profile, "test", 8))
    p.note("data", trajectories=len(trajs), kept_share=report["kept_share"], seconds=round(time.time() - start, 1))


def rl_rows(profile, split, n):
    "Questions of several worlds as rows of verl."
    from webseer.agent import first_messages
    from webseer.retrieval import MiniWeb, ask_fair
    from webseer.world import World, WorldConfig
    rows, per = [], 4
    for i in range(n):
        name = f"verl-{split}-{i // per}"
        if i % per == 0: web = MiniWeb(World(name, WorldConfig.of(profile)))
        q = ask_fair(web, keyed_rng("verl", split, i), profile.k, hop_weights=profile.hop_weights, kinds=profile.kinds, split=split, qid=f"{split}-{i}")
        golds = json.dumps(list(q.golds))
        rows.append(dict(data_source="miniweb", prompt=first_messages(q.text), agent_name="webseer", ability="search", reward_model=dict(style="rule", ground_truth=golds),
                         extra_info=dict(index=i, split=split, qid=q.qid, golds=golds, hops=q.hops, world=name, kind=q.kind, retrieval=f"w/{name}")))
    return rows


def sft(p):
    "verl.trainer.sft_trainer from the untrained checkpoint."
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "verl.trainer.sft_trainer", *SFT_CPU,
             f"data.train_files={p.out}/sft_train.parquet", f"data.val_files={p.out}/sft_val.parquet", f"data.train_batch_size={SFT_BATCH}",
             f"data.micro_batch_size_per_gpu={SFT_BATCH}", "data.max_length=1024", "data.custom_cls.path=pkg://webseer.verl_loop", "data.custom_cls.name=ReflectionSet",
             f"model.path={p.out}/untrained", "optim.lr=3e-3", "optim.betas=[0.9,0.95]", "optim.weight_decay=0.01", "optim.clip_grad=1.0",
             "optim.lr_warmup_steps_ratio=0.05", "optim.lr_scheduler_type=cosine", "checkpoint.save_contents=[model,optimizer,extra,hf_model]",
             "trainer.project_name=webseer", "trainer.experiment_name=sft", "trainer.logger=[console,file]", f"trainer.total_training_steps={SFT_STEPS}",
             "trainer.total_epochs=100", f"trainer.default_local_dir={p.out}/sft", "trainer.resume_mode=auto", "trainer.save_freq=-1", "trainer.test_freq=-1"]
    seconds = p.run(p.verl, words, "sft.log", p.env() | {"VERL_FILE_LOGGER_PATH": str(p.out/"sft.jsonl")})
    rows = [r["data"] | dict(step=r["step"]) for r in read_jsonl(p.out/"sft.jsonl")]
    loss = {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}
    val = [r["val/loss"] for r in rows if "val/loss" in r][-1]
    first, last = sum(loss[k] for k in (1, 2, 3)) / 3, sum(loss[k] for k in sorted(loss)[-10:]) / 10
    assert last < .3 * first, (first, last)
    p.note("sft", steps=len(loss), first_loss=first, last_loss=last, val_loss=val, seconds=round(seconds, 1))


def rl_words(p, base, name, address, steps, *more):
    "The command line of verl.trainer.main_ppo."
    folder = p.out/name
    folder.mkdir(exist_ok=True)
    write_json(folder/"agent.yaml", agent_config(retrieval=address, record=str(folder/"rollouts"), **LOOP))
    return ["-m", "verl.trainer.main_ppo", *RL_CPU, f"+ray_kwargs.ray_init._temp_dir={p.ray}",
            "algorithm.adv_estimator=grpo", "algorithm.use_kl_in_reward=False",
            f"data.train_files={p.out}/rl_train.parquet", f"data.val_files={p.out}/rl_val.parquet", f"data.train_batch_size={BATCH}",
            f"data.max_prompt_length={PROMPT}", f"data.max_response_length={RESPONSE}", "data.return_raw_chat=True", "data.truncation=error", "data.shuffle=False",
            f"actor_rollout_ref.model.path={base}", "actor_rollout_ref.model.use_remove_padding=True",
            "actor_rollout_ref.actor.optim.lr=2e-4", f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH // 2}", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
            "actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.0001", "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
            "actor_rollout_ref.actor.clip_ratio_low=0.2", "actor_rollout_ref.actor.clip_ratio_high=0.28",
            "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
            f"actor_rollout_ref.rollout.n={GROUP}", "actor_rollout_ref.rollout.temperature=1.0", "actor_rollout_ref.rollout.top_k=-1",
            "actor_rollout_ref.rollout.calculate_log_probs=True",
            f"actor_rollout_ref.rollout.max_model_len={PROMPT + RESPONSE}", "actor_rollout_ref.rollout.max_num_seqs=64",
            "actor_rollout_ref.rollout.agent.default_agent_loop=webseer", f"actor_rollout_ref.rollout.agent.agent_loop_config_path={folder}/agent.yaml",
            "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=webseer.verl_loop.WebseerManager",
            "trainer.project_name=webseer", f"trainer.experiment_name={name}", "trainer.logger=[console,file]", f"trainer.total_training_steps={steps}",
            "trainer.total_epochs=100", "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=2", "trainer.test_freq=-1", "trainer.val_before_train=False",
            "trainer.resume_mode=auto", f"trainer.default_local_dir={folder}/checkpoints", f"trainer.rollout_data_dir={folder}/dump",
            f"trainer.validation_data_dir={folder}/dump_val", *more]


def newest(folder):
    "Step of the newest complete checkpoint, 0 if there is none."
    try: return int((folder/"checkpoints"/"latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError): return 0


def logged(path):
    "Steps whose metrics verl has written."
    return [r["step"] for r in read_jsonl(path, tolerate_tail=True)] if path.exists() else []


def rl(p):
    "verl.trainer.main_ppo from the SFT checkpoint, through our agent loop and over HTTP; killed between steps, and resumed."
    from webseer.remote import running_app
    base, folder = p.out/"sft"/f"global_step_{SFT_STEPS}"/"huggingface", p.out/"rl"
    shutil.rmtree(folder, ignore_errors=True)
    with running_app(worlds_app(p.profile)) as address:
        words = rl_words(p, base, "rl", address, RL_STEPS)
        first = p.run(p.verl, words, "rl-killed.log", p.env() | {"VERL_FILE_LOGGER_PATH": str(p.out/"rl-killed.jsonl")}, kill=lambda: len(logged(p.out/"rl-killed.jsonl")) >= KILL_AFTER and (folder/"dump"/f"{KILL_AFTER}.jsonl").exists())
        at = newest(folder)
        second = p.run(p.verl, [*words, "trainer.test_freq=1000"], "rl.log", p.env() | {"VERL_FILE_LOGGER_PATH": str(p.out/"rl.jsonl")})
    before = logged(p.out/"rl-killed.jsonl")
    rows = read_jsonl(p.out/"rl.jsonl")
    after = [r["step"] for r in rows]
    assert at >= KILL_AFTER and before == list(range(1, len(before) + 1)) and len(before) <= at + 1 and after == list(range(at + 1, RL_STEPS + 1)), (before, at, after)
    assert newest(folder) == RL_STEPS and all(r["data"]["training/rollout_probs_diff_mean"] < 1e-4 for r in rows)   # the rollout's weights are the trainer's
    metrics = rollout_metrics(folder/"rollouts")
    assert [m["step"] for m in metrics] == list(range(1, RL_STEPS + 1)) and all(m["rollouts"] == BATCH * GROUP for m in metrics)
    told = [r["data"] for r in rows]
    for m in metrics:
        for d in told:
            if d["training/global_step"] == m["step"]: assert abs(d["webseer/answer"] - m["answer"]) < 1e-6 and abs(d["critic/score/mean"] - m["reward"]) < 1e-5
    p.note("rl", steps_before_kill=before, checkpoint_at_kill=at, steps_after=after, rewards=[round(m["reward"], 3) for m in metrics],
           stops={k: round(sum(m[k] for m in metrics) / len(metrics), 3) for k in metrics[0] if k.startswith("stop_") and any(m[k] for m in metrics)},
           probability_difference=[round(d["training/rollout_probs_diff_mean"], 8) for d in told],
           validation={k: v for k, v in told[-1].items() if k.startswith("val-core")}, seconds=[round(first, 1), round(second, 1)])


BATCH_CODE = """
import json, sys
from omegaconf import OmegaConf
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.sft_trainer import create_sft_dataset
from verl.utils import hf_tokenizer
from verl.utils.dataset.dataset_utils import SFTTensorCollator
files, model, size = sys.argv[1:4]
config = OmegaConf.create(dict(max_length=1024, truncation="error", pad_mode="no_padding", custom_cls=dict(path="pkg://webseer.verl_loop", name="ReflectionSet")))
ds = create_sft_dataset(files, config, hf_tokenizer(model), None)
loader = StatefulDataLoader(ds, batch_size=int(size), sampler=DistributedSampler(ds, shuffle=True, num_replicas=1, rank=0, drop_last=True), collate_fn=SFTTensorCollator("no_padding"))
batch = next(iter(loader))
print("BATCH " + json.dumps([[ids.tolist(), mask.tolist()] for ids, mask in zip(batch["input_ids"].unbind(), batch["loss_mask"].unbind())]))
"""


def masks(p):
    "The first batch that verl's SFT trainer saw, id by id against the embedded trainer's."
    from webseer.model import Codec
    from webseer.sft import encode_messages
    import pyarrow.parquet as pq
    out = subprocess.run([p.verl, "-c", BATCH_CODE, str(p.out/"sft_train.parquet"), str(p.out/"untrained"), str(SFT_BATCH)], env={**os.environ, **p.env()}, capture_output=True, text=True)
    if out.returncode: raise WebseerError(f"verl's batch could not be made: {out.stderr[-2000:]}")
    batch = json.loads(out.stdout.split("BATCH ")[1])
    codec, talks = Codec(), pq.read_table(p.out/"sft_train.parquet").column("messages").to_pylist()
    ours = {tuple(ids): mask for ids, mask in (encode_messages(codec, t) for t in talks)}
    assert len(batch) == SFT_BATCH and all(ours[tuple(ids)] == mask for ids, mask in batch)
    p.note("masks", conversations=len(batch), tokens=sum(len(i) for i, _ in batch), trained=sum(sum(m) for _, m in batch), different=0)


def from_text(text, golds, tokens):
    "The reward of a rollout from what verl wrote down: its text alone (and its length, which text without special tokens does not show)."
    from webseer.agent import parse_reply
    subs, calls = [], 0
    for piece in text.split("\n<|im_start|>assistant\n"):
        said = parse_reply(piece.split("\n<|im_start|>user\n")[0])
        calls += said.error is not None
        for name, args in said.calls:
            if calls >= LOOP["max_calls"] or len(subs) >= LOOP["max_submissions"] or (subs and subs[-1]["f1"] == 1): break
            calls += 1
            if name == "submit_answer" and isinstance(args.get("answer"), str) and args["answer"].strip(): subs.append(dict(answer=args["answer"], **score_answer(args["answer"], golds)))
    return reward(LOOP["variant"], subs, tokens, dict(alpha=.8, l_expect=L_EXPECT, l_max=RESPONSE))[0], len(subs)


def same_mask(tok, t):
    "Ids and mask of a recorded rollout, made again from its messages: what the model wrote is trained on, and nothing else. True if even the spelling in tokens is the tokenizer's."
    from itertools import groupby
    from webseer.agent import parse_reply
    from webseer.verl_loop import after_reply
    runs, spans = groupby(zip(t.ids, t.mask), key=lambda x: x[1]), []
    for on, g in runs: spans.append((on, [i for i, _ in g]))
    replies = [i for i, m in enumerate(t.messages) if m["role"] == "assistant"]
    assert [on for on, _ in spans] == [0, 1] * len(replies)
    for k, i in enumerate(replies):
        fed, said, m = spans[2 * k][1], spans[2 * k + 1][1], t.messages[i]
        new = tok.apply_chat_template(t.messages[:2], add_generation_prompt=True, tokenize=False) if k == 0 else after_reply(tok, t.messages[replies[k - 1] + 1:i], spans[2 * k - 1][1][-1])
        assert fed == tok.encode(new, add_special_tokens=False)
        text = tok.decode(said[:-1] if said[-1] == tok.eos_token_id else said)
        p = parse_reply(text)
        assert p.error or (p.thought, p.calls) == (m["content"], [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in m.get("tool_calls", [])])
        assert not p.error or text == m["content"]
    talk = sft_rows([t])[0]["messages"]
    while talk[-1]["role"] != "assistant": talk.pop()
    return encode_chat(tok, talk) == (t.ids, t.mask)


def recompute(p, name, base):
    "Every rollout that verl dumped: its reward recomputed from its text, its ids and mask compared with ours."
    from transformers import AutoTokenizer
    tok, folder, subs = AutoTokenizer.from_pretrained(base), p.out/name, {}
    kept = {(t.meta["uid"], t.meta["session"]): t for ts in recorded(folder/"rollouts").values() for t in ts}
    n = same = largest = 0
    for f in sorted((folder/"dump").glob("*.jsonl")):
        for d in read_jsonl(f):
            uid, session, _ = d["uid"].rsplit("_", 2)
            t = kept.get((uid, int(session)))
            if t is None: continue                                          # of an attempt that was killed and repeated
            k = t.meta["prompt"]
            response, mask = t.ids[k:k + t.meta["response"]], t.mask[k:k + t.meta["response"]]
            assert tok.decode(response, skip_special_tokens=True) == d["output"] and tok.decode(t.ids[:k], skip_special_tokens=True) == d["input"]
            value, count = from_text(d["output"], json.loads(d["gts"]), len(response)) if t.stop != "error" else (0.0, 0)
            assert abs(value - d["score"]) < 1e-5 and abs(value - t.reward) < 1e-9, (f.name, value, d["score"], t.reward)
            same += same_mask(tok, t)
            n, largest, subs[count] = n + 1, max(largest, len(response)), subs.get(count, 0) + 1
    assert n == len(kept) and n > 0, (n, len(kept))
    return dict(rollouts=n, rewards_equal=n, same_ids_and_mask=same, submissions=dict(sorted(subs.items())), longest=largest,
                length_penalties=sum(t.parts.get("length", 0) < 0 for t in kept.values()))


def check(p):
    "Rewards and masks of the RL run."
    p.note("check", **recompute(p, "rl", p.out/"sft"/f"global_step_{SFT_STEPS}"/"huggingface"))


def evaluate(p):
    "Our evaluator on verl's checkpoints."
    import torch
    from webseer.evaluate import evaluate_stage, summarise
    from webseer.model import load_checkpoint
    torch.set_num_threads(1)
    start, folder = time.time(), p.out/"eval"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for stage, (model, codec, _) in dict(untrained=load_checkpoint(p.out/"untrained"), sft=load_hf(p.out/"sft"/f"global_step_{SFT_STEPS}"/"huggingface"),
                                         srrl=load_hf(p.out/"rl"/"checkpoints"/f"global_step_{RL_STEPS}"/"actor"/"huggingface")).items():
        evaluate_stage(p.profile, 0, stage, "greedy", model, codec, folder)
        if stage != "untrained": evaluate_stage(p.profile, 0, stage, "feedback", model, codec, folder)
    p.note("evaluate", accuracy=summarise(folder), questions=p.profile.test_worlds * p.profile.test_questions, seconds=round(time.time() - start, 1))


def vllm(p):
    "Two steps with rollouts by a real vLLM on the CPU, from the SFT checkpoint."
    from webseer.remote import running_app
    if not p.vllm: return print("vllm: left out, --vllm names no Python")
    base, folder = p.out/"sft"/f"global_step_{SFT_STEPS}"/"huggingface", p.out/"rl_vllm"
    shutil.rmtree(folder, ignore_errors=True)
    with running_app(worlds_app(p.profile)) as address:
        words = [w for w in rl_words(p, base, "rl_vllm", address, 2) if not w.startswith("actor_rollout_ref.rollout.name=")] + ["actor_rollout_ref.rollout.name=vllm"]
        seconds = p.run(p.vllm, words, "rl_vllm.log", p.env(vllm=True) | {"VERL_FILE_LOGGER_PATH": str(p.out/"rl_vllm.jsonl")})
    metrics = rollout_metrics(folder/"rollouts")
    assert [m["step"] for m in metrics] == [1, 2]
    told = [r["data"] for r in read_jsonl(p.out/"rl_vllm.jsonl")]
    diff = [d["training/rollout_probs_diff_mean"] for d in told if "training/rollout_probs_diff_mean" in d]
    p.note("vllm", rewards=[round(m["reward"], 3) for m in metrics], **recompute(p, "rl_vllm", base), probability_difference=diff, seconds=round(seconds, 1))


STAGES = dict(data=data, sft=sft, masks=masks, rl=rl, check=check, evaluate=evaluate, vllm=vllm)

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--verl", default=os.environ.get("WEBSEER_VERL", sys.executable), help="Python of verl's environment")
    a.add_argument("--vllm", default="", help="Python of an environment with verl and a vLLM for the CPU")
    a.add_argument("--out", default="outputs/verl-cpu", help="folder for everything")
    a.add_argument("--tmp", default=None, help="folder for Ray's sockets (a short path)")
    a.add_argument("--stages", default="", help="only these, separated by commas")
    a.add_argument("--patience", type=float, default=480, help="seconds for one program")
    p = Proof(a.parse_args())
    start = time.time()
    try:
        for name in [s for s in p.args.stages.split(",") if s] or STAGES:
            if name not in p.report: STAGES[name](p)
    finally:
        p.sweep()
        shutil.rmtree(p.ray, ignore_errors=True)
    print(f"{time.time() - start:.0f} s; {p.out/'report.json'}")

if __name__ == "__main__":
    try: main()
    except WebseerError as e: sys.exit(f"verl_cpu: {e}")
