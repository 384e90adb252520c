"""The house is in order: library, README and notebooks are in step, and nothing of anybody's machine is in them."""
import configparser, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import readme

ROOT = readme.ROOT
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes."
    to = tmp_path_factory.mktemp("house")
    for name in ("nbs", "paczero"): shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "assets", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, to / name)
    return to


def test_library_is_in_step_with_notebooks(copy):
    before = {p.name: p.read_text() for p in (copy / "paczero").glob("*.py")}
    for p in (copy / "paczero").glob("*.py"):
        if p.name != "__init__.py": p.unlink()
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True, capture_output=True, timeout=300)
    after = {p.name: p.read_text() for p in (copy / "paczero").glob("*.py")}
    assert sorted(before) == sorted(after)
    for name, text in after.items(): assert text == before[name], f"paczero/{name} is not what nbdev_export makes of nbs/: run nbdev_export"


def test_notebooks_are_clean(copy):
    before = {p: p.read_text() for p in (copy / "nbs").rglob("*.ipynb")}
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True, capture_output=True, timeout=300)
    changed = [p.name for p, text in before.items() if p.read_text() != text]
    assert not changed, f"run nbdev_clean: {changed}"


def test_readme_is_in_step():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme.build(), "run: python tests/readme.py --write"


def test_parameters_tag():
    nb = json.loads((ROOT / "nbs" / "run_experiment.ipynb").read_text(encoding="utf-8"))
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    from paczero.lab.experiment import PARAMETERS
    names = re.findall(r"^(\w+) =", "".join(tagged[0]["source"]), re.M)
    assert set(PARAMETERS) < set(names) and {"cell", "device", "data_path", "reference", "run_id"} < set(names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_presentable(path):
    "Small, free of errors, and free of the paths of the machine that it ran on."
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_500_000
    found = re.findall(r"/(?:root|home|Users|work|tmp)/[\w.]+", text)
    assert not found, f"{path.name} shows paths of a machine: {sorted(set(found))[:5]}"
    for cell in json.loads(text)["cells"]:
        for out in cell.get("outputs", []): assert out["output_type"] != "error", f"{path.name}: {out.get('evalue')}"


def test_metadata_agree():
    ini = configparser.ConfigParser(); ini.read(ROOT / "settings.ini")
    import paczero
    assert ini["DEFAULT"]["version"] == paczero.__version__
    assert ini["DEFAULT"]["lib_name"] == "paczero"
    assert f'>={ini["DEFAULT"]["min_python"]}' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {paczero.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {paczero.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_import_is_light():
    "`import paczero` loads nothing heavy, and the mathematics neither torch nor transformers."
    code = "import sys, paczero, paczero.information, paczero.subsets, paczero.mechanisms; print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_global_generators_are_left_alone():
    "No room seeds or draws from the global generators of numpy, random or torch."
    bad = re.compile(r"\bnp\.random\.(seed|rand|randn|randint|normal|permutation|choice|shuffle)\(|torch\.manual_seed\(|\brandom\.(seed|random|randint|choice|shuffle)\(|torch\.randn?\((?!.*generator)")
    for p in (ROOT / "paczero").glob("*.py"):
        for i, line in enumerate(p.read_text().splitlines(), 1): assert not bad.search(line), f"{p.name}:{i}: {line.strip()}"
