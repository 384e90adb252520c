"""Every notebook's own cells run, as `nbdev_test` runs them: each in a process of its own."""
import os, subprocess, sys
from pathlib import Path

import pytest
import readme

# run_experiment is run by papermill in test_main_job; index has nothing to run; the appendix trains a model for half an hour
APART = {"run_experiment", "index"}
NOTEBOOKS = sorted(p for p in (readme.ROOT / "nbs").rglob("*.ipynb") if p.stem not in APART and not {"appendix", ".ipynb_checkpoints"} & set(p.parts))
RUN = "import sys; from pathlib import Path; from nbdev.test import test_nb; ok, s = test_nb(Path(sys.argv[1]), skip_flags=['slow']); sys.exit(not ok)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    kept = {f: f.read_bytes() for f in (readme.ROOT / "results" / "paper").glob(f"{path.stem}*-miniature.csv")} if path.parent.name == "paper" else {}
    env = dict(os.environ, MPLBACKEND="agg", HF_HUB_OFFLINE="1", PACZERO_STATE_DIR=str(tmp_path / "state"))
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], cwd=path.parent, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    stale = [f.name for f, before in kept.items() if f.read_bytes() != before]
    assert not stale, f"results/paper/ was not what {path.name} makes of results/miniature/ and is now: commit {stale} and the figures beside them"
