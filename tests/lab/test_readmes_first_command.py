"""The README's first command does what it says: the very papermill command, on the embedded default, in a copy."""
import json
import re
import shlex
import shutil

import pandas as pd
import pytest

import readme
from common import ROOT
from mill import parameters, run_papermill

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    to = tmp_path_factory.mktemp("job")
    (to / "nbs").mkdir()
    (to / "results").mkdir()
    shutil.copy(ROOT / "nbs" / "run_experiment.ipynb", to / "nbs")
    shutil.copy(ROOT / "settings.ini", to)
    return to


@pytest.fixture(scope="module")
def job(house):
    "(what papermill said, the run's folder, its metrics)"
    command = readme.command(0).split("&&")[-1].strip()
    program, *args = shlex.split(command)
    assert program == ".venv/bin/papermill" and args[-1] == "results/run.ipynb", command
    done = run_papermill(args, house)
    folder, = (house / "results" / "runs").iterdir()
    return done, folder, json.loads((folder / "metrics.json").read_text())


FILES = {
    "config.json", "transcript.jsonl", "ledger.jsonl", "metrics.json", "guarantee.md", "diagnostics.parquet",
    "evaluations.csv", "figures/scores.png", "figures/scores.svg", "figures/run.png", "figures/run.svg",
    "figures/diagnostics.png", "figures/diagnostics.svg", "reference/metrics.json", "public-data/metrics.json",
}


def test_files(job, house):
    _, folder, _ = job
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert FILES <= there
    assert (folder / "transcript.jsonl").stat().st_size < 20_000
    assert (house / "results" / "run.ipynb").stat().st_size < 1_500_000


def test_it_learned_privately(job):
    _, folder, m = job
    reference = json.loads((folder / "reference" / "metrics.json").read_text())
    assert m["mi_spent"] == 0 and m["posterior_bound"] == m["prior"] == 0.5 and m["guarantee_covers"]
    assert not m["stamp"]
    assert m["n_pool"] == 1000 and m["n_test"] == 1000
    assert m["test_before"]["accuracy"] <= 0.60
    assert m["test_after"]["accuracy"] >= m["test_before"]["accuracy"] + 0.08
    assert reference["test_after"]["accuracy"] >= 0.70 and not reference["guarantee_covers"]


def test_the_control_used_no_private_example(job):
    _, folder, m = job
    control = json.loads((folder / "public-data" / "metrics.json").read_text())
    assert control["n_pool"] == control["n_dev"] == m["n_dev"] and control["mechanism"] == m["mechanism"]
    assert control["task"] == "reviews (public data alone)" and control["test_after"]["accuracy"] >= 0.5


def test_heartbeat_is_readable_in_the_log(job):
    done, _, m = job
    lines = re.findall(r"PACZero-ZPL \(I = 0\): step +\d+/\d+ · .*", done.stdout + done.stderr)
    assert len(lines) >= 8 and f"step {m['steps']}/{m['steps']}" in lines[-1] and "dev accuracy" in lines[-1]


def test_replay_of_the_job_is_bit_identical(job):
    from paczero.models import load_model
    from paczero.transcript import Transcript, replay, weights_digest

    _, folder, m = job
    ts = Transcript.load(folder / "transcript.jsonl")
    assert ts.digest == m["transcript_digest"]
    assert all(v is True for v in ts.verify(m["transcript_digest"]).values())
    assert weights_digest(replay(load_model("tiny-opt")[0], ts)) == m["weights_digest"] == ts.end["weights"]


def test_diagnostics_and_guarantee_agree_with_the_transcript(job):
    from paczero.transcript import Transcript

    _, folder, m = job
    d, ts = pd.read_parquet(folder / "diagnostics.parquet"), Transcript.load(folder / "transcript.jsonl")
    assert d.released.tolist() == [y for step in ts.releases for y in step] and d.mi.sum() == 0
    assert abs(d.unanimous.mean() - m["unanimity"]) < 1e-12
    text = (folder / "guarantee.md").read_text()
    assert "not differential privacy" in text and m["transcript_digest"] in text and "1000" in text and "126" in text


def test_executed_notebook_shows_no_private_example(job, house):
    "The executed notebook, the log and the public files carry no sentence of the pool or of the development set."
    from paczero.tasks import load_task

    done, folder, _ = job
    public = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".png", ".parquet")]
    texts = {p.name: p.read_text(errors="replace") for p in public}
    texts |= {"notebook": (house / "results" / "run.ipynb").read_text(), "log": done.stdout + done.stderr}
    task = load_task("reviews", seed=0)
    for e in task.pool + task.dev:
        sentence = e.prompt[: -len(" It was")]
        written = {sentence, json.dumps(sentence)[1:-1]} if len(sentence) >= 25 else ()
        found = [name for name, text in texts.items() if any(w in text for w in written)]
        assert not found, f"{found} show {sentence!r}"


def test_without_an_output_path(house):
    """As in `papermill nbs/run_experiment.ipynb -p model …`.

    The executed notebook goes to standard output, the artefacts to results/ all the same.
    """
    small = parameters(model="tiny-opt", steps=3, n_train=60, n_dev=20, n_eval=20, m=8, run_id="no-output",
                       reference=False)
    done = run_papermill(["nbs/run_experiment.ipynb", *small], house)
    assert json.loads(done.stdout[done.stdout.index("{") :])["cells"]
    metrics = house / "results" / "runs" / "no-output" / "metrics.json"
    assert json.loads(metrics.read_text())["steps"] == 3


BAD = [
    (dict(model="opt-1.3"), "did you mean 'opt-1.3b'"),
    (dict(mechanism="mi", budget=-1), "budget must be a number of nats > 0"),
    (dict(n_train=4, m=126), "is too small a pool"),
    (dict(model="opt-125m", task="reviews"), "tiny-opt"),         # neither cached nor reachable
    (dict(task="sst2", data_path="no/such/folder"), "no/such/folder"),
]


@pytest.mark.parametrize("given, says", BAD, ids=["-".join(map(str, given.values())) for given, _ in BAD])
def test_bad_input_stops_early(given, says, house):
    "Each is a clear error, and no run was begun."
    runs = house / "results" / "runs"
    before = sorted(p.name for p in runs.iterdir()) if runs.exists() else []
    done = run_papermill(["nbs/run_experiment.ipynb", "bad.ipynb", *parameters(**given, run_id="bad")], house,
                         check=False)
    assert done.returncode != 0
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    assert says in said, said[-3000:]
    assert sorted(p.name for p in runs.iterdir()) == before if runs.exists() else not before
