"""Two workers on two cores: one thread each, which waits without burning its core; set before anything loads torch."""
import os

from common import THREADS

os.environ.update(THREADS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_xdist_make_scheduler(config, log):
    "A file's tests stay together, for they share fixtures; notebooks and whatever shares nothing go one by one."
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "test_notebooks.py" in nodeid else super()._split_scope(nodeid)

    return ByFile(config, log)
