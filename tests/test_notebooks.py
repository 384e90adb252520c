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
    "nbs/paper/precision.ipynb": None,
    "nbs/paper/smollm2.ipynb": None,
    "nbs/rooms/accounts.ipynb": "run/test_strange_folders.py",
    "nbs/rooms/audit/pool.ipynb": "audit/test_the_guilty_are_convicted.py",
    "nbs/rooms/audit/report.ipynb": "audit/test_the_guilty_are_convicted.py",
    "nbs/rooms/cli/torchrun.ipynb": "cli/test_torchruns_entry.py",
    "nbs/rooms/directions.ipynb": "transcript/test_kept_transcripts_replay.py",
    "nbs/rooms/finetune.ipynb": "finetune/test_paper_step.py",
    "nbs/rooms/forecast/verdict.ipynb": "forecast/test_verdict.py",
    "nbs/rooms/lab/job.ipynb": "lab/test_sweeps.py",
    "nbs/rooms/lab/kernel.ipynb": "lab/test_executed_notebooks_are_clean.py",
    "nbs/rooms/lab/sweep.ipynb": "lab/test_sweeps.py",
    "nbs/rooms/mechanisms/accountant.ipynb": "mechanisms/test_dp_accounting.py",
    "nbs/rooms/mechanisms/gaussian.ipynb": "mechanisms/test_dp_noise.py",
    "nbs/rooms/mechanisms/mi.ipynb": "mechanisms/test_hostile_records.py",
    "nbs/rooms/objectives/generation.ipynb": "objectives/test_paper_losses.py",
    "nbs/rooms/objectives/options.ipynb": "objectives/test_paper_losses.py",
    "nbs/rooms/run/outcome.ipynb": "finetune/test_baselines_in_the_loop.py",
    "nbs/rooms/run/rounding.ipynb": "finetune/test_baselines_in_the_loop.py",
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


@pytest.mark.parametrize("path", [marked(p) for p in sorted(RUN, key=lambda p: p not in SLOW)])
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
