"""What a forecast says where the directions are strong, faint, or nothing at all."""
import numpy as np
import pytest

from paczero.forecast.measure import Probe
from paczero.forecast.verdict import Forecast


def probe(tau, directions=200, n=500):
    "A probe of examples whose differences share a mean of τ standard deviations, up to its sign."
    rng = np.random.default_rng(0)
    g = tau * rng.normal(size=(directions, 1)) + rng.normal(size=(directions, n))
    return Probe(mean=g.mean(1), std=g.std(1), n=n, source="public examples")


def test_strong_directions_are_unanimous():
    strong = Forecast(probe=probe(1.0), n=1000, m=126)
    assert strong.unanimous > 0.7 and "ZPL should learn" in strong.verdict
    low, high = strong.interval(resamples=40)
    assert low <= strong.unanimous <= high


def test_faint_directions_ask_for_more_examples():
    faint = Forecast(probe=probe(0.02), n=1000, m=126)
    need = faint.n_for(0.5)
    assert faint.unanimous < 0.5 and need > 1000 and f"n ≈ {need}" in faint.verdict
    table = faint.table(ns=(250, 1000, 4000), ms=(8, 126))
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) <= 0).all()      # n helps, M hurts


def test_nothing_beyond_chance_is_said():
    flat = Probe(mean=np.full(4, 1e-3), std=np.ones(4), n=500, source="pool")
    nothing = Forecast(probe=flat, n=1000, m=126)
    assert nothing.n_for(0.5) is None and "nothing beyond chance" in nothing.verdict
    with pytest.raises(ValueError, match="share = 1.5"):
        nothing.n_for(1.5)
