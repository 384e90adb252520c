"""Two processes, one run: the same weights on both, the secret on rank 0 alone; what goes wrong on one ends both.

One pair of processes plays all the scenes (tests/run/scenes.py); here is what must have come of them.
"""
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common import ROOT, environment
from paczero.models import load_model
from paczero.transcript import Transcript, coefficients, replay, weights_digest

SCRIPT = Path(__file__).with_name("scenes.py")
SCENES = ("zpl", "mi", "twin", "one process", "drift", "other weights", "fails", "fails, resumed", "nan", "interrupt",
          "interrupt, resumed", "taken folder", "secret batches", "killed", "killed, alone")
pytestmark = pytest.mark.slow


def start(rank, root, port):
    "One of the two processes, as torchrun would start it."
    path = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tools'}")
    env = dict(path, PACZERO_STATE_DIR=str(root / "state"), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank),
               LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    return subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(root)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "(folder, what rank 0 saw, what rank 1 saw)"
    root = tmp_path_factory.mktemp("pair")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [start(rank, root, port) for rank in (0, 1)]
    try:
        said = [p.communicate(timeout=500)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    ended = [p.returncode for p in processes]
    assert ended == [0, -signal.SIGKILL], "\n".join(said)[-5000:]
    return root, *(json.loads((root / f"{r}.json").read_text()) for r in (0, 1))


def transcript(folder):
    return Transcript.load(folder / "0" / "transcript.jsonl")


def replayed(folder):
    return weights_digest(replay(load_model("tiny-opt")[0], transcript(folder)))


def test_all_scenes_were_played(seen):
    _, zero, one = seen
    assert set(SCENES) <= set(zero)
    assert set(SCENES) - {"one process", "killed", "killed, alone"} == set(one)


@pytest.mark.parametrize("name", ["zpl", "mi", "fails, resumed", "interrupt, resumed"])
def test_both_ranks_end_with_the_weights_of_the_transcript(seen, name):
    root, zero, one = seen
    assert "error" not in zero[name], zero[name]["error"]
    folder = root / name.split(",")[0]
    ts = transcript(folder)
    assert len(ts) == 6 and zero[name]["weights"] == one[name]["weights"] == replayed(folder) == ts.end["weights"]
    assert zero[name]["weights"] == zero[name]["metrics"]["weights_digest"]
    assert one[name]["metrics"] is None and not (folder / "1").exists()         # rank 1 leaves nothing on the disk


def first_diagnostics(folder):
    "The diagnostics of a run's first step."
    lines = (folder / "0" / "ledger.jsonl").read_text().splitlines()
    return next(json.loads(line) for line in lines if "diagnostics" in line)["diagnostics"]


def test_the_losses_are_those_of_one_process(seen):
    root, zero, _ = seen
    two, one = first_diagnostics(root / "zpl"), first_diagnostics(root / "one process")
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert two["ghat_mean"] == pytest.approx(one["ghat_mean"], abs=1e-2)
    assert two["ghat_std"] == pytest.approx(one["ghat_std"], rel=1e-2)
    two, one = zero["zpl"]["metrics"], zero["one process"]["metrics"]
    assert two["test_before"] == pytest.approx(one["test_before"], abs=1e-6)
    assert two["pool_tokens"] == one["pool_tokens"]


def test_the_secret_stays_on_rank_0(seen):
    "Rank 1 never binds a mechanism; with a secret that the releases cannot tell, every byte said is the same."
    root, zero, one = seen
    assert zero["mi"]["secret"] and not any(s["secret"] or s["bound"] for s in one.values())
    assert zero["twins"][0] != zero["twins"][1]
    assert transcript(root / "mi").releases == transcript(root / "twin").releases
    assert zero["mi"]["said"] == zero["twin"]["said"] and one["mi"]["said"] == one["twin"]["said"]


def test_rank_0_says_the_bits_and_nothing_more(seen):
    root, zero, _ = seen
    said, ts = [json.loads(s) for s in zero["mi"]["said"]], transcript(root / "mi")
    said_of = lambda *kinds: [s[1:] for s in said if s[0] in kinds]
    verbs = {"describe", "evaluate", "move", "losses", "update", "tokens", "weights", "digest", "end"}
    assert len(said) > 40 and {s[0] for s in said} == verbs
    assert [s[1] for s in said_of("update")] == [
        coefficients(t, y, ts.header["update"]) for t, y in enumerate(ts.releases)]
    parts = {tuple(s) for s in said_of("losses", "evaluate", "tokens")}
    assert parts == {("pool", None), ("pool",), ("dev",), ("test",)}
    assert not any(said_of("describe", "weights", "digest", "end"))
    assert all(s[1:] in ([0, 1], [0, -1]) for s in said_of("move"))


def test_a_rank_that_drifts_is_found_before_more_is_released(seen):
    root, zero, one = seen
    assert "the trained parameters of rank 1 differ" in zero["drift"]["error"]
    assert "rank 0 stopped the run (RuntimeError)" in one["drift"]["error"]
    assert len(transcript(root / "drift")) == 4            # the drift is in step 3, the next look after step 4


def test_a_rank_with_other_weights_never_begins(seen):
    root, zero, one = seen
    says = r"rank 1 runs something else than rank 0; nothing was released. Different: model.weights"
    assert re.search(says, zero["other weights"]["error"])
    assert "rank 0 stopped the run" in one["other weights"]["error"] and not (root / "other weights").exists()


def test_what_fails_on_one_rank_ends_both(seen):
    root, zero, one = seen
    assert "rank 1 of 2 failed: MemoryError: a card that was too small" in zero["fails"]["error"]
    assert one["fails"]["error"].startswith("MemoryError")
    assert "FloatingPointError: step 2" in zero["nan"]["error"] and "20 of 40" in zero["nan"]["error"]
    assert len(transcript(root / "nan")) == 2
    assert zero["interrupt"]["error"].startswith("KeyboardInterrupt")
    assert "FileExistsError" in zero["taken folder"]["error"]
    for name, kind in dict(nan="FloatingPointError", interrupt="KeyboardInterrupt", **{
            "taken folder": "FileExistsError"}).items():
        assert f"stopped the run ({kind})" in one[name]["error"]
    assert all("looks at a secret batch" in s["secret batches"]["error"] for s in (zero, one))


def test_a_rank_that_is_killed_is_missed_and_the_run_goes_on_without_it(seen):
    root, zero, _ = seen
    says = r"TimeoutError: rank 0 has waited 3 s for rank 1: it is gone, or slower than"
    assert re.match(says, zero["killed"]["error"])
    assert "error" not in zero["killed, alone"] and zero["killed, alone"]["weights"] == replayed(root / "killed")
    assert len(transcript(root / "killed")) == 6
