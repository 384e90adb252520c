"""A run's folder that somebody prepared: links at every name that is written, and nothing outside is touched.

And what lies beside, under names that a careless writer would take for its own, stays as it is.
"""
import os
from pathlib import Path

import pytest
from transformers import TrainerCallback

from paczero import show
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.lab.choose import choose_recipe
from paczero.lab.job import record_failure, run_cell
from paczero.lab.kernel import clean_notebook
from paczero.lab.places import choose_folder
from paczero.mechanisms import MIBudget, ZPL
from paczero.models import load_model
from paczero.publish import save_release
from paczero.run.runs import unpack
from paczero.tasks import load_task

FILES = ("config.json", "ledger.jsonl", "transcript.jsonl", "diagnostics.parquet", "evaluations.csv", "guarantee.md",
         "metrics.json")
NAMES = (".lock", "weights", *FILES)
LAST = ("diagnostics.parquet", "evaluations.csv", "guarantee.md", "weights", "metrics.json")
CONFIG = FineTuneConfig(steps=3, lr=1e-3, m=8, eval_every=3, seed=1)


@pytest.fixture(scope="module")
def task():
    return load_task("reviews", seed=0, n_train=24, n_dev=6, n_eval=6)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def mine(tmp_path):
    "Somebody's own folder, elsewhere."
    folder = tmp_path / "mine"
    (folder / "full").mkdir(parents=True)
    for f in ("thesis.txt", "full/model.safetensors", "full/scores.png"):
        (folder / f).write_text("mine")
    return folder


def go(task, folder, mechanism=None, callbacks=(), weights=True):
    return finetune(*load_model("tiny-opt"), task, mechanism or ZPL(), CONFIG, folder=folder, callbacks=callbacks,
                    runtime=Runtime(test=False, save_weights=weights))


def seen(folder):
    "All there is in a folder, links as links, with the times of their last change."
    def what(p):
        return os.readlink(p) if p.is_symlink() else "folder" if p.is_dir() else (p.read_bytes(), p.stat().st_mtime_ns)
    return {p.relative_to(folder).as_posix(): what(p) for p in sorted(folder.rglob("*"))}


TARGETS = {"a file": "thesis.txt", "nothing": "new.txt", "a folder": "full"}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_link_at_a_name_is_refused_before_the_first_step(name, target, task, mine, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(mine / target)
    before, here = seen(mine), seen(tmp_path / "run")
    with pytest.raises(FileExistsError, match=f"{name} is a symbolic link"):
        go(task, tmp_path / "run")
    assert seen(mine) == before and seen(tmp_path / "run") == here


def neighbours(folder, mine):
    "Links and folders under the names that a writer might take for its own."
    for name in NAMES:
        (folder / f"{name}.part").symlink_to(mine / "thesis.txt")
        (folder / f"{name}.tmp").symlink_to(mine / "new.txt")
        (folder / f"{name}.partial").mkdir()
        (folder / f"{name}.partial" / "thesis.txt").write_text("mine")
    return {n: x for n, x in seen(folder).items()}


def test_links_beside_the_names_are_not_followed(task, mine, tmp_path):
    (tmp_path / "run").mkdir()
    beside, before = neighbours(tmp_path / "run", mine), seen(mine)
    go(task, tmp_path / "run")
    after = seen(tmp_path / "run")
    assert seen(mine) == before and {n: after[n] for n in beside} == beside
    made = {n.split("/")[0] for n in set(after) - set(beside)}
    assert made == set(NAMES)                                   # and no file of ours is left beside


class Plant(TrainerCallback):
    "Links where the run's last files will go, while it runs."

    def __init__(self, folder, target, names):
        self.folder, self.target, self.names = folder, target, names

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == CONFIG.steps:
            for n in self.names:
                (self.folder / n).symlink_to(self.target)


@pytest.mark.parametrize("name", LAST)
def test_a_link_that_comes_later_is_refused_and_the_run_goes_on_without_it(name, task, mine, tmp_path):
    run, before = tmp_path / "run", seen(mine)
    target = mine / ("full" if name == "weights" else "thesis.txt")
    with pytest.raises(FileExistsError, match=f"{name} is a symbolic link"):
        go(task, run, callbacks=[Plant(run, target, [name])], mechanism=MIBudget(budget=0.1, steps=3))
    assert seen(mine) == before and (run / name).is_symlink()
    assert name == "metrics.json" or not (run / "metrics.json").exists()
    (run / name).unlink()
    result = go(task, run, mechanism=MIBudget(budget=0.1, steps=3))
    assert len(result.transcript) == 3 and (run / "metrics.json").is_file()
    assert not [p.name for p in run.rglob("*.part")]


def test_a_model_beside_the_users_own_files(task, mine, tmp_path):
    "What is in the folder of weights stays, but for files of the same name; a link there is refused."
    (tmp_path / "run" / "weights").mkdir(parents=True)
    (tmp_path / "run" / "weights" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "weights" / "model.safetensors").symlink_to(mine / "full" / "model.safetensors")
    before = seen(mine)
    with pytest.raises(FileExistsError, match="model.safetensors is a symbolic link"):
        go(task, tmp_path / "run")
    assert seen(mine) == before
    (tmp_path / "run" / "weights" / "model.safetensors").unlink()
    go(task, tmp_path / "run")
    there = seen(tmp_path / "run" / "weights")
    assert there["notes.txt"][0] == b"mine" and len(there["model.safetensors"][0]) > 1e6


def test_a_folder_that_the_user_names_may_be_a_link(task, mine, tmp_path):
    (tmp_path / "run").symlink_to(mine / "full")
    go(task, tmp_path / "run", weights=False)
    assert {"metrics.json", "scores.png"} <= {p.name for p in (mine / "full").iterdir()}


def test_figures(mine, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, run, before = plt.figure(), tmp_path / "run", seen(mine)
    run.mkdir()
    (run / "figures").symlink_to(mine / "full")
    with pytest.raises(FileExistsError, match="figures is a symbolic link"):
        show.save_figure(fig, run / "figures", "scores")
    (run / "figures").unlink()
    (run / "figures").mkdir()
    (run / "figures" / "scores.svg").symlink_to(mine / "thesis.txt")
    with pytest.raises(FileExistsError, match="scores.svg is a symbolic link"):
        show.save_figure(fig, run / "figures", "scores")
    plt.close(fig)
    assert seen(mine) == before


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(root / "state"))
        return go(task, root / "run", weights=False)


@pytest.mark.parametrize("what", ["transcript", "weights"])
def test_a_release_leaves_the_neighbours_alone(what, finished, mine, tmp_path):
    for name in ("release.part", "release.partial", ".release.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    tokenizer = load_model("tiny-opt")[1]
    save_release(finished, tokenizer, tmp_path / "release", what)
    kept = {p.parent.name for p in tmp_path.glob("*/thesis.txt")}
    assert kept == {"mine", "release.part", "release.partial", ".release.part"}
    assert {p.name for p in tmp_path.iterdir()} - {"state"} == kept | {"release"}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_release_through_a_link(target, finished, mine, tmp_path):
    (tmp_path / "release").symlink_to(mine / target)
    before = seen(mine)
    with pytest.raises(FileExistsError):
        save_release(finished, None, tmp_path / "release")
    assert seen(mine) == before and (tmp_path / "release").is_symlink()
    empty = mine / "empty"
    empty.mkdir()
    (tmp_path / "to-empty").symlink_to(empty)
    with pytest.raises(FileExistsError, match="to-empty is a symbolic link"):
        save_release(finished, None, tmp_path / "to-empty")
    assert not list(empty.iterdir())


def test_a_release_that_fails_leaves_nothing(finished, tmp_path, monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paczero.publish.write.model_card", full)
    with pytest.raises(OSError, match="No space"):
        save_release(finished, None, tmp_path / "release")
    assert not [p for p in tmp_path.iterdir() if "release" in p.name]


def test_unpacking(finished, mine, tmp_path):
    before = seen(mine)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "guarantee.md").symlink_to(mine / "new.txt")
    with pytest.raises(FileExistsError, match="guarantee.md is a symbolic link"):
        unpack(finished.folder, tmp_path / "out")
    (tmp_path / "link").symlink_to(mine / "full")
    with pytest.raises(FileExistsError, match="link is a symbolic link"):
        unpack(finished.folder, tmp_path / "link")
    assert seen(mine) == before


# ---------------------------------------------------------------- a sweep's


def test_a_cell_that_is_a_link(mine, tmp_path):
    before, runs = seen(mine), tmp_path / "runs"
    runs.mkdir()
    (runs / "cell").symlink_to(mine / "full")
    told = record_failure(runs / "cell", "ValueError", "why")
    assert told["outcome"] == "failed" and "not written down" in told["why"]
    told = run_cell(dict(home=str(tmp_path), run_id="cell", why="no recipe", device="cpu"))
    assert told["outcome"] == "failed" and seen(mine) == before
    with pytest.raises(FileExistsError, match="symbolic link"):
        choose_folder(choose_recipe()[0], run_id="cell", results_dir=tmp_path)


def test_a_cells_files(mine, tmp_path):
    folder, before = tmp_path / "cell", seen(mine)
    folder.mkdir()
    (folder / "failed.json").symlink_to(mine / "thesis.txt")
    assert "not written down" in record_failure(folder, "ValueError", "why")["why"]
    (folder / "run.ipynb").symlink_to(mine / "nb.ipynb")
    (mine / "nb.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    before = seen(mine)
    with pytest.raises(FileExistsError, match="run.ipynb is a symbolic link"):
        clean_notebook(folder / "run.ipynb", Path("x.ipynb"))
    assert seen(mine) == before
