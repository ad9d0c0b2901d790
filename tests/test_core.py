"Profiles, and files that survive what happens to them."
import errno
import subprocess
import sys

import pytest

import webseer.core as core
from webseer.core import WebseerError, append_jsonl, keyed_rng, load_profile, profile_names, read_jsonl, replacing, write_text


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads(name):
    p = load_profile(name)
    assert p.n_heads % p.n_kv_heads == 0 and p.d_model % p.n_heads == 0 and p.seeds and p.max_tokens <= p.max_len
    assert abs(sum(p.hop_weights) - 1) < 1e-9


def at(tmp_path, monkeypatch, text):
    (tmp_path/"settings.ini").write_text(text)
    monkeypatch.chdir(tmp_path)


def test_settings_mistakes_are_told(tmp_path, monkeypatch):
    good = (core.root()/"settings.ini").read_text()
    at(tmp_path, monkeypatch, good + "\n[mine]\nsft_stepz = 4\n")
    with pytest.raises(WebseerError, match=r"'sft_stepz' in \[mine\].*did you mean 'sft_steps'"): load_profile("mine")
    at(tmp_path, monkeypatch, good.replace("n_layers = 3\n", "", 1))
    with pytest.raises(WebseerError, match="lacks n_layers"): load_profile("laptop")
    at(tmp_path, monkeypatch, "no section\n")
    with pytest.raises(WebseerError, match="cannot be read"): load_profile("laptop")
    (tmp_path/"settings.ini").unlink()
    with pytest.raises(WebseerError, match="no settings.ini"): load_profile("laptop")


def test_keyed_rng_ignores_the_hash_seed():
    code = "from webseer.core import keyed_rng; print(keyed_rng('a', 1).random())"
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": h, "PYTHONPATH": str(core.root())}).stdout for h in "12"}
    assert seen == {f"{keyed_rng('a', 1).random()}\n"}


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/"x.json"
    write_text(path, "old")
    def full(*a): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(core.os, "fsync", full)
    with pytest.raises(WebseerError, match="disk is full"): write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_full_disk_leaves_whole_rows():
    code = """
import os, resource, signal, sys, tempfile
from webseer.core import WebseerError, append_jsonl, read_jsonl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = os.path.join(tempfile.mkdtemp(), "rows.jsonl")
append_jsonl(path, {"x": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))   # the write stops in the middle, as on a full disk
try: append_jsonl(path, [{"x": "y" * 9000}])
except WebseerError as e: print("told", len(read_jsonl(path)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(core.root())})
    assert out.stdout == "told 1\n", out


def test_many_appends_at_once_lose_nothing(tmp_path):
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from webseer.core import append_jsonl
path, me = sys.argv[1:]
with ThreadPoolExecutor(16) as pool: list(pool.map(lambda i: append_jsonl(path, {"me": me, "i": i, "page": "y" * 30_000}), range(100)))
"""
    path = tmp_path/"rows.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", code, path, str(k)], env={"PYTHONPATH": str(core.root())}) for k in range(2)]
    assert [p.wait() for p in running] == [0, 0]
    assert sorted((r["me"], r["i"]) for r in read_jsonl(path)) == sorted((str(k), i) for k in range(2) for i in range(100))


def test_an_interrupted_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with replacing(tmp_path/"a.bin") as tmp:
            tmp.write_bytes(b"half")
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_broken_row_in_the_middle_is_never_tolerated(tmp_path):
    p = tmp_path/"r.jsonl"
    p.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(WebseerError, match="line 2"): read_jsonl(p, tolerate_tail=True)
    append_jsonl(p, {"a": 4})
    assert p.read_text().count("\n") == 4
