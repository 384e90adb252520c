"""Release records, ledgers, signs, designs and mechanisms from strangers: a readable ValueError, or what they say."""
import json
import time

import pytest
from hypothesis import given, strategies as st

from paczero.finetune import FineTuneConfig
from paczero.mechanisms import Ledger, MIBudget, Release, ZPL, make_mechanism, pack_signs, unpack_signs
from paczero.subsets import SubsetDesign
from strangers import HUGE, anything, fields, fuzz, only_value_error


@fuzz
@given(anything | fields("sign", "kind", "mi", "q_plus", "scalar", "signs", "r", "sigma", "x"))
def test_fuzz_releases(record):
    r = only_value_error(Release.from_record, record)
    if r is not None:
        assert Release.from_record(json.loads(json.dumps(r.to_record()))) == r


@fuzz
@given(anything | fields("budget", "count", "entries"))
def test_fuzz_ledgers(d):
    only_value_error(Ledger.from_dict, d)


TAKE_NUMBERS = dict(
    ledger=Ledger,
    book=lambda v: Ledger().book(v),
    budget=lambda v: MIBudget(budget=v, steps=3),
    steps=lambda v: MIBudget(budget=0.1, steps=v),
    count=lambda v: Ledger.from_dict(dict(budget=None, count=v, entries=[])),
    release=lambda v: Release(sign=1, kind="unanimous", mi=v, q_plus=0.5, scalar=v),
    lr=lambda v: FineTuneConfig(steps=3, lr=v),
    clip=lambda v: FineTuneConfig(steps=3, lr=0.1, clip=v),
    audit_seed=lambda v: ZPL(audit_seed=v),
)


@pytest.mark.parametrize("what", TAKE_NUMBERS)
@pytest.mark.parametrize("v", HUGE)
def test_huge_numbers(what, v):
    only_value_error(TAKE_NUMBERS[what], v)


def test_a_long_ledger_is_quick():
    start = time.monotonic()
    led = Ledger.from_dict(dict(budget=None, count=10**7, entries=[[5, 0.25]]))
    assert led.spent == 0.25 and led.count == 10**7 and time.monotonic() - start < 5


ENDS = ["+", "-", "", "ff", "zz", "FF", " ff", "+-"]
packed = st.builds(lambda m, b: f"{m}:{b}", st.integers(-2, 10**8), st.sampled_from(ENDS))


@fuzz
@given(anything | st.text(max_size=20) | st.binary(max_size=5) | packed)
def test_fuzz_signs(text):
    s = only_value_error(unpack_signs, text)
    if s is not None:
        assert pack_signs(s) == text


@fuzz
@given(anything | fields("n", "m", "seed", "kind", "r", "fingerprint", "stream"))
def test_fuzz_designs(d):
    if isinstance(d, dict) and all(isinstance(d.get(k), int) for k in "nm") and 10**6 < abs(d["n"] * d["m"]) < 10**10:
        return      # allowed, and as large as it says
    only_value_error(SubsetDesign.from_dict, d)


@fuzz
@given(anything | fields("name", "budget", "steps", "schedule", "directions", "signal", "audit_seed", "audit"))
def test_fuzz_mechanisms(spec):
    only_value_error(make_mechanism, spec)
