"""What two processes of one run do, one scene after the other: `scenes.py RANK FOLDER`, in torchrun's environment.

A scene that left a rank hanging would fail the next. Each rank writes down what it saw, in FOLDER/RANK.json.
"""
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from paczero.directions import Theta
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import MIBudget, ZPL
from paczero.mechanisms.secret import OSEntropy
from paczero.models import load_model
from paczero.run.shares import Share
from paczero.run.talk import Team
from paczero.tasks import load_task
from paczero.transcript import weights_digest
from stops import Stop
from twins import bits, twin_of

REAL = {(cls, name): getattr(cls, name) for cls, name in (
    (Theta, "update"), (Share, "losses"), (OSEntropy, "bits"), (OSEntropy, "below"))}
CONFIG = FineTuneConfig(steps=6, lr=1e-3, m=8, eval_every=2, seed=3)


class SecretBatches(ZPL):
    secret_batches = True


# ---------------------------------------------------------------- what goes wrong


def drifting(self, step, coefficients):
    "An update that is off in one number, in the third step."
    REAL[Theta, "update"](self, step, coefficients)
    with torch.no_grad():
        self.home[0].view(-1)[5] += 1e-3 if step == 2 else 0


def failing(f):
    "Losses that fail in the fifth call: the first look of the third step."
    calls = [0]

    def losses(self, rows=None):
        calls[0] += 1
        return f(self, rows) if calls[0] == 5 else REAL[Share, "losses"](self, rows)

    return losses


def out_of_memory(self, rows):
    raise MemoryError("a card that was too small")


def nan(self, rows):
    return REAL[Share, "losses"](self, rows) * np.nan


def die(self, rows):
    os.kill(os.getpid(), signal.SIGKILL)


def fixed(index):
    "Coins and noise as told, the secret as told."
    return {(OSEntropy, "bits"): bits, (OSEntropy, "below"): lambda self, m, where: index}


# ---------------------------------------------------------------- the scenes


class Player:
    "One rank, and what it saw."

    def __init__(self, rank, root):
        self.rank, self.root, self.out, self.said = rank, root, {}, []
        self.task = load_task("reviews", seed=0, n_train=40, n_dev=10, n_eval=10)
        real_tell, real_answer = Team.tell, Team.answer

        def tell(team, what, *args):
            self.said.append(json.dumps([what, *args]))
            return real_tell(team, what, *args)

        def answer(team, data):
            self.said.append(data if isinstance(data, str) else data.hex())
            return real_answer(team, data)

        Team.tell, Team.answer = tell, answer

    def scene(self, name, mechanism=None, folder=None, change=(), on=(0, 1), alter=None, **runtime):
        "One run; what came of it on this rank, an error included."
        mechanism, (model, tokenizer) = mechanism or ZPL(), load_model("tiny-opt")
        folder = self.root / (folder or name.split(",")[0]) / str(self.rank)
        callbacks = [Stop(3)] if name == "interrupt" and self.rank == 0 else ()
        self.said.clear()
        for (cls, method), f in dict(change if self.rank in on else ()).items():
            setattr(cls, method, f)
        if alter and self.rank in on:
            alter(model)
        try:
            r = finetune(model, tokenizer, self.task, mechanism, CONFIG, folder=folder, callbacks=callbacks,
                         runtime=Runtime(**{"patience": 60.0, **runtime}))
            seen = dict(weights=weights_digest(r.model), metrics=r.metrics)
        except BaseException as e:
            seen = dict(error=f"{type(e).__name__}: {e}")
        held = dict(bound=mechanism.design is not None, secret=mechanism._secret is not None)
        self.out[name] = dict(seen, said=list(self.said), **held)
        for (cls, method), f in REAL.items():
            setattr(cls, method, f)
        (self.root / f"{self.rank}.json").write_text(json.dumps(self.out))

    def play_those_that_go_well(self):
        self.scene("zpl", ZPL(audit_seed=1))
        self.scene("mi", MIBudget(budget=0.8, steps=6), change=fixed(2))
        twin = twin_of(self.root / "mi" / "0" / "ledger.jsonl", 2) if self.rank == 0 else None
        self.scene("twin", MIBudget(budget=0.8, steps=6), change=fixed(twin))
        if self.rank == 0:
            self.scene("one process", ZPL(audit_seed=1), parallel=False)
            self.out["twins"] = [2, twin]

    def play_those_that_do_not(self):
        fails, update = (Share, "losses"), (Theta, "update")
        self.scene("drift", change={update: drifting}, on=(1,))
        self.scene("other weights", on=(1,), alter=lambda m: next(m.parameters()).data.view(-1)[:1].add_(1))
        self.scene("fails", change={fails: failing(out_of_memory)}, on=(1,))
        self.scene("fails, resumed", folder="fails")
        self.scene("nan", change={fails: failing(nan)}, on=(1,))
        self.scene("interrupt", MIBudget(budget=0.8, steps=6))
        self.scene("interrupt, resumed", MIBudget(budget=0.8, steps=6), folder="interrupt")
        self.scene("taken folder", folder="zpl")
        self.scene("secret batches", SecretBatches())
        self.scene("killed", change={fails: failing(die)}, on=(1,), patience=3.0)
        self.scene("killed, alone", folder="killed", parallel=False)


if __name__ == "__main__":
    player = Player(int(sys.argv[1]), Path(sys.argv[2]))
    player.play_those_that_go_well()
    player.play_those_that_do_not()
