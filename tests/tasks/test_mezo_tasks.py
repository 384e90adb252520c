"""Thirteen tasks of MeZO's, on rows in the schema of their data sets: prompts by their wording, losses, two steps."""
import math

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Value

from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.objectives import make_objective
from paczero.tasks import TASKS, load_task, score

TEXT, INT, LIST = Value("string"), Value("int32"), datasets.List(Value("string"))
NAMES = "Ann", "Bo", "Eve", "Di Lee", "Max", "Rosa"
NLI = dict(premise=TEXT, hypothesis=TEXT, idx=INT)

# data set, configuration, columns, and a row that differs with i
SCHEMAS = {
    "rte": ("aps/super_glue", "rte", NLI | dict(label=ClassLabel(2)),
            lambda i: dict(premise=f"Ann has {i} cats.", hypothesis="Ann has cats.", idx=i, label=i % 2)),
    "cb": ("aps/super_glue", "cb", NLI | dict(label=ClassLabel(3)),
           lambda i: dict(premise=f"Bo said {i}.", hypothesis="Bo spoke.", idx=i, label=i % 3)),
    "mnli": ("nyu-mll/glue", "mnli", NLI | dict(label=ClassLabel(3)),
             lambda i: dict(premise=f"Eve is {i}.", hypothesis="Eve is old.", idx=i, label=i % 3)),
    "snli": ("stanfordnlp/snli", "", dict(premise=TEXT, hypothesis=TEXT, label=ClassLabel(3)),
             lambda i: dict(premise=f"Dog {i} runs.", hypothesis="A dog sleeps.", label=i % 4 if i % 4 < 3 else -1)),
    "sst5": ("SetFit/sst5", "", dict(text=TEXT, label=Value("int64"), label_text=TEXT),
             lambda i: dict(text=f"film number {i} ", label=i % 5, label_text="some")),
    "trec": ("CogComp/trec", "", dict(text=TEXT, coarse_label=ClassLabel(6), fine_label=ClassLabel(50)),
             lambda i: dict(text=f"What is {i} ?", coarse_label=i % 6, fine_label=i)),
    "wic": ("aps/super_glue", "wic",
            dict(word=TEXT, sentence1=TEXT, sentence2=TEXT, start1=INT, start2=INT, end1=INT, end2=INT, idx=INT,
                 label=ClassLabel(2)),
            lambda i: dict(word="bank", sentence1=f"Bank {i}.", sentence2="A bank.", start1=0, start2=2, end1=4, end2=6,
                           idx=i, label=i % 2)),
    "wsc": ("aps/super_glue", "wsc.fixed",
            dict(text=TEXT, span1_index=INT, span2_index=INT, span1_text=TEXT, span2_text=TEXT, idx=INT,
                 label=ClassLabel(2)),
            lambda i: dict(text=f"Ann met Eve when She was {i}.", span1_index=0, span2_index=4, span1_text="Ann",
                           span2_text="She", idx=i, label=i % 2)),
    "copa": ("aps/super_glue", "copa",
             dict(premise=TEXT, choice1=TEXT, choice2=TEXT, question=TEXT, idx=INT, label=ClassLabel(2)),
             lambda i: dict(premise=f"It is {i}. ", choice1="The clock struck.", choice2="I slept on and on, as usual.",
                            question=("cause", "effect")[i % 2], idx=i, label=i % 2)),
    "record": ("aps/super_glue", "record",
               dict(passage=TEXT, query=TEXT, entities=LIST, answers=LIST, idx=dict(passage=INT, query=INT)),
               lambda i: dict(passage=f"{', '.join(NAMES)} met at {i}.\n@highlight\nAll came\n@highlight\nRosa spoke",
                              query="There was @placeholder, too", entities=list(NAMES[:2 + i % 5]),
                              answers=[NAMES[1], NAMES[0]][: 1 + i % 2], idx=dict(passage=i, query=0))),
    "boolq": ("google/boolq", "", dict(question=TEXT, answer=Value("bool"), passage=TEXT),
              lambda i: dict(question="is it so", answer=i % 2 == 0, passage=f"It is {i}.")),
    "multirc": ("aps/super_glue", "multirc",
                dict(paragraph=TEXT, question=TEXT, answer=TEXT, label=ClassLabel(2),
                     idx=dict(paragraph=INT, question=INT, answer=INT)),
                lambda i: dict(paragraph="Ann saw Bo. Eve saw Di.", question=f"Who saw whom, {i // 3}?",
                               answer=NAMES[i % 3], label=int(i % 3 == 0),
                               idx=dict(paragraph=0, question=i // 3, answer=i % 3))),
    "drop": ("ucinlp/drop", "",
             dict(section_id=TEXT, query_id=TEXT, passage=TEXT, question=TEXT,
                  answers_spans=dict(spans=LIST, types=LIST)),
             lambda i: dict(section_id="s", query_id=f"q{i}", passage=f"They had {i}.", question=" How many? ",
                            answers_spans=dict(spans=[str(i), "some"], types=["number", "span"]))),
}

THREE = 'Suppose {} Can we infer that "{}"? Yes, No, or Maybe?\n'
# MeZO's prompt for row 1, and the options behind it
WORDING = {
    "rte": ('Ann has 1 cats.\nDoes this mean that "Ann has cats." is true? Yes or No?\n', ["Yes", "No"]),
    "cb": (THREE.format("Bo said 1.", "Bo spoke."), ["Yes", "No", "Maybe"]),
    "mnli": (THREE.format("Eve is 1.", "Eve is old."), ["Yes", "Maybe", "No"]),
    "snli": (THREE.format("Dog 1 runs.", "A dog sleeps."), ["Yes", "Maybe", "No"]),
    "sst5": ("film number 1 It was", [" terrible", " bad", " okay", " good", " great"]),
    "trec": ("Question: What is 1 ?\nType:",
             [" Expression", " Entity", " Description", " Human", " Location", " Number"]),
    "wic": ('Does the word "bank" have the same meaning in these two sentences? Yes, No?\nBank 1.\nA bank.\n',
            ["No", "Yes"]),
    "wsc": ('Ann met Eve when She was 1.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
            ["No", "Yes"]),
    "copa": ("It is 1 so", [" the clock struck.", " I slept on and on, as usual."]),
    "record": ("Ann, Bo, Eve, Di Lee, Max, Rosa met at 1.\n- All came\n- Rosa spoke\n-",
               [f" There was {n}, too" for n in NAMES[:3]]),
    "boolq": ("It is 1. Is it so?\n", ["Yes", "No"]),
    "multirc": ("Ann saw Bo. Eve saw Di.\nQuestion: Who saw whom, 0?\nI found this answer \"Bo\". Is that correct? "
                "Yes or No?\n", ["No", "Yes"]),
    "drop": ("Passage: They had 1.\nQuestion: How many?\nAnswer:", []),
}
RIGHT = dict(rte=1, cb=1, mnli=1, snli=1, sst5=1, trec=1, wic=1, wsc=1, copa=1, record=1, boolq=1, multirc=0)

everything = pytest.mark.parametrize("name", sorted(SCHEMAS))


def table(name, start, n):
    "Rows as `datasets` gives them."
    hub, config, columns, row = SCHEMAS[name]
    return datasets.Dataset.from_list([row(i) for i in range(start, start + n)], features=Features(columns))


def loaded(name, **kw):
    "The task on such rows: 8 in the pool, 2 to choose, the test set apart."
    test = TASKS[name].eval_splits[0]
    data = {"train": table(name, 0, 15), test: table(name, 15, 6), "development": table(name, 21, 3)}
    return load_task(name, data=data, **dict(n_train=8, n_dev=2) | kw)


@pytest.fixture(scope="module")
def base():
    return load_model("tiny-opt")


@everything
def test_prompts_are_worded_as_mezos(name):
    hub, config, _, _ = SCHEMAS[name]
    spec = TASKS[name]
    assert (spec.hub, spec.config) == (hub, config)
    data = {"train": table(name, 1, 1), spec.eval_splits[0]: table(name, 2, 1)}
    (e,) = load_task(name, data=data, n_train=1, n_dev=0).pool
    prompt, options = WORDING[name]
    assert e.prompt == prompt and list(e.options or spec.options) == options
    assert e.answers == ("1", "some") if name == "drop" else e.label == RIGHT[name]
    assert all(o.startswith(" ") != prompt.endswith("\n") for o in options), "a space, or a new line, and not both"


@everything
def test_a_missing_column_is_named(name, tmp_path):
    rows = table(name, 0, 4).to_list()
    spec = TASKS[name]
    read = {c for c in rows[0] if c in (*spec.columns, *spec.needed)}
    assert len(read) >= 2
    for column in sorted(read):
        lacking = [{k: v for k, v in r.items() if k != column} for r in rows]
        with pytest.raises(ValueError, match=rf"has no column '{column}' \(task '{name}' needs it\)"):
            load_task(name, data={"train": lacking, spec.eval_splits[0]: rows}, n_train=1, n_dev=1)


@everything
def test_a_folder_of_parquet_files_is_the_same(name, tmp_path):
    "Read from files as the hub's converted branch has them, too."
    test = TASKS[name].eval_splits[0]
    for split, rows in (("train", table(name, 0, 15)), (test, table(name, 15, 6)), ("development", table(name, 21, 3))):
        (tmp_path / split).mkdir()
        rows.to_parquet(tmp_path / split / "0000.parquet")
    there = load_task(name, path=tmp_path, n_train=8, n_dev=2)
    assert there.fingerprint == loaded(name).fingerprint


def plain_loss(model, tokenizer, e, options):
    "Minus the log of the right option's share, each option read by itself and scored by the mean of its tokens."
    means = []
    for option in options:
        before, ids = tokenizer(e.prompt).input_ids, tokenizer(e.prompt + option).input_ids
        assert ids[: len(before)] == before
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        means.append(np.mean([float(logp[t - 1, ids[t]]) for t in range(len(before), len(ids))]))
    return math.log(sum(math.exp(m) for m in means)) - means[e.label]


@pytest.mark.parametrize("name", sorted(set(SCHEMAS) - {"drop"}))
def test_losses_by_the_definition(name, base):
    task = loaded(name)
    got = make_objective(*base, task, task.pool[:4]).losses().tolist()
    assert got == pytest.approx([plain_loss(*base, e, e.options or task.options) for e in task.pool[:4]], abs=2e-4)


@everything
def test_two_steps(name, base, tmp_path):
    "Trained, chosen and tested; every score is there, and they mean the best-scored option."
    task = loaded(name, n_eval=4)
    config = FineTuneConfig(steps=2, lr=1e-4, m=8, eval_every=1)
    r = finetune(*base, task, ZPL(), config, folder=tmp_path / "run", runtime=Runtime(test=name != "drop"))
    assert r.metrics["steps"] == 2 and r.metrics["metric"] == ("f1" if name == "drop" else "accuracy")
    assert np.isfinite(r.evaluations.loss).all() and len(r.evaluations) == 3
    if name == "drop":
        return
    o = make_objective(*base, task, task.test)
    best = o.scores().argmax(1).tolist()
    expected = score(best, task.test)
    there = {k for k in r.metrics["test_after"] if k != "loss"}
    assert there == ({"accuracy", "f1", "exact_match"} if name == "record" else {"accuracy"})
    assert {k: r.metrics["test_after"][k] for k in there} == pytest.approx({k: expected[k] for k in there})


@pytest.mark.filterwarnings("ignore:task 'snli'")
def test_rows_without_agreement_are_left_out():
    "SNLI's label -1; the rest keeps its order."
    rows = [SCHEMAS["snli"][3](i) for i in range(12)]
    task = load_task("snli", data=dict(train=rows, validation=rows), n_train=9, n_dev=0)
    assert sorted(e.prompt for e in task.pool) == sorted(THREE.format(f"Dog {i} runs.", "A dog sleeps.")
                                                         for i in range(12) if i % 4 < 3)
    assert [e.label for e in task.test] == [i % 4 for i in range(12) if i % 4 < 3]
    with pytest.raises(ValueError, match="the training split has 9 rows"):
        load_task("snli", data=dict(train=rows, validation=rows), n_train=10, n_dev=0)


def test_several_names_may_be_right():
    "ReCoRD: the second answer counts as the first does; F1 counts words."
    data = dict(train=table("record", 0, 1), validation=table("record", 9, 1))
    (e,) = load_task("record", data=data, n_train=1, n_dev=0).test
    assert (e.candidates, e.answers) == (NAMES, ("Bo", "Ann"))
    assert [score([i], [e])["accuracy"] for i in range(6)] == [1, 1, 0, 0, 0, 0]
    half = score([3], [type(e)("?", 0, ("Lee",), candidates=NAMES)])
    assert (half["accuracy"], half["exact_match"]) == (0, 0) and half["f1"] == pytest.approx(2 / 3)


def test_questions_are_whole_or_not():
    "MultiRC: pairs, F1 of yes, and questions of which every answer is judged right."
    task = load_task("multirc", data=dict(train=table("multirc", 0, 3), validation=table("multirc", 3, 6)), n_train=1,
                     n_dev=0)
    assert sorted(e.label for e in task.test) == [0, 0, 0, 0, 1, 1] and len({e.group for e in task.test}) == 2
    never = score([0] * 6, task.test)
    assert never == dict(accuracy=4 / 6, f1_answers=0.0, questions=0.0)
    wrong_once = [e.label for e in task.test]
    wrong_once[0] = 1 - wrong_once[0]
    assert score(wrong_once, task.test)["questions"] == 0.5


@pytest.mark.parametrize("wrong, meant", [("SST-5", "sst5"), ("boolQ", "boolq"), ("recrod", "record"),
                                          ("multi_rc", "multirc"), ("mnli-m", "mnli"), ("wsc273", "wsc")])
def test_an_unknown_task_gives_the_nearest(wrong, meant):
    with pytest.raises(ValueError, match=f"unknown task '{wrong}'; did you mean '{meant}'"):
        load_task(wrong)
