"""Every notebook's own cells run, and the text that is committed with them is what they make now."""
import json

import pytest

from census import notebooks
from common import ROOT
from notebooks import Server
from outputs import MACHINE, compare, texts

# Run by papermill, in tests/lab/test_readmes_first_command.py; and half an hour of making the embedded model.
# They show pictures and no text, for nothing compares it.
APART = ("nbs/run_experiment.ipynb", "nbs/appendix/")
NOTEBOOKS = [p.relative_to(ROOT).as_posix() for p in notebooks()]
RUN = [p for p in NOTEBOOKS if not p.startswith(APART)]
# More than about five seconds on a quiet core (tools/notebooks.py measures), left out of the fast selection; and for
# a room the quick test that touches it there.
SLOW = {
    "nbs/paper/precision.ipynb",
    "nbs/paper/smollm2.ipynb",
    "nbs/rooms/accounts.ipynb",
    "nbs/rooms/audit/pool.ipynb",
    "nbs/rooms/audit/report.ipynb",
    "nbs/rooms/cli/main.ipynb",
    "nbs/rooms/cli/torchrun.ipynb",
    "nbs/rooms/directions.ipynb",
    "nbs/rooms/finetune.ipynb",
    "nbs/rooms/forecast/verdict.ipynb",
    "nbs/rooms/lab/job.ipynb",
    "nbs/rooms/lab/kernel.ipynb",
    "nbs/rooms/lab/sweep.ipynb",
    "nbs/rooms/mechanisms/accountant.ipynb",
    "nbs/rooms/mechanisms/gaussian.ipynb",
    "nbs/rooms/mechanisms/mi.ipynb",
    "nbs/rooms/mechanisms/zpl.ipynb",
    "nbs/rooms/models/load.ipynb",
    "nbs/rooms/objectives/generation.ipynb",
    "nbs/rooms/objectives/options.ipynb",
    "nbs/rooms/publish/base.ipynb",
    "nbs/rooms/run/outcome.ipynb",
    "nbs/rooms/run/rounding.ipynb",
    "nbs/rooms/show/run.ipynb",
}


@pytest.fixture(scope="session")
def server():
    "The process that has imported what is heavy, one for each of pytest's workers."
    server = Server()
    yield server
    server.close()


def marked(path):
    "A notebook as a parameter, marked where it is slow."
    return pytest.param(path, marks=[pytest.mark.slow] if path in SLOW else [])


@pytest.mark.parametrize("path", map(marked, sorted(RUN, key=lambda p: p not in SLOW)))
def test_notebook(path, server):
    name = path.split("/")[-1].removesuffix(".ipynb")
    tables = (ROOT / "results" / "paper").glob(f"{name}*-miniature.csv") if path.startswith("nbs/paper/") else ()
    kept = {f: f.read_bytes() for f in tables}
    run = server.run(ROOT / path)
    assert run.ok, run.log[-6000:]
    stale = [f.name for f, before in kept.items() if f.read_bytes() != before]
    assert not stale, f"results/paper/ was not what {path} makes of results/miniature/: commit {stale} and its figures"
    wrong = compare(ROOT / path, run.outputs)
    assert not wrong, "\n".join([*wrong, f"run: python tools/outputs.py --write {path}"])


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in RUN])
def test_a_notebook_that_is_not_run_shows_no_text(path):
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        assert not texts(cell.get("outputs", [])), f"run: python tools/outputs.py --clear {path}"


def test_every_slow_room_has_a_quick_test():
    assert set(SLOW) <= set(RUN)
    for path, quick in SLOW.items():
        assert path.startswith("nbs/paper/") or (ROOT / "tests" / quick).is_file(), path


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_is_presentable(path):
    "Small, free of errors, and free of the paths of the machine that it ran on."
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(text) < 1_500_000
    found = sorted(set(MACHINE.findall(text)))
    assert not found, f"{path} shows paths of a machine: {found[:5]}"
    assert '"output_type": "error"' not in text, f"{path} shows an error"
