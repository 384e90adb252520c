"""The paper's losses by their definition, and what becomes of prompts that are too long."""
import pytest
import torch

from paczero.models import load_model
from paczero.objectives import encode_options, make_objective
from paczero.objectives.tokens import encode
from paczero.tasks import load_task, squad_f1
from realdata import folder

OPTIONS = (" terrible", " great")


@pytest.fixture(scope="module")
def base():
    return load_model("tiny-opt")


def mean_logprob(model, tokenizer, prompt, option):
    "Mean log-probability of an option's tokens after a prompt, in one forward pass of its own."
    before, ids = tokenizer(prompt).input_ids, tokenizer(prompt + option).input_ids
    assert ids[0] == 2 and ids[: len(before)] == before
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return torch.stack([logp[t - 1, ids[t]] for t in range(len(before), len(ids))]).mean()


def check_losses(base, task):
    """Cross entropy over the options of the mean log-probability of each option's tokens.

    One forward pass a sequence, nothing shared, nothing batched.
    """
    expected = []
    for e in task.pool:
        scores = torch.stack([mean_logprob(*base, e.prompt, option) for option in OPTIONS])
        expected.append(-scores.log_softmax(0)[e.label])
    got = make_objective(*base, task, task.pool, None).losses().cpu()
    assert torch.allclose(got, torch.stack(expected).to(got.dtype), atol=2e-4)


def test_losses_on_sst2_by_the_definition(base):
    check_losses(base, load_task("sst2", path=folder("sst2"), n_train=24, n_dev=1))


def test_losses_on_reviews_by_the_definition(base):
    check_losses(base, load_task("reviews", n_train=24, n_dev=1))


def plain_answer(model, tokenizer, task, prompt):
    "Greedy, one token after the other, each with a forward pass over everything before it."
    ids = list(tokenizer(prompt).input_ids)
    text = ""
    for _ in range(task.max_new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[len(tokenizer(prompt).input_ids) :], skip_special_tokens=True)
        if task.stop in text or ids[-1] == tokenizer.eos_token_id:
            break
    return text.split(task.stop)[0].strip()


def test_answers_are_scored_by_the_definition(base):
    "Minus the token F1 of the greedy answer."
    model, tokenizer = base
    task = load_task("facts", n_train=4, n_dev=1)
    expected = [-squad_f1(plain_answer(model, tokenizer, task, e.prompt), e.answers) for e in task.pool]
    got = make_objective(model, tokenizer, task, task.pool, None).losses().tolist()
    assert got == pytest.approx(expected, abs=1e-6)


def test_too_long_prompts_lose_their_left_end(base):
    "At 2048 tokens; OPT's leading </s> stays, and so does the question, which is on the right."
    _, tokenizer = base
    context = " ".join(f"word{i}" for i in range(3000))
    text = f"Title: x\nContext: {context}\nQuestion: which?\nAnswer:"
    ids = tokenizer(text).input_ids
    assert len(ids) > 2048 and ids[0] == 2 and encode(tokenizer, text, 2048) == [2] + ids[-2047:]
    for option, got in zip(OPTIONS, encode_options(tokenizer, text, OPTIONS, 2048)):
        assert got.ids[0] == 2 and len(got.ids) <= 2048
        n, whole = len(got.ids) - 1, tokenizer(text + option).input_ids
        assert list(got.ids[1:]) == whole[-n:], "the option must stand behind the right end of the prompt"
    assert encode(tokenizer, "short", 2048) == tokenizer("short").input_ids
