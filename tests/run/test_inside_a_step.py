"""How a step looked from inside: kept with the owner, right to the last digit, the same after a restart, and never
of a secret batch; and a clip that most examples meet all the time is said, once."""

import json
import math
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from paczero.finetune import FineTuneConfig, finetune, load_result
from paczero.mechanisms import MIBudget, NonPrivate, ZPL
from paczero.models import load_model
from paczero.run.ledger import INSIDE
from paczero.run.runs import open_runs
from paczero.run.watch import Watch
from paczero.show import plot_diagnostics
from paczero.subsets import SubsetDesign
from paczero.tasks import load_task

from common import environment, ROOT
from stops import Stop

pytest.importorskip("opacus")
from paczero.mechanisms.gaussian import DPAggZO, DPZero

DATA = dict(name="reviews", n_train=40, n_dev=8, n_eval=8)
PLAN = dict(epsilon=2.0, sample_rate=0.3, steps=3, clip=2.0)


class Keeps(Watch):
    "Keeps every step's differences."

    def __init__(self):
        self.seen = []

    def see(self, t, seen, releases, rows):
        self.seen.append((seen, releases))


def run(mechanism, folder=None, callbacks=(), watch=Watch(), **changes):
    "A small run."
    config = FineTuneConfig(**dict(steps=3, lr=1e-4, m=8, eval_every=2) | changes)
    return finetune(*load_model("tiny-opt"), load_task(**DATA), mechanism, config, folder=folder,
                    callbacks=callbacks, watch=watch)


def diagnostics(folder):
    "What the ledger keeps of each step."
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return [e["diagnostics"] for e in lines if "diagnostics" in e]


def entropies(design, steps):
    "The slow way: from Gaussian densities."
    p = np.full(design.m, 1 / design.m)
    for _, releases in steps:
        for r in releases:
            if r.kind == "noisy":
                p = p * np.exp(-((r.r - r.sign_vector) ** 2) / (2 * r.sigma**2))
            p = p / p.sum()
            yield -sum(x * math.log(x) for x in p if x)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("clip", [2.0, None])
def test_what_is_kept_is_what_happened(k, clip, tmp_path):
    "Against loops over examples and subsets, for every step and direction."
    watch, mechanism = Keeps(), MIBudget(budget=1.0, steps=6, directions=k)
    result = run(mechanism, tmp_path / "run", watch=watch, clip=clip, k=k, m=32, steps=6)
    design = SubsetDesign.from_dict(result.transcript.header["design"])
    told, bound = list(entropies(design, watch.seen)), clip or math.inf
    assert any(r.kind == "noisy" for _, releases in watch.seen for r in releases)
    for row, (t, j) in zip(result.history.itertuples(), ((t, j) for t in range(6) for j in range(k)), strict=True):
        g = watch.seen[t][0][j]
        assert (row.step, row.k) == (t, j) and row.ghat_max == max(abs(x) for x in g)
        assert row.clipped == pytest.approx(sum(abs(x) > bound for x in g) / 40, abs=1e-12)
        cut = [max(-bound, min(bound, x)) for x in g]
        means = [np.mean([x for x, inside in zip(cut, design.membership[:, m]) if inside]) for m in range(32)]
        assert row.subset_var == pytest.approx(np.var(means), rel=1e-9)
        assert row.posterior_entropy == pytest.approx(told[t * k + j], abs=1e-9)
    if clip:
        assert 0 < result.history.clipped.mean() < 1
    kept = pd.read_parquet(tmp_path / "run" / "diagnostics.parquet")
    assert kept[list(INSIDE)].equals(result.history[list(INSIDE)])
    assert load_result(tmp_path / "run").history.equals(result.history)


@pytest.mark.parametrize("mechanism", [lambda: DPZero(**PLAN), lambda: DPAggZO(**PLAN, directions=2)])
def test_nothing_is_kept_of_secret_batches(mechanism, tmp_path):
    made = mechanism()
    result = run(made, tmp_path / "run", clip=2.0, k=made.directions)
    assert all(set(d) == {"lr", "seconds"} for d in diagnostics(tmp_path / "run"))
    assert result.history[list(INSIDE)].isna().all(axis=None) and plot_diagnostics(result) is None


@pytest.mark.parametrize("mechanism", [ZPL, lambda: MIBudget(budget=1.0, steps=3), NonPrivate])
def test_nothing_of_it_is_public(mechanism, tmp_path):
    result = run(mechanism(), tmp_path / "run", clip=2.0)
    open_ = [p for p in (tmp_path / "run").iterdir() if p.suffix in (".jsonl", ".json", ".md", ".csv")
             and p.name != "ledger.jsonl"]
    assert len(open_) >= 5
    values = result.history[["ghat_max", "subset_var", "posterior_entropy"]].values.ravel()
    told = {repr(float(x)) for x in values if x == x} | set(INSIDE)
    for p in open_:
        assert not any(x in p.read_text() for x in told), p.name
    assert os.stat(tmp_path / "run" / "ledger.jsonl").st_mode & 0o077 == 0


def test_only_a_mechanism_with_a_posterior_has_its_entropy():
    for mechanism, has in ((ZPL(), False), (NonPrivate(), False), (NonPrivate(signal="quant_half"), False),
                           (MIBudget(budget=1.0, steps=3), True)):
        assert run(mechanism).history.posterior_entropy.notna().all() == has


def test_a_resumed_run_keeps_the_same(tmp_path):
    made = lambda: MIBudget(budget=1.0, steps=6, audit_seed=3)
    straight = run(made(), tmp_path / "straight", steps=6, clip=2.0)
    with pytest.raises(KeyboardInterrupt):
        run(made(), tmp_path / "cut", [Stop(4)], steps=6, clip=2.0)
    resumed = run(made(), tmp_path / "cut", steps=6, clip=2.0)
    assert resumed.history[list(INSIDE)].equals(straight.history[list(INSIDE)])


def test_a_run_from_before_reads_as_before(tmp_path):
    "Its ledger without the numbers: nothing is known of them, all else is as it was, and it can be gone on with."
    from paczero.transcript import Chain

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(ZPL(audit_seed=3), folder, [Stop(2)], clip=2.0)
    chain, lines = Chain(), []
    for e in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines()):
        if "diagnostics" in e:
            e["diagnostics"] = {k: v for k, v in e["diagnostics"].items() if k not in INSIDE}
        lines.append(chain.line({k: v for k, v in e.items() if k != "~"}))
    (folder / "ledger.jsonl").write_text("".join(lines))
    result = run(ZPL(audit_seed=3), folder, clip=2.0)
    assert result.history.clipped.isna().tolist() == [True, True, False]
    assert result.transcript == run(ZPL(audit_seed=3), clip=2.0).transcript


@pytest.mark.parametrize("home", ["miniature", "smollm2-135m"])
def test_kept_packs_are_read_as_before(home):
    kept = next(r for r in open_runs(ROOT / "results" / home).values() if r.has("diagnostics.parquet"))
    assert len(kept.diagnostics) and not set(INSIDE) & set(kept.diagnostics.columns)
    assert plot_diagnostics(SimpleNamespace(history=kept.diagnostics)) is None


CLIP = 1e-3  # nearly every difference is above it


def said(caught):
    "What was warned of the clip."
    return [str(w.message) for w in caught if "clip=" in str(w.message)]


def test_a_clip_that_most_meet_is_said_once(tmp_path):
    with warnings.catch_warnings(record=True, action="always") as caught:
        result = run(ZPL(), steps=45, lr=1e-5, eval_every=45, clip=CLIP)
    assert result.history.clipped.min() > 0.5
    (text,) = said(caught)
    for part in (f"clip={CLIP:g}", "last 20 steps", "more than half", "a larger clip", "-p clip none", "nats"):
        assert part in text


@pytest.mark.parametrize("what", [
    dict(steps=19, clip=CLIP), dict(steps=30, clip=None), dict(steps=30, clip=1e4)], ids=str)
def test_else_it_is_not_said(what):
    with warnings.catch_warnings(record=True, action="always") as caught:
        run(ZPL(), lr=1e-5, eval_every=30, **what)
    assert not said(caught)


def test_of_secret_batches_it_is_not_said():
    with warnings.catch_warnings(record=True, action="always") as caught:
        run(DPZero(**PLAN | dict(clip=0.5, steps=25)), steps=25, lr=1e-6, eval_every=25, clip=0.5)
    assert not said(caught)


def test_a_warning_that_is_an_error_loses_no_release(tmp_path):
    plan = dict(steps=24, lr=1e-5, eval_every=24, clip=CLIP)
    with warnings.catch_warnings(action="error"), pytest.raises(UserWarning, match="clip="):
        run(ZPL(audit_seed=1), tmp_path / "run", **plan)
    with warnings.catch_warnings(action="error"):  # it has been said
        result = run(ZPL(audit_seed=1), tmp_path / "run", **plan)
    with warnings.catch_warnings(action="ignore"):
        assert result.transcript == run(ZPL(audit_seed=1), **plan).transcript


def test_a_headless_log_is_readable(tmp_path):
    "Without a notebook: one line with the text, behind the place that Python names."
    script = f"""
from paczero.finetune import FineTuneConfig, finetune
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.tasks import load_task
finetune(*load_model("tiny-opt"), load_task(**{DATA!r}), ZPL(),
         FineTuneConfig(steps=22, lr=1e-5, m=8, eval_every=22, clip={CLIP}))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if "clip=" in line]
    assert done.returncode == 0 and len(lines) == 1 and "UserWarning: clip=0.001: in each" in lines[0], done.stderr
