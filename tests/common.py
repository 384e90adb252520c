"""What several tests need: where things are, and how a child process is to be started."""
import os
import sys
from pathlib import Path

from readme import ROOT

BIN = Path(sys.executable).parent
THREADS = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="passive",
               GOMP_SPINCOUNT="0", TOKENIZERS_PARALLELISM="false")


def environment(**more):
    "A child's environment: this repository's package, one thread that waits quietly, no hub."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **THREADS, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "PYTHONPATH": path, **more}


def patch_everywhere(monkeypatch, name, value):
    "Put something in the place of a public function in every room that has it by name."
    rooms = [m for n, m in list(sys.modules.items()) if n.startswith("paczero.") and hasattr(m, name)]
    assert rooms, f"no loaded room has {name}"
    for room in rooms:
        monkeypatch.setattr(room, name, value)
