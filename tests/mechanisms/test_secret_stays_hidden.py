"""Nothing of the secret leaves a run but through the releases.

Two designs. *Twins* (tests/twins.py): whatever leaves is equal, byte for byte. *Needle*: a secret of the operating
system among 65,536 subsets, and a search for its number in everything that is left.
"""
import os
import re
import struct
import traceback
from dataclasses import replace

import pytest
from transformers import TrainerCallback

import paczero.finetune as finetuning
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import MIBudget, Secret
from paczero.mechanisms.secret import OSEntropy
from paczero.models import load_model
from paczero.publish import save_release
from paczero.run.folder import RunFolder, secret_file
from paczero.tasks import load_task
from twins import ADDRESS, files, fix, noisy_signs, twin_of, views

STEPS, M = 5, 64
TASK = load_task("reviews", seed=0, n_train=40, n_dev=10, n_eval=10)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def go(mechanism=None, folder=None, m=M, steps=STEPS, callbacks=(), test=False):
    "A short run."
    config = FineTuneConfig(steps=steps, lr=1e-3, m=m, eval_every=2, seed=3)
    mechanism = mechanism or MIBudget(budget=1.0, steps=steps)
    runtime = Runtime(test=test)
    model, tokenizer = load_model("tiny-opt")
    return finetune(model, tokenizer, TASK, mechanism, config, folder=folder, callbacks=callbacks, runtime=runtime)


# ---------------------------------------------------------------- twins


class Fail(TrainerCallback):
    "Raises, with a cause, after three steps."

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 3:
            try:
                raise OSError("a disk somewhere")
            except OSError as e:
                raise RuntimeError("a callback of the user's failed") from e


def no_noise(mp, folder):
    "The frame above the one that fails holds the secret."
    mp.setattr(OSEntropy, "gauss", lambda self, where: 1 / 0)


def interrupted(mp, folder):
    def pick(self, values):
        raise KeyboardInterrupt

    mp.setattr(Secret, "pick", pick)


def full_disk(mp, folder):
    real, ledger = os.fsync, folder / "ledger.jsonl"

    def fsync(fd):
        if ledger.exists() and ledger.stat().st_size > 600:
            raise OSError(28, "No space left on device")
        return real(fd)

    mp.setattr(os, "fsync", fsync)


def not_finite(mp, folder):
    real = finetuning.differences

    def differences(theta, losses, t, *rest):
        return real(theta, (lambda: losses() * float("nan")) if t == 2 else losses, t, *rest)

    mp.setattr(finetuning, "differences", differences)


PROVOKED = dict(
    callback=(lambda mp, folder: None, RuntimeError), noise=(no_noise, ZeroDivisionError),
    interrupt=(interrupted, BaseException), disk=(full_disk, OSError), nan=(not_finite, FloatingPointError),
)


def shown(error, folder):
    "An exception as the most talkative tools show it: every frame, every cause, every local variable."
    text = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    text += "".join(traceback.format_exception(error))
    return ADDRESS.sub("0x", text.replace(str(folder), "RUN"))


def finished(root):
    "What a run leaves, and every object of it in every view."
    mechanism = MIBudget(budget=1.0, steps=STEPS)
    result = go(mechanism, root / "run", test=True)
    objects = dict(
        result=replace(result, model=None, folder=None), mechanism=mechanism, guarantee=result.guarantee,
        transcript=result.transcript, metrics=result.metrics, secret=mechanism._secret, entropy=mechanism._entropy,
        ledger=mechanism.ledger, history=result.history.to_dict())
    out = {f"file {k}": v for k, v in files(root / "run").items()}
    for k, x in objects.items():
        out |= views(x, k)
    return out | {f"release {k}": v for k, v in files(save_release(result, None, root / "release")).items()}


def provoked(monkeypatch, root, name):
    "What a run leaves that is made to fail, and its error as it is shown."
    patch, error = PROVOKED[name]
    with monkeypatch.context() as mp:
        patch(mp, root / name)
        with pytest.raises(error) as e:
            go(folder=root / name, callbacks=[Fail] if name == "callback" else ())
    assert e.value.__traceback__ is not None
    left = {f"file of {name}: {k}": v for k, v in files(root / name).items()}
    return {f"error {name}": shown(e.value, root), **left}


def everything(monkeypatch, capfd, recwarn, root, index):
    "All that a run with this secret leaves, shows and says: finished, then provoked to fail in several ways."
    with monkeypatch.context() as mp:
        fix(index, mp.setattr)
        out = finished(root)
        for name in PROVOKED:
            out |= provoked(monkeypatch, root, name)
    text = capfd.readouterr()
    out["stdout"], out["stderr"] = text.out.replace(str(root), "RUN"), text.err.replace(str(root), "RUN")
    out["warnings"] = "\n".join(sorted({str(w.message) for w in recwarn.list}))
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Two secrets that these runs cannot tell apart by their releases, and how many of those are noisy."
    root = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(root / "state"))
        fix(7, mp.setattr)
        go(folder=root / "run")
    ledger = root / "run" / "ledger.jsonl"
    return 7, twin_of(ledger, 7), len(noisy_signs(ledger))


def first_differences(a, b):
    "Lines in which two texts differ, a few."
    if isinstance(a, bytes):
        return "bytes"
    return [(x, y) for x, y in zip(a.splitlines(), b.splitlines()) if x != y][:3]


def test_twins(pair, monkeypatch, capfd, recwarn, tmp_path):
    a, b, noisy = pair
    assert a != b and noisy >= 1
    one = everything(monkeypatch, capfd, recwarn, tmp_path / "same", a)
    for path in (tmp_path / "same", tmp_path / "state"):                  # the same paths and names for both
        path.rename(path.with_suffix(".before"))
    two = everything(monkeypatch, capfd, recwarn, tmp_path / "same", b)
    assert one.keys() == two.keys() and len(one) > 100
    differ = {k: first_differences(one[k], two[k]) for k in one if one[k] != two[k]}
    assert not differ
    for k in ("file transcript.jsonl", "file diagnostics.parquet", "error noise", "error disk"):
        assert one[k]
    assert "Secret(hidden)" in one["error noise"]               # the locals of the frame that held it were shown
    for k in ("secret.pickle", "secret.copy", "secret.deepcopy", "mechanism.pickle", "mechanism.deepcopy"):
        assert "refuses" in one[k]


def index_of(secret):
    return secret.pick(range(M))


def leak_repr(mp, mechanism):
    mp.setattr(Secret, "__repr__", lambda s: f"Secret({index_of(s)})")


def leak_pickle(mp, mechanism):
    mp.setattr(Secret, "__reduce_ex__", lambda s, p: (Secret, (index_of(s),)))


def leak_print(mp, mechanism):
    real = mechanism._record

    def record(release):
        print("debug: subset", index_of(mechanism._secret))
        return real(release)

    mp.setattr(mechanism, "_record", record)


def leak_diagnostics(mp, mechanism):
    real = RunFolder.write_step

    def write_step(self, t, releases, diagnostics):
        told = diagnostics["loss"] + 1e-12 * index_of(mechanism._secret)
        return real(self, t, releases, dict(diagnostics, loss=told))

    mp.setattr(RunFolder, "write_step", write_step)


@pytest.mark.parametrize("leak", [leak_repr, leak_pickle, leak_diagnostics, leak_print], ids=lambda f: f.__name__)
def test_twins_would_tell(leak, pair, monkeypatch, capfd, tmp_path):
    "The control: each of these leaks makes the twins differ."
    got = []
    for j in pair[:2]:
        with monkeypatch.context() as mp:
            fix(j, mp.setattr)
            mechanism = MIBudget(budget=1.0, steps=STEPS)
            leak(mp, mechanism)
            go(mechanism, tmp_path / str(j))
            got.append({**files(tmp_path / str(j)), **views(mechanism, "mechanism"), "out": capfd.readouterr().out})
    assert any(got[0][k] != got[1][k] for k in got[0])


# ---------------------------------------------------------------- needle


def needles(index):
    "The number as it may be written: a pattern of text, and its bytes as integers and floats of several kinds."
    text = rf"(?<![0-9A-Fa-f.])(?:{index}|0x{index:x}|{index:016b})(?![0-9A-Fa-f.])"
    return re.compile(text.encode()), [struct.pack(f, index) for f in ("<q", "<i", ">q", ">i", "<d", "<f")]


def watcher(state, seen):
    "A callback that looks at the files of the secret while the run goes on."

    class Watch(TrainerCallback):
        def on_step_end(self, args, state_, control, **kw):
            modes = lambda p: (p.stat().st_mode & 0o777, p.parent.stat().st_mode & 0o777)
            seen[:] = [(p, *modes(p), p.read_bytes()) for p in sorted(state.glob("*"))]

    return Watch


@pytest.fixture
def needle(capfd, tmp_path, state):
    "A run whose secret is a number too long to occur by chance: (result, mechanism, folder, number, files)."
    for attempt in range(50):
        mechanism, seen, folder = MIBudget(budget=0.5, steps=4), [], tmp_path / f"run{attempt}"
        result = go(mechanism, folder, m=65536, steps=4, callbacks=[watcher(state, seen)])
        index = mechanism._secret.pick(range(65536))
        if index > 12000 and index % 1000:
            return result, mechanism, folder, index, seen


def haystack(result, mechanism, folder, release, said):
    "Everything that is left of a run, as bytes."
    hay = {"stdout": said.out.encode(), "stderr": said.err.encode()}
    hay |= {f"run {k}": v for k, v in files(folder).items()} | {f"release {k}": v for k, v in files(release).items()}
    objects = dict(result=replace(result, model=None), mechanism=mechanism, guarantee=result.guarantee,
                   secret=mechanism._secret)
    for k, x in objects.items():
        hay |= {n: v if isinstance(v, bytes) else v.encode() for n, v in views(x, k).items()}
    return hay


def test_needle(needle, capfd, tmp_path):
    "A real secret among 65,536 subsets is found nowhere."
    result, mechanism, folder, index, seen = needle
    text, packed = needles(index)
    save_release(result, None, tmp_path / "release")
    hay = haystack(result, mechanism, folder, tmp_path / "release", capfd.readouterr())
    hay["mark"], = (data for p, _, _, data in seen if p.suffix == ".mark")
    assert hay["mark"].count(b'"releases"') == 4
    for k, v in hay.items():
        assert not text.search(v), (k, text.search(v))
        if k.endswith((".parquet", ".pickle")):
            assert not any(p in v for p in packed[:1] + packed[2:3]), k
    for n in (rb'{"index": %d}' % index, b"subset %d," % index, b"%#x" % index):
        assert text.search(n)                                   # the control: the search does find it


def test_the_secrets_file_is_private_and_temporary(needle):
    "Kept outside the run's folder while it is needed, readable by nobody else, gone afterwards."
    _, _, folder, _, seen = needle
    assert [file.suffix for file, *_ in seen] == [".mark", ".secret"]
    for file, mode, around, _ in seen:
        assert mode == 0o600 and folder not in file.parents and not file.exists()
        assert os.name != "posix" or around & 0o077 == 0


class Stop(TrainerCallback):
    "Stops a run after two steps."

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_no_secret_is_kept_where_none_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", "off")
    assert secret_file(tmp_path) is None
    with pytest.raises(KeyboardInterrupt):
        go(MIBudget(budget=0.1, steps=STEPS), tmp_path / "run", callbacks=[Stop])
    assert not list(tmp_path.rglob("*.secret")) and not list(tmp_path.rglob("*.mark"))
    with pytest.raises(RuntimeError, match="cannot go on"):
        go(MIBudget(budget=0.1, steps=STEPS), tmp_path / "run")


def test_a_run_in_memory_leaves_no_secret(state):
    "Nobody can go on with it, however it ended."
    held = []

    class Look(Stop):
        def on_step_end(self, args, state_, control, **kw):
            held.extend(state.glob("*"))
            super().on_step_end(args, state_, control, **kw)

    with pytest.raises(KeyboardInterrupt):
        go(MIBudget(budget=0.1, steps=STEPS), callbacks=[Look])
    go(MIBudget(budget=0.1, steps=STEPS))
    assert not held and not list(state.glob("*"))
