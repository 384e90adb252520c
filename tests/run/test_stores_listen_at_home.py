"""Processes of one run on one machine: what they listen on is reached from that machine alone."""
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common import environment

JOIN = """
import json, os, sys
from paczero.run.team import join

def listening():
    "Addresses on which this process listens, from the kernel's tables."
    own = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    rows = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/self/net/{table}").readlines()[1:]]
    return sorted({r[1].split(":")[0] for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in own})

before = os.environ["MASTER_ADDR"]
team = join("cpu", patience=60)
if team.rank:
    said = team.hear()
    team.answer("heard " + said[0])
else:
    said = [a.decode() for a in team.ask("hello")]
print(json.dumps(dict(rank=team.rank, said=said, listens=listening(), master=before == os.environ["MASTER_ADDR"])))
sys.stdout.flush()
from torch import distributed
distributed.barrier()
distributed.destroy_process_group()
"""


def processes(host, **more):
    "What each of two processes saw."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = environment(WORLD_SIZE="2", MASTER_ADDR=host, MASTER_PORT=port, **more)
    env.pop("GLOO_SOCKET_IFNAME", None)
    all_ = [subprocess.Popen([sys.executable, "-c", JOIN], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=dict(env, RANK=r, LOCAL_RANK=r)) for r in ("0", "1")]
    try:
        said = [p.communicate(timeout=200) for p in all_]
    finally:
        for p in all_:
            p.kill()
    assert [p.returncode for p in all_] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="the kernel's tables are elsewhere here")
@pytest.mark.parametrize("host", ["127.0.0.1", socket.gethostname()], ids=["loopback", "by the machine's name"])
def test_nothing_listens_but_on_loopback(host):
    zero, one = processes(host, LOCAL_WORLD_SIZE="2")
    assert zero["said"] == ["heard hello"] and one["said"] == ["hello"] and zero["master"] and one["master"]
    assert zero["listens"] and set(zero["listens"] + one["listens"]) == {"0100007F"}        # 127.0.0.1, as it is there
