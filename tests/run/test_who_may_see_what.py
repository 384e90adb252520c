"""The table of who may see what has every file and field of a run, and what is private leaves with no release."""

import io
import json
import os
import re
from contextlib import redirect_stdout
from dataclasses import replace
from fnmatch import fnmatchcase

import pandas as pd
import pytest
from transformers import TrainerCallback

from paczero.finetune import FineTuneConfig, finetune, load_result, Runtime
from paczero.mechanisms import MIBudget, NonPrivate, ZPL
from paczero.models import load_model
from paczero.publish import model_card, push_to_hub, save_release
from paczero.run import visibility
from paczero.run.progress import Heartbeat
from paczero.run.runs import open_runs
from paczero.run.visibility import field_level, fields_of, file_level, may_leave, owner_only, pool_is_private, PRIVATE
from paczero.tasks import load_task
from paczero.transcript import TranscriptError

from common import ROOT

pytest.importorskip("opacus")
from paczero.mechanisms.gaussian import DPAggZO, DPZero

PLAN = dict(epsilon=2.0, sample_rate=0.3, steps=3, clip=20.0)
REVIEWS = dict(name="reviews", n_train=40, n_dev=12, n_eval=12)
FACTS = dict(name="facts", n_train=16, n_dev=6, n_eval=6)
RUNS = {
    "zpl": (lambda: ZPL(), REVIEWS, dict(clip=5.0), {}),
    "zpl, generation": (lambda: ZPL(audit_seed=1), FACTS, {}, {}),
    "mi": (lambda: MIBudget(budget=0.5, steps=3, directions=2), REVIEWS, dict(k=2), {}),
    "dpzero": (lambda: DPZero(**PLAN), REVIEWS, dict(clip=20.0), {}),
    "dp-aggzo, lora": (lambda: DPAggZO(**PLAN, directions=2), REVIEWS, dict(clip=20.0, k=2), dict(track="lora")),
    "mezo": (lambda: NonPrivate(), REVIEWS, {}, {}),
}


class Listener(TrainerCallback):
    "Hears what every callback hears."

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kw):
        self.heard += [("on_log", k) for k in logs]

    def on_evaluate(self, args, state, control, metrics=None, **kw):
        self.heard += [("on_evaluate", k) for k in metrics]


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    "(result, its folder, a release of it, what callbacks heard, what was printed)"
    root = tmp_path_factory.mktemp("runs")
    make, data, changes, load = RUNS[request.param]
    config = FineTuneConfig(**dict(steps=3, lr=1e-4, m=8, eval_every=2) | changes)
    listener, printed, before = Listener(), io.StringIO(), os.umask(0o022)
    try:
        with redirect_stdout(printed):
            result = finetune(*load_model("tiny-opt", **load), load_task(**data), make(), config, folder=root / "run",
                              callbacks=[listener, Heartbeat(0.0)], runtime=Runtime(save_weights=True))
        release = save_release(result, None, root / "release")
    finally:
        os.umask(before)
    return result, root / "run", release, listener.heard, printed.getvalue()


def records(folder):
    "(file, what it says) of all that has fields."
    for f in sorted(folder.iterdir()):
        if f.suffix == ".json":
            yield f.name, json.loads(f.read_text())
        elif f.suffix == ".jsonl":
            yield from ((f.name, json.loads(line)) for line in f.read_text().splitlines())
        elif f.suffix in (".parquet", ".csv"):
            table = pd.read_parquet(f) if f.suffix == ".parquet" else pd.read_csv(f)
            yield f.name, dict.fromkeys(table.columns, 0)


def strict(result):
    "Whether exact numbers of the pool are private in this run."
    return pool_is_private(result.metrics["mechanism"])


def test_every_file_is_in_the_table(run):
    for folder in run[1:3]:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        unknown = [n for n in names if not any(fnmatchcase(n, p) for p in visibility.FILES)]
        assert not unknown, f"put into paczero.run.visibility.FILES: {unknown}"


def test_every_field_is_in_the_table(run):
    told = [(file, field) for folder in run[1:3] for file, x in records(folder) for field in fields_of(x)]
    assert {file for file, _ in told} >= {"config.json", "metrics.json", "ledger.jsonl", "transcript.jsonl",
                                          "diagnostics.parquet", "evaluations.csv", "release.json"}
    assert all(field_level(file, field) for file, field in told)
    assert all(field_level("guarantee.md", field) for field in fields_of(run[0].guarantee.to_dict()))


def test_files_that_are_not_for_everybody_are_the_owners_alone(run):
    modes = {p.name: p.stat().st_mode & 0o077 for p in run[1].iterdir() if p.is_file()}
    assert {n for n, mode in modes.items() if not mode} == {n for n in modes if owner_only(n)}
    assert {"config.json", "metrics.json", "ledger.jsonl", "diagnostics.parquet"} == {n for n in modes if owner_only(n)}


def test_what_callbacks_hear_and_what_is_printed_is_public(run):
    result, _, _, heard, printed = run
    assert all(may_leave(file, field, strict(result)) for file, field in heard) and ("on_log", "learning_rate") in heard
    words = dict(loss=" loss ", unanimous="unanimous", mi_spent="nats", seconds="s/step")
    shown = {name for name, word in words.items() if word in printed.replace("dev loss", "")}
    assert all(may_leave("progress", name, strict(result)) for name in shown)
    assert shown >= (set() if strict(result) else {"loss", "seconds"})


def test_a_release_says_only_what_may_leave(run):
    result, folder, release, *_ = run
    for file, x in records(release):
        assert all(may_leave(file, field, strict(result)) for field in fields_of(x, silent=False)), file
    config, text = json.loads((folder / "config.json").read_text()), "".join(p.read_text() for p in release.iterdir())
    assert config["task"]["fingerprint"] not in text and config["task"]["pool_fingerprint"] not in text


MARK = 987654321.0625       # no number of a run


def marked(x, name=""):
    "The metrics with a mark in the place of all that may not leave a differentially private run."
    if isinstance(x, dict) and x:
        return {k: marked(v, f"{name}.{k}" if name else k) for k, v in x.items()}
    return x if may_leave("metrics.json", name, True) else MARK


def test_private_metrics_do_not_leave(run, tmp_path):
    result = run[0]
    if not strict(result):
        pytest.skip("the pool is assumed known")
    metrics = marked(result.metrics)
    hidden = {k for k, v in metrics.items() if v == MARK}
    assert hidden >= {"pool_tokens", "seconds", "seconds_per_step", "peak_memory_bytes", "unanimity", "mi_spent"}
    release = save_release(replace(result, metrics=metrics), None, tmp_path / "release")
    assert not any(re.search("98765432", p.read_text()) for p in release.iterdir())


def test_a_card_sees_no_private_metric(run, monkeypatch):
    "Also where somebody lets it print all metrics that it sees."
    from paczero.publish import card

    result = run[0]
    if not strict(result):
        pytest.skip("the pool is assumed known")
    monkeypatch.setattr(card, "_scores", str)
    text = model_card(replace(result, metrics=marked(result.metrics)))
    assert "examples_forwarded" in text and "98765432" not in text and "pool_tokens" not in text


@pytest.mark.parametrize("more", [dict(pool_loss=0.7), dict(pool_tokens=812)])
def test_what_nobody_classified_is_not_pushed(run, more):
    _, _, release, *_ = run
    file = release / "release.json"
    kept = file.read_text()
    file.write_text(json.dumps(json.loads(kept) | more))
    try:
        with pytest.raises(ValueError, match="nobody has said who may see"):
            push_to_hub(release, "me/model", api=object())
    finally:
        file.write_text(kept)


def test_exact_numbers_of_the_pool_do_not_leave_in_a_header(run, tmp_path):
    "The prior of repeated texts goes with a guarantee on candidate subsets, and into no release under (ε, δ)."
    result = run[0]
    with pytest.raises(ValueError, match="design.text_prior"):
        visibility.refuse_private("transcript.jsonl", {"design": {"text_prior": 0.73}}, True)
    assert not strict(result) or "text_prior" not in result.transcript.header["design"]


def test_runs_that_were_kept_are_in_the_table():
    "Also those of former versions."
    unknown = set()
    for home in ("default", "miniature", "smollm2-135m"):
        for run in open_runs(ROOT / "results" / home).values():
            for file, read in (("config.json", lambda r: r.config), ("metrics.json", lambda r: r.metrics),
                               ("cell.json", lambda r: r.cell), ("transcript.jsonl", lambda r: r.transcript.header)):
                try:
                    said = fields_of(read(run))
                except TranscriptError:
                    continue
                unknown |= {(file, f) for f in said if not known(file, f)}
    assert not unknown


def known(file, field):
    "Whether the table has a field."
    try:
        return bool(field_level(file, field))
    except ValueError:
        return False


def test_an_unknown_file_is_private_and_a_loaded_run_can_still_be_released(run, tmp_path):
    assert file_level("notes.txt") == PRIVATE and owner_only("notes.txt")
    save_release(load_result(run[1]), None, tmp_path / "again")
    a, b = (json.loads((folder / "release.json").read_text()) for folder in (tmp_path / "again", run[2]))
    assert fields_of(a) == fields_of(b) and a["scores"] == b["scores"] and a["digest"] == b["digest"]
