"""DP cells of the paper spend ε as DP-AggZO's release does; a run, its page, its accounts and its attacker agree."""
import json
import math

import pytest
from opacus.accountants.utils import get_noise_multiplier

from paczero.accounts import accounts
from paczero.audit import LeaveOneOut
from paczero.finetune import FineTuneConfig, finetune
from paczero.mechanisms import DPZero
from paczero.models import load_model
from paczero.paper import cell, cells, recipe_for
from paczero.publish import load_release, save_release
from paczero.tasks import load_task
from paczero.transcript import Transcript

PLAN = dict(epsilon=2.0, sample_rate=0.25, steps=4, clip=20.0)
CONFIG = FineTuneConfig(steps=4, lr=1e-5, lr_schedule="constant", clip=20.0, m=2, eval_every=2, seed=1)


def run(folder, mechanism, **more):
    task = load_task("reviews", n_train=40, n_dev=12, n_eval=12)
    return finetune(*load_model("tiny-opt"), task, mechanism, CONFIG, folder=folder, **more)


def test_a_cells_noise_is_what_the_release_would_have_found():
    names = [i for i in cells().run_id if cell(i).method.mechanism.dp]
    assert len(names) == 12
    for i in (n for n in names if "eps2p0" in n or "eps0p2_K64_T1000" in n):
        r = cell(i)
        theirs = get_noise_multiplier(target_epsilon=0.95 * r.dp_epsilon, target_delta=r.dp_delta, steps=r.steps,
                                      sample_rate=r.sample_rate)
        made = r.make_mechanism()
        assert (made.noisy_n, made.noise_multiplier) == (True, theirs)
        assert made.booked <= r.dp_epsilon
    assert not recipe_for("tiny-opt", mechanism="dpzero").make_mechanism().noisy_n


def test_one_size_a_run_and_it_is_counted(tmp_path):
    result = run(tmp_path / "run", DPZero(**PLAN, noisy_n=True), watch=LeaveOneOut())
    lines = [json.loads(x) for x in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    sizes = {r["pool_size"] for e in lines for r in e.get("releases", ())}
    assert len(sizes) == 1 and sizes != {None}
    header = Transcript.load(tmp_path / "run/transcript.jsonl").header
    assert header["mechanism"]["noisy_n"] is True and "pool_size" not in str(header)
    g = result.guarantee
    assert g.pool_epsilon == 0.1 and g.epsilon <= 2
    one = accounts(tmp_path).dp
    assert (one.runs, one.epsilon) == (1, g.epsilon)
    run(tmp_path / "again", DPZero(**PLAN, noisy_n=True))
    two = accounts(tmp_path).dp
    assert two.runs == 2 and 0.2 + g.epsilon - 0.1 < two.epsilon <= 2 * g.epsilon
    assert result.transcript.verify(ledger=tmp_path / "run/ledger.jsonl")["ledger"] is True
    save_release(result, None, tmp_path / "release")
    load_release(tmp_path / "release")
    assert "for a noisy pool size" in (tmp_path / "release/README.md").read_text()


def test_a_run_that_goes_on_keeps_its_size(tmp_path, monkeypatch):
    from transformers import TrainerCallback

    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", DPZero(**PLAN, noisy_n=True), callbacks=[Stop()])
    run(tmp_path / "run", DPZero(**PLAN, noisy_n=True))
    lines = [json.loads(x) for x in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert len({r["pool_size"] for e in lines for r in e.get("releases", ())}) == 1


def test_a_public_size_says_nothing_new(tmp_path):
    result = run(tmp_path / "run", DPZero(**PLAN))
    assert "pool_size" not in (tmp_path / "run/ledger.jsonl").read_text()
    assert "noisy" not in (tmp_path / "run/transcript.jsonl").read_text()
    assert "pool_epsilon" not in result.guarantee.to_dict()
    assert math.isclose(accounts(tmp_path).dp.epsilon, result.guarantee.epsilon)
