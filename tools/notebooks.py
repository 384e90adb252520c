"""Run notebooks, each in a process of its own, forked from one that has imported what is heavy once.

    python tools/notebooks.py nbs/rooms/subsets.ipynb …     # run them; print how long each took, and what went wrong

As `nbdev_test` does it: cells with `#| slow` or `#| eval: false` are left out, and the working folder is that of
the notebook.
"""
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ["torch", "transformers", "peft", "pandas", "pyarrow.parquet", "scipy.stats", "scipy.optimize",
           "matplotlib.pyplot", "seaborn", "matplotlib_inline.backend_inline", "nbdev.test", "IPython.display",
           "ipywidgets", "transformers.models.opt.modeling_opt", "peft.tuners.lora", "safetensors.torch"]
# One thread, which waits without burning a core; nothing is fetched; figures are drawn, not shown.
ENVIRONMENT = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="passive",
                   GOMP_SPINCOUNT="0", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MPLBACKEND="agg")


@dataclass(frozen=True)
class Run:
    "What came of a notebook: whether it ended well, what it said, and its outputs by cell."
    ok: bool
    log: str
    outputs: dict       # cell's number -> outputs as the notebook's JSON has them; cells that were left out are missing
    seconds: float
    cpu: float          # of them, on a core: what it would take on a quiet machine


def execute(path, skip=("slow",)):
    "Run a notebook's cells in this process; the outputs of each cell that was run, by number."
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor
    from nbdev.frontmatter import FrontmatterProc

    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb

    def left_out(cell):
        if cell.cell_type != "code":
            return True
        directives = getattr(cell, "directives_", None) or {}
        never = directives.get("eval:", [""])[0].lower() == "false" or "nbdev_export(" in cell.source
        return never or bool(set(skip) & directives.keys())

    run = {i: c for i, c in enumerate(nb.cells) if not left_out(c)}
    for cell in run.values():
        cell.outputs = []
    shell = CaptureShell(path, mpl_format="png")
    try:
        shell.run_all(nb, exc_stop=True, preproc=left_out)
    except BaseException:
        sys.exit(shell.prettytb(fname=path) if shell.exc else "stopped")
    return {i: c.outputs for i, c in run.items()}


def play(job):
    "A job in this process, which is its own: a notebook's outputs go to a file, all that it says to another."
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path[:] = [p for p in sys.path if p != str(ROOT / "tools")]
    os.environ.update(job["env"], IN_TEST="1")
    os.chdir(Path(job["path"]).parent)
    pandas = importlib.import_module("pandas")
    pandas.set_option("display.max_columns", 20)        # as in Jupyter; without a kernel, pandas guesses a width
    outputs = execute(Path(job["path"]))
    Path(job["outputs"]).write_text(json.dumps(outputs, default=dict), encoding="utf-8")


def fork(job):
    "Play a job in a child of this process: (its exit status, or None where its time was up; its seconds on a core)."
    pid = os.fork()
    if not pid:
        _child(job)
    end, done = time.monotonic() + job["timeout"], 0
    watch = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    while not done and time.monotonic() < end:
        if watch is None:
            time.sleep(0.02)
        else:
            select.select([watch], [], [], max(0, end - time.monotonic()))
        done, code, used = os.wait4(pid, os.WNOHANG)
    if watch is not None:
        os.close(watch)
    _end_group(pid)
    if not done:
        _, _, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(code) if done else None, used.ru_utime + used.ru_stime


def _child(job):
    "What a forked child does; it never returns."
    os.setsid()
    code = 1
    try:
        play(job)
        code = 0
    except SystemExit as e:
        print(e.code, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_group(pid):
    "End what a notebook may have left running."
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def serve():
    "Import what is heavy, then play a job for each line on standard input; a line with its status goes out."
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    for name in PRELOAD:
        importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps(fork(json.loads(line))) + "\n")
        answers.flush()


class Server:
    "The process that forks notebooks, started with the first one."

    def __init__(self, **env):
        self.process, self.env = None, env      # env: more of the environment of its process

    def run(self, path, timeout=600, **env):
        "Run one notebook with its own state folder; a `Run`."
        with tempfile.TemporaryDirectory() as tmp:
            files = dict(log=f"{tmp}/log", outputs=f"{tmp}/outputs")
            job = dict(files, path=str(Path(path).resolve()), timeout=timeout,
                       env=dict(PACZERO_STATE_DIR=f"{tmp}/state", **env))
            start = time.monotonic()
            status, cpu = self._ask(job)
            log = Path(files["log"]).read_text(errors="replace") if Path(files["log"]).exists() else ""
            log += f"\n{path}: not done after {timeout} s" if status is None else ""
            made = json.loads(Path(files["outputs"]).read_text(encoding="utf-8")) if status == 0 else {}
        return Run(status == 0, log, {int(i): o for i, o in made.items()}, time.monotonic() - start, cpu)

    def _ask(self, job):
        "The exit status of a job, None where it ran out of time; and its seconds on a core."
        if not hasattr(os, "fork"):
            return _alone(job, self.env)
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__, "--serve"], text=True, cwd=ROOT,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            env={**os.environ, **ENVIRONMENT, **self.env})
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs notebooks has ended ({self.process.wait()})")
        return json.loads(answer)

    def close(self):
        "End the server."
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(60)


def _alone(job, env):
    "A job in a fresh process, where there is no fork."
    try:
        return subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], timeout=job["timeout"],
                              env={**os.environ, **ENVIRONMENT, **env}).returncode, float("nan")
    except subprocess.TimeoutExpired:
        return None, float("nan")


def main(paths):
    "Run notebooks one after the other; the status is 1 where one failed."
    server, failed = Server(), 0
    for path in paths:
        run = server.run(path)
        failed += not run.ok
        print(f"{run.seconds:6.1f} s, {run.cpu:5.1f} on a core  {'ok    ' if run.ok else 'FAILED'} {path}", flush=True)
        if not run.ok:
            print(run.log)
    server.close()
    return bool(failed)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif sys.argv[1:2] == ["--job"]:
        play(json.loads(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
