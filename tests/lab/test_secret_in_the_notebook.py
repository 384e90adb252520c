"""Twins through papermill: the executed notebook, its log and its files say nothing of the secret."""
import json
import os
import re

import pytest

from common import ROOT
from mill import parameters, run_papermill
from twins import files, twin_of

# In the kernel, and nowhere else: coins, noise and the secret as told (tests/twins.py).
SITE = """
import os, sys
if any("ipykernel" in a for a in sys.orig_argv):
    import paczero.finetune, paczero.lab.experiment, twins
    twins.fix(int(os.environ["TWIN"]))
"""
CLOCK = re.compile(r"\d+(\.\d+)? ?(s/step|s each|s\b|seconds?|it/s|cell/s|s/cell)|\d+:\d\d(:\d\d)?|\?(it|cell)/s"
                   r"|[\d,.]+ MiB|[\d,.]+ kB")
SVG_NAMES = re.compile(rb'(id="|#|clip-path="url\()[\w-]+')        # matplotlib names parts of an SVG at random


def clean(text, root):
    "Text without colours, paths, addresses and the clock."
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(str(root), "ROOT")
    text = CLOCK.sub("#", re.sub(r"0x[0-9a-f]{6,}", "0x", text))
    return re.sub(r"\d+\.\d+#|\d\.\d+s", "#", text)


def shown(cell, root):
    "A cell's source and outputs; what was printed as one text, for in how many pieces it came is the clock's affair."
    outputs = cell.get("outputs", [])
    printed = "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")
    others = [{k: v for k, v in o.items() if k != "metadata"} for o in outputs if o["output_type"] != "stream"]
    texts = [printed, *(json.dumps(o, sort_keys=True) for o in others)]
    return dict(source=clean("".join(cell["source"]), root), outputs=[clean(t, root) for t in texts])


def notebook(root, index):
    "run_experiment by papermill, with this secret: its log, the executed notebook without its clock, its files."
    (root / "site").mkdir(parents=True)
    (root / "site" / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join(map(str, (root / "site", ROOT, ROOT / "tests")))
    given = parameters(mechanism="mi", budget="1.0", steps=4, m=64, n_train=40, n_dev=10, n_eval=10,
                       reference=False, run_id="twin", results_dir=root / "results")
    done = run_papermill([ROOT / "nbs" / "run_experiment.ipynb", root / "out.ipynb", *given, "--cwd", root], root,
                         PYTHONPATH=path, TWIN=str(index))
    cells = [shown(c, root) for c in json.loads((root / "out.ipynb").read_text())["cells"]]
    left = files(root / "results")
    left = {k: SVG_NAMES.sub(b"", v) if k.endswith(".svg") else v for k, v in left.items()}
    lines = clean(done.stderr + done.stdout, root).splitlines()
    log = [x for x in lines if x.strip() and "Executing" not in x and "%|" not in x]
    return dict(cells=cells, files=left, log=log)


@pytest.mark.slow
def test_twins_in_the_notebook(tmp_path):
    one = notebook(tmp_path / "a", 5)
    other = twin_of(tmp_path / "a" / "results" / "runs" / "twin" / "ledger.jsonl", 5)
    two = notebook(tmp_path / "b", other)
    assert one["files"].keys() == two["files"].keys() and any(k.endswith(".png") for k in one["files"])
    assert not [k for k in one["files"] if one["files"][k] != two["files"][k]]
    for a, b in zip(one["cells"], two["cells"]):
        differ = [(x[:300], y[:300]) for x, y in zip(a["outputs"], b["outputs"]) if x != y]
        assert a == b, (a["source"][:200], differ[:2])
    assert one["log"] == two["log"]
