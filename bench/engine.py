"""Sampler and trainer speed on the embedded task, beside a loop over transformers' generate, in one run on one model.

    python bench/engine.py [--questions 64] [--threads 1]

All loops play the same questions greedily with the same weights. `generate` is called once per turn on whole conversations:
of one rollout after the other (the plain loop that most example scripts have), and left-padded for all live rollouts at
once (what a careful script does).
"""
import argparse, tempfile, time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from webseer.agent import Budget, rollouts, run_sync
from webseer.core import load_profile
from webseer.evaluate import test_world
from webseer.model import Codec, ModelConfig, ModelPolicy, Qwen2, init_weights, load_checkpoint, save_checkpoint
from webseer.sft import encode_messages, sft_loss


class GeneratePolicy(ModelPolicy):
    "The same batching of turns, with transformers.generate on whole conversations instead of a persistent cache."
    def __init__(self, hf, codec, max_new=24):
        super().__init__(None, codec, max_new=max_new); self.hf, self.history, self.max_new = hf, {}, max_new
        self.sampler.turn, self.sampler.forget = self.turn, lambda key: self.history.pop(key, None)

    @torch.inference_mode()
    def turn(self, chunks):
        for k, new in chunks.items(): self.history[k] = self.history.get(k, []) + new
        T = max(len(self.history[k]) for k in chunks)
        ids = torch.full((len(chunks), T), self.codec.pad)
        for i, k in enumerate(chunks): ids[i, T - len(self.history[k]):] = torch.tensor(self.history[k])
        out = self.hf.generate(ids, attention_mask=(torch.arange(T) >= torch.tensor([[T - len(self.history[k])] for k in chunks])).long(),
                               max_new_tokens=self.max_new, do_sample=False, eos_token_id=self.codec.end, pad_token_id=self.codec.pad)[:, T:].tolist()
        res = {}
        for k, e in zip(chunks, out):
            e = e[:e.index(self.codec.end) + 1] if self.codec.end in e else e
            self.history[k] += e; res[k] = e, [0.] * len(e)
        return res


def timed(f):
    t = time.perf_counter(); out = f()
    return out, time.perf_counter() - t


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--questions', type=int, default=64, help='rollouts side by side')
    ap.add_argument('--threads', type=int, default=1, help='CPU threads')
    ap.add_argument('--checkpoint', default=None, help='checkpoint folder; default: an untrained model of the laptop profile')
    a = ap.parse_args(); torch.set_num_threads(a.threads)
    p = load_profile('laptop')
    if a.checkpoint: model, codec, _ = load_checkpoint(a.checkpoint)
    else: codec = Codec(); model = init_weights(Qwen2(ModelConfig.of(p, codec.n)))
    folder = save_checkpoint(Path(tempfile.mkdtemp()) / 'model', model, codec)
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    jobs = [(tools, q) for i in range(-(-a.questions // p.test_questions)) for _, tools, qs in [test_world(p, i)] for q in qs][:a.questions]
    budget = Budget(max_calls=12, max_tokens=768)
    play = lambda policy: run_sync(rollouts(policy, jobs, budget))
    play(ModelPolicy(model, codec))                                            # warm up
    ours, t_ours = timed(lambda: play(ModelPolicy(model, codec)))
    theirs, t_theirs = timed(lambda: play(GeneratePolicy(hf, codec)))
    few = jobs[:min(len(jobs), 16)]
    singly, t_singly = timed(lambda: [run_sync(rollouts(GeneratePolicy(hf, codec), [j], budget))[0] for j in few])
    print(f'{len(jobs)} rollouts, {sum(len(t.ids) for t in ours) / len(jobs):.0f} tokens each, {a.threads} thread(s), torch {torch.__version__}')
    for name, ts, t in (('sampler', ours, t_ours), ('generate, batched', theirs, t_theirs), (f'generate, one by one ({len(few)})', singly, t_singly)):
        speed = len(ts) / t; same = sum(x.ids == y.ids for x, y in zip(ours, ts))
        print(f'{name:28}{speed:8.1f} rollouts/s {sum(len(x.ids) for x in ts) / t:9.0f} tokens/s   sampler is {len(ours) / t_ours / speed:5.1f} x; {same} of {len(ts)} rollouts identical')
    batch = [encode_messages(codec, t.messages) for t in ours]; batch = [b for b in batch if sum(b[1])][:12]
    opt = torch.optim.AdamW(model.parameters(), lr=0.)
    def step():
        loss, _, n = sft_loss(model, batch, codec, torch.tensor([-1])); opt.zero_grad(); loss.backward(); opt.step()
        return n
    step(); sizes, t = timed(lambda: [step() for _ in range(20)])
    print(f'training   {sum(sizes) / t:8.0f} tokens/s forward and backward')
