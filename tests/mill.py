"""papermill as a user calls it, from this environment."""
import os
import subprocess

from common import BIN, environment


def run_papermill(args, cwd, check=True, timeout=900, **env):
    "Run papermill; what it said, and how it ended."
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([str(BIN / "papermill"), *map(str, args)], cwd=cwd, env=environment(PATH=path, **env),
                          capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done


def parameters(**values):
    "Parameters as papermill takes them."
    return [str(x) for k, v in values.items() for x in ("-p", k, v)]
