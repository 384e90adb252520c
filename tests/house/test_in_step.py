"""Library, README, notebooks and metadata are in step with each other."""
import configparser
import json
import re
import shutil
import subprocess

import pytest

import readme
from common import BIN, ROOT


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes."
    to = tmp_path_factory.mktemp("house")
    left_out = shutil.ignore_patterns("__pycache__", "assets", ".ipynb_checkpoints")
    for name in ("nbs", "paczero"):
        shutil.copytree(ROOT / name, to / name, ignore=left_out)
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, to / name)
    return to


def library(root):
    "Every module's text."
    package = root / "paczero"
    return {p.relative_to(package).as_posix(): p.read_text(encoding="utf-8") for p in sorted(package.rglob("*.py"))}


def test_library_is_what_the_notebooks_export(copy):
    "Every module, in every folder: all are deleted, and nbdev_export makes the same again."
    before = library(copy)
    for name in before:
        if name != "__init__.py":       # the package's own, with the version: nbdev only writes that into it
            (copy / "paczero" / name).unlink()
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True, capture_output=True, timeout=300)
    after = library(copy)
    assert sorted(before) == sorted(after)
    other = [name for name, text in after.items() if text != before[name]]
    assert not other, f"not what nbdev_export makes of nbs/ (run it): {other}"


def test_notebooks_are_clean(copy):
    before = {p: p.read_text(encoding="utf-8") for p in (copy / "nbs").rglob("*.ipynb")}
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True, capture_output=True, timeout=300)
    changed = [p.name for p, text in before.items() if p.read_text(encoding="utf-8") != text]
    assert not changed, f"run nbdev_clean: {changed}"


def test_readme_is_in_step():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme.build(), "run: python tools/readme.py --write"


def test_parameters_tag():
    "papermill finds one cell of parameters, and it has all that `run_experiment` takes."
    from paczero.lab.choose import parameters

    nb = json.loads((ROOT / "nbs" / "run_experiment.ipynb").read_text(encoding="utf-8"))
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = re.findall(r"^(\w+) =", "".join(tagged[0]["source"]), re.M)
    assert set(parameters()) < set(names)
    assert {"cell", "device", "data_path", "reference", "run_id"} < set(names)


def test_metadata_agree():
    import paczero

    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    assert ini["DEFAULT"]["version"] == paczero.__version__
    assert ini["DEFAULT"]["lib_name"] == "paczero"
    assert f'>={ini["DEFAULT"]["min_python"]}' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {paczero.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {paczero.__version__}" in (ROOT / "CHANGELOG.md").read_text()
