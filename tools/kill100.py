"""Kill a small run a hundred times, at random moments and at every write, and compare what it ends with bit for bit.

    python tests/kill100.py                 # 100 random kills over ZPL and MI runs, then one kill before and after every durable write
    python tests/kill100.py --kills 10      # fewer

Not collected by pytest: it takes minutes. One parent imports everything once and forks a worker for each attempt; the worker is
killed with SIGKILL. The secret, the coins and the noise are fixed by an audit seed, so that two runs can be compared at all.
"""

import argparse, hashlib, json, os, random, signal, sys, tempfile, time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
import torch

torch.set_num_threads(1)
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import MIBudget, ZPL
from paczero.models import load_model
from paczero.tasks import load_task
from paczero.transcript import Transcript, read_log, replay, weights_digest

SEED = 11
# a kill is no power cut: what a killed process wrote is there whether the disk is slow or made of memory, so memory will do


def make(name, steps):
    "The mechanism of a run, with its secret fixed."
    return ZPL(audit_seed=SEED) if name == "zpl" else MIBudget(budget=0.5, steps=steps, audit_seed=SEED)


def run(name, folder, steps):
    "What the worker does."
    config = FineTuneConfig(steps=steps, lr=1e-3, m=8, eval_every=max(1, steps // 6), seed=1)
    finetune(*BASE, TASK, make(name, steps), config, folder=folder, runtime=Runtime(test=True))


def crash_at(count, after):
    "Kill this process before or after its `count`-th durable write (fsync, rename, unlink)."
    seen = 0

    def wrap(f):
        def g(*a, **k):
            nonlocal seen
            seen += 1
            if seen == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return f(*a, **k)
            finally:
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        return g

    for f in ("fsync", "replace", "unlink"):
        setattr(os, f, wrap(getattr(os, f)))


def fork(name, folder, steps, crash=None):
    "Start a worker; its process id."
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        err = os.open(str(folder) + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(err, 1)
        os.dup2(err, 2)
        if crash:
            crash_at(*crash)
        run(name, folder, steps)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pid, until=None):
    "Wait for a worker; kill it as soon as `until()` holds. True where it was killed."
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if until and until():
            os.kill(pid, signal.SIGKILL)
            until = None
        time.sleep(0.0005)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"a worker died of signal {os.WTERMSIG(status)}"
        return True
    return False


def lines(path):
    "The whole lines of a log, as they lie on the disk."
    raw = path.read_bytes() if path.exists() else b""
    return [json.loads(l) for l in raw[: raw.rfind(b"\n") + 1].splitlines()]


def check_booked(folder):
    "Nothing is public that was not booked first, and it was booked for what it was."
    ledger = [e for e in lines(folder / "ledger.jsonl") if "releases" in e]
    public = [e for e in lines(folder / "transcript.jsonl") if "y" in e]
    assert len(public) <= len(ledger), f"{folder}: {len(public)} steps released, {len(ledger)} booked"
    for a, b in zip(public, ledger):
        assert a["t"] == b["t"] and a["y"] == [r["scalar"] for r in b["releases"]], (a, b)
    return len(ledger)


def outcome(folder):
    "All that must be the same: the releases, the ledger but for its clock, the scores, the spending, the weights."
    m = json.loads((folder / "metrics.json").read_text())
    ledger = [
        {**e, "diagnostics": {k: v for k, v in e["diagnostics"].items() if k != "seconds"}} if "diagnostics" in e else e
        for e in read_log(folder / "ledger.jsonl")[0]
    ]
    keep = {k: v for k, v in m.items() if k not in ("seconds", "seconds_per_step", "peak_memory_bytes")}
    return dict(
        transcript=(folder / "transcript.jsonl").read_bytes(),
        ledger=ledger,
        metrics=keep,
        evaluations=(folder / "evaluations.csv").read_bytes(),
        config=(folder / "config.json").read_bytes(),
    )


def compare(a, b, what):
    for k in a:
        assert a[k] == b[k], f"{what}: {k} differs from the uninterrupted run's"


def finished(folder):
    return (folder / "metrics.json").exists()


def fail(folder):
    raise AssertionError(f"{folder.name} did not end:\n" + Path(str(folder) + ".log").read_text()[-2000:])


def random_kills(root, name, steps, kills, rng, whole, seconds):
    "Runs killed at random moments until `kills` are reached; each one is resumed to its end and compared."
    done, runs, moments = 0, 0, []
    size = (whole / "ledger.jsonl").stat().st_size
    while done < kills:
        folder = root / f"{name}-{runs}"
        runs += 1
        while not finished(folder):
            before = check_booked(folder)
            ledger = folder / "ledger.jsonl"
            if done < kills and rng.random() < 0.5:  # after a number of bytes of the ledger
                have = ledger.stat().st_size if ledger.exists() else 0
                goal = have + rng.randrange(1, max(2, size // 5))
                until = lambda: ledger.exists() and ledger.stat().st_size >= goal
            elif done < kills:  # or after some time
                end = time.monotonic() + rng.uniform(0, 1.2 * seconds)
                until = lambda: time.monotonic() > end
            else:
                until = None
            killed = wait(fork(name, folder, steps), until)
            after = check_booked(folder)
            assert after >= before, "the ledger became shorter"
            if killed:
                done += 1
                moments.append(after)
            elif not finished(folder):
                fail(folder)
        compare(outcome(whole), outcome(folder), folder.name)
        model, _ = load_model("tiny-opt")
        ts = Transcript.load(folder / "transcript.jsonl")
        assert weights_digest(replay(model, ts)) == ts.end["weights"]
    return done, runs, moments


def every_write(root, name, steps):
    "One kill before and one after every durable write of a short run, each resumed and compared."
    whole = root / f"{name}-every"
    assert not wait(fork(name, whole, steps))
    if not finished(whole):
        fail(whole)
    n, faults = 0, []
    for after in (False, True):
        count = 1
        while True:
            folder = root / f"{name}-{'after' if after else 'before'}-{count}"
            if not wait(fork(name, folder, steps, (count, after))):  # it ended before that many writes
                if not finished(folder):
                    fail(folder)
                break
            n += 1
            check_booked(folder)
            if not finished(folder):
                wait(fork(name, folder, steps))
            if finished(folder):
                compare(outcome(whole), outcome(folder), folder.name)
            else:
                faults.append((folder.name, Path(str(folder) + ".log").read_text().strip().splitlines()[-1][:300]))
            count += 1
    return n, faults


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--seed", type=int)
    a = p.parse_args()
    seed = a.seed if a.seed is not None else random.SystemRandom().randrange(2**32)
    rng, t0 = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill100-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as tmp:
        root = Path(tmp)
        os.environ["PACZERO_STATE_DIR"] = str(root / "state")
        BASE, TASK = load_model("tiny-opt"), load_task("reviews", seed=0, n_train=40, n_dev=20, n_eval=20)
        for name in ("zpl", "mi"):
            whole = root / f"{name}-whole"
            start = time.monotonic()
            assert not wait(fork(name, whole, a.steps))
            if not finished(whole):
                fail(whole)
            seconds = time.monotonic() - start
            done, runs, at = random_kills(
                root, name, a.steps, a.kills // 2 if name == "zpl" else a.kills - a.kills // 2, rng, whole, seconds
            )
            h = [sum(q * a.steps / 6 <= x < (q + 1) * a.steps / 6 for x in at) for q in range(6)] + [
                sum(x >= a.steps for x in at)
            ]
            print(
                f"{name}: {done} kills over {runs} runs of {a.steps} steps ({seconds:.1f} s each uninterrupted), all ended bit-identical, none under-booked; "
                f"kills by sixth of the steps, and after the last: {h}; seed {seed}; {time.monotonic() - t0:.0f} s",
                flush=True,
            )
        bad = []
        for name in ("zpl", "mi"):
            n, faults = every_write(root, name, 5)
            bad += faults
            print(
                f"{name}: killed before and after each durable write, {n} kills: {n - len(faults)} resumed bit-identical; {time.monotonic() - t0:.0f} s",
                flush=True,
            )
            for f in faults:
                print("   FAULT", *f, flush=True)
        left = list((root / "state").glob("*")) if (root / "state").exists() else []
        print(f"secret files left over from finished runs: {len(left)}", flush=True)
    sys.exit(bool(bad or left))
