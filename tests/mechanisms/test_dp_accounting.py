"""What the noise of a differentially private run costs: on the private side, and no more than needed."""
import json
import math

import numpy as np
import pytest
from scipy import stats

from paczero.information import posterior_bound
from paczero.mechanisms import MIBudget, NonPrivate, Release, ZPL, make_mechanism
from paczero.subsets import SubsetDesign

pytest.importorskip("opacus")
from paczero.mechanisms.accountant import dp_posterior_bound, epsilon_spent, matched_budget, noise_multiplier
from paczero.mechanisms.gaussian import DPAggZO, DPZero

PLAN = dict(epsilon=2.0, sample_rate=0.1, steps=4, clip=20.0)
DESIGN = SubsetDesign(500, 4, 0)


def gaussian_delta(mu, epsilon):
    "δ of one Gaussian release whose mean moves by μ standard deviations, in closed form."
    return stats.norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * stats.norm.cdf(-epsilon / mu - mu / 2)


def test_multiplier_is_on_the_private_side_and_no_larger_than_needed():
    for eps, q, T in ((2.0, 0.064, 300), (0.5, 0.1, 50), (6.0, 1.0, 20)):
        s = noise_multiplier(eps, 1e-5, q, T)
        assert 0.99 * eps < epsilon_spent(s, 1e-5, q, T) <= eps < epsilon_spent(s / 1.01, 1e-5, q, T)
    mu = math.sqrt(20) / s                                     # q = 1: the plain Gaussian mechanism
    assert 0.8e-5 < gaussian_delta(mu, 6) <= 1e-5 < 2e-5 < gaussian_delta(mu / 0.9, 6)


def test_rdp_never_says_less_than_prv():
    for s, q, T in ((1.0, 0.064, 37), (6.0, 0.064, 2000), (2.0, 1.0, 10)):
        assert epsilon_spent(s, 1e-5, q, T, accountant="rdp") > 0.98 * epsilon_spent(s, 1e-5, q, T)


NO_PLAN = [
    (dict(epsilon=0), "epsilon = 0"), (dict(epsilon=-2.0), "epsilon"), (dict(epsilon="2"), "epsilon"),
    (dict(delta=0.0), "delta"), (dict(delta=1.0), "delta"), (dict(delta=math.nan), "delta"),
    (dict(sample_rate=0), "sample_rate"), (dict(sample_rate=1.01), "sample_rate"),
    (dict(steps=0), "steps"), (dict(steps=2.5), "steps"), (dict(sampling="shuffle"), "Poisson"),
    (dict(accountant="gdp"), "accountant"),
]


@pytest.mark.parametrize("bad, says", NO_PLAN)
def test_accountant_refuses(bad, says):
    with pytest.raises(ValueError, match=says):
        noise_multiplier(**{**dict(epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=10), **bad})


NO_MECHANISM = [
    (dict(clip=None), "clip = None"), (dict(clip=0.0), "clip"), (dict(clip=math.inf), "clip"),
    (dict(epsilon=0), "epsilon"), (dict(delta=2), "delta"), (dict(sampling="fixed"), "Poisson"),
    (dict(noise_multiplier=0.3), "too little"), (dict(directions=3), "DPZero"), (dict(colour=1), "colour"),
]


@pytest.mark.parametrize("bad, says", NO_MECHANISM)
def test_mechanism_refuses(bad, says):
    with pytest.raises((ValueError, TypeError), match=says):
        DPZero(**{**PLAN, **bad})
    with pytest.raises(ValueError, match=says):
        make_mechanism(dict(name="dpzero", **{**PLAN, **bad}))


def test_sampling_that_the_accountant_does_not_know_is_refused():
    m = DPZero(**PLAN).bind(DESIGN)
    with pytest.raises(RuntimeError, match="no batch was drawn"):
        m.step(np.zeros((1, 500)), clip=20.0)
    rows = m.batch(500)
    for g in (np.zeros((1, len(rows) + 1)), np.zeros((2, len(rows)))):
        with pytest.raises(ValueError, match="ghat has shape"):
            m.step(g, clip=20.0)
    for clip in (None, 19.0):
        with pytest.raises(ValueError, match="clip"):
            m.step(np.zeros((1, len(rows))), clip=clip)
    for _ in range(4):
        m.step(np.zeros((1, len(m.batch(500)))), clip=20.0)
    with pytest.raises(RuntimeError, match="4 of 4"):
        m.batch(500)


def test_k_directions_cost_what_one_vector_costs():
    one, many = DPZero(**PLAN), DPAggZO(**PLAN, directions=64)
    assert one.noise_multiplier == many.noise_multiplier and one.booked == many.booked <= 2
    by_direction = many.noise_multiplier / 8            # clipped direction by direction: norm c√64
    assert epsilon_spent(by_direction, 1e-5, 0.1, 4) > 5 * many.booked


def test_matching_at_equal_posterior():
    for e in (0.2, 0.3, 0.5, 1.0, 2.0, 6.0):
        assert abs(dp_posterior_bound(e) - math.exp(e) / (1 + math.exp(e))) < 1e-12
        assert abs(posterior_bound(matched_budget(e)) - dp_posterior_bound(e)) < 1e-9
        assert dp_posterior_bound(e) < dp_posterior_bound(e, 1e-5) < dp_posterior_bound(e) + 1e-5
    assert dp_posterior_bound(0) == 0.5 and dp_posterior_bound(0, 0.2) == pytest.approx(0.6)
    for bad in (dict(epsilon=-1), dict(epsilon=1, delta=1.5), dict(epsilon=math.nan)):
        with pytest.raises(ValueError):
            dp_posterior_bound(**bad)


def test_foreign_records_are_refused():
    good = Release(sign=1, kind="gaussian", scalar=0.5)
    assert Release.from_record(json.loads(json.dumps(good.to_record()))) == good
    for m in (ZPL(), MIBudget(budget=0.3, steps=3), NonPrivate()):
        with pytest.raises(ValueError, match="release record 0"):
            m.bind(DESIGN).restore([good])
    for bad in (dict(sign=-1), dict(mi=0.1), dict(kind="coin"), dict(scalar=math.inf)):
        with pytest.raises(ValueError):
            DPZero(**PLAN).bind(DESIGN).restore([{**good.to_record(), **bad}])
    with pytest.raises(ValueError, match="release record 4"):
        DPZero(**PLAN).bind(DESIGN).restore([good] * 5)
