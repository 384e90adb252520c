"""The paper's examples and scores, against plain code written from the method's description alone.

On the real SST-2 and SQuAD, where they are at hand (tests/realdata.py).
"""
import string
from collections import Counter

import numpy as np
import pytest

from paczero.tasks import load_task, squad_f1
from realdata import folder, rows


@pytest.mark.filterwarnings("ignore:task 'sst2'")
@pytest.mark.parametrize("seed", [0, 1, pytest.param(42, marks=pytest.mark.slow)])
def test_sst2_examples(seed):
    """RandomState(s) permutes the training split; the first 1000 are the pool, the next 500 the development set.

    All 872 validation sentences are the test; each is stripped, with the prompt around it.
    """
    data = folder("sst2")
    task = load_task("sst2", path=data, seed=seed)
    train, validation = rows(data, "train"), rows(data, "validation")
    order = np.random.RandomState(seed).permutation(len(train))
    plain = lambda r: (r["sentence"].strip() + " It was", r["label"])
    assert [(e.prompt, e.label) for e in task.pool] == [plain(train[i]) for i in order[:1000]]
    assert [(e.prompt, e.label) for e in task.dev] == [plain(train[i]) for i in order[1000:1500]]
    assert [(e.prompt, e.label) for e in task.test] == [plain(r) for r in validation] and len(task.test) == 872
    assert task.options == (" terrible", " great")
    unstripped = any(r["sentence"] != r["sentence"].strip() for r in train)
    assert unstripped, "the data has nothing to strip: this test would not notice"


def squad_prompt(r):
    return f"Title: {r['title']}\nContext: {r['context']}\nQuestion: {r['question']}\nAnswer:"


@pytest.mark.slow
def test_squad_examples():
    data = folder("squad")
    task = load_task("squad", path=data, seed=3)
    train, validation = rows(data, "train"), rows(data, "validation")
    order = np.random.RandomState(3).permutation(len(train))
    assert [e.prompt for e in task.pool + task.dev] == [squad_prompt(train[i]) for i in order[:1500]]
    padded = any(squad_prompt(r) != squad_prompt({k: str(v).strip() for k, v in r.items()}) for r in train)
    assert padded, "no white space around any field: this test would not notice"
    for e, i in zip(task.pool, order):
        assert set(e.answers) == {a.strip() for a in train[i]["answers"]["text"]}
    titles = {f"Title: {r['title']}" for r in validation}
    assert len(task.test) == 1000 and {e.prompt.split("\n")[0] for e in task.test} <= titles
    assert task.max_new_tokens == 50 and "\n" in task.stop


def plain_words(s):
    "Lower case, no punctuation, no articles."
    s = "".join(c for c in s.lower() if c not in string.punctuation)
    return [w for w in s.split() if w not in ("a", "an", "the")]


def plain_one(a, b):
    "F1 of two lists of words, as multisets."
    shared = sum((Counter(a) & Counter(b)).values())
    if not a or not b:
        return float(a == b)
    precision, recall = shared / len(a), shared / len(b)
    return 0.0 if not shared else 2 * precision * recall / (precision + recall)


def plain_f1(prediction, golds):
    "SQuAD's score, from its description: the best gold counts."
    return max(plain_one(plain_words(prediction), plain_words(g)) for g in golds)


def guesses(r, rng):
    "Answers to a question: right, nearly right, wrong and empty."
    golds, tokens = r["answers"]["text"], r["context"].split()
    at = rng.randint(len(tokens))
    return (golds[0], golds[0].upper() + ".", "the " + golds[-1], " ".join(tokens[at : at + 4]),
            golds[0] + " " + tokens[at], "")


def test_squad_f1_on_real_answers():
    rng, seen = np.random.RandomState(0), []
    for r in rows(folder("squad"), "validation"):
        golds = r["answers"]["text"]
        for guess in guesses(r, rng):
            seen.append(squad_f1(guess, golds))
            assert seen[-1] == pytest.approx(plain_f1(guess, golds))
    assert 0 in seen and 1 in seen and any(0 < s < 1 for s in seen)
