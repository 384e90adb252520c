"""One process with two threads against two processes with one thread each: `python tests/parallel_speed.py [pairs]`, on a machine that does nothing else.

The embedded task with the whole pool of 1000, through the command that a user gives; the two kinds take turns, so that a slow minute hits both.
"""

import json, os, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd

KINDS = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def seconds_per_step(processes, threads, steps=12, root=None, **parameters):
    "Mean time of a step (two passes over the pool, release, update) in a fresh run, from its metrics."
    with tempfile.TemporaryDirectory() as tmp:
        env = dict(
            os.environ,
            OMP_NUM_THREADS=str(threads),
            HF_HUB_OFFLINE="1",
            PYTHONPATH=os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        )
        cmd = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "paczero.parallel",
        ]
        for k, v in dict(
            dict(steps=steps, eval_every=steps, n_dev=10, n_eval=10, results_dir=tmp, run_id="speed"), **parameters
        ).items():
            cmd += ["-p", k, str(v)]
        subprocess.run(cmd, env=env, check=True, capture_output=True, timeout=900)
        rows = [json.loads(l) for l in (Path(tmp) / "runs" / "speed" / "ledger.jsonl").read_text().splitlines()]
    return pd.Series(
        [r["diagnostics"]["seconds"] for r in rows if "diagnostics" in r][1:]
    ).median()  # the first step warms up


def compare(pairs=3, **parameters):
    "A row a pair, a column a kind: median seconds of a step; and the machine's load when it began."
    rows = []
    for _ in range(pairs):
        load = os.getloadavg()[0]
        rows.append(
            {name: seconds_per_step(*kind, **parameters) for name, kind in KINDS.items()} | {"load before": load}
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    print(table.round(4).to_string())
    print(table.median().round(4).to_string())
