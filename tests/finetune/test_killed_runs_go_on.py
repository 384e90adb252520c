"""kill -9 at any moment; the run goes on, and base weights + transcript are the model that it ends with.

tools/kill100.py does the same a hundred times, and before and after every durable write.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from common import environment
from paczero.models import load_model
from paczero.transcript import Transcript, replay, weights_digest

STEPS = 40
# One process imports what is heavy and forks a worker for each attempt: it says the worker's id, then how it ended.
JOBS = f"""
import os, sys, traceback
from paczero.finetune import FineTuneConfig, finetune
from paczero.mechanisms import MIBudget, ZPL
from paczero.models import load_model
from paczero.tasks import load_task
folder, name = sys.argv[1:3]
task = load_task("reviews", seed=0, n_train=150, n_dev=40, n_eval=40)
config = FineTuneConfig(steps={STEPS}, lr=1e-3, m=16, eval_every=10, seed=1)

def work():
    mechanism = ZPL() if name == "zpl" else MIBudget(budget=0.3, steps={STEPS})
    finetune(*load_model("tiny-opt"), task, mechanism, config, folder=folder)

for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print("pid", pid, flush=True)
    print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def parent(name, tmp_path):
    "The process that forks workers; it ends with the test."
    env = environment(PACZERO_STATE_DIR=str(tmp_path / "state"))
    args = [sys.executable, "-c", JOBS, str(tmp_path / "run"), name]
    with (tmp_path / "errors").open("w") as errors:
        p = subprocess.Popen(args, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        yield p
        p.stdin.close()
        p.wait(60)


def hear(parent, word):
    "The number that follows a word on the parent's output."
    for line in parent.stdout:
        if line.startswith(word + " "):
            return int(line.split()[1])


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def attempt(parent, folder, kill):
    "Start or resume the run; kill it some way on, without a warning. Whether it was, and what is on the disk then."
    ledger = folder / "ledger.jsonl"
    target, start = lines(ledger) + random.randint(1, 12), time.monotonic()
    parent.stdin.write("go\n")
    parent.stdin.flush()
    pid = hear(parent, "pid")
    if kill:
        while lines(ledger) < target and time.monotonic() - start < 120 and not (folder / "metrics.json").exists():
            time.sleep(0.002)
        with suppress(ProcessLookupError):          # it may have ended by itself
            os.kill(pid, signal.SIGKILL)
    status = hear(parent, "status")
    assert status in (0, -signal.SIGKILL), (folder.parent / "errors").read_text()[-3000:]
    public = folder / "transcript.jsonl"
    raw = public.read_bytes() if public.exists() else b""
    return status != 0, raw[: raw.rfind(b"\n") + 1]          # a torn last line was never a release


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("name", ["zpl", "mi"])
def test_killed_again_and_again(name, parent, tmp_path):
    folder, kills, released = tmp_path / "run", 0, []
    while not (folder / "metrics.json").exists():
        killed, public = attempt(parent, folder, kill=kills < 3)
        kills += killed
        released.append(public)
    assert kills == 3
    for a, b in zip(released, released[1:]):
        assert b.startswith(a), "a release that was on the disk was changed"
    check_books(folder, name)
    state = tmp_path / "state"
    assert not state.exists() or not list(state.glob("*"))


def check_books(folder, name):
    "The transcript leads to the model, and the ledger to what was spent."
    m, ts = json.loads((folder / "metrics.json").read_text()), Transcript.load(folder / "transcript.jsonl")
    assert len(ts) == STEPS and weights_digest(replay(load_model("tiny-opt")[0], ts)) == m["weights_digest"]
    entries = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    booked = [r["mi"] for e in entries for r in e.get("releases", [])]
    assert len(booked) == STEPS and abs(sum(booked) - m["mi_spent"]) < 1e-12
    assert m["mi_spent"] == 0 if name == "zpl" else 0 < m["mi_spent"] <= 0.3
