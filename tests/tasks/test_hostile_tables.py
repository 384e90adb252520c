"""Tables from strangers, in every format: rows or a readable error, never a crash."""
import json
import random

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from paczero.tasks import read_table
from strangers import anything, fuzz, only_value_error

SQUAD = b'[{"paragraphs": [{"context": "x", "qas": [{}]}], "title": "t"}]'
DEEP = [
    b"[" * 100_000, b'{"a":' * 50_000, b"[" * 900 + b"]" * 900, b'{"data": [{"paragraphs": 1}]}',
    b'[{"paragraphs": []}, 3]', SQUAD, b'[{"a": ' + b"9" * 5000 + b"}]", b"a,b\n1\n", b'a,b\n"1,2\n', b"a,a\n1,2\n",
    b"a\n" + b"x" * 300_000, b"a\x00b\n1\n", b"\xff\xfe\n", b"\n\n", b"PAR1" + b"\x00" * 50 + b"PAR1", b"", b"NaN",
    b"[1, 2]", b'[{"a": NaN}]',
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_fuzz_tables(suffix, tmp_path):
    file = tmp_path / f"t{suffix}"

    @fuzz
    @given(st.binary(max_size=200) | st.sampled_from(DEEP) | anything.map(lambda x: json.dumps(x).encode()))
    def check(data):
        file.write_bytes(data)
        rows = only_value_error(read_table, file)
        assert rows is None or (rows and all(isinstance(r, dict) for r in rows))

    check()


def test_fuzz_parquet(tmp_path):
    "A parquet file with changed bytes: an error or rows, never a crash."
    file, rng = tmp_path / "t.parquet", random.Random(0)
    pd.DataFrame(dict(text=["a good film", "a bad film"] * 20, label=[1, 0] * 20)).to_parquet(file)
    raw = file.read_bytes()
    for _ in range(400):
        b = bytearray(raw)
        for _ in range(rng.choice([1, 1, 4])):
            b[rng.randrange(len(b))] = rng.randrange(256)
        if rng.random() < 0.2:
            del b[rng.randrange(len(b)) :]
        file.write_bytes(bytes(b))
        only_value_error(read_table, file)
