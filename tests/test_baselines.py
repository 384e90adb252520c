"DPZero, DP-AggZO and mini-batch MeZO: the noise is right, wrong ones are told apart, and nothing of a batch is written down."
import json, math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from paczero import paper
from paczero.accounts import accounts
from paczero.lab.experiment import choose_recipe
from paczero.finetune import FineTuneConfig, Runtime, finetune, load_result
from paczero.mechanisms import MIBudget, NonPrivate, Release, ZPL, make_mechanism
from paczero.models import load_model
from paczero.subsets import SubsetDesign
from paczero.tasks import load_task
from paczero.transcript import Transcript, replay, weights_digest

pytest.importorskip("opacus")
from paczero.mechanisms.gaussian import DPAggZO, DPZero, clipped_sum
from paczero.mechanisms.accountant import dp_posterior_bound, epsilon_spent, matched_budget, noise_multiplier

PLAN = dict(epsilon=2.0, sample_rate=0.1, steps=4, clip=20.0)
DESIGN = SubsetDesign(500, 4, 0)


def test_multiplier_is_on_the_private_side_and_no_larger_than_needed():
    for eps, q, T in ((2.0, 0.064, 300), (0.5, 0.1, 50), (6.0, 1.0, 20)):
        s = noise_multiplier(eps, 1e-5, q, T)
        assert 0.99 * eps < epsilon_spent(s, 1e-5, q, T) <= eps < epsilon_spent(s / 1.01, 1e-5, q, T)
    mu = math.sqrt(20) / s                                     # q = 1: the plain Gaussian mechanism, in closed form
    delta = lambda mu: stats.norm.cdf(-6 / mu + mu / 2) - math.exp(6) * stats.norm.cdf(-6 / mu - mu / 2)
    assert 0.8e-5 < delta(mu) <= 1e-5 < 2e-5 < delta(mu / 0.9)


def test_rdp_never_says_less_than_prv():
    for s, q, T in ((1.0, 0.064, 37), (6.0, 0.064, 2000), (2.0, 1.0, 10)):
        assert epsilon_spent(s, 1e-5, q, T, accountant="rdp") > 0.98 * epsilon_spent(s, 1e-5, q, T)


@pytest.mark.parametrize("bad, says", [(dict(epsilon=0), "epsilon = 0"), (dict(epsilon=-2.0), "epsilon"), (dict(epsilon="2"), "epsilon"), (dict(delta=0.0), "delta"), (dict(delta=1.0), "delta"), (dict(delta=math.nan), "delta"),
    (dict(sample_rate=0), "sample_rate"), (dict(sample_rate=1.01), "sample_rate"), (dict(steps=0), "steps"), (dict(steps=2.5), "steps"), (dict(sampling="shuffle"), "Poisson"), (dict(accountant="gdp"), "accountant")])
def test_accountant_refuses(bad, says):
    with pytest.raises(ValueError, match=says): noise_multiplier(**{**dict(epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=10), **bad})


@pytest.mark.parametrize("bad, says", [(dict(clip=None), "clip = None"), (dict(clip=0.0), "clip"), (dict(clip=math.inf), "clip"), (dict(epsilon=0), "epsilon"), (dict(delta=2), "delta"), (dict(sampling="fixed"), "Poisson"),
    (dict(noise_multiplier=0.3), "too little"), (dict(directions=3), "DPZero"), (dict(colour=1), "colour")])
def test_mechanism_refuses(bad, says):
    with pytest.raises((ValueError, TypeError), match=says): DPZero(**{**PLAN, **bad})
    with pytest.raises(ValueError, match=says): make_mechanism(dict(name="dpzero", **{**PLAN, **bad}))


def test_sampling_that_the_accountant_does_not_know_is_refused():
    m = DPZero(**PLAN).bind(DESIGN)
    with pytest.raises(RuntimeError, match="no batch was drawn"): m.step(np.zeros((1, 500)), clip=20.0)
    rows = m.batch(500)
    for g in (np.zeros((1, len(rows) + 1)), np.zeros((2, len(rows)))):
        with pytest.raises(ValueError, match="ghat has shape"): m.step(g, clip=20.0)
    for clip in (None, 19.0):
        with pytest.raises(ValueError, match="clip"): m.step(np.zeros((1, len(rows))), clip=clip)
    for _ in range(4): m.step(np.zeros((1, len(m.batch(500)))), clip=20.0)
    with pytest.raises(RuntimeError, match="4 of 4"): m.batch(500)


@pytest.mark.parametrize("k", [1, 4, 64])
def test_sensitivity(k):
    rng, worst = np.random.default_rng(k), {}
    wrong = dict(each=lambda g: np.clip(g / k, -1, 1).sum(1), mean=lambda g: np.clip(g.mean(1), -1, 1) * g.shape[1], undivided=lambda g: clipped_sum(g, 1.0) * k, none=lambda g: g.sum(1) / k)
    for _ in range(40):
        g, new = rng.normal(size=(k, 30)), rng.normal(size=(k, 1)) * 10.0 ** rng.integers(-3, 12)
        for name, f in dict(wrong, right=lambda g: clipped_sum(g, 1.0)).items():
            worst[name] = max(worst.get(name, 0), np.linalg.norm(f(np.hstack([g, new])) - f(g)))
    assert 0.999 < worst["right"] <= 1 + 1e-12
    for name in ("mean", "none") + (("each", "undivided") if k > 1 else ()): assert worst[name] > 1.4, name


def test_noise_and_batches_have_the_distribution_that_was_accounted_for():
    m = DPAggZO(epsilon=2.0, sample_rate=0.1, steps=1600, clip=3.0, directions=8).bind(DESIGN)       # 12,800 numbers tell 10 % with certainty
    sizes, y = [], []
    for _ in range(1600):
        rows = m.batch(500); sizes.append(len(rows))
        y.append([r.scalar * 50 / 8 for r in m.step(np.zeros((8, len(rows))), clip=3.0)])
    y, std, sizes = np.array(y), 3.0 * m.noise_multiplier, np.array(sizes)
    ok = lambda y, std: 1e-6 < stats.chi2.cdf((y**2).sum() / std**2, y.size) < 1 - 1e-6 and stats.kstest(y.ravel() / std, "norm").pvalue > 1e-6
    assert ok(y, std) and not ok(y, 1.1 * std) and not ok(y, 0.9 * std) and not ok(y, std / math.sqrt(8))
    assert np.abs(np.corrcoef(y.T) - np.eye(8)).max() < 0.3                       # a fresh draw for each coordinate
    p = lambda q: stats.binomtest(int(sizes.sum()), 800_000, q).pvalue
    assert p(0.1) > 1e-6 > p(0.11) and 1e-6 < stats.chi2.cdf(((sizes - 50) ** 2).sum() / 45, 1600) < 1 - 1e-6
    a, b = (DPZero(**PLAN).bind(DESIGN).batch(500) for _ in range(2))
    assert a.tolist() != b.tolist()                                              # from the operating system, not from a seed


def test_users_seed_changes_nothing():
    import random, torch
    got = []
    for _ in range(2):
        random.seed(1); np.random.seed(1); torch.manual_seed(1)
        m = DPZero(**PLAN).bind(DESIGN); rows = m.batch(500)
        got.append((rows.tolist(), m.step(np.zeros((1, len(rows))), clip=20.0)[0].scalar))
    assert got[0][0] != got[1][0] and got[0][1] != got[1][1]


def test_k_directions_cost_what_one_vector_costs():
    one, many = DPZero(**PLAN), DPAggZO(**PLAN, directions=64)
    assert one.noise_multiplier == many.noise_multiplier and one.booked == many.booked <= 2
    assert epsilon_spent(many.noise_multiplier / 8, 1e-5, 0.1, 4) > 5 * many.booked  # clipped direction by direction: norm c√64


def test_update_is_the_published_one(monkeypatch):
    "θ − lr Σ g_k z_k: what `coefficients` makes of the releases, without noise."
    from paczero.transcript import coefficients
    m = DPAggZO(epsilon=2.0, sample_rate=1.0, steps=1, clip=2.0, directions=4).bind(DESIGN)
    monkeypatch.setattr(m._entropy, "gauss", lambda where: 0.0)
    g = np.random.default_rng(0).normal(size=(4, 500)) * 9
    assert m.batch(500).tolist() == list(range(500))
    y = [r.scalar for r in m.step(g, clip=2.0)]
    v = g / 4; v = v * np.minimum(1, 2.0 / np.linalg.norm(v, axis=0))
    got = coefficients(0, y, dict(steps=1, lr=0.3, lr_schedule="constant"))
    assert np.allclose(got, 0.3 * v.sum(1) / 500, rtol=0, atol=0.3 * 2.0 * m.noise_multiplier * 2**-20 / 500)


def test_matching_at_equal_posterior():
    from paczero.information import posterior_bound
    for e in (0.2, 0.3, 0.5, 1.0, 2.0, 6.0):
        assert abs(dp_posterior_bound(e) - math.exp(e) / (1 + math.exp(e))) < 1e-12 and abs(posterior_bound(matched_budget(e)) - dp_posterior_bound(e)) < 1e-9
        assert dp_posterior_bound(e) < dp_posterior_bound(e, 1e-5) < dp_posterior_bound(e) + 1e-5
    assert dp_posterior_bound(0) == 0.5 and dp_posterior_bound(0, 0.2) == pytest.approx(0.6)
    for bad in (dict(epsilon=-1), dict(epsilon=1, delta=1.5), dict(epsilon=math.nan)):
        with pytest.raises(ValueError): dp_posterior_bound(**bad)


# ---------------------------------------------------------------- in the loop

@pytest.fixture(scope="module")
def task(): return load_task("reviews", seed=0, n_train=60, n_dev=20, n_eval=20)

def go(mech, task, folder, k=1, **kw):
    config = FineTuneConfig(**{**dict(steps=4, lr=1e-5, lr_schedule="constant", clip=20.0, k=k, m=4, eval_every=2, select="last"), **kw})
    return finetune(*load_model("tiny-opt"), task, mech, config, folder=folder)

def texts(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file() and p.suffix in (".json", ".jsonl", ".md", ".csv")}

@pytest.mark.parametrize("mech, k", [(DPZero(**PLAN), 1), (DPAggZO(**PLAN, directions=2), 2)], ids=["dpzero", "dp-aggzo"])
def test_run(mech, k, task, tmp_path):
    r = go(mech, task, tmp_path / "run", k)
    m, said = r.metrics, r.guarantee
    assert m["epsilon_spent"] == mech.booked <= 2 and m["delta"] == 1e-5 and m["mi_spent"] is None and m["mi_bound"] is None and m["unanimity"] is None and m["guarantee_covers"]
    assert m["examples_forwarded"] == 2 * k * 4 * 6 and {"epsilon", "delta", "sample_rate", "noise_multiplier", "clip"} <= set(m["mechanism"])
    page = (tmp_path / "run" / "guarantee.md").read_text()
    assert "differentially private" in page and "I = 0" not in page and "zero privacy loss" not in page and said.posterior_bound == dp_posterior_bound(mech.booked, 1e-5)
    t = Transcript.load(tmp_path / "run" / "transcript.jsonl")
    assert len(t) == 4 and all(len(y) == k for y in t.releases) and weights_digest(replay(load_model("tiny-opt")[0], t)) == m["weights_digest"]
    assert load_result(tmp_path / "run").guarantee == said
    assert t.verify(ledger=tmp_path / "run" / "ledger.jsonl")["ledger"] is True
    told = [json.loads(x) for x in texts(tmp_path / "run")["ledger.jsonl"].splitlines()]
    steps = [e for e in told if "releases" in e]
    assert all(set(e) == {"t", "releases", "diagnostics", "~"} and set(e["diagnostics"]) == {"lr", "seconds"} for e in steps)
    assert [e["diagnostics"]["seconds"] > 0 for e in steps] == [False, True, False, True]        # not step by step: time tells the batch's size
    assert all(set(x) == {"sign", "kind", "scalar"} for e in steps for x in e["releases"])
    row = accounts(tmp_path).runs.iloc[0]
    assert row.counted == math.inf and "not nats" in row.note


def test_empty_batches(task, tmp_path, monkeypatch):
    "Noise alone is released, without a forward pass over the pool."
    from paczero.objectives import OptionCrossEntropy
    seen, real = [], OptionCrossEntropy.scores
    monkeypatch.setattr(OptionCrossEntropy, "scores", lambda self, rows=None: (seen.append(None if rows is None else len(rows)), real(self, rows))[1])
    for restore in ("copy", "inplace"):
        mech = DPZero(**PLAN); bits = mech._entropy.bits
        monkeypatch.setattr(mech._entropy, "bits", lambda k, where: (1 << k) - 1 if where.startswith("batch") else bits(k, where))   # nobody is drawn
        r = go(mech, task, tmp_path / restore, restore=restore)
        assert len(set(r.history.released)) == 4
        assert weights_digest(replay(load_model("tiny-opt")[0], r.transcript)) == r.metrics["weights_digest"]
    assert set(seen) <= {None, 0}


def test_resume_goes_on(task, tmp_path):
    from transformers import TrainerCallback
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        finetune(*load_model("tiny-opt"), task, DPZero(**PLAN), config := FineTuneConfig(steps=4, lr=1e-5, lr_schedule="constant", clip=20.0, m=4, eval_every=2, select="last"), folder=tmp_path / "run", callbacks=[Stop])
    before = (tmp_path / "run" / "transcript.jsonl").read_bytes()
    r = finetune(*load_model("tiny-opt"), task, DPZero(**PLAN), config, folder=tmp_path / "run")
    assert (tmp_path / "run" / "transcript.jsonl").read_bytes().startswith(before) and len(r.transcript) == 4
    assert weights_digest(replay(load_model("tiny-opt")[0], r.transcript)) == r.metrics["weights_digest"]


def test_audited_runs_are_stamped_and_reproducible(task, tmp_path):
    stamp = "secret fixed for audit: no guarantee"
    a, b = (go(DPZero(**PLAN, audit_seed=1), task, tmp_path / x) for x in "ab")
    assert a.transcript.releases == b.transcript.releases
    for name in ("config.json", "transcript.jsonl", "metrics.json", "guarantee.md"): assert stamp in (tmp_path / "a" / name).read_text(), name
    assert a.metrics["posterior_bound"] == 1.0 and a.metrics["epsilon_spent"] is None and not a.metrics["guarantee_covers"] and "**No guarantee.**" in a.guarantee.markdown()


def test_minibatch_mezo(task, tmp_path):
    a, b = (go(NonPrivate(batch=16), task, tmp_path / x) for x in "ab")
    assert a.transcript.releases == b.transcript.releases and a.metrics["examples_forwarded"] == 2 * 4 * 16 and not a.guarantee.covered
    full = go(NonPrivate(), task, tmp_path / "full")
    whole = go(NonPrivate(batch=60), task, tmp_path / "whole")
    assert np.allclose(full.history.released, whole.history.released, rtol=1e-4) and full.metrics["examples_forwarded"] == 2 * 4 * 60
    with pytest.raises(ValueError, match="batch = 61 is larger than the pool of 60"): go(NonPrivate(batch=61), task, tmp_path / "large")
    assert load_result(tmp_path / "a").transcript.releases == a.transcript.releases


def test_foreign_records_are_refused():
    good = Release(sign=1, kind="gaussian", scalar=0.5)
    assert Release.from_record(json.loads(json.dumps(good.to_record()))) == good
    for m in (ZPL(), MIBudget(budget=0.3, steps=3), NonPrivate()):
        with pytest.raises(ValueError, match="release record 0"): m.bind(DESIGN).restore([good])
    for bad in (dict(sign=-1), dict(mi=0.1), dict(kind="coin"), dict(scalar=math.inf)):
        with pytest.raises(ValueError): DPZero(**PLAN).bind(DESIGN).restore([{**good.to_record(), **bad}])
    with pytest.raises(ValueError, match="release record 4"): DPZero(**PLAN).bind(DESIGN).restore([good] * 5)


# ---------------------------------------------------------------- recipes

def test_every_cell_is_a_recipe():
    recipes = {i: paper.cell(i) for i in paper.cells().run_id}
    assert len(recipes) == 143
    dp = {i: r for i, r in recipes.items() if r.mechanism in paper.DP_NAMES}
    assert len(dp) == 12 and {(r.clip, r.sample_rate, r.dp_delta, r.m) for r in dp.values()} == {(25.0, 0.064, 1e-5, None)}
    m = recipes["dpaggzo_sst2_1p3b_ft_eps6p0_K64_T1000"].make_mechanism()
    assert (m.name, m.directions, m.steps) == ("dp-aggzo", 64, 1000) and 5.9 < m.booked <= 6
    tiny = [paper.recipe_for(mechanism=n) for n in paper.DP_NAMES]
    for r in tiny: assert abs(2 * r.k * r.steps * r.sample_rate * r.n_train / (2 * 150 * 1000) - 1) < 0.03       # as many examples as ZPL's default


@pytest.mark.parametrize("given, says", [(dict(dp_epsilon=1), "dp_epsilon"), (dict(sample_rate=0.1), "sample_rate"), (dict(mechanism="dpzero", m=8), "m=8"), (dict(mechanism="dpzero", budget=0.3), "budget"),
    (dict(mechanism="dpzero", k=2), "k=2"), (dict(mechanism="dpzero", dp_epsilon=-1), "dp_epsilon"), (dict(mechanism="dpzero", dp_delta=1.0), "dp_delta"), (dict(mechanism="dpzero", clip="none"), "clip"),
    (dict(mechanism="dp-aggzo", sample_rate=0.0), "sample_rate"), (dict(mechanism="nonprivate", batch_size=1001), "larger than the pool"), (dict(batch_size=10), "batch_size"), (dict(mechanism="nonprivate", batch_size=0), "batch_size")])
def test_recipes_refuse(given, says):
    with pytest.raises(ValueError, match=says): choose_recipe(**given)


def test_a_cell_with_another_mechanism():
    r, _ = choose_recipe("sst2_1p3b_ft_paczpl_s0", mechanism="dpzero", clip=25.0)
    assert (r.dp_epsilon, r.m, r.k) == (2.0, None, 1)
    r, _ = choose_recipe("dpzero_sst2_1p3b_ft_eps1p0_K1_T20k", mechanism="zpl")
    assert (r.dp_epsilon, r.m, r.mechanism) == (None, 126, "zpl")


def test_tables_and_figures_take_them(task, tmp_path):
    import matplotlib; matplotlib.use("Agg")
    from paczero import experiment, show, publish
    runs = [go(m, task, tmp_path / n) for n, m in (("dp", DPZero(**PLAN)), ("small", NonPrivate(batch=8)), ("zpl", ZPL()))]
    for r in runs: show.plot_run(r, runs[-1])
    show.plot_scores(runs)
    table, bad = show.collect(tmp_path)
    assert not bad and len(table) == 3 and set(show.summarise(table)["I(S*; Y), nats"]) == {"0", "not private", f"– (ε = {runs[0].metrics['epsilon_spent']:.3g})"}
    assert any("DPZero (ε = 2)" in x for x in show.readable_scores(runs).index) and "batches of 8" in show.method_label(runs[1].metrics["mechanism"])
    assert "ε = " in experiment.release_summary(runs[0]).loc["spent"].iloc[0] and "differentially private" in publish.model_card(runs[0])
    recipe = paper.recipe_for(mechanism="dp-aggzo", seed=3, n_train=500)
    beside = experiment.reference_recipe(recipe)
    assert (beside.mechanism, beside.steps, beside.seed, beside.n_train, beside.k) == ("nonprivate", 150, 3, 500, 1)
