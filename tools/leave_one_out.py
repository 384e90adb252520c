"""Make the runs of nbs/paper/pool_membership.ipynb: the embedded model under each mechanism, attacked while it learns.

    python tools/leave_one_out.py            # all that is not there yet; stop it whenever you like, it goes on
    python tools/leave_one_out.py zpl mi     # some of them

Some 30 minutes of one core. A run's folder holds the attack's own files, which are private where the data are: here the
pool is the embedded one, which is public. `reports.parquet` keeps Λ and the pivotal steps of every
example of each run.
"""
import sys
from pathlib import Path

import pandas as pd

from paczero.audit import LeaveOneOut, attack_run
from paczero.lab.choose import choose_recipe
from paczero.lab.devices import with_dtype
from paczero.lab.experiment import run_or_load
from paczero.lab.start import recipe_data, recipe_network
from paczero.run.runs import open_runs
from paczero.tasks.task import on_public_data

HOME = Path(__file__).resolve().parents[1]/"results"/"leave_one_out"
SEEDS = (0, 1, 2)       # of the cases that only vary ZPL: the first
CASES = {
    "zpl": dict(mechanism="zpl"),
    "mezo": dict(mechanism="nonprivate", signal="raw_full"),
    "sign": dict(mechanism="nonprivate", signal="quant_full"),
    "random": dict(mechanism="nonprivate", signal="random_sign"),
    "mi": dict(mechanism="mi", budget=0.33),
    "public": dict(mechanism="zpl"),
    "dpzero-2": dict(mechanism="dpzero", dp_epsilon=2.0),
    "zpl-n250": dict(mechanism="zpl", n_train=250),
    "zpl-m16": dict(mechanism="zpl", m=16),
    "zpl-m504": dict(mechanism="zpl", m=504),
    "zpl-clip": dict(mechanism="zpl", clip=2.0),
}
SOME = range(100)       # of a differentially private run: all of the pool, 2340 times, takes too long


def make(case, seed):
    "One run, attacked."
    recipe = with_dtype(choose_recipe(model="tiny-opt", seed=seed, **CASES[case])[0], "cpu")
    data = recipe_data(recipe)
    if case == "public":
        data = on_public_data(data)
    folder, watch = HOME/"runs"/f"{case}-s{seed}", LeaveOneOut(only=SOME if case.startswith("dpzero") else None)
    if f"{case}-s{seed}" in {r.name for r in open_runs(HOME).values() if r.state == "finished"}:
        return
    network, tokenizer = recipe_network(recipe, "cpu")
    run_or_load(folder, network, tokenizer, data, recipe.make_mechanism(), recipe.config, watch=watch)
    save(watch.report, f"{case}-s{seed}")
    if case == "mi":
        save(attack_run(folder, sees="number"), f"{case}-number-s{seed}")


def save(report, name):
    "Λ and pivotal steps of every example, behind those of the other runs."
    file, frame = HOME/"reports.parquet", pd.DataFrame(dict(run=name, llr=report.llr, pivotal=report.pivotal))
    before = pd.read_parquet(file) if file.exists() else frame[:0]
    pd.concat([before[before.run != name], frame], ignore_index=True).to_parquet(file)
    print(name, report.summary(), flush=True)


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        for seed in SEEDS[:1] if case.startswith("zpl-") else SEEDS:
            make(case, seed)
