"""An audit in little: the honest pass, the shameless are convicted, and the attack on the pool sees what is there.

The rooms' own notebooks do the same over hundreds of runs, with mechanisms that cheat by less.
"""
import numpy as np
import pytest

from paczero.audit.pool import pool_membership_attack
from paczero.audit.problem import LogisticPool
from paczero.audit.report import audit
from paczero.mechanisms import NonPrivate, ZPL


def test_zpl_stays_within_its_bound():
    report = audit(lambda s: ZPL(audit_seed=s), LogisticPool(), runs=12)
    assert report.ok and report.verdict == "within the certified bound" and "**within" in report.markdown()
    assert np.allclose(report.gain, 0) and (report.booked == 0).all()


def test_half_of_the_signs_held_to_zero_nats_is_caught():
    report = audit(lambda s: NonPrivate(signal="quant_half", audit_seed=s), LogisticPool(), runs=12, claim=0.0)
    assert not report.ok and report.verdict.startswith("exceeds it") and "**exceeds**" in report.markdown()
    assert report.gain.mean() > 1


def test_a_secret_that_is_no_audits_is_refused():
    with pytest.raises((RuntimeError, ValueError)):
        audit(lambda s: ZPL(), LogisticPool(), runs=2)


def test_the_pools_attack_sees_what_there_is_to_see():
    rng = np.random.default_rng(0)
    before = rng.normal(1, 0.3, 200), rng.normal(1, 0.3, 300)
    remembers = before[0] - 0.5 - rng.normal(0, 0.05, 200), before[1] - rng.normal(0, 0.05, 300)
    table = pool_membership_attack(before, remembers, resamples=100)
    assert table.loc["fall of the loss", "low"] > 0.95
    blind = table.loc["loss before (must be blind)"]
    assert blind.low < 0.5 < blind.high
