"""Packs keep runs whole: what goes in comes out, transcripts verify and replay, and what is damaged says so."""
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pandas as pd
import pytest

from common import ROOT
from paczero.accounts import accounts
from paczero.finetune import finetune
from paczero.models import load_model
from paczero.mechanisms import ZPL, MIBudget
from paczero.run.config import FineTuneConfig, Runtime
from paczero.run.pack import PACK_FILES, open_pack, pack_runs
from paczero.run.record import folder_runs
from paczero.run.runs import find_run, open_runs, state, unpack
from paczero.tasks import load_task
from paczero.transcript import Transcript, TranscriptError

HOMES = ("default", "miniature", "smollm2-135m")
DROP = ["ledger.jsonl"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "Two small real runs as folders."
    home = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PACZERO_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        for name, mechanism in (("runs/zpl", ZPL()), ("runs/mi", MIBudget(budget=0.1, steps=4))):
            config = FineTuneConfig(steps=4, lr=1e-3, m=8, eval_every=2, seed=5)
            task = load_task("reviews", seed=0, n_train=32, n_dev=20, n_eval=20)
            finetune(*load_model("tiny-opt"), task, mechanism, config, folder=home / name, runtime=Runtime(test=False))
    return home


@pytest.fixture
def home(kept, tmp_path):
    "A copy of them that a test may pack and break."
    return shutil.copytree(kept, tmp_path / "home")


def parts(run):
    "All that a reader may ask of a run."
    return run.config, run.metrics, run.cell, run.transcript, run.read("guarantee.md"), run.state, run.steps_done


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- what goes in comes out


def test_round_trip(home, tmp_path):
    before = {r.path.relative_to(home).as_posix(): (parts(r), r.evaluations, r.diagnostics) for r in folder_runs(home)}
    originals = files(home)
    assert pack_runs(home, DROP) == (["runs/mi", "runs/zpl"], {})
    assert sorted(files(home)) == sorted(f"pack/{f}" for f in PACK_FILES)
    for name, run in open_runs(home).items():
        told, evaluations, diagnostics = before[name]
        assert parts(run) == told
        pd.testing.assert_frame_equal(run.evaluations, evaluations)
        pd.testing.assert_frame_equal(run.diagnostics, diagnostics)
        out = files(unpack(run, tmp_path / name))
        assert all(out[f] == originals[f"{name}/{f}"] for f in out if not f.endswith(".parquet"))
        assert Transcript.load(tmp_path / name / "transcript.jsonl") == run.transcript


def test_the_second_time_nothing_happens(home):
    pack_runs(home, DROP)
    before = files(home)
    assert pack_runs(home, DROP) == ([], {})
    assert files(home) == before


def test_the_same_runs_give_the_same_pack(home, kept, tmp_path):
    again = shutil.copytree(kept, tmp_path / "again")
    pack_runs(home, DROP)
    pack_runs(again, DROP)
    assert files(home) == files(again)


def test_a_new_run_joins(home, kept):
    shutil.move(home / "runs" / "mi", home.parent / "mi")
    pack_runs(home, DROP)
    before = find_run(home / "runs" / "zpl").transcript
    shutil.move(home.parent / "mi", home / "runs" / "mi")
    assert [n for n, _ in open_runs(home).items()] == ["runs/mi", "runs/zpl"]      # a folder and a packed run
    assert pack_runs(home, DROP) == (["runs/mi"], {})
    assert find_run(home / "runs" / "zpl").transcript == before and state(home / "runs" / "mi") == "finished"


# ---------------------------------------------------------------- nothing is lost


def test_a_ledger_is_neither_packed_nor_lost(home):
    before = files(home)
    packed, left = pack_runs(home)
    assert packed == [] and all("ledger.jsonl" in why for why in left.values()) and len(left) == 2
    assert files(home) == before


def break_transcript(run):
    run.joinpath("transcript.jsonl").write_text("")


def break_digest(run):
    m = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(m | dict(transcript_digest="0" * 64)))


def save_weights(run):
    "A model's folder in a run's has a config.json, too."
    (run / "weights").mkdir()
    (run / "weights" / "config.json").write_text("{}")


CHANGES = {
    "unfinished": lambda run: (run / "metrics.json").unlink(),
    "an empty transcript": break_transcript,
    "not the one that its metrics name": break_digest,
    "notes.txt": lambda run: (run / "notes.txt").write_text("mine"),
    "weights/config.json": save_weights,
    "no transcript.jsonl": lambda run: (run / "transcript.jsonl").unlink(),
}


@pytest.mark.parametrize("says", CHANGES)
def test_what_cannot_be_kept_whole_stays(home, says):
    CHANGES[says](home / "runs" / "mi")
    before = files(home / "runs" / "mi")
    packed, left = pack_runs(home, DROP)
    assert packed == ["runs/zpl"] and list(left) == ["runs/mi"] and says in left["runs/mi"]
    assert files(home / "runs" / "mi") == before


def test_another_run_of_the_same_name_stays(home, kept):
    pack_runs(home, DROP)
    shutil.copytree(kept / "runs" / "zpl", home / "runs" / "mi")
    packed, left = pack_runs(home, DROP)
    assert packed == [] and "rename" in left["runs/mi"] and (home / "runs" / "mi" / "ledger.jsonl").exists()
    assert find_run(home / "runs" / "mi").metrics["mechanism"]["name"] == "zpl"        # the folder goes before the pack


def test_killed_in_the_swap(home):
    pack_runs(home, DROP)
    (home / ".pack.x1.old").mkdir()
    (home / "pack").rename(home / ".pack.x1.old" / "was")
    pack_runs(home, DROP)
    assert len(open_runs(home)) == 2 and [p.name for p in home.iterdir()] == ["pack"]


def test_folders_of_the_users_stay(home):
    "Whoever keeps a copy under a name that a packer might use finds it again."
    for name in ("pack.part", "pack.old"):
        (home / name).mkdir()
        (home / name / "thesis.txt").write_text("mine")
    assert pack_runs(home, DROP)[0] == ["runs/mi", "runs/zpl"]
    assert [(home / n / "thesis.txt").read_text() for n in ("pack.part", "pack.old")] == ["mine"] * 2


def test_a_link_is_not_packed_away(home, tmp_path):
    run = home / "runs" / "mi"
    (tmp_path / "elsewhere.csv").write_bytes((run / "evaluations.csv").read_bytes())
    (run / "evaluations.csv").unlink()
    (run / "evaluations.csv").symlink_to(tmp_path / "elsewhere.csv")
    packed, left = pack_runs(home, DROP)
    assert packed == ["runs/zpl"] and "evaluations.csv" in left["runs/mi"] and (run / "evaluations.csv").is_symlink()


def test_no_pack_through_a_link(home, tmp_path):
    (tmp_path / "mine").mkdir()
    (home / "pack").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="symbolic link"):
        pack_runs(home, DROP)
    assert not list((tmp_path / "mine").iterdir()) and state(home / "runs" / "mi") == "finished"


def test_killed_while_folders_are_removed(home, kept):
    pack_runs(home, DROP)
    rest = shutil.ignore_patterns("config.json", "metrics.json")
    shutil.copytree(kept / "runs" / "zpl", home / "runs" / "zpl", ignore=rest)
    assert pack_runs(home, DROP) == ([], {}) and not (home / "runs").exists()


def test_accounts_miss_no_packed_run(home):
    "Without its ledger nobody knows what a run released: the sum is a lower bound, and says so."
    whole = accounts(home)
    assert whole.complete and whole.total == pytest.approx(0.1)
    pack_runs(home, DROP)
    books = accounts(home)
    assert not books.complete and books.posterior_bound == 1
    assert set(books.runs.run) == {"runs/mi", "runs/zpl"} and "no ledger.jsonl" in books.runs.note[0]


# ---------------------------------------------------------------- packs of strangers


def damage(home, file, data):
    (home / "pack" / file).write_bytes(data)


DAMAGED = {
    "not parquet": ("runs.parquet", lambda old: b"run,config\n"),
    "half a table": ("runs.parquet", lambda old: old[: len(old) // 2]),
    "empty table": ("runs.parquet", lambda old: b""),
    "half an archive": ("transcripts.zip", lambda old: old[: len(old) // 2]),
    "no archive": ("transcripts.zip", lambda old: b"PK"),
    "other members": ("transcripts.zip", lambda old: old.replace(b"runs/zpl", b"runs/zpm")),
    "long table of another": ("diagnostics.parquet", lambda old: b"PAR1" * 10),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_packs_say_so(home, how):
    pack_runs(home, DROP)
    file, change = DAMAGED[how]
    damage(home, file, change((home / "pack" / file).read_bytes()))
    with pytest.raises(TranscriptError, match=file):
        run = find_run(home / "runs" / "zpl")
        assert run.transcript and len(run.diagnostics)


@pytest.mark.parametrize("name", ["../zpl", "/zpl", "runs/../zpl", "a\\b", ".", ""])
def test_names_stay_below_the_folder(home, name):
    import pyarrow.parquet as pq

    pack_runs(home, DROP)
    table = pq.read_table(home / "pack" / "runs.parquet")
    rows = [dict(r, run=name if r["run"] == "runs/zpl" else r["run"]) for r in table.to_pylist()]
    pq.write_table(table.from_pylist(rows, table.schema), home / "pack" / "runs.parquet")
    with pytest.raises(TranscriptError, match="below its folder"):
        open_runs(home)


def test_changed_bits_are_found(home):
    pack_runs(home, DROP)
    with zipfile.ZipFile(home / "pack" / "transcripts.zip") as z:
        members = {n: z.read(n) for n in z.namelist()}
    flipped = members["runs/zpl/transcript.jsonl"].replace(b'"y":[1]', b'"y":[-1]', 1)
    with zipfile.ZipFile(home / "pack" / "transcripts.zip", "w") as z:
        for n, data in (members | {"runs/zpl/transcript.jsonl": flipped}).items():
            z.writestr(n, data)
    with pytest.raises(TranscriptError, match="its link does not match"):
        assert find_run(home / "runs" / "zpl").transcript


# ---------------------------------------------------------------- the packs of this repository


@pytest.mark.parametrize("folder", ["default", "smollm2-135m", pytest.param("miniature", marks=pytest.mark.slow)])
def test_every_packed_transcript_verifies(folder):
    "The digest that its metrics and its guarantee name is that of the bytes in the archive."
    runs = open_runs(ROOT / "results" / folder)
    assert len(runs) >= 9
    for name, run in runs.items():
        told = run.transcript.verify(digest=run.metrics["transcript_digest"])
        assert told["digest as published"] is True and told["subset design"] is not False, name
        assert told["finished"] is True and run.transcript.digest in run.read("guarantee.md").decode(), name


def test_what_is_packed_is_public():
    for folder in HOMES:
        runs = open_runs(ROOT / "results" / folder)
        assert not any(run.has("ledger.jsonl") for run in runs)
        with zipfile.ZipFile(ROOT / "results" / folder / "pack" / "transcripts.zip") as z:
            assert set(z.namelist()) == {f"{name}/transcript.jsonl" for name, _ in runs.items()}


def test_a_sweep_passes_over_packed_cells():
    from paczero.lab.select import plan

    planned = plan(tables="table1", set="miniature")
    assert set(planned.state) == {"finished"} and (planned.done > 0).all()


def test_the_tool(kept, tmp_path):
    home = shutil.copytree(kept, tmp_path / "home")
    run = lambda *args: subprocess.run([sys.executable, ROOT / "tools" / "pack.py", *map(str, args)], text=True,
                                       capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    told = run(home)
    assert told.returncode == 0 and "nothing new to pack" in told.stdout and "ledger.jsonl" in told.stdout
    told = run(home, "--drop", "ledger.jsonl")
    assert told.returncode == 0 and "packed 2 runs" in told.stdout and not (home / "runs").exists()
    told = run(home, "--unpack", tmp_path / "out", "zpl")
    assert told.returncode == 0 and (tmp_path / "out" / "zpl" / "metrics.json").exists()
    assert run(tmp_path / "nowhere").returncode == 2


def test_small(tmp_path):
    "A few files each, and no more than they need."
    sizes = {h: [p.stat().st_size for p in (ROOT / "results" / h / "pack").iterdir()] for h in HOMES}
    assert all(len(s) <= 4 for s in sizes.values()) and sum(map(sum, sizes.values())) < 3 << 20
    assert open_pack(tmp_path) is None
