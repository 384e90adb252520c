"""A user's seeds change nothing: coins are fair and secrets fresh whatever they are, and no global generator moves."""
import random

import numpy as np
import torch
from scipy.stats import chi2

from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import MIBudget, ZPL
from paczero.models import load_model
from paczero.subsets import SubsetDesign
from paczero.tasks import load_task


def seed_all():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def states():
    "Where the global generators stand."
    numpy = [x.tolist() if hasattr(x, "tolist") else x for x in np.random.get_state()]
    return random.getstate(), numpy, torch.get_rng_state().tolist()


def test_a_users_seed_changes_nothing(tmp_path, monkeypatch):
    "Two runs after the same global seeds have other coins; and the global generators stand where they stood."
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path))
    task = load_task("reviews", seed=0, n_train=40, n_dev=10, n_eval=10)
    config, coins = FineTuneConfig(steps=20, lr=1e-3, m=16384, eval_every=2, seed=3, k=4), []
    for _ in range(2):
        seed_all()
        before = states()
        r = finetune(*load_model("tiny-opt"), task, ZPL(), config, runtime=Runtime(test=False))
        assert states() == before
        assert r.metrics["releases"].get("coin", 0) >= 20
        coins.append([y for k, y in zip(r.history.kind, r.history.released) if k == "coin"])
    assert coins[0] != coins[1]                            # equal by chance: once in a million or less


def chi(counts):
    "Chi-square of counts against equal ones."
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def pairs(a, b):
    "How often each of the four pairs occurs."
    return np.bincount((2 * a + b).ravel(), minlength=4)


def test_coins_are_fair_whatever_the_seed():
    "Chi-square of 20,000 coins, thrown after the same global seed again and again, alone and in neighbouring pairs."
    design, runs = SubsetDesign(50, 16, 0), []
    ghat = np.where(design.membership[:, 0], 1.0, -1.0)    # subset 0 says +, its opposites say -: never unanimous
    for _ in range(20):
        seed_all()
        mechanism = ZPL().bind(design)
        releases = [mechanism.step(ghat)[0] for _ in range(1000)]
        assert all(r.kind == "coin" for r in releases)
        runs.append([r.sign for r in releases])
    x = (np.array(runs) > 0).astype(int)
    assert chi2.sf(chi(np.bincount(x.ravel(), minlength=2)), 1) > 1e-6
    assert chi2.sf(chi(pairs(x[:, 0::2], x[:, 1::2])), 3) > 1e-6         # pairs in time
    assert chi2.sf(chi(pairs(x[0::2], x[1::2])), 3) > 1e-6               # pairs of runs under the same seed
    no_coin = np.ones(20_000, int)
    assert chi(np.bincount(no_coin, minlength=2)) > 1000                 # the control: a coin that is none is seen


def test_secrets_are_fresh_whatever_the_seed():
    design, drawn = SubsetDesign(200, 4096, 0), set()
    for _ in range(8):
        seed_all()
        drawn.add(MIBudget(budget=0.1, steps=1).bind(design)._secret.pick(range(4096)))
    assert len(drawn) >= 6
