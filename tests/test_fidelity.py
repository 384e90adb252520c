"""The paper's set-up, step by step, against plain code written from the method's description alone; on the real SST-2 and SQuAD where they are at hand."""
import json, os, string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.subsets import SubsetDesign
from paczero.tasks import load_task, squad_f1

ROOT = Path(__file__).resolve().parent.parent


def data(name):
    "The folder of a real data set; skips where there is none."
    for root in filter(None, (os.environ.get("PACZERO_SHARED"), ROOT.parent / "shared")):
        if (Path(root) / "data" / name / "train.parquet").is_file(): return Path(root) / "data" / name
    pytest.skip(f"no real {name} at hand: put its train.parquet and validation.parquet into ../shared/data/{name}, or set PACZERO_SHARED")


def rows(folder, split):
    import pyarrow.parquet as pq
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


@pytest.mark.filterwarnings("ignore:task 'sst2'")
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_sst2_examples(seed):
    "RandomState(s) permutes the training split; the first 1000 are the pool, the next 500 the development set; all 872 validation sentences, stripped, with the prompt around them."
    folder = data("sst2"); task = load_task("sst2", path=folder, seed=seed)
    train, validation = rows(folder, "train"), rows(folder, "validation")
    order = np.random.RandomState(seed).permutation(len(train))
    plain = lambda r: (r["sentence"].strip() + " It was", r["label"])
    assert [(e.prompt, e.label) for e in task.pool] == [plain(train[i]) for i in order[:1000]]
    assert [(e.prompt, e.label) for e in task.dev] == [plain(train[i]) for i in order[1000:1500]]
    assert [(e.prompt, e.label) for e in task.test] == [plain(r) for r in validation] and len(task.test) == 872
    assert task.options == (" terrible", " great")
    assert any(r["sentence"] != r["sentence"].strip() for r in train), "the data has nothing to strip: this test would not notice"


def test_squad_examples():
    folder = data("squad"); task = load_task("squad", path=folder, seed=3)
    train, validation = rows(folder, "train"), rows(folder, "validation")
    order = np.random.RandomState(3).permutation(len(train))
    plain = lambda r: f"Title: {r['title']}\nContext: {r['context']}\nQuestion: {r['question']}\nAnswer:"
    assert [e.prompt for e in task.pool + task.dev] == [plain(train[i]) for i in order[:1500]]
    assert any(plain(r) != plain({k: str(v).strip() for k, v in r.items()}) for r in train), "no white space around any field: this test would not notice"
    assert all(set(e.answers) == {a.strip() for a in train[i]["answers"]["text"]} for e, i in zip(task.pool, order))
    assert len(task.test) == 1000 and {e.prompt.split("\n")[0] for e in task.test} <= {f"Title: {r['title']}" for r in validation}
    assert task.max_new_tokens == 50 and "\n" in task.stop


def plain_f1(prediction, golds):
    "SQuAD's score, from its description: lower case, no punctuation, no articles, words as a multiset, the best gold counts."
    def words(s): return [w for w in "".join(c for c in s.lower() if c not in string.punctuation).split() if w not in ("a", "an", "the")]
    def one(a, b):
        shared = sum((Counter(a) & Counter(b)).values())
        if not a or not b: return float(a == b)
        return 0.0 if not shared else 2 * (shared / len(a)) * (shared / len(b)) / (shared / len(a) + shared / len(b))
    return max(one(words(prediction), words(g)) for g in golds)


def test_squad_f1_on_real_answers():
    validation = rows(data("squad"), "validation"); rng = np.random.RandomState(0); seen = []
    for r in validation:
        golds, tokens = r["answers"]["text"], r["context"].split()
        at = rng.randint(len(tokens))
        for guess in (golds[0], golds[0].upper() + ".", "the " + golds[-1], " ".join(tokens[at:at + 4]), golds[0] + " " + tokens[at], ""):
            assert squad_f1(guess, golds) == pytest.approx(plain_f1(guess, golds)); seen.append(squad_f1(guess, golds))
    assert 0 in seen and 1 in seen and any(0 < s < 1 for s in seen)


def test_losses_on_sst2_by_the_definition():
    "Cross entropy over the options of the mean log-probability of each option's tokens; one forward pass a sequence, nothing shared, nothing batched."
    import torch
    from paczero.objectives import make_objective
    task = load_task("sst2", path=data("sst2"), n_train=24, n_dev=1)
    model, tokenizer = load_model("tiny-opt")
    expected = []
    for e in task.pool:
        scores = []
        for option in (" terrible", " great"):
            prompt, ids = tokenizer(e.prompt).input_ids, tokenizer(e.prompt + option).input_ids
            assert ids[0] == 2 and ids[:len(prompt)] == prompt
            with torch.no_grad(): logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            scores.append(torch.stack([logp[t - 1, ids[t]] for t in range(len(prompt), len(ids))]).mean())
        expected.append(-torch.stack(scores).log_softmax(0)[e.label])
    assert torch.allclose(make_objective(model, tokenizer, task, task.pool, None).losses().cpu(), torch.stack(expected), atol=2e-4)


def test_too_long_prompts_lose_their_left_end():
    "At 2048 tokens; OPT's leading </s> stays, and so does the question, which is on the right."
    from paczero.objectives.tokens import encode
    from paczero.objectives import encode_options
    _, tokenizer = load_model("tiny-opt")
    text = "Title: x\nContext: " + " ".join(f"word{i}" for i in range(3000)) + "\nQuestion: which?\nAnswer:"
    ids = tokenizer(text).input_ids
    assert len(ids) > 2048 and ids[0] == 2 and encode(tokenizer, text, 2048) == [2] + ids[-2047:]
    for option, got in zip((" terrible", " great"), encode_options(tokenizer, text, (" terrible", " great"), 2048)):
        assert got.ids[0] == 2 and len(got.ids) <= 2048
        n, whole = len(got.ids) - 1, tokenizer(text + option).input_ids
        assert list(got.ids[1:]) == whole[-n:], "the option must stand behind the right end of the prompt"
    assert encode(tokenizer, "short", 2048) == tokenizer("short").input_ids


def test_schedule_is_that_of_hugging_face():
    "'polynomial' of power 1 to 1e-7, step by step as the scheduler itself counts."
    import torch
    from transformers import get_scheduler
    from paczero.schedule import learning_rate
    for lr, steps in ((1e-4, 1000), (1e-3, 1500), (5e-6, 20000)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        scheduler = get_scheduler("polynomial", optimizer, num_warmup_steps=0, num_training_steps=steps, scheduler_specific_kwargs=dict(lr_end=1e-7, power=1.0))
        for t in range(steps):
            if t % 97 == 0 or t == steps - 1: assert learning_rate(t, steps, lr) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), (lr, t)
            optimizer.step(); scheduler.step()


def test_clipping_comes_before_the_subset_means():
    "Every example's difference is clipped, then averaged; with one heavy example that turns signs, and neither no clipping nor clipping the means gives the same."
    n, m, c = 40, 12, 1.0
    design = SubsetDesign(n, m, 5); inside = design.membership
    ghat = np.full(n, -0.5); ghat[0] = 100.0
    def signs(values, clip_means=False):
        means = [np.mean([values[i] for i in range(n) if inside[i, j]]) for j in range(m)]
        return [1 if (np.clip(g, -c, c) if clip_means else g) >= 0 else -1 for g in means]
    right = signs(np.clip(ghat, -c, c))
    released, = ZPL().bind(design).step(ghat[None], clip=c)
    assert released.sign_vector.tolist() == right == [-1] * m and released.scalar == -1        # unanimous, so this is not a coin
    unclipped, = ZPL().bind(design).step(ghat[None])
    assert unclipped.sign_vector.tolist() == signs(ghat) == signs(ghat, clip_means=True) == [1 if inside[0, j] else -1 for j in range(m)]


def test_the_best_checkpoint_is_that_of_the_development_set(tmp_path):
    "Looked at every `eval_every` steps and at the end; the lowest development loss wins, and its weights are what comes back."
    from paczero.objectives import make_objective
    task = load_task("reviews", seed=0, n_train=40, n_dev=30, n_eval=10)
    model, tokenizer = load_model("tiny-opt")
    r = finetune(model, tokenizer, task, ZPL(), FineTuneConfig(steps=10, lr=2e-2, m=8, eval_every=3, seed=2), folder=tmp_path / "run", runtime=Runtime(test=False))
    looked = [(e["at"], e["dev"]["loss"]) for e in map(json.loads, (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) if "dev" in e]
    assert [at for at, _ in looked] == [0, 3, 6, 9, 10]
    best_at, best_loss = min(looked[1:], key=lambda x: x[1])
    assert r.metrics["best_step"] == best_at
    assert make_objective(model, tokenizer, task, task.dev, None).evaluate()["loss"] == pytest.approx(best_loss, rel=1e-5)
