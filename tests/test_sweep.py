"""Sweeps: what they cost, what they skip, what they survive; on miniature cells with a few steps and small pools."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from paczero.cli.main import main
from paczero.lab.select import plan
from paczero.run.folder import state, steps_done
from paczero.lab.sweep import sweep

ROOT = Path(__file__).resolve().parent.parent
CELLS = ["sst2_1p3b_ft_paczpl_s0", "sst2_1p3b_ft_paczpl_s1"]
SMALL = dict(n_train=24, n_dev=8, n_eval=8, m=8, steps=4)
SET = ["--set", ",".join(f"{k}={v}" for k, v in SMALL.items())]


def begin(tmp, *args):
    "A sweep in a process of its own."
    env = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PACZERO_STATE_DIR=str(tmp / "state"), PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, "-m", "paczero", "sweep", *map(str, args), "--yes"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))       # where the tests run in the background, it is ignored, and children inherit that


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_free(folder):
    "Whether no process holds the run's folder."
    from filelock import FileLock, Timeout
    try:
        with FileLock(str(folder / ".lock"), timeout=0): return True
    except Timeout: return False


def test_dry_run_says_what_it_costs_and_does_nothing(tmp_path, capsys):
    assert main(["sweep", "--cell", *CELLS, "--miniature", "--results-dir", str(tmp_path), "--device", "cpu", "--dry-run", *SET]) == 0
    text = capsys.readouterr().out
    assert "2 cells (miniature) on cpu: 0 finished, 2 to run" in text
    assert f"{2 * 2 * 24 * 4:,} forward passes" in text and "s a cell" in text and "memory: up to" in text and "disk: " in text
    assert not list(tmp_path.iterdir())


def test_the_cost_comes_from_runs_of_the_same_kind(tmp_path):
    "A finished run of this machine gives the speed; one of another machine, or a broken one, does not."
    import platform
    from paczero.lab.cost import measured
    def run(name, **changes):
        folder = tmp_path / "runs" / name; folder.mkdir(parents=True)
        m = dict(model="opt-125m", task="sst2", seconds_per_step=6., n_pool=300, seconds=60., device="cpu", cpus=os.cpu_count(), machine=platform.machine()) | changes
        (folder / "metrics.json").write_text(json.dumps(m))
        (folder / "config.json").write_text(json.dumps(dict(model=dict(track="full"), recipe=dict(k=2), mechanism=dict(name="zpl"))))
        (folder / "cell.json").write_text(json.dumps(dict(seconds=71.)))
    run("a"); run("b", machine="abacus"); run("c", seconds_per_step="fast")
    table = measured([tmp_path], "cpu")
    assert len(table) == 1 and table.forward[0] == pytest.approx(6 / (2 * 2 * 300)) and table.rest[0] == pytest.approx(11)


def test_the_list_and_mistakes(capsys):
    assert main(["cells"]) == 0 and len(capsys.readouterr().out.splitlines()) == 144
    assert main(["cells", "--where", "track=lora,mechanism=zpl,table=table1"]) == 0 and len(capsys.readouterr().out.splitlines()) == 9
    for args, says in ((["--cell", "sst2_1p3b_ft_paczp_s0"], "did you mean 'sst2_1p3b_ft_paczpl_s0'"), (["--cell", CELLS[0], CELLS[0]], "2 times"), ([], "no cell is selected"),
                       (["--table", "table1", "--where", "mechanism=dpzero"], "none in common"), (["--table", "tabel1"], "did you mean 'table1'"), (["--cell", CELLS[0], "--set", "steps=3"], "results_dir")):
        assert main(["sweep", *args]) == 2
        assert says in capsys.readouterr().err
    for args in (["sweep", "--where", "mechanism"], ["sweep", "--workers", "0"], ["swep"]):
        with pytest.raises(SystemExit) as e: main(args)
        assert e.value.code == 2
    assert main(["status", "--miniature", "--results-dir", "/nonexistent"]) == 0 and "0 of 143 cells finished" in capsys.readouterr().out


def test_nothing_starts_unconfirmed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert main(["sweep", "--cell", CELLS[0], "--miniature", "--results-dir", str(tmp_path), "--device", "cpu", "--no-probe"]) == 2
    assert "--yes" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_failure_is_written_down_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    good, bad = (tmp_path / "runs" / c for c in CELLS)
    bad.mkdir(parents=True); (bad / "config.json").write_text("{}")            # an unfinished run of another kind
    args = ["--cell", *CELLS, "--miniature", "--results-dir", str(tmp_path), "--device", "cpu", "--no-probe", "--workers", "2", *SET]
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    assert main(["sweep", *args, "--yes"]) == 1
    out = capsys.readouterr().out
    assert "1 finished" in out and "1 failed" in out and f"{CELLS[1]} failed: ValueError" in out
    failed = json.loads((bad / "failed.json").read_text())
    assert failed["exception"] == "ValueError" and "unfinished run of another kind" in failed["message"] and failed["last_lines"] and failed["version"] and failed["when"]
    assert state(bad) == "failed" and state(good) == "finished"
    cell = json.loads((good / "cell.json").read_text())
    assert cell["run_id"] == CELLS[0] and cell["set"] == "miniature" and cell["recipe"]["model"] == "tiny-opt" and cell["recipe"]["steps"] == 4 and cell["stands_for"]["model"] == "opt-1.3b"
    assert json.loads((good / "metrics.json").read_text())["steps"] == 4 and not (good / "reference").exists()
    notebook = (good / "run.ipynb").read_text()
    assert str(tmp_path) not in notebook and str(ROOT) not in notebook, "the executed notebook shows paths of this machine"
    before = (good / "metrics.json").stat().st_mtime_ns
    (bad / "config.json").unlink()                                             # what was wrong is mended
    assert main(["sweep", *args, "--yes"]) == 0
    assert state(bad) == "finished" and not (bad / "failed.json").exists() and (good / "metrics.json").stat().st_mtime_ns == before


def test_a_stopped_and_a_killed_sweep_go_on(tmp_path):
    overrides = dict(SMALL, steps=150, n_train=60)
    folder, args = tmp_path / "runs" / CELLS[0], ["--cell", CELLS[0], "--miniature", "--results-dir", tmp_path, "--device", "cpu", "--no-probe", "--set", ",".join(f"{k}={v}" for k, v in overrides.items())]
    seen = []
    for kill in (signal.SIGINT, signal.SIGKILL):
        done = steps_done(folder)
        p = begin(tmp_path, *args)
        wait_for(lambda: steps_done(folder) >= done + 5 or p.poll() is not None)
        p.send_signal(kill); out, _ = p.communicate(timeout=60)
        assert p.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL), out
        wait_for(lambda: is_free(folder), 30)                                  # the kernel ends by itself, and lets go
        assert state(folder) == "unfinished" and not (folder / "failed.json").exists()
        raw = (folder / "transcript.jsonl").read_bytes(); seen.append(raw[: raw.rfind(b"\n") + 1])
        assert done + 5 <= steps_done(folder) < 150
    planned = plan(CELLS[0], set="miniature", results_dir=tmp_path, overrides=overrides)
    assert planned.state[0] == "unfinished" and planned.done[0] == steps_done(folder)
    assert sweep(planned, device="cpu").outcome.tolist() == ["finished"]
    whole = (folder / "transcript.jsonl").read_bytes()
    assert whole.startswith(seen[0]) and whole.startswith(seen[1]) and len(seen[1]) > len(seen[0])
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 150


def test_too_big_for_the_device(tmp_path, monkeypatch):
    "Found by the estimate, written down, and nothing is started."
    from paczero import models
    import paczero.sweep
    monkeypatch.setattr(models, "free_memory", lambda device="cpu": 10**9)
    monkeypatch.setattr(paczero.sweep, "_start", lambda j: pytest.fail("was started"))
    out = sweep(plan(["sst2_6p7b_ft_paczpl_s0", "sst2_1p3b_ft_paczpl_s0"], results_dir=tmp_path), device="cpu")
    assert out.outcome.tolist() == ["failed", "failed"] and out.why.str.startswith("MemoryError: opt-").all()
    assert json.loads((tmp_path / "runs" / "sst2_6p7b_ft_paczpl_s0" / "failed.json").read_text())["exception"] == "MemoryError"


def test_on_a_cluster(tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None) as cluster:
        planned = plan("sst2_1p3b_lora_paczpl_s1", set="miniature", results_dir=tmp_path, overrides=SMALL)
        assert sweep(planned, device="cpu", scheduler=cluster.scheduler_address).outcome.tolist() == ["finished"]
    assert json.loads((tmp_path / "runs" / "sst2_1p3b_lora_paczpl_s1" / "metrics.json").read_text())["steps"] == 4
    with pytest.raises(ConnectionError, match="does not answer as a dask scheduler"):
        sweep(plan("sst2_1p3b_lora_paczpl_s2", set="miniature", results_dir=tmp_path, overrides=SMALL), device="cpu", scheduler="tcp://127.0.0.1:9")
