"""(ε, δ) of several runs on one pool: never below the truth, never above basic composition, never mixed with nats."""
import itertools
import math
import shutil

import numpy as np
import pytest
from scipy import stats
from transformers import TrainerCallback

from paczero.accounts import accounts
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.information import posterior_bound
from paczero.mechanisms import ZPL, MIBudget
from paczero.models import load_model
from paczero.run.pack import pack_runs
from paczero.tasks import load_task

pytest.importorskip("opacus")
from paczero.mechanisms.accountant import composed_epsilon, epsilon_spent
from paczero.mechanisms.composition import DPCost, composed
from paczero.mechanisms.gaussian import DPAggZO, DPZero

DELTA = 1e-5


def gaussian_delta(mu, epsilon):
    "δ of one Gaussian release whose mean moves by μ standard deviations, in closed form."
    return stats.norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * stats.norm.cdf(-epsilon / mu - mu / 2)


def cost(sigma, q, steps, delta=DELTA):
    return DPCost(epsilon_spent(sigma, delta, q, steps), delta, sigma, q, steps)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_against_the_closed_form(accountant):
    "q = 1: all the steps of all the plans are one Gaussian step with μ² = Σ T/σ²; whoever forgets a plan is below it."
    for plans in itertools.combinations([(9.0, 1.0, 12), (30.0, 1.0, 100), (4.0, 1.0, 2)], 2):
        mu = math.sqrt(sum(T / s**2 for s, _, T in plans))
        eps = composed_epsilon(plans, DELTA, accountant)
        assert gaussian_delta(mu, eps) <= DELTA < gaussian_delta(mu, (0.95 if accountant == "prv" else 0.8) * eps)


def losses(plans, removed, n=200_000):
    "n samples of the privacy loss of all plans together, in one direction of the neighbours."
    rng, out = np.random.default_rng(3), np.zeros(n)
    for sigma, q, steps in plans:
        for _ in range(steps):
            x = rng.normal(size=n) * sigma + (rng.random(n) < q if removed else 0)
            out += (1 if removed else -1) * np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))
    return out


def test_against_sampled_losses():
    "Plans that differ in noise, rate and steps, both directions."
    plans = [(1.2, 0.05, 12), (3.0, 0.4, 8), (2.0, 0.15, 5)]
    eps = composed_epsilon(plans, 1e-2)
    told = [np.maximum(0, -np.expm1(eps - losses(plans, removed))).mean() for removed in (True, False)]
    assert 0.0085 < max(told) < 0.0104


SETS = {"equal": [(2.0, 0.1, 30)] * 3, "noise": [(2.0, 0.1, 30), (3.0, 0.1, 30)],
        "all": [(2.0, 0.1, 30), (1.5, 0.2, 10), (6.0, 0.064, 900)], "unlike": [(1.0, 0.1, 5), (80.0, 0.01, 50)]}


@pytest.mark.parametrize("plans", SETS.values(), ids=SETS)
def test_between_the_largest_and_the_sum(plans):
    runs = [cost(*p) for p in plans]
    told = composed(runs)
    assert told.delta >= sum(c.delta for c in runs) * (1 - 1e-15) and told.epsilon <= told.added
    assert told.epsilon >= max(epsilon_spent(s, told.delta, q, T) for s, q, T in plans) * (1 - 1e-12)
    if len(plans) > 2:
        assert told.epsilon < 0.9 * told.added and "PRV" in told.how
    same = composed(runs, DELTA)
    assert same.delta == DELTA and same.epsilon >= max(max(c.epsilon for c in runs) * 0.999, told.epsilon)
    assert composed(runs[::-1]) == told


def test_equal_plans_are_one_run_of_the_summed_steps():
    for J, T in ((2, 50), (5, 20), (10, 10)):
        assert composed([cost(1.5, 0.1, T)] * J, DELTA).epsilon == epsilon_spent(1.5, DELTA, 0.1, 100)


def test_what_no_accountant_can_tell_is_not_bounded():
    strange = DPCost(1.0, DELTA, 1e-9, 0.1, 5)
    assert composed([strange] * 2).epsilon == 2.0                       # basic composition asks for no plan
    assert composed([strange] * 2, 1e-6).epsilon == math.inf
    assert composed([strange] * 2, 1e-6).posterior_bound == 1.0
    assert composed([DPCost(1.0, 0.6, 2.0, 0.1, 5)] * 2).epsilon == math.inf        # δ of 1.2 promises nothing


# ---------------------------------------------------------------- the accounts of real runs

KINDS = {"dpzero-a": (DPZero(epsilon=1.0, sample_rate=0.2, steps=4, clip=5.0), 1),
         "dpzero-b": (DPZero(epsilon=1.0, sample_rate=0.2, steps=4, clip=5.0), 1),
         "aggzo": (DPAggZO(epsilon=2.0, sample_rate=0.1, steps=4, clip=5.0, directions=2), 2),
         "mi": (MIBudget(budget=0.1, steps=4), 1), "zpl": (ZPL(), 1)}
DP = ["aggzo", "dpzero-a", "dpzero-b"]


class Stop(TrainerCallback):
    "Stops a run after two steps."

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 2:
            raise KeyboardInterrupt


def go(home, name, mechanism, k, callbacks=()):
    task = load_task("reviews", seed=0, n_train=40, n_dev=10, n_eval=10)
    config = FineTuneConfig(steps=4, lr=1e-4, m=8, k=k, eval_every=2, clip=5.0, seed=1)
    return finetune(*load_model("tiny-opt"), task, mechanism, config, folder=home / name, callbacks=callbacks,
                    runtime=Runtime(test=False))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        for name, (mechanism, k) in KINDS.items():
            go(home, name, mechanism, k)
        with pytest.raises(KeyboardInterrupt):
            go(home, "stopped", DPZero(epsilon=1.0, sample_rate=0.2, steps=4, clip=5.0), 1, [Stop])
    return home


@pytest.fixture
def home(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "home")


def plan(mechanism):
    return mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps


def test_accounts_compose(home):
    "Also the run that stopped: all its planned steps."
    books, plans = accounts(home), [plan(KINDS[n][0]) for n in (*DP, "dpzero-a")]
    pool = books.pools.iloc[0]
    assert pool.nats == books.total == pytest.approx(0.1)
    assert pool.epsilon == composed_epsilon(plans, pool.delta) < pool.dp.added == pytest.approx(5, abs=0.02)
    assert pool.delta == pytest.approx(4e-5, rel=1e-12) and pool.delta >= 4e-5 * (1 - 1e-15)
    assert books.posterior_bound == pool.dp.posterior_bound > posterior_bound(0.1)
    page = books.markdown()
    assert "At most 0.1 nats" in page and "At most (ε, δ) = " in page and "not added" in page and "4e-05" in page
    strict = accounts(home, delta=1e-6).pools.iloc[0]
    assert strict.delta == 1e-6 and strict.epsilon == composed_epsilon(plans, 1e-6) > pool.epsilon


def test_packed_runs_count_as_before(home):
    before = accounts(home)
    for name in ("mi", "zpl"):                  # their ledgers say what they spent: a pack has none
        shutil.rmtree(home / name)
    whole = accounts(home)
    assert pack_runs(home, ["ledger.jsonl"])[0] == DP
    books = accounts(home)
    assert books.complete and (books.pools.epsilon == whole.pools.epsilon).all() and books.dp == whole.dp == before.dp
    assert "no run with" not in books.markdown() and "secret subset" not in books.markdown().split("## How")[0]


def test_a_copy_and_its_pack_are_one_run(home, tmp_path):
    before = accounts(home).dp
    shutil.copytree(home / "aggzo", home / "elsewhere" / "copy")
    shutil.copytree(home / "dpzero-a", home / "elsewhere" / "packed")
    pack_runs(home / "elsewhere", ["ledger.jsonl"])
    books = accounts(home)
    assert books.dp == before and books.runs.note.str.contains("the same transcript").sum() == 2


def test_a_plan_that_was_made_cheaper_is_refused(home):
    for file in ("config.json", "ledger.jsonl"):
        text = (home / "aggzo" / file).read_text()
        assert file != "config.json" or '"noise_multiplier"' in text
        if file == "config.json":
            (home / "aggzo" / file).write_text(text.replace('"noise_multiplier": ', '"noise_multiplier": 1'))
        else:
            (home / "aggzo" / file).unlink()
    books = accounts(home)
    assert not books.complete and books.posterior_bound == 1 and "no bound can be given" in books.markdown()
    assert "another mechanism" in books.runs.set_index("run").note["aggzo"]
