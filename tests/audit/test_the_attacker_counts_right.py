"""What an audit counts, by hand: guesses without knowledge, agreement, intervals, and who is acquitted."""
import numpy as np
import pytest

from paczero.audit import report
from paczero.audit.intervals import clopper_pearson
from paczero.audit.problem import LogisticPool
from paczero.audit.success import agreement, leaked_information, membership_success
from paczero.mechanisms import MIBudget, Release, ZPL
from paczero.mechanisms.release import pack_signs
from paczero.subsets import SubsetDesign

DESIGN = SubsetDesign(24, 8, 0)


def released(sign, signs, kind="coin"):
    return Release(sign=sign, kind=kind, mi=0.0, q_plus=0.5, scalar=float(sign), signs=pack_signs(signs))


def test_who_knows_nothing_guesses_that_nobody_was_in():
    "At prior 1/2 a tie is no reason to say 'member'."
    secrets = np.arange(8)
    right = membership_success(np.full((8, 8), 1 / 8), secrets, DESIGN)
    assert (right == ~DESIGN.membership[:, secrets].T).all()


def test_steps_that_all_subsets_agree_on_tell_nothing():
    split = released(-1, [1, 1, -1, -1])
    for sign in (1, -1):
        agreed = released(sign, [sign] * 4, "unanimous")
        assert agreement([agreed, split, agreed], 4).tolist() == [-1, -1, 1, 1]


@pytest.mark.parametrize("m", [2, 8, 126])
def test_nats_are_counted_from_one_of_m(m):
    named, nothing = np.eye(m), np.full((m, m), 1 / m)
    assert np.allclose(leaked_information(named, np.arange(m))[1], np.log(m))
    assert np.allclose(leaked_information(nothing, np.arange(m))[1], 0)


def test_the_most_exposed_of_many_has_a_wider_interval():
    "Bonferroni: the largest of 24 counts is one of 24 chances to be unlucky."
    line = report._rate("most exposed", [3, 9, 4], 20, 0.5, 0.95, among=24)
    assert (line["low"], line["high"]) == clopper_pearson(9, 20, 1 - 0.05 / 24)


def test_a_lean_either_way_is_seen():
    "Coins that avoid the secret's sign, and noise that is too small, are as guilty as their contraries."
    for leans, exceeds in ((0.5, False), (0.2, True), (0.8, True)):
        k = int(400 * leans)
        assert report._coins([1] * k + [-1] * (400 - k), 0.95)["exceeds"] == exceeds
    z = np.sqrt(3) * np.linspace(-1, 1, 2001)           # variance 1
    for std, exceeds in ((1.0, False), (0.9, True), (1.1, True)):
        assert report._noise(std * z, 0.95)["exceeds"] == exceeds


def test_the_claim_is_the_budget_not_what_was_spent():
    make = lambda s: MIBudget(budget=0.7, steps=30, schedule="uniform", audit_seed=s)
    seen = report.audit(make, LogisticPool(), runs=3)
    assert seen.claim == 0.7 and (seen.booked < 0.7).all()


def test_coins_are_compared_with_the_secrets_sign():
    "A mechanism whose coins are the secret's sign is found by that line, whatever the others say."
    class Tells(ZPL):
        needs_secret = True

        def release(self, means, *, pool_mean=None):
            rel = super().release(means)
            told = int(self._secret.pick(rel.sign_vector))
            return Release(**{**vars(rel), "sign": told, "scalar": float(told)})

    seen = report.audit(lambda s: Tells(audit_seed=s), LogisticPool(), runs=6)
    line = next(x for x in seen.lines if x["quantity"].startswith("coin"))
    assert line["exceeds"] and line["estimate"] == 1
