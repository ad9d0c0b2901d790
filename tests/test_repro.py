"The runner: skip, resume after a kill, rerun what is stale, refuse wrong parameters."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from webseer.core import WebseerError, load_profile
from webseer.repro import STEPS, Step, check_parameters, code_of, plan, reproduce

ROOT = Path(__file__).parents[1]


def notebook(path, code, parameters="profile = 'smoke'\nseed = 0"):
    cells = [{"cell_type": "code", "id": f"c{i}", "execution_count": None, "outputs": [], "source": src, "metadata": {"tags": ["parameters"]} if i == 0 else {}}
             for i, src in enumerate([parameters, code])]
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "cells": cells, "metadata": {
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, "language_info": {"name": "python"}}}))


SLOW = """
import time
from webseer.core import append_jsonl, read_jsonl, run_dir
path = run_dir(profile, seed)/'train'/'rows.jsonl'
done = len(read_jsonl(path, tolerate_tail=True)) if path.exists() else 0
for i in range(done, 6):
    append_jsonl(path, {'step': i, 'started_at': done})
    time.sleep(0.3 if done == 0 else 0)
"""
TWO = (Step("01_first", (), ("world",), ("a.txt",)), Step("02_train", ("01_first",), ("sft",), ("train",), True))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("WEBSEER_OUTPUTS", str(tmp_path/"outputs"))
    monkeypatch.setenv("WEBSEER_FIGURES", str(tmp_path/"figures"))
    notebook(tmp_path/"01_first.ipynb", "from webseer.core import run_dir\n(run_dir(profile)/'a.txt').write_text('a')", "profile = 'smoke'")
    notebook(tmp_path/"02_train.ipynb", SLOW)
    return tmp_path


def run(place, seeds=(0,), **kw):
    lines = []
    reproduce(kw.pop("profile", "smoke"), seeds, steps=TWO, notebooks=place, say=lines.append, **kw)
    return [l.split(": ", 1)[1] for l in lines if l.startswith("[") and "finished" not in l]


def test_kill_and_resume(place):
    code = f"from webseer.repro import reproduce\nfrom tests.test_repro import TWO\nreproduce('smoke', (0,), steps=TWO, notebooks={str(place)!r})"
    p = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    rows, end = place/"outputs"/"smoke"/"seed0"/"train"/"rows.jsonl", time.time() + 60
    while time.time() < end and not (rows.exists() and rows.read_text().count("\n") >= 2): time.sleep(0.02)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    time.sleep(1.5)  # the kernel notices that its parent is gone
    stamp = json.loads((place/"outputs"/"smoke"/"stamps"/"02_train-seed0.json").read_text())
    assert stamp["state"] == "running"
    assert run(place) == ["done before, skipped", "was interrupted, resumes"]
    got = [json.loads(l) for l in rows.read_text().splitlines()]
    assert [r["step"] for r in got] == list(range(6)), "nothing lost, nothing twice"
    assert got[-1]["started_at"] >= 2, "went on where it stopped"
    assert run(place) == ["done before, skipped"]*2
    manifest = json.loads((place/"outputs"/"smoke"/"manifest.json").read_text())
    assert manifest["steps"]["02_train-seed0"]["state"] == "done" and manifest["seeds"] == [0] and manifest["versions"]["python"]


def test_changes_rerun_what_depends_on_them(place):
    assert run(place) == ["not run yet"]*2
    assert run(place, seeds=(0, 1)) == ["done before, skipped", "done before, skipped", "not run yet"]
    assert run(place, profile=load_profile("smoke", passk=9, seeds=(5,))) == ["done before, skipped"]*2
    assert run(place, profile=load_profile("smoke", n_entities=17)) == ["settings changed (n_entities)", "an earlier step changed"]
    assert (place/"outputs"/"smoke"/"stale"/"02_train-seed0"/"train"/"rows.jsonl").is_file()
    assert run(place, only=["1"], profile=load_profile("smoke", n_entities=17), force=True) == ["forced"]
    (place/"outputs"/"smoke"/"stamps"/"01_first.json").write_text('{"sta')  # torn
    with pytest.raises(WebseerError, match="reads from 01_first, which is not run yet"): run(place, only=["02_train"], profile=load_profile("smoke", n_entities=18))


def test_failing_notebook_is_told_and_kept(place):
    notebook(place/"02_train.ipynb", "raise ValueError('the tide is out')")
    with pytest.raises(WebseerError, match="02_train seed 0 stopped in cell .*the tide is out"): run(place)
    assert (place/"outputs"/"smoke"/"nb"/"02_train-seed0.ipynb").is_file()
    notebook(place/"02_train.ipynb", SLOW.replace("0.3", "0"))
    assert run(place) == ["done before, skipped", "code changed (core, notebook)"]


def test_unknown_parameter_step_and_file_are_refused(place):
    with pytest.raises(WebseerError, match="no parameter 'sead': did you mean 'seed'"): check_parameters(place/"02_train.ipynb", ["sead"])
    notebook(place/"02_train.ipynb", SLOW, "profile = 'smoke'")
    with pytest.raises(WebseerError, match="no parameter 'seed'"): run(place)
    assert not (place/"outputs"/"smoke"/"stamps").exists(), "refused before anything ran"
    with pytest.raises(WebseerError, match="unknown step '3'"): run(place, only=["3"])
    with pytest.raises(WebseerError, match="nowhere.json do not exist"): run(place, released="nowhere.json")


def test_prose_is_not_code(tmp_path):
    (tmp_path/"core.py").write_text("def f():\n    'one'\n    return 1  # comment\n")
    notebook(tmp_path/"n.ipynb", "from webseer.core import f")
    a = code_of(tmp_path/"n.ipynb", tmp_path)
    (tmp_path/"core.py").write_text("def f():\n    'another'\n\n    return 1\n")
    assert code_of(tmp_path/"n.ipynb", tmp_path) == a and set(a) == {"notebook", "core"}
    (tmp_path/"core.py").write_text("def f(): return 2\n")
    assert code_of(tmp_path/"n.ipynb", tmp_path)["core"] != a["core"]


def test_the_real_notebooks_take_their_parameters():
    from webseer.repro import _parameters
    for job in plan(load_profile("smoke"), (0,), released="x.json"): check_parameters(job.source, _parameters(job))
    names = [s.name for s in STEPS]
    assert all(a in names[:i] for i, s in enumerate(STEPS) for a in s.after), "a step reads only from earlier ones"
