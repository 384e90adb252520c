"""What a private row says goes into no message: a marker in every column of broken tables, in every format."""
import csv
import json
import logging
import traceback

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paczero.tasks import TaskSpec, load_task, read_table

MARKER = "MAR" + "KER-7f3a"     # in two pieces, for a traceback shows lines of source
SPAM = TaskSpec(name="spam", template="{subject}: {text} is", options=(" fine", " spam"), labels=("ham", "spam"),
                uid="id")
CAPITAL = TaskSpec(name="capital", template="{text} of {subject} is", answers="label", uid="id")
COLUMNS = ("id", "subject", "text", "label")
SIZE = dict(n_train=3, n_dev=2, n_eval=2)


def rows(**wrong):
    "Twelve rows with the marker in every column, one of which has other cells."
    out = [dict(id=f"{MARKER} {i}", subject=f"{MARKER} {i}", text=f"{MARKER} {i}", label="ham") for i in range(12)]
    return [*out[:5], dict(out[5], **wrong), *out[6:]]


def raw(text):
    "A file that is written as it stands."
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def table(rows):
    "Rows as a file of the format that its name says."

    def write(path):
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif path.suffix in (".json", ".jsonl"):
            text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
            path.write_text(text)
        else:
            with open(path, "w", newline="") as f:
                dialect = dict(delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None) if path.suffix == ".tsv" else {}
                csv.writer(f, **dialect).writerows([list(rows[0]), *(list(r.values()) for r in rows)])

    return write


def without(*columns):
    "Rows that lack columns."
    return [{k: v for k, v in r.items() if k not in columns} for r in rows()]


TEXTS = {   # a fault that any format can have: its rows, and whose task refuses them
    "label": (rows(label=MARKER), SPAM), "repeated id": (rows(id=f"{MARKER} 4"), SPAM),
    "empty": (rows(text=" "), SPAM), "broken list": (rows(label=f'["{MARKER}'), CAPITAL),
    "other names": ([{f"{MARKER}{i}": v for i, v in enumerate(r.values())} for r in rows()], SPAM),
    "no text": (without("text"), SPAM), "no label": (without("label"), CAPITAL),
}
OBJECTS = {     # and those that need more than text
    "number": (rows(text=None), SPAM), "nested": ([dict(r, label=[MARKER, ""]) for r in rows()], CAPITAL),
    "deep": ([dict(r, text=[MARKER]) for r in rows()], SPAM),
    "object": ([dict(r, subject={MARKER: MARKER}) for r in rows()], SPAM),
}
LINE = ",".join(COLUMNS) + "\n" + f"{MARKER},{MARKER},{MARKER},ham\n"
FILES = {       # files that cannot be read at all
    "csv cells": (".csv", LINE + f"{MARKER},{MARKER}\n"), "csv quote": (".csv", LINE + f'"{MARKER},{MARKER}\n'),
    "csv after a quote": (".csv", LINE + f'"{MARKER}"{MARKER},1,2,3\n'),
    "csv header": (".csv", f"{MARKER},a,{MARKER}\n1,2,3\n"),
    "csv no header": (".csv", f"{MARKER},{MARKER} 2,{MARKER} 3,{MARKER} 4\n" * 9),
    "csv bytes": (".csv", LINE.encode() + MARKER.encode() + b"\xff,a,b,ham\n"),
    "csv long": (".csv", LINE + MARKER * 20000 + ",a,b,ham\n"),
    "tsv cells": (".tsv", "\t".join(COLUMNS) + f"\n{MARKER}\t{MARKER}\n"),
    "jsonl": (".jsonl", f'{{"text": "{MARKER}"}}\n{{"text": "{MARKER}", {MARKER}}}\n'),
    "jsonl escape": (".jsonl", f'{{"text": "{MARKER}\\q"}}\n'), "jsonl text": (".jsonl", f'"{MARKER}"\n'),
    "jsonl list": (".jsonl", f'["{MARKER}"]\n'), "json": (".json", f'[{{"{MARKER}": {MARKER}}}]'),
    "json object": (".json", f'{{"{MARKER}": "{MARKER}"}}'), "json list": (".json", f'["{MARKER}", 1]'),
    "json control": (".json", f'[{{"text": "{MARKER}\x01"}}]'),
    "json number": (".json", f'[{{"a": "{MARKER}", "b": {"9" * 5000}}}]'),
    "json nesting": (".json", json.dumps([dict(title=MARKER, paragraphs=[dict(context=MARKER, qas=[{MARKER: 1}])])])),
    "json nesting text": (".json", json.dumps([dict(title=MARKER, paragraphs=[MARKER])])),
    "json bytes": (".json", b'["' + MARKER.encode() + b'\xff"]'),
    "parquet": (".parquet", b"PAR1" + MARKER.encode() * 9 + b"PAR1"),
}


def chain(e):
    "An error and all that it came from, hidden or not."
    seen = []
    while e is not None and e not in seen:
        seen.append(e)
        yield e
        yield from chain(e.__context__ if e.__context__ is not e.__cause__ else None)
        e = e.__cause__


def told(call, caplog, capfd):
    "All words that a failing call leaves behind."
    caplog.set_level(logging.DEBUG)
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    try:
        raise caught.value
    except Exception:
        logging.getLogger("somebody's").exception("loading failed")
    words = [f"{e} {e!r} {e.args!r}" for e in chain(caught.value)]
    out, err = capfd.readouterr()
    return "\n".join([*words, *traceback.format_exception(caught.value), caplog.text, out, err])


def refused(write, suffix, spec, tmp_path):
    "A call that loads a folder with such a file."
    for split in ("train", "validation"):
        write(tmp_path / f"{split}{suffix}")
    return lambda: load_task(spec, path=tmp_path, **SIZE)


@pytest.fixture
def words(caplog, capfd, monkeypatch, tmp_path):
    "What is told of a call, without the opt-in and with it."

    def both(call):
        caplog.clear()
        monkeypatch.delenv("PACZERO_SHOW_DATA", raising=False)
        hidden = told(call, caplog, capfd)
        monkeypatch.setenv("PACZERO_SHOW_DATA", "1")
        caplog.clear()
        return hidden, told(call, caplog, capfd)

    monkeypatch.chdir(tmp_path)
    return both


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("fault", [*TEXTS, *OBJECTS])
def test_a_bad_row_of_a_file_is_not_quoted(fault, suffix, words, tmp_path):
    if fault in OBJECTS and suffix in (".csv", ".tsv"):
        pytest.skip("a cell of such a file is a text")
    wrong, spec = (TEXTS | OBJECTS)[fault]
    hidden, _ = words(refused(table(wrong), suffix, spec, tmp_path))
    assert MARKER not in hidden, hidden


@pytest.mark.parametrize("form", ["dicts", "frame", "dataset"])
@pytest.mark.parametrize("fault", [*TEXTS, *OBJECTS])
def test_a_bad_row_in_memory_is_not_quoted(fault, form, words):
    wrong, spec = (TEXTS | OBJECTS)[fault]
    if form == "frame":
        wrong = pd.DataFrame(wrong)
    if form == "dataset":
        wrong = pytest.importorskip("datasets").Dataset.from_list(wrong)
    hidden, shown = words(lambda: load_task(spec, data=wrong, **SIZE))
    assert MARKER not in hidden, hidden
    assert (MARKER in shown) == (fault not in ("empty", "number", "no text", "no label")), shown


@pytest.mark.parametrize("fault", FILES)
def test_a_broken_file_is_not_quoted(fault, words, tmp_path):
    suffix, content = FILES[fault]
    load = refused(raw(content), suffix, SPAM, tmp_path)
    for call in (load, lambda: read_table(tmp_path / f"train{suffix}")):
        if fault == "csv no header" and call is not load:
            continue        # it is read: only a task knows what the columns should be
        hidden, _ = words(call)
        assert MARKER not in hidden, hidden


@pytest.mark.parametrize("data", [MARKER, MARKER.encode(), [MARKER], [[MARKER]], {MARKER: MARKER},
                                  dict(train=[MARKER], test=[MARKER]), dict(text=MARKER, label=MARKER), (MARKER,),
                                  {"train": MARKER, "test": MARKER}, {"train": rows(), MARKER: rows()}])
def test_what_is_no_table_is_not_quoted(data, words):
    hidden, _ = words(lambda: load_task(SPAM, data=data, **SIZE))
    assert MARKER not in hidden, hidden


@pytest.mark.parametrize("call", [lambda: load_task(rows()), lambda: load_task(pd.DataFrame(rows())),
                                  lambda: load_task(SPAM, path=rows()), lambda: load_task(SPAM, path=rows()[0])])
def test_rows_in_the_wrong_place_are_not_quoted(call, words):
    hidden, _ = words(call)
    assert MARKER not in hidden, hidden


def test_a_message_says_where_and_what(words):
    hidden, _ = words(lambda: load_task(SPAM, data=rows(label=MARKER), **SIZE))
    for word in ("data, train", "1 of 12 rows", "row 5", f"text of {len(MARKER)} characters", "ham, spam",
                 "PACZERO_SHOW_DATA=1"):
        assert word in hidden


def test_good_rows_leave_no_words_at_all(caplog, capfd, recwarn):
    caplog.set_level(logging.DEBUG)
    load_task(SPAM, data=rows(), **SIZE)
    out, err = capfd.readouterr()
    assert MARKER not in "".join([out, err, caplog.text, *(str(w.message) for w in recwarn)])
