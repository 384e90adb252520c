"""Nothing moves the weights before it is on the disk: mark, ledger, transcript, and only then θ."""
import pytest

from paczero.directions import Theta
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import MIBudget, ZPL
from paczero.models import load_model
from paczero.tasks import load_task
from paczero.transcript import ChainedLog, Transcript, replay, weights_digest

STEPS = 3
MECHANISMS = [lambda: ZPL(), lambda: MIBudget(budget=0.3, steps=STEPS)]


@pytest.fixture
def go(tmp_path, monkeypatch):
    "Runs three steps on the embedded model; the model, afterwards."
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    task = load_task("reviews", seed=0, n_train=24, n_dev=8, n_eval=8)

    def run(mechanism, model, name="run", **more):
        config = FineTuneConfig(**{**dict(steps=STEPS, lr=1e-3, m=8, eval_every=STEPS), **more})
        return finetune(*model, task, mechanism, config, folder=tmp_path / name, runtime=Runtime(test=False))
    return run


@pytest.mark.parametrize("make", MECHANISMS, ids=["zpl", "mi"])
def test_a_step_is_on_the_disk_before_it_moves_the_weights(go, monkeypatch, make):
    "In this order, for every step; what is kept of a budget's run outside its folder comes first."
    events, append, update = [], ChainedLog.append, Theta.update

    def write(log, entry):
        append(log, entry)
        assert log.path.read_bytes().endswith(b"}\n")
        t = entry.get("next", entry).get("t")
        if t is not None:
            events.append((t, log.path.suffix if log.path.suffix == ".mark" else log.path.stem))

    def move(theta, t, coefficients):
        events.append((t, "update"))
        return update(theta, t, coefficients)

    monkeypatch.setattr(ChainedLog, "append", write)
    monkeypatch.setattr(Theta, "update", move)
    mechanism = make()
    go(mechanism, load_model("tiny-opt"))
    order = [".mark"] * mechanism.needs_secret + ["ledger", "transcript", "update"]
    assert events == [(t, what) for t in range(STEPS) for what in order]


def test_the_best_step_is_known_after_a_restart(go, monkeypatch):
    "Killed behind its best step, the run that goes on ends with the weights of the run that was never killed."
    plan, append = dict(steps=5, lr=2e-2, eval_every=1, seed=5), ChainedLog.append
    whole = go(ZPL(audit_seed=5), load_model("tiny-opt"), "whole", **plan)
    assert whole.metrics["best_step"] == 2

    def full(log, entry):
        if entry.get("t") == 3:
            raise OSError(28, "No space left on device")
        append(log, entry)

    with monkeypatch.context() as m:
        m.setattr(ChainedLog, "append", full)
        with pytest.raises(OSError, match="No space left"):
            go(ZPL(audit_seed=5), load_model("tiny-opt"), **plan)
    again = go(ZPL(audit_seed=5), load_model("tiny-opt"), **plan)
    assert (again.metrics["best_step"], weights_digest(again.model)) == (2, weights_digest(whole.model))
    assert again.transcript.releases == whole.transcript.releases


@pytest.mark.parametrize("torn", ["ledger.jsonl", "transcript.jsonl"])
def test_what_the_disk_does_not_take_does_not_move_the_weights(go, tmp_path, monkeypatch, torn):
    "A disk that is full at step 1: the model stands where step 0 left it."
    append = ChainedLog.append

    def full(log, entry):
        if log.path.name == torn and entry.get("t") == 1:
            raise OSError(28, "No space left on device")
        append(log, entry)

    monkeypatch.setattr(ChainedLog, "append", full)
    model, tokenizer = load_model("tiny-opt")
    with pytest.raises(OSError, match="No space left"):
        go(ZPL(), (model, tokenizer))
    done = Transcript.load(tmp_path / "run" / "transcript.jsonl")
    assert len(done) == 1
    assert weights_digest(model) == weights_digest(replay(load_model("tiny-opt")[0], done))
