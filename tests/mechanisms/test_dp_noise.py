"""DPZero and DP-AggZO: the noise is right and wrong ones are told apart; so are batches, clipping and the update."""
import math
import random

import numpy as np
import pytest
from scipy import stats

from paczero.subsets import SubsetDesign
from paczero.transcript import coefficients

pytest.importorskip("opacus")
from paczero.mechanisms.gaussian import DPAggZO, DPZero, clipped_sum

PLAN = dict(epsilon=2.0, sample_rate=0.1, steps=4, clip=20.0)
DESIGN = SubsetDesign(500, 4, 0)


def clippings(k):
    "Ways to sum what K directions say of each example: the right one, and wrong ones."
    return dict(
        right=lambda g: clipped_sum(g, 1.0),
        each=lambda g: np.clip(g / k, -1, 1).sum(1),
        mean=lambda g: np.clip(g.mean(1), -1, 1) * g.shape[1],
        undivided=lambda g: clipped_sum(g, 1.0) * k,
        none=lambda g: g.sum(1) / k,
    )


@pytest.mark.parametrize("k", [1, 4, 64])
def test_sensitivity(k):
    "One example more moves the right sum by its clip at most, and comes near it; the wrong sums by more."
    rng, worst = np.random.default_rng(k), {}
    for _ in range(40):
        g, new = rng.normal(size=(k, 30)), rng.normal(size=(k, 1)) * 10.0 ** rng.integers(-3, 12)
        for name, f in clippings(k).items():
            worst[name] = max(worst.get(name, 0), np.linalg.norm(f(np.hstack([g, new])) - f(g)))
    assert 0.999 < worst["right"] <= 1 + 1e-12
    for name in ("mean", "none") + (("each", "undivided") if k > 1 else ()):
        assert worst[name] > 1.4, name


@pytest.fixture(scope="module")
def drawn():
    "1600 steps without data: the noise in units of a clipped example (1600, 8), its promised σ, batch sizes (1600,)."
    m = DPAggZO(epsilon=2.0, sample_rate=0.1, steps=1600, clip=3.0, directions=8).bind(DESIGN)
    sizes, y = [], []
    for _ in range(1600):       # 12,800 numbers tell 10 % with certainty
        rows = m.batch(500)
        sizes.append(len(rows))
        y.append([r.scalar * 50 / 8 for r in m.step(np.zeros((8, len(rows))), clip=3.0)])
    return np.array(y), 3.0 * m.noise_multiplier, np.array(sizes)


def looks_normal(y, std):
    "Whether numbers pass for draws of N(0, std²): their sum of squares and their distribution."
    in_range = 1e-6 < stats.chi2.cdf((y**2).sum() / std**2, y.size) < 1 - 1e-6
    return in_range and stats.kstest(y.ravel() / std, "norm").pvalue > 1e-6


def test_noise_has_the_distribution_that_was_accounted_for(drawn):
    y, std, _ = drawn
    assert looks_normal(y, std)
    assert not any(looks_normal(y, wrong) for wrong in (1.1 * std, 0.9 * std, std / math.sqrt(8)))
    assert np.abs(np.corrcoef(y.T) - np.eye(8)).max() < 0.3                       # a fresh draw for each coordinate


def test_batches_have_the_distribution_that_was_accounted_for(drawn):
    sizes = drawn[2]
    p = lambda q: stats.binomtest(int(sizes.sum()), 800_000, q).pvalue
    assert p(0.1) > 1e-6 > p(0.11)
    assert 1e-6 < stats.chi2.cdf(((sizes - 50) ** 2).sum() / 45, 1600) < 1 - 1e-6
    a, b = (DPZero(**PLAN).bind(DESIGN).batch(500) for _ in range(2))
    assert a.tolist() != b.tolist()                                              # from the operating system, not a seed


def test_users_seed_changes_nothing():
    import torch

    got = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        m = DPZero(**PLAN).bind(DESIGN)
        rows = m.batch(500)
        got.append((rows.tolist(), m.step(np.zeros((1, len(rows))), clip=20.0)[0].scalar))
    assert got[0][0] != got[1][0] and got[0][1] != got[1][1]


def test_update_is_the_published_one(monkeypatch):
    "θ − lr Σ g_k z_k: what `coefficients` makes of the releases, without noise."
    m = DPAggZO(epsilon=2.0, sample_rate=1.0, steps=1, clip=2.0, directions=4).bind(DESIGN)
    monkeypatch.setattr(m._entropy, "gauss", lambda where: 0.0)
    g = np.random.default_rng(0).normal(size=(4, 500)) * 9
    assert m.batch(500).tolist() == list(range(500))
    y = [r.scalar for r in m.step(g, clip=2.0)]
    v = g / 4
    v = v * np.minimum(1, 2.0 / np.linalg.norm(v, axis=0))
    got = coefficients(0, y, dict(steps=1, lr=0.3, lr_schedule="constant"))
    grid = 0.3 * 2.0 * m.noise_multiplier * 2**-20 / 500
    assert np.allclose(got, 0.3 * v.sum(1) / 500, rtol=0, atol=grid)
