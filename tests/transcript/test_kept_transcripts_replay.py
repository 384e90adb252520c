"""Transcripts in the repository, made by earlier versions, still give their models to the bit.

What draws z and writes θ may get faster, not other.
"""
import pytest

from common import ROOT

FOLDERS = sorted(p.parent for p in (ROOT / "results" / "default").rglob("transcript.jsonl")
                 if "s0" in p.parent.as_posix())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_replay(folder):
    from paczero.models import load_model
    from paczero.transcript import Transcript, replay, weights_digest

    ts = Transcript.load(folder / "transcript.jsonl")
    if ts.verify()["directions"] is not True:
        pytest.skip("this CPU or torch draws other normals than the one that made this transcript")
    assert weights_digest(replay(load_model("tiny-opt")[0], ts)) == ts.end["weights"]


def test_there_are_some():
    assert len(FOLDERS) >= 2
