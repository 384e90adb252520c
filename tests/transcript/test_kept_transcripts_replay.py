"""Transcripts in the repository, made by earlier versions, still give their models to the bit.

What draws z and writes θ may get faster, not other.
"""
import pytest

from common import ROOT
from paczero.models import load_model
from paczero.run.runs import find_run
from paczero.transcript import replay, weights_digest

KEPT = ("default/s0", "default/s0/reference", "miniature/runs/sst2_1p3b_lora_paczpl_s1")      # full, not private, LoRA


@pytest.mark.parametrize("name", KEPT)
def test_replay(name):
    run = find_run(ROOT / "results" / name)
    ts, m = run.transcript, run.transcript.header["model"]
    if ts.verify()["directions"] is not True:
        pytest.skip("this CPU or torch draws other normals than the one that made this transcript")
    lora = m["track"] == "lora"
    more = dict(lora_rank=m["lora_rank"], lora_alpha=m["lora_alpha"], seed=m["lora_seed"]) if lora else {}
    model = load_model("tiny-opt", track=m["track"], **more)[0]
    assert weights_digest(replay(model, ts)) == run.metrics["weights_digest"] == ts.end["weights"]
