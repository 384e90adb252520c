"""Two workers on two cores: one thread each, set before anything loads torch; no hub."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
