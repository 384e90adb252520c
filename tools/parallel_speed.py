"""One process with two threads against two processes with one thread each, on a machine that does nothing else.

    python tools/parallel_speed.py [pairs]

The embedded task with the whole pool of 1000, through the command that a user gives; the two kinds take turns, so that
a slow minute hits both.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def run(processes, threads, parameters):
    "One run, as torchrun starts it."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", PYTHONPATH=path)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "paczero.cli.torchrun"]
    given = [x for k, v in parameters.items() for x in ("-p", k, str(v))]
    subprocess.run([sys.executable, "-m", *launch, *given], env=env, check=True, capture_output=True, timeout=900)


def seconds_per_step(processes, threads, steps=12, **parameters):
    "Median time of a step (two passes over the pool, release, update) in a fresh run, from its ledger."
    with tempfile.TemporaryDirectory() as tmp:
        small = dict(steps=steps, eval_every=steps, n_dev=10, n_eval=10, results_dir=tmp, run_id="speed")
        run(processes, threads, small | parameters)
        lines = (Path(tmp) / "runs" / "speed" / "ledger.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    times = [e["diagnostics"]["seconds"] for e in entries if "diagnostics" in e]
    return pd.Series(times[1:]).median()        # the first step warms up


def compare(pairs=3, **parameters):
    "A row a pair, a column a kind: median seconds of a step; and the machine's load when it began."
    rows = []
    for _ in range(pairs):
        load = os.getloadavg()[0]
        row = {name: seconds_per_step(*kind, **parameters) for name, kind in KINDS.items()}
        rows.append(row | {"load before": load})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    print(table.round(4).to_string())
    print(table.median().round(4).to_string())
