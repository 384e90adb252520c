"""Transcripts from strangers: refused with a clear message, quickly, with nothing executed."""
import json
import random
import time
import tracemalloc

import pytest
from hypothesis import given, strategies as st

from paczero.subsets import SubsetDesign
from paczero.transcript import Transcript, TranscriptError, read_log
from strangers import HUGE, anything, change, entries_of, fuzz, only_value_error, rechain, scratch, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished run: its transcript's bytes and digest."
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(root / "state"))
        raw = small_run(root / "run")
    return raw, Transcript.load(root / "run" / "transcript.jsonl").digest


# ---------------------------------------------------------------- 10,000 mutated transcripts


def mutations(raw, n, seed=5):
    "n mutated logs, as (bytes, whether they have an honest chain)."
    rng, entries = random.Random(seed), entries_of(raw)
    while n:
        chained = rng.random() < 0.4
        data = change(rng, entries) if chained else scratch(rng, raw)
        if data != raw:
            n -= 1
            yield data, chained


@pytest.mark.slow
def test_ten_thousand_mutations(run, tmp_path):
    "None is accepted as the original; none raises anything but TranscriptError."
    check_mutations(run, tmp_path / "t.jsonl", 10_000, refused=8000, other=100)


def test_some_mutations(run, tmp_path):
    "As above, with five hundred."
    check_mutations(run, tmp_path / "t.jsonl", 500, refused=400, other=5)


def check_mutations(run, file, n, refused, other):
    raw, digest = run
    assert rechain(entries_of(raw)) == raw
    count, start = dict(refused=0, other=0), time.process_time()
    for data, chained in mutations(raw, n):
        file.write_bytes(data)
        try:
            t = Transcript.load(file)
        except TranscriptError as e:
            count["refused"] += 1
            assert len(str(e)) < 600
            continue
        # without a new chain only what the transcript was some steps earlier passes, unfinished as it then was
        assert chained or (raw.startswith(data) and data.endswith(b"\n") and t.end is None), data
        assert t.digest != digest
        count["other"] += 1
        if count["other"] <= 150:
            assert t.verify(digest=digest)["digest as published"] is False
    assert count["refused"] > refused and count["other"] > other, count
    assert time.process_time() - start < 120


def test_a_torn_tail_is_dropped_only_when_asked(run, tmp_path):
    raw, _ = run
    for cut in random.Random(1).sample(range(1, len(raw)), 60):
        (tmp_path / "t").write_bytes(raw[:cut])
        whole = raw[:cut].rfind(b"\n") + 1
        got, _, good = read_log(tmp_path / "t", recover=True)
        assert good == whole and rechain(got) == raw[:whole]
        if raw[:cut] != raw[:whole]:
            with pytest.raises(TranscriptError, match="cut off|no such"):
                read_log(tmp_path / "t")


HEADERS = [
    *((("update", "lr"), v) for v in HUGE), *((("update", "steps"), v) for v in (10**400, 0, 1.5, True)),
    (("update", "k"), 10**9), (("directions", "seed"), 10**400), (("update", "lr_schedule"), []),
    (("update", "zo_eps"), 0), (("mechanism",), []), (("format",), {}), (("model", "weights"), 7),
    (("directions", "z"), None),
]


@pytest.mark.parametrize("path, value", HEADERS, ids=str)
def test_bad_headers(path, value, run, tmp_path):
    e = entries_of(run[0])
    at = e[0]
    for k in path[:-1]:
        at = at[k]
    at[path[-1]] = value
    (tmp_path / "t").write_bytes(rechain(e))
    if path == ("update", "lr") and value == 5e-324:
        assert Transcript.load(tmp_path / "t")
        return
    with pytest.raises(TranscriptError, match="line 1"):
        Transcript.load(tmp_path / "t")


# ---------------------------------------------------------------- designs

DESIGNS = [
    dict(n=10**9), dict(m=10**9), dict(n=10**9, m=10**9), dict(n=10**30), dict(n="x"), dict(m=None), dict(seed=-1),
    dict(kind=["half"]), dict(kind="no"), dict(r=10**400), dict(n=True), "empty", "none",
]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_designs_from_strangers(design, run, tmp_path):
    "A header may name any design: verifying it takes no gigabytes and no minutes, and does not say yes."
    e = entries_of(run[0])
    others = {"empty": {}, "none": {"n": None}}
    e[0]["design"] = others[design] if isinstance(design, str) else dict(e[0]["design"], **design)
    (tmp_path / "t").write_bytes(rechain(e))
    t = Transcript.load(tmp_path / "t")
    tracemalloc.start()
    start = time.monotonic()
    try:
        verified = only_value_error(t.verify)
        assert verified is None or verified["subset design"] is not True
        with pytest.raises(ValueError) as error:
            SubsetDesign.from_dict(e[0]["design"])
        assert len(str(error.value)) < 1000
        assert tracemalloc.get_traced_memory()[1] < 300e6 and time.monotonic() - start < 5
    finally:
        tracemalloc.stop()


def test_big_logs_are_refused_before_they_are_read(tmp_path):
    with (tmp_path / "big").open("wb") as f:
        f.truncate(1 << 40)
    start = time.monotonic()
    with pytest.raises(TranscriptError, match="more than"):
        Transcript.load(tmp_path / "big")
    (tmp_path / "long").write_bytes(b"[" * (5 << 20) + b"\n")
    with pytest.raises(TranscriptError, match="longer than"):
        Transcript.load(tmp_path / "long")
    (tmp_path / "deep").write_bytes(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}\n")
    with pytest.raises(TranscriptError):
        Transcript.load(tmp_path / "deep")
    for other in (tmp_path, tmp_path / "none"):
        with pytest.raises(TranscriptError, match="no such file"):
            Transcript.load(other)
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------- fuzz

KEYS = ["t", "y", "end", "format", "model", "design", "mechanism", "update", "directions"]


@fuzz
@given(st.binary(max_size=300) | st.lists(anything, max_size=4).map(lambda x: json.dumps(x).encode()))
def test_fuzz_logs(tmp_path_factory, data):
    f = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    f.write_bytes(data)
    only_value_error(Transcript.load, f)
    only_value_error(Transcript.load, f, recover=True)
    only_value_error(read_log, f, True)


@fuzz
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), anything, max_size=6), max_size=4))
def test_fuzz_entries(entries):
    only_value_error(Transcript.from_entries, entries, "0" * 64)
