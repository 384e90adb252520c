"""A run's folder is copied, killed, torn, moved and put back: whatever was drawn once is never drawn anew.

The first half plays runs without a model, in processes that are killed at every write; the second one is the attack as
somebody would make it, on runs of the embedded model.
"""
import json
import os
import shutil
import signal
import traceback
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import DPZero, MIBudget, NonPrivate, ZPL
from paczero.models import load_model
from paczero.run.folder import RunFolder, hold_secret
from paczero.run.mark import Mark, kept_file
from paczero.subsets import SubsetDesign
from paczero.tasks import load_task
from paczero.transcript import TranscriptError, log, read_log

from stops import Stop

STEPS, N = 5, 24
HEADER = dict(format="paczero-transcript/1", mechanism=dict(name="a test's"))
REFUSED = "Going on from a copy would draw anew"


class Own(ZPL):
    "No secret, and it does not say that its steps may be drawn again."

    may_redraw = False


MECHANISMS = dict(
    mi=lambda: MIBudget(budget=0.3, steps=STEPS), own=Own, half=lambda: NonPrivate(signal="raw_half"))


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


# ---------------------------------------------------------------- runs without a model


def live(folder, name, until=STEPS):
    "A run from wherever it stands to so many steps, as the loop does it; all of them: to its end."
    disk, mechanism = RunFolder(folder, dict(lr=0.1), HEADER, keep=True), MECHANISMS[name]()
    try:
        mechanism.bind(SubsetDesign(N, 8, seed=0))
        if "end" in disk.transcript.entries[-1]:
            return disk.forget()
        if not any("test_before" in e for e in disk.ledger.entries):
            disk.ledger.append({"test_before": {}})
        hold_secret(mechanism, disk)
        mechanism.restore([r for e in disk.steps for r in e["releases"]])
        for t in range(len(disk.steps), until):
            ghat = np.random.Generator(np.random.PCG64(t)).normal(size=(1, N))
            disk.write_step(t, mechanism.step(ghat), dict(lr=0.1, loss=0.7, seconds=0.0))
            if t % 2:
                disk.ledger.append({"at": t + 1, "dev": {"loss": 0.5}})
        if until == STEPS:
            disk.transcript.append({"end": {}})
            disk.forget()
    finally:
        disk.close()


def killed(work, crash):
    "Do something in a process of its own, which `crash` may have killed; whether it was."
    pid = os.fork()
    if not pid:
        try:
            crash()
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(count):
    "Killed before the `count`-th sync to the disk, removal or renaming, of whichever file."
    return at(count, after=False)


def after(count):
    "Killed behind it."
    return at(count, after=True)


def at(count, after):
    seen = [0]

    def wrap(f):
        def g(*a, **k):
            seen[0] += 1
            if seen[0] == count and not after:
                die()
            now = seen[0] == count
            try:
                return f(*a, **k)
            finally:
                if now:
                    die()

        return g

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, wrap(getattr(os, name)))


class Half:
    "A log's file that is killed in the middle of its `count`-th line, counted over all logs."

    seen = 0

    def __init__(self, f, count):
        self.f, self.count = f, count

    def write(self, data):
        Half.seen += 1
        if Half.seen == self.count:
            self.f.write(data[: len(data) // 2])
            die()
        return self.f.write(data)

    def __getattr__(self, name):
        return getattr(self.f, name)


def torn(count):
    "Killed in the middle of the `count`-th line."
    real = log._open_alone
    log._open_alone = lambda *a: Half(real(*a), count)


def steps(folder):
    "The ledger's steps, as far as they are there."
    file = folder / "ledger.jsonl"
    return [e for e in read_log(file, recover=True)[0] if "releases" in e] if file.exists() else []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("crash", [before, after, torn], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["mi", "own"])
def test_a_kill_anywhere_is_gone_on_from(name, crash, tmp_path, state):
    for count in range(1, 200):
        folder = tmp_path / f"run{count}"
        if not killed(lambda: live(folder, name), lambda: crash(count)):
            break
        was = steps(folder)
        marked = [e["next"] for f in state.glob("*.mark") for e in read_log(f, recover=True)[0] if "next" in e]
        live(folder, name)
        now = steps(folder)
        assert len(now) == STEPS and now[: len(was)] == was and now[: len(marked)] == marked
        public = [e["y"] for e in read_log(folder / "transcript.jsonl")[0] if "y" in e]
        assert public == [[r["scalar"] for r in e["releases"]] for e in now]
        assert not list(state.iterdir())
    assert count > 15


@contextmanager
def every_write(each):
    "Call `each()` after every sync to the disk."
    real = os.fsync

    def fsync(fd):
        real(fd)
        os.fsync = real
        try:
            each()
        finally:
            os.fsync = fsync

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = real


def copies_of(folder, name, place):
    "A run that is stopped before its end, copied after each write."
    copies = []

    def copy():
        if (folder / "ledger.jsonl").exists():
            copies.append(shutil.copytree(folder, place / str(len(copies))))

    with every_write(copy):
        live(folder, name, STEPS - 1)
    return copies


def put_back(copy, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(copy, folder)


def answers(folder, name, tmp_path, elsewhere=False):
    "For each copy that is put back, in another place or the same: the steps it then had, or None where refused."
    state, kept = tmp_path / "state", tmp_path / "kept"
    copies = copies_of(folder, name, tmp_path / "copies")
    true = steps(folder)
    shutil.copytree(state, kept)
    out = []
    for i, copy in enumerate(copies):
        to = tmp_path / f"away{i}" if elsewhere else folder
        put_back(copy, to)
        shutil.rmtree(state)
        shutil.copytree(kept, state)
        out.append(None)
        with suppress(TranscriptError):
            live(to, name, STEPS - 1)
            out[-1] = steps(to)
    return true, out


@pytest.mark.parametrize("elsewhere", [False, True], ids=["put back", "elsewhere"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_no_copy_gets_another_answer(name, elsewhere, tmp_path):
    true, out = answers(tmp_path / "run", name, tmp_path, elsewhere)
    named = [x for x in out if x is not None and len(x) == len(true)]
    assert len(out) > 10 and out.count(None) > 5 and named
    # a copy without a name yet is another run, with a secret of its own; every other one has the same steps, or none
    first = next(i for i, c in enumerate(sorted((tmp_path / "copies").iterdir(), key=lambda p: int(p.name)))
                 if (c / "ledger.jsonl").stat().st_size)
    assert all(x in (None, true) for x in out[first:])


def test_without_the_line_in_the_mark_a_copy_would_be_answered(tmp_path, monkeypatch):
    "The control: counting and chain alone let the copy from just before the last release draw it anew."
    monkeypatch.setattr(Mark, "ahead", lambda self, line: self.log.append(self._here()))
    true, out = answers(tmp_path / "run", "mi", tmp_path)
    assert any(x not in (None, true) for x in out)


def test_a_private_log_is_private_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        live(tmp_path / "run", "mi", 2)
    finally:
        os.umask(old)
    modes = {f: (tmp_path / "run" / f).stat().st_mode & 0o777 for f in ("ledger.jsonl", "transcript.jsonl")}
    assert modes == {"ledger.jsonl": 0o600, "transcript.jsonl": 0o666}
    (tmp_path / "run" / "ledger.jsonl").chmod(0o644)                # as an older version left it
    live(tmp_path / "run", "mi", 3)
    assert (tmp_path / "run" / "ledger.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cut", [1, 9, None], ids=["newline", "torn", "line"])
def test_a_ledger_behind_its_transcript_is_left_as_it_is(cut, tmp_path):
    live(tmp_path / "run", "own", 3)
    ledger = tmp_path / "run" / "ledger.jsonl"
    raw = ledger.read_bytes()
    ledger.write_bytes(raw[: -cut if cut else raw[:-1].rfind(b"\n") + 1])
    there = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(TranscriptError, match="do not tell the same story"):
        live(tmp_path / "run", "own")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == there


def test_one_writer_though_the_lock_is_removed(tmp_path):
    live(tmp_path / "run", "own", 2)
    disk = RunFolder(tmp_path / "run", dict(lr=0.1), HEADER, keep=True)
    (tmp_path / "run" / ".lock").unlink()
    with pytest.raises(RuntimeError, match="another process is working on it"):
        live(tmp_path / "run", "own", 3)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(RuntimeError, match="another process is working on it"):
        live(tmp_path / "copy", "own", 3)                               # its mark is the run's
    disk.close()


# ---------------------------------------------------------------- runs of a model

TASK = load_task("reviews", seed=0, n_train=40, n_dev=10, n_eval=10)
CONFIG = FineTuneConfig(steps=12, lr=1e-3, m=64, eval_every=4, seed=3, clip=20.0)
DP = dict(epsilon=2.0, sample_rate=0.25, steps=12, clip=20.0, accountant="rdp")


def go(mechanism, folder, stop=None):
    "The run, from wherever it stands: to its end, or to a Ctrl-C."
    with suppress(KeyboardInterrupt):
        return finetune(*load_model("tiny-opt"), TASK, mechanism(), CONFIG, folder=folder,
                        callbacks=[Stop(stop)] if stop else (), runtime=Runtime(test=False))


BUDGETS = dict(mi=lambda: MIBudget(budget=0.33, steps=12), dp=lambda: DPZero(**DP))


@pytest.mark.parametrize("mechanism", BUDGETS.values(), ids=BUDGETS)
def test_the_attack(mechanism, tmp_path, state):
    "Stop, copy, go on, put the copy back, go on; fifteen times."
    run, copy, newest = (tmp_path / name for name in ("run", "copy", "newest"))
    go(mechanism, run, stop=4)
    shutil.copytree(run, copy)
    go(mechanism, run, stop=8)
    run.rename(newest)
    for _ in range(15):
        put_back(copy, run)
        with pytest.raises(TranscriptError, match=REFUSED):
            go(mechanism, run)
        assert steps(run) == steps(copy)
    put_back(newest, run)
    result = go(mechanism, run)                                         # the honest one goes on
    assert steps(run)[:8] == steps(newest) and len(steps(run)) == 12
    booked = sum(r.get("mi") or 0 for e in steps(run) for r in e["releases"])
    assert booked == pytest.approx(result.guarantee.mi_spent or 0) and booked <= 0.33
    assert not list(state.iterdir())
    put_back(copy, run)
    with pytest.raises(RuntimeError, match="is gone, so it cannot go on"):
        go(mechanism, run)


def test_zpl_goes_on_from_a_copy(tmp_path, state):
    "New coins; no secret was looked at, and nothing is kept outside."
    go(ZPL, tmp_path / "run", stop=4)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    go(ZPL, tmp_path / "run")
    result = go(ZPL, tmp_path / "copy")
    assert len(steps(tmp_path / "copy")) == 12 and result.guarantee.mi == 0
    assert not list(state.glob("*")) and "run" not in read_log(tmp_path / "copy" / "ledger.jsonl")[0][0]


def test_a_moved_folder_goes_on(tmp_path, state, monkeypatch):
    mechanism = BUDGETS["mi"]
    go(mechanism, tmp_path / "run", stop=2)
    (tmp_path / "run").rename(tmp_path / "moved")
    go(mechanism, tmp_path / "moved", stop=4)
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "other machine"))
    with pytest.raises(RuntimeError, match="move the files with this name along") as e:
        go(mechanism, tmp_path / "moved")
    name = kept_file(tmp_path / "moved", "mark")
    assert str(name) in str(e.value)
    for file in list(state.iterdir()):
        assert file.stem == name.stem
        shutil.move(file, name.parent)
    go(mechanism, tmp_path / "moved")
    assert len(steps(tmp_path / "moved")) == 12 and not list(name.parent.iterdir())


@pytest.mark.parametrize("mechanism", BUDGETS.values(), ids=BUDGETS)
def test_no_state_folder_no_resuming(mechanism, tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", "off")
    go(mechanism, tmp_path / "run", stop=2)
    with pytest.raises(RuntimeError, match="PACZERO_STATE_DIR=off"):
        go(mechanism, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) and len(steps(tmp_path / "run")) == 2
    assert len(go(mechanism, tmp_path / "afresh").transcript) == 12


@pytest.mark.parametrize("inside", ["", "state", "a/b"])
def test_a_state_folder_inside_the_run_is_refused(inside, tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "run" / inside))
    with pytest.raises(ValueError, match="lies in the run's folder"):
        go(BUDGETS["mi"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
