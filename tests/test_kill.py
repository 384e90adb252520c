"""kill -9 at any moment; the run goes on, and base weights + transcript are the model that it ends with."""
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

JOB = """
import sys
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import MIBudget, ZPL
from paczero.models import load_model
from paczero.tasks import load_task
folder, name = sys.argv[1:3]
steps = 40
mechanism = ZPL() if name == "zpl" else MIBudget(budget=0.3, steps=steps)
task = load_task("reviews", seed=0, n_train=150, n_dev=40, n_eval=40)
r = finetune(*load_model("tiny-opt"), task, mechanism, FineTuneConfig(steps=steps, lr=1e-3, m=16, eval_every=10, seed=1), folder=folder)
"""


@pytest.mark.parametrize("name", ["zpl", "mi"])
def test_killed_again_and_again(name, tmp_path):
    folder, kills, seen = tmp_path / "run", 0, []
    env = dict(os.environ, HF_HUB_OFFLINE="1", PACZERO_STATE_DIR=str(tmp_path / "state"), OMP_NUM_THREADS="1")
    ledger = folder / "ledger.jsonl"
    lines = lambda: ledger.read_bytes().count(b"\n") if ledger.exists() else 0
    while not (folder / "metrics.json").exists():
        p = subprocess.Popen([sys.executable, "-c", JOB, str(folder), name], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < 3:                                      # let it get some way on, then kill it without a warning
            start, target = time.monotonic(), lines() + random.randint(1, 12)
            while p.poll() is None and lines() < target and time.monotonic() - start < 120: time.sleep(0.002)
            if p.poll() is None: p.send_signal(signal.SIGKILL); kills += 1
        _, err = p.communicate(timeout=300)
        assert p.returncode in (0, -signal.SIGKILL), err[-3000:]
        seen.append((folder / "transcript.jsonl").read_bytes() if (folder / "transcript.jsonl").exists() else b"")
    assert kills == 3
    whole = [s[: s.rfind(b"\n") + 1] for s in seen]          # a torn last line was never a release
    for a, b in zip(whole, whole[1:]): assert b.startswith(a), "a release that was on the disk was changed"
    m = json.loads((folder / "metrics.json").read_text())
    from paczero.models import load_model
    from paczero.transcript import Transcript, replay, weights_digest
    ts = Transcript.load(folder / "transcript.jsonl")
    assert len(ts) == 40 and weights_digest(replay(load_model("tiny-opt")[0], ts)) == m["weights_digest"]
    booked = [r["mi"] for line in ledger.read_text().splitlines() for r in json.loads(line).get("releases", [])]
    assert len(booked) == 40 and abs(sum(booked) - m["mi_spent"]) < 1e-12
    assert m["mi_spent"] == 0 if name == "zpl" else 0 < m["mi_spent"] <= 0.3
    assert not list((tmp_path / "state").glob("*")) if (tmp_path / "state").exists() else True
