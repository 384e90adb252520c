"""Kill a small run a hundred times, at random moments and at every write, and compare what it ends with bit for bit.

    python tools/kill100.py             # 100 random kills over ZPL and MI runs, then one before and after every write
    python tools/kill100.py --kills 10  # fewer

It takes minutes, so it is no test (tests/finetune/test_killed_runs_go_on.py is a short one). One parent imports
everything once and forks a worker for each attempt; the worker is killed with SIGKILL. The secret, the coins and the
noise are fixed by an audit seed, so that two runs can be compared at all. A kill is no power cut: what a killed process
wrote is there whether the disk is slow or made of memory, so memory will do.
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
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
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


# ---------------------------------------------------------------- the worker


class Worker:
    "A run that is started, killed and resumed: its mechanism's name, its folder, its steps."

    def __init__(self, base, task, name, folder, steps):
        self.base, self.task, self.name, self.folder, self.steps = base, task, name, folder, steps
        self.log = Path(f"{folder}.log")

    def run(self):
        "What the worker does."
        fixed = ZPL(audit_seed=SEED)
        mechanism = fixed if self.name == "zpl" else MIBudget(budget=0.5, steps=self.steps, audit_seed=SEED)
        config = FineTuneConfig(steps=self.steps, lr=1e-3, m=8, eval_every=max(1, self.steps // 6), seed=1)
        runtime = Runtime(test=True)
        finetune(*self.base, self.task, mechanism, config, folder=self.folder, runtime=runtime)

    def fork(self, crash=None):
        "Start a worker; its process id."
        pid = os.fork()
        if pid:
            return pid
        code = 3
        try:
            err = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(err, 1)
            os.dup2(err, 2)
            if crash:
                crash_at(*crash)
            self.run()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def whole(self):
        "Run without a kill; the seconds that it took."
        start = time.monotonic()
        assert not wait(self.fork())
        self.must_be_finished()
        return time.monotonic() - start

    @property
    def finished(self):
        return (self.folder / "metrics.json").exists()

    def must_be_finished(self):
        if not self.finished:
            raise AssertionError(f"{self.folder.name} did not end:\n" + self.log.read_text()[-2000:])


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


# ---------------------------------------------------------------- what must hold


def lines(path):
    "The whole lines of a log, as they lie on the disk."
    raw = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]


def check_booked(folder):
    "Nothing is public that was not booked first, and it was booked for what it was."
    ledger = [e for e in lines(folder / "ledger.jsonl") if "releases" in e]
    public = [e for e in lines(folder / "transcript.jsonl") if "y" in e]
    assert len(public) <= len(ledger), f"{folder}: {len(public)} steps released, {len(ledger)} booked"
    for a, b in zip(public, ledger):
        assert a["t"] == b["t"] and a["y"] == [r["scalar"] for r in b["releases"]], (a, b)
    return len(ledger)


def without_clock(entry):
    "A ledger's entry without its seconds."
    if "diagnostics" not in entry:
        return entry
    return {**entry, "diagnostics": {k: v for k, v in entry["diagnostics"].items() if k != "seconds"}}


def outcome(folder):
    "All that must be the same: the releases, the ledger but for its clock, the scores, the spending, the weights."
    clock = ("seconds", "seconds_per_step", "peak_memory_bytes")
    metrics = json.loads((folder / "metrics.json").read_text())
    same = {name: (folder / name).read_bytes() for name in ("transcript.jsonl", "evaluations.csv", "config.json")}
    ledger = [without_clock(e) for e in read_log(folder / "ledger.jsonl")[0] if "run" not in e]     # a run's own name
    return dict(same, ledger=ledger,
                metrics={k: v for k, v in metrics.items() if k not in clock})


def compare(whole, folder):
    "A run that was killed against the one that was not."
    a, b = outcome(whole), outcome(folder)
    for k in a:
        assert a[k] == b[k], f"{folder.name}: {k} differs from the uninterrupted run's"


def check_replay(folder):
    "The transcript leads to the weights that it says."
    ts = Transcript.load(folder / "transcript.jsonl")
    assert weights_digest(replay(load_model("tiny-opt")[0], ts)) == ts.end["weights"]


# ---------------------------------------------------------------- killing


def moment(rng, ledger, size, seconds):
    "When to kill: after a number of bytes of the ledger, or after some time."
    if rng.random() < 0.5:
        have = ledger.stat().st_size if ledger.exists() else 0
        goal = have + rng.randrange(1, max(2, size // 5))
        return lambda: ledger.exists() and ledger.stat().st_size >= goal
    end = time.monotonic() + rng.uniform(0, 1.2 * seconds)
    return lambda: time.monotonic() > end


def random_kills(make, whole, kills, rng, seconds):
    "Runs killed at random moments until `kills` are reached; each one is resumed to its end and compared."
    runs, moments = 0, []
    size = (whole / "ledger.jsonl").stat().st_size
    while len(moments) < kills:
        worker = make(str(runs))
        runs += 1
        while not worker.finished:
            before = check_booked(worker.folder)
            goes_on = len(moments) < kills
            until = moment(rng, worker.folder / "ledger.jsonl", size, seconds) if goes_on else None
            killed = wait(worker.fork(), until)
            after = check_booked(worker.folder)
            assert after >= before, "the ledger became shorter"
            if killed:
                moments.append(after)
            else:
                worker.must_be_finished()
        compare(whole, worker.folder)
        check_replay(worker.folder)
    return runs, moments


def every_write(make):
    "One kill before and one after every durable write of a short run, each resumed and compared."
    whole, n, faults = make("every"), 0, []
    whole.whole()
    for after in (False, True):
        count = 1
        while True:
            worker = make(f"{'after' if after else 'before'}-{count}")
            if not wait(worker.fork((count, after))):                # it ended before that many writes
                worker.must_be_finished()
                break
            n += 1
            check_booked(worker.folder)
            if not worker.finished:
                wait(worker.fork())
            if worker.finished:
                compare(whole.folder, worker.folder)
            else:
                faults.append((worker.folder.name, worker.log.read_text().strip().splitlines()[-1][:300]))
            count += 1
    return n, faults


# ---------------------------------------------------------------- the command


def arguments():
    p = argparse.ArgumentParser()
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    return p.parse_args()


def sixths(moments, steps):
    "How many kills fell in each sixth of the steps, and after the last."
    counts = [sum(q * steps / 6 <= x < (q + 1) * steps / 6 for x in moments) for q in range(6)]
    return counts + [sum(x >= steps for x in moments)]


def kill_at_random(a, make, name, kills):
    "One mechanism's random kills, and a line about them."
    whole = make(name, a.steps)("whole")
    seconds = whole.whole()
    runs, moments = random_kills(make(name, a.steps), whole.folder, kills, random.Random(a.seed), seconds)
    print(f"{name}: {len(moments)} kills over {runs} runs of {a.steps} steps ({seconds:.1f} s each uninterrupted), "
          "all ended bit-identical, none under-booked;\n  kills by sixth of the steps, and after the last: "
          f"{sixths(moments, a.steps)}; seed {a.seed}", flush=True)


def kill_at_every_write(make, name):
    "One mechanism's kills around every write; what did not come out the same."
    n, faults = every_write(make(name, 5))
    print(f"{name}: killed before and after each durable write, {n} kills: {n - len(faults)} resumed bit-identical",
          flush=True)
    for f in faults:
        print("   FAULT", *f, flush=True)
    return faults


def main():
    a = arguments()
    with tempfile.TemporaryDirectory(prefix="kill100-", dir=MEMORY) as tmp:
        root = Path(tmp)
        os.environ["PACZERO_STATE_DIR"] = str(root / "state")
        base, task = load_model("tiny-opt"), load_task("reviews", seed=0, n_train=40, n_dev=20, n_eval=20)
        make = lambda name, steps: lambda what: Worker(base, task, name, root / f"{name}-{what}", steps)
        kill_at_random(a, make, "zpl", a.kills // 2)
        kill_at_random(a, make, "mi", a.kills - a.kills // 2)
        bad = kill_at_every_write(make, "zpl") + kill_at_every_write(make, "mi")
        left = list((root / "state").glob("*")) if (root / "state").exists() else []
        print(f"secret files left over from finished runs: {len(left)}", flush=True)
    return bool(bad or left)


if __name__ == "__main__":
    sys.exit(main())
