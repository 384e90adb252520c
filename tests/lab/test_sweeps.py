"""Sweeps: what they cost, what they skip, what they survive; on miniature cells with a few steps and small pools."""
import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock, Timeout

from common import ROOT, environment, patch_everywhere
from paczero.cli.main import main
from paczero.lab import job
from paczero.lab.cost import measured
from paczero.lab.select import plan
from paczero.lab.sweep import sweep
from paczero.run.runs import state, steps_done

CELLS = ["sst2_1p3b_ft_paczpl_s0", "sst2_1p3b_ft_paczpl_s1"]
SMALL = dict(n_train=24, n_dev=8, n_eval=8, m=8, steps=4)


def arguments(root, *cells, **overrides):
    "A miniature sweep's arguments."
    changes = ",".join(f"{k}={v}" for k, v in {**SMALL, **overrides}.items())
    return ["--cell", *cells, "--miniature", "--results-dir", str(root), "--device", "cpu", "--set", changes]


# ---------------------------------------------------------------- before anything runs


def test_dry_run_says_what_it_costs_and_does_nothing(tmp_path, capsys):
    assert main(["sweep", *arguments(tmp_path, *CELLS), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 cells (miniature) on cpu: 0 finished, 2 to run" in text
    assert f"{2 * 2 * 24 * 4:,} forward passes" in text and "s a cell" in text
    assert "memory: up to" in text and "disk: " in text
    assert not list(tmp_path.iterdir())


def measured_run(root, name, **changes):
    "A finished run's files, as far as its speed is read from them."
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    metrics = dict(model="opt-125m", task="sst2", seconds_per_step=6.0, n_pool=300, seconds=60.0, device="cpu",
                   cpus=os.cpu_count(), machine=platform.machine())
    config = dict(model=dict(track="full"), recipe=dict(k=2), mechanism=dict(name="zpl"))
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "cell.json").write_text(json.dumps(dict(seconds=71.0)))


def test_the_cost_comes_from_runs_of_the_same_kind(tmp_path):
    "A finished run of this machine gives the speed; one of another machine, or a broken one, does not."
    measured_run(tmp_path, "a")
    measured_run(tmp_path, "b", machine="abacus")
    measured_run(tmp_path, "c", seconds_per_step="fast")
    table = measured([tmp_path], "cpu")
    assert len(table) == 1
    assert table.forward[0] == pytest.approx(6 / (2 * 2 * 300)) and table.rest[0] == pytest.approx(11)


def test_the_list_of_cells(capsys):
    assert main(["cells"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 144
    assert main(["cells", "--where", "track=lora,mechanism=zpl,table=table1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert main(["status", "--miniature", "--results-dir", "/nonexistent"]) == 0
    assert "0 of 143 cells finished" in capsys.readouterr().out


MISTAKES = [
    (["--cell", "sst2_1p3b_ft_paczp_s0"], "did you mean 'sst2_1p3b_ft_paczpl_s0'"),
    (["--cell", CELLS[0], CELLS[0]], "2 times"), ([], "no cell is selected"),
    (["--table", "table1", "--where", "mechanism=dpzero"], "none in common"),
    (["--table", "tabel1"], "did you mean 'table1'"), (["--cell", CELLS[0], "--set", "steps=3"], "results_dir"),
]


@pytest.mark.parametrize("args, says", MISTAKES)
def test_mistakes_are_said(args, says, capsys):
    assert main(["sweep", *args]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("args", [["sweep", "--where", "mechanism"], ["sweep", "--workers", "0"], ["swep"]])
def test_what_is_no_command(args):
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2


def test_nothing_starts_unconfirmed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert main(["sweep", *arguments(tmp_path, CELLS[0]), "--no-probe"]) == 2
    assert "--yes" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_too_big_for_the_device(tmp_path, monkeypatch):
    "Found by the estimate, written down, and nothing is started."
    patch_everywhere(monkeypatch, "free_memory", lambda device="cpu": 10**9)
    monkeypatch.setattr(job, "_start", lambda j: pytest.fail("was started"))
    big = ["sst2_6p7b_ft_paczpl_s0", "sst2_1p3b_ft_paczpl_s0"]
    out = sweep(plan(big, results_dir=tmp_path), device="cpu")
    assert out.outcome.tolist() == ["failed", "failed"] and out.why.str.startswith("MemoryError: opt-").all()
    failed = json.loads((tmp_path / "runs" / big[0] / "failed.json").read_text())
    assert failed["exception"] == "MemoryError"


# ---------------------------------------------------------------- a failure beside a success


@pytest.fixture(scope="module")
def half_failed(tmp_path_factory):
    "A sweep of two cells, of which one cannot go on: (root, good folder, bad folder, what it said)."
    root = tmp_path_factory.mktemp("sweep")
    good, bad = (root / "runs" / c for c in CELLS)
    bad.mkdir(parents=True)
    (bad / "config.json").write_text("{}")            # an unfinished run of another kind
    p = begin(root, *arguments(root, *CELLS), "--workers", "2")
    out, _ = p.communicate(timeout=400)
    assert p.returncode == 1, out
    return root, good, bad, out


@pytest.mark.slow
def test_a_failure_is_written_down(half_failed):
    _, _, bad, out = half_failed
    assert "1 finished" in out and "1 failed" in out and f"{CELLS[1]} failed: ValueError" in out
    failed = json.loads((bad / "failed.json").read_text())
    assert failed["exception"] == "ValueError" and "unfinished run of another kind" in failed["message"]
    assert failed["last_lines"] and failed["version"] and failed["when"]
    assert state(bad) == "failed"


@pytest.mark.slow
def test_the_rest_goes_on(half_failed):
    root, good, _, _ = half_failed
    cell, m = (json.loads((good / name).read_text()) for name in ("cell.json", "metrics.json"))
    assert state(good) == "finished" and m["steps"] == 4 and not (good / "reference").exists()
    assert cell["run_id"] == CELLS[0] and cell["set"] == "miniature"
    assert cell["recipe"]["model"] == "tiny-opt" and cell["recipe"]["steps"] == 4
    assert cell["stands_for"]["model"] == "opt-1.3b"
    notebook = (good / "run.ipynb").read_text()
    assert str(root) not in notebook and str(ROOT) not in notebook, "the executed notebook shows paths of this machine"


@pytest.mark.slow
def test_what_was_wrong_is_mended(half_failed, monkeypatch):
    root, good, bad, _ = half_failed
    before = (good / "metrics.json").stat().st_mtime_ns
    monkeypatch.setenv("PACZERO_STATE_DIR", str(root / "state"))
    (bad / "config.json").unlink()
    assert main(["sweep", *arguments(root, *CELLS), "--no-probe", "--yes"]) == 0
    assert state(bad) == "finished" and not (bad / "failed.json").exists()
    assert (good / "metrics.json").stat().st_mtime_ns == before


# ---------------------------------------------------------------- stopped and killed


def begin(root, *args):
    "A sweep in a process of its own; Ctrl-C reaches it although tests may run where it is ignored."
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-m", "paczero", "sweep", *args, "--no-probe", "--yes"], cwd=ROOT,
                            env=environment(PACZERO_STATE_DIR=str(root / "state")), text=True, preexec_fn=listen,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_free(folder):
    "Whether no process holds the run's folder."
    try:
        with FileLock(str(folder / ".lock"), timeout=0):
            return True
    except Timeout:
        return False


def stop(root, folder, args, sign):
    "Start a sweep and end it by a signal after five steps more; the public lines that it leaves."
    done = steps_done(folder)
    p = begin(root, *args)
    wait_for(lambda: steps_done(folder) >= done + 5 or p.poll() is not None)
    p.send_signal(sign)
    out, _ = p.communicate(timeout=60)
    assert p.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL), out
    wait_for(lambda: is_free(folder), 60)                                  # the kernel ends by itself, and lets go
    assert state(folder) == "unfinished" and not (folder / "failed.json").exists()
    assert done + 5 <= steps_done(folder) < 150
    raw = (folder / "transcript.jsonl").read_bytes()
    return raw[: raw.rfind(b"\n") + 1]


@pytest.mark.slow
def test_a_stopped_and_a_killed_sweep_go_on(tmp_path):
    folder, changes = tmp_path / "runs" / CELLS[0], dict(steps=150, n_train=60)
    args = arguments(tmp_path, CELLS[0], **changes)
    seen = [stop(tmp_path, folder, args, sign) for sign in (signal.SIGINT, signal.SIGKILL)]
    planned = plan(CELLS[0], set="miniature", results_dir=tmp_path, overrides={**SMALL, **changes})
    assert planned.state[0] == "unfinished" and planned.done[0] == steps_done(folder)
    assert sweep(planned, device="cpu").outcome.tolist() == ["finished"]
    whole = (folder / "transcript.jsonl").read_bytes()
    assert all(whole.startswith(s) for s in seen) and len(seen[1]) > len(seen[0])
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 150


# ---------------------------------------------------------------- a cluster


@pytest.mark.slow
def test_on_a_cluster(tmp_path):
    distributed = pytest.importorskip("distributed")
    cell, local = "sst2_1p3b_lora_paczpl_s1", dict(host="127.0.0.1", dashboard_address=None)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, **local) as cluster:
        planned = plan(cell, set="miniature", results_dir=tmp_path, overrides=SMALL)
        done = sweep(planned, device="cpu", scheduler=cluster.scheduler_address)
    assert done.outcome.tolist() == ["finished"]
    assert json.loads((tmp_path / "runs" / cell / "metrics.json").read_text())["steps"] == 4


def test_no_cluster_there(tmp_path):
    pytest.importorskip("distributed")
    planned = plan("sst2_1p3b_lora_paczpl_s2", set="miniature", results_dir=tmp_path, overrides=SMALL)
    with pytest.raises(ConnectionError, match="does not answer as a dask scheduler"):
        sweep(planned, device="cpu", scheduler="tcp://127.0.0.1:9")
