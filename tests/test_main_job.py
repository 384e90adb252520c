"""The README's first command does what it says: the very papermill command, on the embedded default, in a copy of the tree."""
import json, os, re, shlex, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import readme

ROOT, BIN = readme.ROOT, Path(sys.executable).parent


def papermill(args, cwd, check=True, **env):
    "Run papermill of this environment."
    environment = dict(os.environ, HF_HUB_OFFLINE="1", PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", **env)
    done = subprocess.run([str(BIN / "papermill"), *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    to = tmp_path_factory.mktemp("job")
    shutil.copytree(ROOT / "nbs", to / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "appendix", "0*"))
    (to / "results").mkdir(); shutil.copy(ROOT / "settings.ini", to)
    return to


@pytest.fixture(scope="module")
def job(house):
    command = readme.command(0).split("&&")[-1].strip()
    program, *args = shlex.split(command)
    assert program == ".venv/bin/papermill" and args[-1] == "results/run.ipynb", command
    done = papermill(args, house)
    folder, = (house / "results" / "runs").iterdir()
    return done, folder, json.loads((folder / "metrics.json").read_text())


def test_files(job, house):
    _, folder, _ = job
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"config.json", "transcript.jsonl", "ledger.jsonl", "metrics.json", "guarantee.md", "diagnostics.parquet", "evaluations.csv",
            "figures/scores.png", "figures/scores.svg", "figures/run.png", "figures/run.svg", "reference/metrics.json"} <= there
    assert (folder / "transcript.jsonl").stat().st_size < 20_000
    assert (house / "results" / "run.ipynb").stat().st_size < 1_500_000


def test_it_learned_privately(job):
    _, folder, m = job
    reference = json.loads((folder / "reference" / "metrics.json").read_text())
    assert m["mi_spent"] == 0 and m["posterior_bound"] == m["prior"] == 0.5 and m["guarantee_covers"] and not m["stamp"]
    assert m["n_pool"] == 1000 and m["n_test"] == 1000
    assert m["test_before"]["accuracy"] <= 0.60
    assert m["test_after"]["accuracy"] >= m["test_before"]["accuracy"] + 0.08
    assert reference["test_after"]["accuracy"] >= 0.70 and not reference["guarantee_covers"]


def test_heartbeat_is_readable_in_the_log(job):
    done, _, m = job
    lines = re.findall(r"PACZero-ZPL \(I = 0\): step +\d+/\d+ · .*", done.stdout + done.stderr)
    assert len(lines) >= 8 and f"step {m['steps']}/{m['steps']}" in lines[-1] and "dev accuracy" in lines[-1]


def test_replay_of_the_job_is_bit_identical(job):
    _, folder, m = job
    from paczero.models import load_model
    from paczero.transcript import Transcript, replay, weights_digest
    ts = Transcript.load(folder / "transcript.jsonl")
    assert ts.digest == m["transcript_digest"] and all(v is True for v in ts.verify(m["transcript_digest"]).values())
    assert weights_digest(replay(load_model("tiny-opt")[0], ts)) == m["weights_digest"] == ts.end["weights"]


def test_diagnostics_and_guarantee_agree_with_the_transcript(job):
    _, folder, m = job
    from paczero.transcript import Transcript
    d, ts = pd.read_parquet(folder / "diagnostics.parquet"), Transcript.load(folder / "transcript.jsonl")
    assert d.released.tolist() == [y for step in ts.releases for y in step] and d.mi.sum() == 0
    assert abs(d.unanimous.mean() - m["unanimity"]) < 1e-12
    text = (folder / "guarantee.md").read_text()
    assert "not differential privacy" in text and m["transcript_digest"] in text and "1000" in text and "126" in text


def test_executed_notebook_shows_no_private_example(job, house):
    "The executed notebook, the log and the public files carry no sentence of the pool or of the development set."
    done, folder, _ = job
    from paczero.tasks import load_task
    task = load_task("reviews", seed=0)
    texts = {"notebook": (house / "results" / "run.ipynb").read_text(), "log": done.stdout + done.stderr,
             **{p.name: p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file() and p.suffix not in (".png", ".parquet")}}
    for e in task.pool + task.dev:
        sentence = e.prompt[: -len(" It was")]
        if len(sentence) < 25: continue
        for name, text in texts.items(): assert sentence not in text and json.dumps(sentence)[1:-1] not in text, f"{name} shows {sentence!r}"


def test_without_an_output_path(house):
    "As in `papermill nbs/run_experiment.ipynb -p model …`: the executed notebook goes to standard output, the artefacts to results/ all the same."
    done = papermill(["nbs/run_experiment.ipynb", "-p", "model", "tiny-opt", "-p", "steps", "3", "-p", "n_train", "60", "-p", "n_dev", "20", "-p", "n_eval", "20", "-p", "m", "8",
                      "-p", "run_id", "no-output", "-p", "reference", "False"], house)
    assert json.loads(done.stdout[done.stdout.index("{"):])["cells"]
    assert json.loads((house / "results" / "runs" / "no-output" / "metrics.json").read_text())["steps"] == 3


@pytest.mark.parametrize("parameters, says", [
    (["-p", "model", "opt-1.3"], "did you mean 'opt-1.3b'"),
    (["-p", "mechanism", "mi", "-p", "budget", "-1"], "budget must be a number of nats > 0"),
    (["-p", "n_train", "4", "-p", "m", "126"], "is too small a pool"),
    (["-p", "model", "opt-125m", "-p", "task", "reviews"], "tiny-opt"),         # neither cached nor reachable
    (["-p", "task", "sst2", "-p", "data_path", "no/such/folder"], "no/such/folder"),
], ids=lambda v: "-".join(v[1::2]) if isinstance(v, list) else None)
def test_bad_input_stops_early(parameters, says, house):
    "Each is a clear error, and no run was begun."
    runs = house / "results" / "runs"
    before = sorted(p.name for p in runs.iterdir()) if runs.exists() else []
    done = papermill(["nbs/run_experiment.ipynb", "bad.ipynb", *parameters, "-p", "run_id", "bad"], house, check=False)
    assert done.returncode != 0
    assert says in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr), (done.stdout + done.stderr)[-3000:]
    assert sorted(p.name for p in runs.iterdir()) == before if runs.exists() else not before
