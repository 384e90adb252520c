"""`kept` leaves out runs without privacy, on their owner's word; a run that has a budget counts whatever is said."""
from paczero.accounts import accounts
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import MIBudget, NonPrivate
from paczero.models import load_model
from paczero.tasks import load_task


def test_kept_is_no_discount(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    task = load_task("reviews", seed=0, n_train=24, n_dev=8, n_eval=8)
    for name, mechanism in dict(budget=MIBudget(budget=0.3, steps=2), reference=NonPrivate()).items():
        config = FineTuneConfig(steps=2, lr=1e-3, m=8, eval_every=2)
        finetune(*load_model("tiny-opt"), task, mechanism, config, folder=tmp_path / "runs" / name,
                 runtime=Runtime(test=False))
    assert accounts(tmp_path / "runs").total == float("inf")
    for kept in ("reference", "*", ("reference", "budget")):
        assert accounts(tmp_path / "runs", kept=kept).total == 0.3
