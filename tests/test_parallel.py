"""Two processes, one run: the same weights on both, the secret on rank 0 alone, and whatever goes wrong on one ends both.

One pair of processes plays all the scenes below one after the other (so a scene that left a rank hanging would fail the next), and writes down what each rank saw.
"""
import hashlib, json, os, re, signal, socket, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

SCENES = ("zpl", "mi", "twin", "one process", "drift", "other weights", "fails", "fails, resumed", "nan", "interrupt", "interrupt, resumed", "taken folder", "secret batches", "killed", "killed, alone")


# ---------------------------------------------------------------- what the two processes do

def play(rank, root):
    "All scenes, as rank `rank` plays them."
    import torch
    import paczero.finetune as F
    import paczero.parallel as P
    from paczero.directions import Theta
    from paczero.mechanisms import MIBudget, ZPL
    from paczero.mechanisms.secret import OSEntropy
    from paczero.models import load_model
    from paczero.tasks import load_task
    from paczero.transcript import weights_digest
    from transformers import TrainerCallback
    task = load_task("reviews", seed=0, n_train=40, n_dev=10, n_eval=10)
    config = F.FineTuneConfig(steps=6, lr=1e-3, m=8, eval_every=2, seed=3)
    said, out = [], {}

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 3: raise KeyboardInterrupt

    class SecretBatches(ZPL): secret_batches = True

    real = dict(tell=P.Team.tell, answer=P.Team.answer, update=Theta.update, losses=P.Share.losses, bits=OSEntropy.bits, below=OSEntropy.below)

    def tell(self, what, *args): said.append(json.dumps([what, *args])); return real["tell"](self, what, *args)
    def answer(self, data): said.append(data if isinstance(data, str) else data.hex()); return real["answer"](self, data)
    def drifting(self, step, coefficients):
        real["update"](self, step, coefficients)
        with torch.no_grad(): self.home[0].view(-1)[5] += 1e-3 if step == 2 else 0
    calls = [0]
    def failing(f):
        def losses(self, rows=None):
            calls[0] += 1
            return f(self, rows) if calls[0] == 5 else real["losses"](self, rows)     # the first look of the third step
        return losses
    def out_of_memory(self, rows): raise MemoryError("a card that was too small")
    def nan(self, rows): return real["losses"](self, rows) * np.nan
    def die(self, rows): os.kill(os.getpid(), signal.SIGKILL)

    def scene(name, mechanism=None, folder=None, change=lambda: None, on=(0, 1), alter=lambda m: None, **runtime):
        "One run; what came of it on this rank, an error included."
        mechanism, (model, tok), r = mechanism or ZPL(), load_model("tiny-opt"), None
        said.clear(); calls[0] = 0
        P.Team.tell, P.Team.answer = tell, answer
        if rank in on: change(); alter(model)
        try: r = F.finetune(model, tok, task, mechanism, config, folder=root / (folder or name.split(",")[0]) / str(rank), callbacks=[Breaks] if name == "interrupt" and rank == 0 else (),
                            runtime=F.Runtime(**dict(dict(patience=60.), **runtime)))
        except BaseException as e: out[name] = dict(error=f"{type(e).__name__}: {e}")
        else: out[name] = dict(weights=weights_digest(r.model), metrics=r.metrics)
        out[name] |= dict(said=list(said), bound=mechanism.design is not None, secret=mechanism._secret is not None)
        Theta.update, P.Share.losses, OSEntropy.bits, OSEntropy.below = (real[k] for k in ("update", "losses", "bits", "below"))
        (root / f"{rank}.json").write_text(json.dumps(out))

    def fix(index): # coins and noise as told, the secret as told; nothing else knows
        def go():
            OSEntropy.bits = lambda self, k, where: int.from_bytes(hashlib.shake_256(f"twins {where}".encode()).digest((k + 7) // 8), "big") >> (-k % 8)
            OSEntropy.below = lambda self, m, where: index
        return go

    def patch(cls, name, f): return lambda: setattr(cls, name, f)

    scene("zpl", ZPL(audit_seed=1))
    scene("mi", MIBudget(budget=0.8, steps=6), change=fix(2))
    twin = twin_of(root / "mi" / "0" / "ledger.jsonl", 2) if rank == 0 else None
    scene("twin", MIBudget(budget=0.8, steps=6), change=fix(twin))
    if rank == 0: scene("one process", ZPL(audit_seed=1), parallel=False); out["twins"] = [2, twin]
    scene("drift", change=patch(Theta, "update", drifting), on=(1,))
    scene("other weights", on=(1,), alter=lambda m: next(m.parameters()).data.view(-1)[:1].add_(1))
    scene("fails", change=patch(P.Share, "losses", failing(out_of_memory)), on=(1,))
    scene("fails, resumed", folder="fails")
    scene("nan", change=patch(P.Share, "losses", failing(nan)), on=(1,))
    scene("interrupt", MIBudget(budget=0.8, steps=6))
    scene("interrupt, resumed", MIBudget(budget=0.8, steps=6), folder="interrupt")
    scene("taken folder", folder="zpl")
    scene("secret batches", SecretBatches())
    scene("killed", change=patch(P.Share, "losses", failing(die)), on=(1,), patience=3.)
    scene("killed, alone", folder="killed", parallel=False)


def twin_of(ledger, index):
    "Another subset with the same sign as `index` in every noisy release."
    from paczero.mechanisms import Release
    from paczero.transcript import read_log
    signs = np.stack([Release.from_record(r).sign_vector for e in read_log(ledger)[0] for r in e.get("releases", []) if r["kind"] == "noisy"])
    return int(next(j for j in np.flatnonzero((signs == signs[:, [index]]).all(0)) if j != index))


# ---------------------------------------------------------------- what must have come of it

@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "(folder, what rank 0 saw, what rank 1 saw)"
    root = tmp_path_factory.mktemp("pair")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PACZERO_STATE_DIR=str(root / "state"), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", PYTHONPATH=os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])))
    ps = [subprocess.Popen([sys.executable, __file__, str(r), str(root)], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in (0, 1)]
    try: said = [p.communicate(timeout=240)[0] for p in ps]
    finally:
        for p in ps: p.kill()
    assert ps[0].returncode == 0 and ps[1].returncode == -signal.SIGKILL, "\n".join(said)[-5000:]
    return root, *(json.loads((root / f"{r}.json").read_text()) for r in (0, 1))


def transcript(folder):
    from paczero.transcript import Transcript
    return Transcript.load(folder / "0" / "transcript.jsonl")


def replayed(folder):
    from paczero.models import load_model
    from paczero.transcript import replay, weights_digest
    return weights_digest(replay(load_model("tiny-opt")[0], transcript(folder)))


def test_all_scenes_were_played(seen):
    _, zero, one = seen
    assert set(SCENES) <= set(zero) and set(SCENES) - {"one process", "killed", "killed, alone"} == set(one)


@pytest.mark.parametrize("name", ["zpl", "mi", "fails, resumed", "interrupt, resumed"])
def test_both_ranks_end_with_the_weights_of_the_transcript(seen, name):
    root, zero, one = seen
    assert "error" not in zero[name], zero[name]["error"]
    ts = transcript(root / name.split(",")[0])
    assert len(ts) == 6 and zero[name]["weights"] == one[name]["weights"] == replayed(root / name.split(",")[0]) == ts.end["weights"] == zero[name]["metrics"]["weights_digest"]
    assert one[name]["metrics"] is None and not (root / name.split(",")[0] / "1").exists()           # rank 1 leaves nothing on the disk


def test_the_losses_are_those_of_one_process(seen):
    root, zero, _ = seen
    first = [next(json.loads(l) for l in (root / name / "0" / "ledger.jsonl").read_text().splitlines() if "diagnostics" in l)["diagnostics"] for name in ("zpl", "one process")]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=1e-6)
    assert first[0]["ghat_mean"] == pytest.approx(first[1]["ghat_mean"], abs=1e-2) and first[0]["ghat_std"] == pytest.approx(first[1]["ghat_std"], rel=1e-2)
    for k, v in zero["one process"]["metrics"]["test_before"].items(): assert zero["zpl"]["metrics"]["test_before"][k] == pytest.approx(v, abs=1e-6)
    assert zero["zpl"]["metrics"]["pool_tokens"] == zero["one process"]["metrics"]["pool_tokens"]


def test_the_secret_stays_on_rank_0(seen):
    "Rank 1 never binds a mechanism; and with another secret that the releases cannot tell apart, every byte that is said is the same."
    root, zero, one = seen
    assert zero["mi"]["secret"] and not any(s["secret"] or s["bound"] for s in one.values())
    assert zero["twins"][0] != zero["twins"][1] and transcript(root / "mi").releases == transcript(root / "twin").releases
    said = [json.loads(s) for s in zero["mi"]["said"]]
    assert zero["mi"]["said"] == zero["twin"]["said"] and one["mi"]["said"] == one["twin"]["said"] and len(said) > 40
    assert {s[0] for s in said} == {"describe", "evaluate", "move", "losses", "update", "tokens", "weights", "digest", "end"}
    ts = transcript(root / "mi")
    from paczero.transcript import coefficients
    assert [s[2] for s in said if s[0] == "update"] == [coefficients(t, y, ts.header["update"]) for t, y in enumerate(ts.releases)]      # the bits, nothing more
    assert {tuple(s[1:]) for s in said if s[0] in ("losses", "evaluate", "tokens")} == {("pool", None), ("pool",), ("dev",), ("test",)}
    assert all(len(s) == 1 for s in said if s[0] in ("describe", "weights", "digest", "end")) and all(s[2:] in ([0, 1], [0, -1]) for s in said if s[0] == "move")


def test_a_rank_that_drifts_is_found_before_more_is_released(seen):
    root, zero, one = seen
    assert "the trained parameters of rank 1 differ" in zero["drift"]["error"] and "rank 0 stopped the run (RuntimeError)" in one["drift"]["error"]
    assert len(transcript(root / "drift")) == 4            # the drift is in step 3, the next look after step 4


def test_a_rank_with_other_weights_never_begins(seen):
    root, zero, one = seen
    assert re.search(r"rank 1 runs something else than rank 0; nothing was released. Different: model.weights", zero["other weights"]["error"])
    assert "rank 0 stopped the run" in one["other weights"]["error"] and not (root / "other weights").exists()


def test_what_fails_on_one_rank_ends_both(seen):
    root, zero, one = seen
    assert "rank 1 of 2 failed: MemoryError: a card that was too small" in zero["fails"]["error"] and one["fails"]["error"].startswith("MemoryError")
    assert "FloatingPointError: step 2" in zero["nan"]["error"] and "20 of 40" in zero["nan"]["error"] and len(transcript(root / "nan")) == 2
    assert "stopped the run (FloatingPointError)" in one["nan"]["error"]
    assert zero["interrupt"]["error"].startswith("KeyboardInterrupt") and "stopped the run (KeyboardInterrupt)" in one["interrupt"]["error"]
    assert "FileExistsError" in zero["taken folder"]["error"] and "stopped the run (FileExistsError)" in one["taken folder"]["error"]
    assert all("looks at a secret batch" in s["secret batches"]["error"] for s in (zero, one))


def test_a_rank_that_is_killed_is_missed_and_the_run_goes_on_without_it(seen):
    root, zero, _ = seen
    assert re.match(r"TimeoutError: rank 0 has waited 3 s for rank 1: it is gone, or slower than", zero["killed"]["error"])
    assert "error" not in zero["killed, alone"] and zero["killed, alone"]["weights"] == replayed(root / "killed") and len(transcript(root / "killed")) == 6


if __name__ == "__main__": play(int(sys.argv[1]), Path(sys.argv[2]))
