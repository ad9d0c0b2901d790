"The notebooks are the source: the package must be what they export, and stay light to import."
import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ("pyproject.toml", "settings.ini", "README.md"):
        if (ROOT/name).exists(): shutil.copy(ROOT/name, tmp_path)
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path/"webseer").mkdir()
    shutil.copy(ROOT/"webseer"/"__init__.py", tmp_path/"webseer")
    subprocess.run([Path(sys.executable).parent/"nbdev-export"], cwd=tmp_path, check=True, capture_output=True)
    here, there = ({p.name for p in (d/"webseer").glob("*.py")} for d in (ROOT, tmp_path))
    assert here == there, f"only in the package: {sorted(here - there)}, only exported: {sorted(there - here)}; run nbdev-export"
    same, differ, bad = filecmp.cmpfiles(ROOT/"webseer", tmp_path/"webseer", sorted(here), shallow=False)
    assert not differ and not bad, f"{differ + bad} differ from their notebooks; run nbdev-export (after nbdev-update, if a module was edited)"


@pytest.mark.parametrize("path", [*CHAPTERS, *sorted((ROOT/"nbs"/"repro").glob("*.ipynb"))], ids=lambda p: p.stem)
def test_notebook_form(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    cells = nb["cells"]
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# "), "begins with its title"
    assert len({c["id"] for c in cells}) == len(cells), "cell ids are unique"
    assert "jupytext" not in nb["metadata"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert "import *" not in source
    if path.parent.name == "repro":
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1 and "profile =" in "".join(tagged[0]["source"])
        assert "#| export" not in source and "def " not in source.replace("def show(", "") and 8 <= len(cells) <= 24


def test_chapters_import_only_lower_numbers():
    from webseer.repro import _bare, _cells
    number, imports = {}, {}
    for p in CHAPTERS:
        cells = _cells(p)
        name = next((c.split()[2] for c in cells if c.startswith("#| default_exp ")), None)
        if name is None: continue
        number[name] = p.stem.split("_")[0]
        imports[name] = {i for c in cells if "#| export" in c for i in _bare(c)[1]}
    wrong = [f"{a} ({number[a]}) imports {b} ({number[b]})" for a, bs in imports.items() for b in bs if b in number and number[b] > number[a]]
    assert not wrong, wrong


@pytest.mark.parametrize("module", ["webseer", "webseer.core", "webseer.cli", "webseer.repro"])
def test_light_import(module):
    heavy = "('torch', 'matplotlib', 'pandas', 'bm25s', 'transformers', 'papermill', 'scipy', 'numpy', 'datasets', 'pyarrow', 'verl', 'vllm', 'ray')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_readme_is_the_index_notebook():
    cells = json.loads((ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(c["cell_type"] == "markdown" for c in cells), "the index is text only"
    assert (ROOT/"README.md").read_text(encoding="utf-8") == "\n\n".join("".join(c["source"]).strip() for c in cells).replace("](../", "](") + "\n", "README.md is made from nbs/index.ipynb"
