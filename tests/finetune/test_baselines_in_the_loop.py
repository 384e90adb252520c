"""DPZero, DP-AggZO and mini-batch MeZO in the one loop: replayed, resumed, stamped; nothing of a batch is written."""
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from transformers import TrainerCallback

from paczero import publish, show
from paczero.accounts import accounts
from paczero.finetune import FineTuneConfig, finetune, load_result, Runtime
from paczero.mechanisms import NonPrivate, ZPL
from paczero.models import load_model
from paczero.objectives import GenerationF1, OptionCrossEntropy
from paczero.tasks import load_task
from paczero.transcript import Transcript, replay, weights_digest

pytest.importorskip("opacus")
from paczero.mechanisms.accountant import dp_posterior_bound
from paczero.mechanisms.gaussian import DPAggZO, DPZero

PLAN = dict(epsilon=2.0, sample_rate=0.1, steps=4, clip=20.0)
CONFIG = dict(steps=4, lr=1e-5, lr_schedule="constant", clip=20.0, m=4, eval_every=2, select="last")
STAMP = "secret fixed for audit: no guarantee"


@pytest.fixture(scope="module")
def task():
    return load_task("reviews", seed=0, n_train=60, n_dev=20, n_eval=20)


def go(mechanism, task, folder, k=1, callbacks=(), **changes):
    "A run of four steps."
    config = FineTuneConfig(**{**CONFIG, "k": k, **changes})
    return finetune(*load_model("tiny-opt"), task, mechanism, config, folder=folder, callbacks=callbacks)


def replayed(transcript):
    "The digest of the weights that a transcript leads to."
    return weights_digest(replay(load_model("tiny-opt")[0], transcript))


BASELINES = [(DPZero(**PLAN), 1), (DPAggZO(**PLAN, directions=2), 2)]


@pytest.fixture(scope="module", params=BASELINES, ids=["dpzero", "dp-aggzo"])
def run(request, task, tmp_path_factory):
    "(mechanism, K, result, folder) of a finished run."
    mechanism, k = request.param
    folder = tmp_path_factory.mktemp("runs") / "run"
    return mechanism, k, go(mechanism, task, folder, k), folder


def test_what_is_spent_is_epsilon(run):
    mechanism, k, r, folder = run
    m = r.metrics
    assert m["epsilon_spent"] == mechanism.booked <= 2 and m["delta"] == 1e-5 and m["guarantee_covers"]
    assert m["mi_spent"] is None and m["mi_bound"] is None and m["unanimity"] is None
    assert m["examples_forwarded"] == 2 * k * 4 * 6
    assert {"epsilon", "delta", "sample_rate", "noise_multiplier", "clip"} <= set(m["mechanism"])
    books = accounts(folder.parent)
    row = books.runs.iloc[0]
    assert (row.counted, row.epsilon, row.delta) == (0, mechanism.booked, 1e-5) and "no nats" in row.note
    assert (books.dp.epsilon, books.posterior_bound) == (mechanism.booked, dp_posterior_bound(mechanism.booked, 1e-5))


def test_the_guarantee_speaks_of_differential_privacy(run):
    mechanism, _, r, folder = run
    page = (folder / "guarantee.md").read_text()
    assert "differentially private" in page and "I = 0" not in page and "zero privacy loss" not in page
    assert r.guarantee.posterior_bound == dp_posterior_bound(mechanism.booked, 1e-5)
    assert load_result(folder).guarantee == r.guarantee


def test_the_transcript_is_the_run(run):
    _, k, r, folder = run
    t = Transcript.load(folder / "transcript.jsonl")
    assert len(t) == 4 and all(len(y) == k for y in t.releases)
    assert replayed(t) == r.metrics["weights_digest"]
    assert t.verify(ledger=folder / "ledger.jsonl")["ledger"] is True


def test_the_ledger_says_nothing_of_a_batch(run):
    told = [json.loads(x) for x in (run[3] / "ledger.jsonl").read_bytes().splitlines()]
    steps = [e for e in told if "releases" in e]
    assert all(set(e) == {"t", "releases", "diagnostics", "~"} for e in steps)
    assert all(set(e["diagnostics"]) == {"lr", "seconds"} for e in steps)
    timed = [e["diagnostics"]["seconds"] > 0 for e in steps]
    assert timed == [False, True, False, True]          # not step by step: time tells the batch's size
    assert all(set(x) == {"sign", "kind", "scalar"} for e in steps for x in e["releases"])


@pytest.mark.parametrize("restore", ["copy", "inplace"])
def test_empty_batches(restore, task, tmp_path, monkeypatch):
    "Noise alone is released, without a forward pass over the pool."
    seen, real = [], OptionCrossEntropy.scores

    def scores(self, rows=None):
        if self.n == len(task.pool):
            seen.append(None if rows is None else len(rows))
        return real(self, rows)

    monkeypatch.setattr(OptionCrossEntropy, "scores", scores)
    mechanism = DPZero(**PLAN)
    bits = mechanism._entropy.bits
    nobody = lambda k, where: (1 << k) - 1 if where.startswith("batch") else bits(k, where)
    monkeypatch.setattr(mechanism._entropy, "bits", nobody)
    r = go(mechanism, task, tmp_path / "run", restore=restore)
    assert len(set(r.history.released)) == 4
    assert replayed(r.transcript) == r.metrics["weights_digest"]
    assert set(seen) <= {None, 0}


class Stop(TrainerCallback):
    "Stops a run after three steps."

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_resume_goes_on(task, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(DPZero(**PLAN), task, tmp_path / "run", callbacks=[Stop])
    before = (tmp_path / "run" / "transcript.jsonl").read_bytes()
    r = go(DPZero(**PLAN), task, tmp_path / "run")
    assert (tmp_path / "run" / "transcript.jsonl").read_bytes().startswith(before) and len(r.transcript) == 4
    assert replayed(r.transcript) == r.metrics["weights_digest"]


def test_audited_runs_are_stamped_and_reproducible(task, tmp_path):
    a, b = (go(DPZero(**PLAN, audit_seed=1), task, tmp_path / x) for x in "ab")
    assert a.transcript.releases == b.transcript.releases
    for name in ("config.json", "transcript.jsonl", "metrics.json", "guarantee.md"):
        assert STAMP in (tmp_path / "a" / name).read_text(), name
    assert a.metrics["posterior_bound"] == 1.0 and a.metrics["epsilon_spent"] is None
    assert not a.metrics["guarantee_covers"] and "**No guarantee.**" in a.guarantee.markdown()


def test_minibatch_mezo(task, tmp_path):
    a, b = (go(NonPrivate(batch=16), task, tmp_path / x) for x in "ab")
    assert a.transcript.releases == b.transcript.releases
    assert a.metrics["examples_forwarded"] == 2 * 4 * 16 and not a.guarantee.covered
    full = go(NonPrivate(), task, tmp_path / "full")
    whole = go(NonPrivate(batch=60), task, tmp_path / "whole")
    assert np.allclose(full.history.released, whole.history.released, rtol=1e-4)
    assert full.metrics["examples_forwarded"] == 2 * 4 * 60
    with pytest.raises(ValueError, match="batch = 61 is larger than the pool of 60"):
        go(NonPrivate(batch=61), task, tmp_path / "large")
    assert load_result(tmp_path / "a").transcript.releases == a.transcript.releases


@pytest.fixture(scope="module")
def three(task, tmp_path_factory):
    "Three runs of different kinds, and their folder."
    root = tmp_path_factory.mktemp("three")
    kinds = dict(dp=DPZero(**PLAN), small=NonPrivate(batch=8), zpl=ZPL())
    return [go(m, task, root / name) for name, m in kinds.items()], Path(root)


def test_tables_and_figures_take_them(three):
    import matplotlib

    matplotlib.use("Agg")
    runs, root = three
    for r in runs:
        show.plot_run(r, runs[-1])
    show.plot_scores(runs)
    table, bad = show.collect(root)
    spent = f"– (ε = {runs[0].metrics['epsilon_spent']:.3g})"
    assert not bad and len(table) == 3
    assert set(show.summarise(table)["I(S*; Y), nats"]) == {"0", "0 (no guarantee)", spent}
    assert any("DPZero (ε = 2)" in x for x in show.readable_scores(runs).index)
    assert "batches of 8" in show.method_label(runs[1].metrics["mechanism"])


def test_pages_speak_of_epsilon(three):
    run = three[0][0]
    assert "ε = " in show.release_summary(run).loc["spent"].iloc[0]
    assert "differentially private" in publish.model_card(run)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mechanism", [m for m, _ in BASELINES], ids=["dpzero", "dp-aggzo"])
def test_half_precision_is_refused_before_a_folder_is_made(mechanism, dtype, task, tmp_path):
    config = FineTuneConfig(**CONFIG, k=mechanism.directions)
    with pytest.raises(ValueError, match=f"dtype = {dtype} rounds so coarsely"):
        finetune(*load_model("tiny-opt", dtype=dtype), task, mechanism, config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_epsilon_that_drowns_in_rounding_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match=r"Runtime\(max_tokens=1\)"):
        go(DPZero(**PLAN), task, tmp_path / "run", zo_eps=1e-6)
    alone = Runtime(max_tokens=1)
    config = FineTuneConfig(**CONFIG, zo_eps=1e-6)
    finetune(*load_model("tiny-opt"), task, DPZero(**PLAN), config, folder=tmp_path / "alone", runtime=alone)


def test_generated_answers_are_read_one_at_a_time(tmp_path):
    "F1 jumps where rounding turns a token, so no neighbour may have a say in it."
    facts, sizes, real = load_task("facts", seed=0, n_train=40, n_dev=6, n_eval=6), [], GenerationF1._answers

    def answers(self, group):
        sizes.append((self.n == 40, sum(len(b.index) for b in group)))
        return real(self, group)

    with mock.patch.object(GenerationF1, "_answers", answers):
        go(DPZero(**PLAN | dict(sample_rate=0.5)), facts, tmp_path / "run")
    assert {size for pool, size in sizes if pool} == {1} < {size for pool, size in sizes}
