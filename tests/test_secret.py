"""Nothing of the secret leaves a run but through the releases.

Two designs. *Twins*: two runs that differ in the secret alone, with the same coins and noise, and with secrets that have the same sign
in every noisy release: the releases are equal, so everything else that leaves must be equal, byte for byte (the clock and the memory
meter are stopped). *Needle*: a secret of the operating system among 65,536 subsets, and a search for its number in everything that is left.
"""
import copy, hashlib, json, os, pickle, random, re, struct, subprocess, sys, traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import readme
import torch

import paczero.finetune as F
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.run.folder import secret_file
from paczero.mechanisms import MIBudget, Secret, ZPL
from paczero.mechanisms.secret import OSEntropy
from paczero.models import load_model
from paczero.publish import model_card, save_release
from paczero.subsets import SubsetDesign
from paczero.tasks import load_task
from paczero.transcript import read_log
from transformers import TrainerCallback

STEPS, M = 5, 64
TASK = load_task("reviews", seed=0, n_train=40, n_dev=10, n_eval=10)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def go(mechanism, folder=None, m=M, steps=STEPS, callbacks=(), test=False, **kw):
    "A short run."
    config = FineTuneConfig(steps=steps, lr=1e-3, m=m, eval_every=2, seed=3, **kw)
    return finetune(*load_model("tiny-opt"), TASK, mechanism, config, folder=folder, callbacks=callbacks, runtime=Runtime(test=test))


# ---------------------------------------------------------------- twins

def fix(monkeypatch, index):
    "The operating system's entropy for a test: bits as told, the secret as told. Nothing else knows that it is a test."
    def bits(self, k, where): return int.from_bytes(hashlib.shake_256(f"twins {where}".encode()).digest((k + 7) // 8), "big") >> (-k % 8)
    monkeypatch.setattr(OSEntropy, "bits", bits)
    monkeypatch.setattr(OSEntropy, "below", lambda self, m, where: index)
    monkeypatch.setattr(F, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(F, "peak_memory", lambda device: 0)


def twin_of(ledger, index):
    "Another subset with the same sign as `index` in every noisy release."
    signs = []
    for e in read_log(ledger)[0]:
        for r in e.get("releases", []):
            if r["kind"] == "noisy": signs.append(F.Release.from_record(r).sign_vector)
    assert signs, "no noisy release: this run would say nothing"
    same = np.flatnonzero((np.stack(signs) == np.stack(signs)[:, [index]]).all(0))
    return int(next(j for j in same if j != index)), len(signs)


def views(x, name):
    "All the ways in which an object is commonly shown, saved or sent."
    attempts = dict(repr=lambda: repr(x), str=lambda: str(x), format=lambda: f"{x}", vars=lambda: repr(vars(x)), json=lambda: json.dumps(x),
                    dict=lambda: json.dumps(x.to_dict()), describe=lambda: json.dumps(x.describe()), markdown=lambda: x.markdown(), pickle=lambda: pickle.dumps(x), copy=lambda: repr(copy.copy(x)),
                    deepcopy=lambda: repr(copy.deepcopy(x)), ledger=lambda: json.dumps(x.ledger.to_dict()), state=lambda: repr(x.__getstate__()))
    out = {}
    for k, f in attempts.items():
        try: v = f()
        except Exception as e: v = f"{type(e).__name__}: {e}"
        out[f"{name}.{k}"] = v if isinstance(v, bytes) else re.sub(r"0x[0-9a-f]{6,}", "0x", v)
    return out


def seen(error, folder):
    "An exception as the most talkative tools show it: every frame, every cause, every local variable."
    text = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()) + "".join(traceback.format_exception(error))
    return re.sub(r"0x[0-9a-f]{6,}", "0x", text.replace(str(folder), "RUN"))


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Fail(TrainerCallback):
    "Raises, with a cause, after three steps."
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 3:
            try: raise OSError("a disk somewhere")
            except OSError as e: raise RuntimeError("a callback of the user's failed") from e


def everything(monkeypatch, capfd, recwarn, root, index):
    "All that a run with this secret leaves, shows and says: finished, then provoked to fail in several ways."
    out = {}
    with monkeypatch.context() as mp:
        fix(mp, index)
        mechanism = MIBudget(budget=1.0, steps=STEPS)
        result = go(mechanism, root / "run", test=True)
        out |= {f"file {k}": v for k, v in files(root / "run").items()}
        for k, x in dict(result=replace(result, model=None, folder=None), mechanism=mechanism, guarantee=result.guarantee, transcript=result.transcript, metrics=result.metrics,
                         secret=mechanism._secret, entropy=mechanism._entropy, ledger=mechanism.ledger, history=result.history.to_dict()).items(): out |= views(x, k)
        out |= {f"release {k}": v for k, v in files(save_release(result, None, root / "release")).items()}

        def provoke(name, patch=lambda mp: None, error=Exception, **kw):
            with monkeypatch.context() as inner:
                patch(inner)
                with pytest.raises(error) as e: go(MIBudget(budget=1.0, steps=STEPS), root / name, **kw)
            out[f"error {name}"] = seen(e.value, root)
            out.update({f"file of {name}: {k}": v for k, v in files(root / name).items()})
            assert e.value.__traceback__ is not None

        provoke("callback", callbacks=[Fail], error=RuntimeError)
        def in_noise(mp): mp.setattr(OSEntropy, "gauss", lambda self, where: 1 / 0)
        provoke("noise", in_noise, ZeroDivisionError)                    # the frame above holds the secret
        def interrupted(mp): mp.setattr(Secret, "pick", lambda self, values: (_ for _ in ()).throw(KeyboardInterrupt()))
        provoke("interrupt", interrupted, BaseException)
        def full(mp):
            real = os.fsync
            def fsync(fd):
                if (root / "disk" / "ledger.jsonl").exists() and (root / "disk" / "ledger.jsonl").stat().st_size > 600: raise OSError(28, "No space left on device")
                return real(fd)
            mp.setattr(os, "fsync", fsync)
        provoke("disk", full, OSError)
        def nan(mp):
            real = F.differences
            def f(theta, losses, t, k=1):
                return real(theta, (lambda: losses() * float("nan")) if t == 2 else losses, t, k)
            mp.setattr(F, "differences", f)
        provoke("nan", nan, FloatingPointError)
    text = capfd.readouterr()
    out["stdout"], out["stderr"] = text.out.replace(str(root), "RUN"), text.err.replace(str(root), "RUN")
    out["warnings"] = "\n".join(sorted({str(w.message) for w in recwarn.list}))
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Two secrets that these runs cannot tell apart by their releases."
    root = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(root / "state")); fix(mp, 7)
        go(MIBudget(budget=1.0, steps=STEPS), root / "run")
    other, noisy = twin_of(root / "run" / "ledger.jsonl", 7)
    return 7, other, noisy


def test_twins(pair, monkeypatch, capfd, recwarn, tmp_path):
    a, b, noisy = pair
    assert a != b and noisy >= 1
    one = everything(monkeypatch, capfd, recwarn, tmp_path / "same", a)
    (tmp_path / "same").rename(tmp_path / "before")                       # the same path for both
    two = everything(monkeypatch, capfd, recwarn, tmp_path / "same", b)
    assert one.keys() == two.keys() and len(one) > 100
    differ = [k for k in one if one[k] != two[k]]
    assert not differ, (differ, [[(x, y) for x, y in zip(one[k].splitlines(), two[k].splitlines()) if x != y][:3] for k in differ if isinstance(one[k], str)])
    for k in ("file transcript.jsonl", "file diagnostics.parquet", "error noise", "error disk"): assert one[k]
    assert "Secret(hidden)" in one["error noise"]                         # the locals of the frame that held it were shown
    assert all("refuses" in one[f"secret.{k}"] for k in ("pickle", "copy", "deepcopy")) and "refuses" in one["mechanism.pickle"] and "refuses" in one["mechanism.deepcopy"]


@pytest.mark.parametrize("leak", ["repr", "pickle", "diagnostics", "print"])
def test_twins_would_tell(leak, pair, monkeypatch, capfd, tmp_path):
    "The control: each of these leaks makes the twins differ."
    index = lambda s: s.pick(range(M))
    got = []
    for j in pair[:2]:
        with monkeypatch.context() as mp:
            fix(mp, j)
            if leak == "repr": mp.setattr(Secret, "__repr__", lambda s: f"Secret({index(s)})")
            if leak == "pickle": mp.setattr(Secret, "__reduce_ex__", lambda s, p: (Secret, (index(s),)))
            mech = MIBudget(budget=1.0, steps=STEPS)
            if leak == "print": mp.setattr(mech, "_record", lambda rel, mech=mech: (print("debug: subset", index(mech._secret)), type(mech)._record(mech, rel))[1])
            if leak == "diagnostics":
                real = F.RunFolder.write_step
                mp.setattr(F.RunFolder, "write_step", lambda self, t, rel, d, mech=mech: real(self, t, rel, dict(d, loss=d["loss"] + 1e-12 * index(mech._secret))))
            go(mech, tmp_path / f"{leak}-{j}")
            got.append({**files(tmp_path / f"{leak}-{j}"), **views(mech, "mechanism"), "out": capfd.readouterr().out})
    assert any(got[0][k] != got[1][k] for k in got[0])


SITE = """
import os, sys
if any("ipykernel" in a for a in sys.orig_argv):
    import hashlib
    from types import SimpleNamespace
    import paczero.finetune as F, paczero.experiment
    from paczero.mechanisms import OSEntropy
    def bits(self, k, where): return int.from_bytes(hashlib.shake_256(f"twins {where}".encode()).digest((k + 7) // 8), "big") >> (-k % 8)
    OSEntropy.bits = bits
    OSEntropy.below = lambda self, m, where: int(os.environ["TWIN"])
    F.time, F.peak_memory = SimpleNamespace(perf_counter=lambda: 0.0), lambda device: 0
"""


def notebook(root, index):
    "run_experiment by papermill, with this secret: its log, the executed notebook without its clock, its files."
    (root / "site").mkdir(parents=True); (root / "site" / "sitecustomize.py").write_text(SITE)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(root / "site"), str(readme.ROOT)]), TWIN=str(index), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MPLBACKEND="agg")
    p = dict(mechanism="mi", budget="1.0", steps=4, m=M, n_train=40, n_dev=10, n_eval=10, reference=False, run_id="twin", results_dir=str(root / "results"))
    args = [x for k, v in p.items() for x in ("-p", k, str(v))]
    done = subprocess.run([str(Path(sys.executable).parent / "papermill"), str(readme.ROOT / "nbs" / "run_experiment.ipynb"), str(root / "out.ipynb"), *args, "--cwd", str(root)],
                          env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    def clean(s):
        s = re.sub(r"\x1b\[[0-9;]*m", "", s).replace(str(root), "ROOT")
        s = re.sub(r"0x[0-9a-f]{6,}", "0x", s)
        s = re.sub(r"\d+(\.\d+)? ?(s/step|s each|s\b|seconds?|it/s|cell/s|s/cell)|\d+:\d\d(:\d\d)?|\?(it|cell)/s|[\d,.]+ MiB|[\d,.]+ kB", "#", s)
        return re.sub(r"\d+\.\d+#|\d\.\d+s", "#", s)
    nb = json.loads((root / "out.ipynb").read_text())
    stream = lambda c: "".join("".join(o["text"]) for o in c.get("outputs", []) if o["output_type"] == "stream")       # in how many pieces it came is the clock's affair
    shown = lambda c: [{k: v for k, v in o.items() if k != "metadata"} for o in c.get("outputs", []) if o["output_type"] != "stream"]
    cells = [dict(source=clean("".join(c["source"])), outputs=[clean(stream(c))] + [clean(json.dumps(o, sort_keys=True)) for o in shown(c)]) for c in nb["cells"]]
    ids = lambda raw: re.sub(rb'(id="|#|clip-path="url\()[\w-]+', b"", raw)                 # matplotlib names parts of an SVG at random
    left = {k: ids(v) if k.endswith(".svg") else v for k, v in files(root / "results").items()}
    log = [l for l in clean(done.stderr + done.stdout).splitlines() if l.strip() and "Executing" not in l and "%|" not in l]
    return dict(cells=cells, files=left, log=log)


def test_twins_in_the_notebook(tmp_path):
    one = notebook(tmp_path / "a", 5)
    other, _ = twin_of(tmp_path / "a" / "results" / "runs" / "twin" / "ledger.jsonl", 5)
    two = notebook(tmp_path / "b", other)
    assert one["files"].keys() == two["files"].keys() and any(k.endswith(".png") for k in one["files"])
    assert not [k for k in one["files"] if one["files"][k] != two["files"][k]]
    for a, b in zip(one["cells"], two["cells"]): assert a == b, (a["source"][:200], [(x[:300], y[:300]) for x, y in zip(a["outputs"], b["outputs"]) if x != y][:2])
    assert one["log"] == two["log"]


# ---------------------------------------------------------------- needle

def needles(index):
    "The number as it may be written."
    text = rf"(?<![0-9A-Fa-f.])(?:{index}|0x{index:x}|{index:016b})(?![0-9A-Fa-f.])"
    return re.compile(text.encode()), [struct.pack(f, index) for f in ("<q", "<i", ">q", ">i", "<d", "<f")]


def test_needle(capfd, tmp_path, state):
    "A real secret among 65,536 subsets is found nowhere."
    for attempt in range(50):                               # until its number is long enough not to occur by chance
        mech, watched = MIBudget(budget=0.5, steps=4), {}
        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kw): watched["file"] = [(p, p.stat().st_mode & 0o777, p.parent.stat().st_mode & 0o777) for p in state_dir.glob("*")]
        state_dir = state
        result = go(mech, tmp_path / f"run{attempt}", m=65536, steps=4, callbacks=[Watch])
        index = mech._secret.pick(range(65536))
        if index > 12000 and index % 1000: break
    text, packed = needles(index)
    (file, mode, around), = watched["file"]
    assert mode == 0o600 and tmp_path / f"run{attempt}" not in file.parents and not file.exists()      # kept outside while needed, gone afterwards
    if os.name == "posix": assert around & 0o077 == 0
    save_release(result, None, tmp_path / "release")
    out = capfd.readouterr()
    hay = {"stdout": out.out.encode(), "stderr": out.err.encode(), **{f"run {k}": v for k, v in files(tmp_path / f"run{attempt}").items()}, **{f"release {k}": v for k, v in files(tmp_path / "release").items()}}
    for k, x in dict(result=replace(result, model=None), mechanism=mech, guarantee=result.guarantee, secret=mech._secret).items():
        hay |= {n: v if isinstance(v, bytes) else v.encode() for n, v in views(x, k).items()}
    for k, v in hay.items():
        assert not text.search(v), (k, text.search(v))
        if k.endswith((".parquet", ".pickle")): assert not any(p in v for p in packed[:1] + packed[2:3]), k
    for n in (rb'{"index": %d}' % index, b"subset %d," % index, b"%#x" % index): assert text.search(n)      # the control: the search does find it


def test_no_secret_is_kept_where_none_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", "off")
    assert secret_file(tmp_path) is None
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): go(MIBudget(budget=.1, steps=STEPS), tmp_path / "run", callbacks=[Stop])
    with pytest.raises(RuntimeError, match="cannot go on"): go(MIBudget(budget=.1, steps=STEPS), tmp_path / "run")


# ---------------------------------------------------------------- the user's seeds

def seed_all():
    random.seed(0); np.random.seed(0); torch.manual_seed(0)


def states(): return random.getstate(), [x.tolist() if hasattr(x, "tolist") else x for x in np.random.get_state()], torch.get_rng_state().tolist()


def test_a_users_seed_changes_nothing():
    "Two runs after the same global seeds have other coins; and the global generators stand where they stood."
    got = []
    for _ in range(2):
        seed_all(); before = states()
        r = go(ZPL(), m=16384, steps=20, k=4)
        assert states() == before
        assert r.metrics["releases"].get("coin", 0) >= 20
        got.append([(k, y) for k, y in zip(r.history.kind, r.history.released)])
    coins = [[y for k, y in g if k == "coin"] for g in got]
    assert coins[0] != coins[1]                            # equal by chance: once in a million or less


def test_coins_are_fair_whatever_the_seed():
    "Chi-square of 20,000 coins, thrown after the same global seed again and again, alone and in neighbouring pairs."
    design, runs = SubsetDesign(50, 16, 0), []
    ghat = np.where(design.membership[:, 0], 1.0, -1.0)          # subset 0 says +, its opposites say -: never unanimous
    for _ in range(20):
        seed_all()
        mech = ZPL().bind(design)
        rel = [mech.step(ghat)[0] for _ in range(1000)]
        assert all(r.kind == "coin" for r in rel)
        runs.append([r.sign for r in rel])
    x = (np.array(runs) > 0)
    chi = lambda counts: ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    from scipy.stats import chi2
    assert chi2.sf(chi(np.bincount(x.ravel().astype(int), minlength=2)), 1) > 1e-6
    assert chi2.sf(chi(np.bincount((2 * x[:, 0::2] + x[:, 1::2]).ravel(), minlength=4)), 3) > 1e-6      # pairs in time
    assert chi2.sf(chi(np.bincount((2 * x[0::2] + x[1::2]).ravel(), minlength=4)), 3) > 1e-6            # pairs of runs under the same seed
    assert chi(np.bincount(np.tile(x[0], 20).astype(int) * 0 + 1, minlength=2)) > 1000                   # the control: a coin that is none is seen
    first = {MIBudget(budget=.1, steps=1).bind(SubsetDesign(200, 4096, 0))._secret.pick(range(4096)) for _ in range(8) if not seed_all()}
    assert len(first) >= 6                                  # secrets, too


# ---------------------------------------------------------------- the stamp

def test_audit_runs_are_stamped(tmp_path):
    for mech in (ZPL(audit_seed=1), MIBudget(budget=.1, steps=STEPS, audit_seed=1)):
        folder = tmp_path / mech.name
        r = go(mech, folder)
        stamp = "secret fixed for audit: no guarantee"
        for name in ("config.json", "transcript.jsonl", "metrics.json", "guarantee.md"): assert stamp in (folder / name).read_text(), name
        assert stamp in (folder / "transcript.jsonl").read_text().splitlines()[0] and stamp in repr(mech) and stamp in r.guarantee.markdown()
        assert "**No guarantee.**" in model_card(r).split("## Privacy guarantee")[0] and stamp in model_card(r)
        save_release(r, None, tmp_path / f"release-{mech.name}")
        for name in ("README.md", "release.json", "transcript.jsonl"): assert stamp in (tmp_path / f"release-{mech.name}" / name).read_text(), name
        assert r.metrics["guarantee_covers"] is False and r.metrics["posterior_bound"] == 1.0 and r.metrics["mi_bound"] is None
    r = go(ZPL(), tmp_path / "real")
    for p in (tmp_path / "real").iterdir():
        if p.suffix in (".json", ".jsonl", ".md"): assert "audit" not in p.read_text()
