"A copy of the tree in which wrong versions are made and tested, one after the other."
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from .mutant import misplaced, put, ROOT

# The code broke, and nothing was tested; or no test ended.
INVALID = ("NameError", "SyntaxError", "ImportError", "ModuleNotFoundError", "IndentationError", "UnboundLocalError",
           "AttributeError", "TypeError", "nothing")
LOST, UNSOUND = "its text is not there", "its test fails on the library as it is"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
RAISED = re.compile(r"^(?:E +)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Failed|Warning))\b(?:: ?(.*))?$", re.M)


@dataclass(frozen=True)
class Outcome:
    "What a test made of a tree."
    ok: bool            # it passed
    how: str            # what was raised
    says: str           # with which words
    seconds: float
    log: str = ""

    @property
    def verdict(self):
        "killed, survived or invalid."
        return "survived" if self.ok else "invalid" if self.how in (*INVALID, LOST, UNSOUND) else "killed"


def copy_tree(to, at=None, root=ROOT):
    "The files of a commit; or those that git knows, and new ones that it does not ignore, as they are now."
    if at is not None:
        data = subprocess.run(["git", "archive", at], cwd=root, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(to, filter="data")
        return
    names = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, capture_output=True,
                           check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def raised(log, pytest=False):
    "The exception that ended a test: its kind and its words."
    log = COLOURS.sub("", log)
    found = RAISED.findall(log)
    if pytest and re.search(r"^E +(assert\b|Failed: )", log, re.M):
        found = [("AssertionError", re.search(r"^E +(.*)", log, re.M)[1])]
    return (found[-1][0].rpartition(".")[2], found[-1][1].strip()) if found else ("nothing", log.strip()[-200:])


class Slot:
    "A copy of the tree, with a server of notebooks in it."

    def __init__(self, folder, at=None):
        self.root = Path(folder)
        copy_tree(self.root, at)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.env = dict(PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")       # no module of the version before
        spec = importlib.util.spec_from_file_location("notebooks_of_the_slot", self.root / "tools" / "notebooks.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        self.server = module.Server(**self.env)

    def test(self, killer, timeout=300):
        "Run a notebook or a pytest id on the tree as it stands."
        start = time.monotonic()
        if killer.endswith(".ipynb"):
            run = self.server.run(self.root / killer, timeout=timeout)
            return Outcome(run.ok, *raised(run.log), time.monotonic() - start, run.log)
        command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-pno:cacheprovider", "--tb=short", killer]
        try:
            done = subprocess.run(command, cwd=self.root, env={**os.environ, **self.env}, timeout=timeout,
                                  capture_output=True, text=True)
            code, log = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            code, log = 2, f"not done after {timeout} s"
        how = raised(log, pytest=True) if code == 1 else ("nothing", log.strip()[-200:])
        return Outcome(code == 0, *how, time.monotonic() - start, log)

    def trial(self, mutant):
        "What its test makes of a wrong version; the tree is put back."
        if why := misplaced(mutant, self.root):
            return Outcome(False, LOST, why, 0.0)
        kept = put(mutant, self.root)
        try:
            return self.test(mutant.killer)
        finally:
            for file, text in kept.items():
                file.write_text(text, encoding="utf-8")

    def close(self):
        "End the server."
        self.server.close()
