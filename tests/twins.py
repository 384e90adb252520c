"""Twins: two runs that differ in the secret alone, with the same coins and noise, and with stopped clocks.

Their secrets have the same sign in every noisy release, so the releases are equal, and so must be all else that leaves.
"""
import copy
import hashlib
import itertools
import json
import pickle
import re
import sys
import time

import numpy as np

from paczero.mechanisms import Release
from paczero.mechanisms.secret import OSEntropy
from paczero.run import folder
from paczero.transcript import read_log

ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


class StoppedTime:
    "The module `time` with a stopwatch that stands."

    def __getattr__(self, name):
        return getattr(time, name)

    def perf_counter(self):
        return 0.0


def bits(self, k, where):
    "The operating system's bits for a test: told by where they are used."
    return int.from_bytes(hashlib.shake_256(f"twins {where}".encode()).digest((k + 7) // 8), "big") >> (-k % 8)


def fix(index, put=setattr):
    "Coins, noise and secret as told, clocks and the memory meter stopped, runs numbered. Nothing else knows of it."
    put(OSEntropy, "bits", bits)
    put(folder, "new_name", map("{:032x}".format, itertools.count()).__next__)
    put(OSEntropy, "below", lambda self, m, where: index)
    for name, room in list(sys.modules.items()):
        if name.startswith("paczero."):
            if getattr(room, "time", None) is time:
                put(room, "time", StoppedTime())
            if hasattr(room, "peak_memory"):
                put(room, "peak_memory", lambda device: 0)


def noisy_signs(ledger):
    "(noisy releases, M) signs of the subsets, from a run's ledger."
    releases = [r for e in read_log(ledger)[0] for r in e.get("releases", []) if r["kind"] == "noisy"]
    assert releases, "no noisy release: this run would say nothing"
    return np.stack([Release.from_record(r).sign_vector for r in releases])


def twin_of(ledger, index):
    "Another subset with the same sign as `index` in every noisy release."
    signs = noisy_signs(ledger)
    same = np.flatnonzero((signs == signs[:, [index]]).all(0))
    return int(next(j for j in same if j != index))


VIEWS = dict(
    repr=repr, str=str, format=format, vars=lambda x: repr(vars(x)), json=json.dumps,
    dict=lambda x: json.dumps(x.to_dict()), describe=lambda x: json.dumps(x.describe()),
    markdown=lambda x: x.markdown(), pickle=pickle.dumps, copy=lambda x: repr(copy.copy(x)),
    deepcopy=lambda x: repr(copy.deepcopy(x)), ledger=lambda x: json.dumps(x.ledger.to_dict()),
    state=lambda x: repr(x.__getstate__()),
)


def views(x, name):
    "All the ways in which an object is commonly shown, saved or sent."
    out = {}
    for k, f in VIEWS.items():
        try:
            v = f(x)
        except Exception as e:
            v = f"{type(e).__name__}: {e}"
        out[f"{name}.{k}"] = v if isinstance(v, bytes) else ADDRESS.sub("0x", v)
    return out


def files(folder):
    "Every file below a folder."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
