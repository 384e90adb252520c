"""Run folders and releases that somebody else prepared: refused with a reason, and nothing in them is overwritten."""
import json
import random
import shutil

import pytest

from paczero.accounts import accounts
from paczero.finetune import FineTuneConfig, Runtime, finetune, load_result
from paczero.lab.choose import choose_recipe
from paczero.lab.places import choose_folder
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.publish import load_release, push_to_hub
from paczero.tasks import load_task
from strangers import change, entries_of, odd, places, rechain, scratch, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished run's folder."
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(root / "state"))
        small_run(root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def base():
    return load_model("tiny-opt")


def go(base, folder):
    "Begin a run there, or go on with it."
    task = load_task("reviews", seed=0, n_train=30, n_dev=6, n_eval=6)
    config = FineTuneConfig(steps=6, lr=1e-3, m=8, eval_every=3, seed=1)
    return finetune(*base, task, ZPL(), config, folder=folder, runtime=Runtime(test=False))


@pytest.fixture(scope="module")
def mine(base, tmp_path_factory):
    "A finished run of `go`."
    root = tmp_path_factory.mktemp("mine")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(root / "state"))
        go(base, root / "run")
    return root / "run"


FOLDERS = {
    "no config": dict(ledger=None), "list": dict(config=b"[]"), "deep": dict(config=b"[" * 100_000),
    "not json": dict(config=b"\xff"), "other": dict(config=None, ledger=None),
    "no transcript, config of another": dict(config=None), "null": dict(config=b"null"),
}


@pytest.mark.parametrize("parts", FOLDERS.values(), ids=FOLDERS)
def test_folders_of_another_run(parts, run, base, tmp_path, monkeypatch):
    "None: the file of another run."
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    names, folder = dict(config="config.json", ledger="ledger.jsonl"), tmp_path / "run"
    folder.mkdir()
    for k, data in parts.items():
        (folder / names[k]).write_bytes((run / names[k]).read_bytes() if data is None else data)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError):
        go(base, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} == before


def set_scalars(entries):
    for e in entries:
        if "releases" in e:
            e["releases"][0].update(scalar="x")


LEDGERS = {
    "releases are a number": lambda e: e[-2].update(releases=3),
    "an empty release": lambda e: e.insert(2, {"releases": [{}], "t": 0}),
    "a look that is none": lambda e: e.append({"at": [], "dev": 3}),
    "a look without its step": lambda e: e.append({"dev": {}}),
    "scalars are text": set_scalars,
}


@pytest.mark.parametrize("break_", LEDGERS.values(), ids=LEDGERS)
def test_ledgers_that_say_something_else(break_, mine, base, tmp_path):
    folder = shutil.copytree(mine, tmp_path / "run")
    (folder / "metrics.json").unlink()
    e = entries_of((folder / "ledger.jsonl").read_bytes())
    break_(e)
    (folder / "ledger.jsonl").write_bytes(rechain(e))
    with pytest.raises(ValueError):
        go(base, folder)


@pytest.mark.parametrize("data", [b"[]", b"{}", b"[" * 100_000, b"null"], ids=lambda d: d[:3].decode())
def test_metrics_that_are_none(data, mine, tmp_path):
    folder = shutil.copytree(mine, tmp_path / "run")
    (folder / "metrics.json").write_bytes(data)
    with pytest.raises(ValueError):
        load_result(folder)


RUN_IDS = ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "a\x00b", "a b", 7, "~", "$HOME", "-" * 300 + "/"]


@pytest.mark.parametrize("run_id", RUN_IDS)
def test_run_ids_stay_below_results(run_id, tmp_path):
    with pytest.raises(ValueError, match="run_id"):
        choose_folder(choose_recipe()[0], run_id=run_id, results_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def damage(folder, rng):
    "Change one of a run's files, at random."
    f = folder / rng.choice(["config.json", "ledger.jsonl", "transcript.jsonl"])
    if rng.random() >= 0.6:
        f.write_bytes(scratch(rng, f.read_bytes()))
    elif f.suffix == ".jsonl":
        f.write_bytes(change(rng, entries_of(f.read_bytes())))
    else:
        d = json.loads(f.read_text())
        *path, key = rng.choice([p for p in places(d) if p])
        at = d
        for k in path:
            at = at[k]
        at[key] = odd(rng)
        f.write_text(json.dumps(d))


def test_accounts_survive_anything(run, tmp_path):
    shutil.copytree(run, tmp_path / "good")
    rng = random.Random(2)
    for i in range(60):
        damage(shutil.copytree(run, tmp_path / f"bad{i}"), rng)
    books = accounts(tmp_path)
    assert len(books.runs) == 61 and (books.runs.run == "good").any()
    assert (books.runs.status == "unreadable").sum() > 20
    assert not books.complete and "At least" in books.markdown()
    assert books.total >= 0.5 - 1e-12


RELEASES = [b"", b"[]", b"[" * 100_000, b'{"format": "paczero-release/1", "what": []}',
            b'{"format": "paczero-release/1", "what": "../x"}', b"\xff"]


@pytest.mark.parametrize("what", RELEASES, ids=range(len(RELEASES)))
def test_a_release_from_a_stranger(what, tmp_path):
    (tmp_path / "release.json").write_bytes(what)
    with pytest.raises(ValueError, match="damaged|no release"):
        load_release(tmp_path)
    with pytest.raises(ValueError, match="damaged|no release"):
        push_to_hub(tmp_path, "me/x", api=object())


def test_a_runs_folder_is_no_release(run):
    with pytest.raises(ValueError, match="it is a run's folder"):
        push_to_hub(run, "me/x", api=object())
