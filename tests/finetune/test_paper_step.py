"""The paper's step, against plain code written from the method's description alone: rate, clipping, best checkpoint."""
import json

import numpy as np
import pytest

from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.objectives import make_objective
from paczero.schedule import learning_rate
from paczero.subsets import SubsetDesign
from paczero.tasks import load_task


@pytest.mark.parametrize("lr, steps", [(1e-4, 1000), (1e-3, 1500), (5e-6, 20000)])
def test_schedule_is_that_of_hugging_face(lr, steps):
    "'polynomial' of power 1 to 1e-7, step by step as the scheduler itself counts."
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_scheduler("polynomial", optimizer, num_warmup_steps=0, num_training_steps=steps,
                              scheduler_specific_kwargs=dict(lr_end=1e-7, power=1.0))
    for t in range(steps):
        if t % 97 == 0 or t == steps - 1:
            now = optimizer.param_groups[0]["lr"]
            assert learning_rate(t, steps, lr) == pytest.approx(now, rel=1e-9), (lr, t)
        optimizer.step()
        scheduler.step()


def plain_signs(values, inside, clip_means=None):
    "Each subset's sign, from the mean of its members."
    means = [np.mean([v for v, member in zip(values, inside[:, j]) if member]) for j in range(inside.shape[1])]
    clipped = means if clip_means is None else np.clip(means, -clip_means, clip_means)
    return [1 if g >= 0 else -1 for g in clipped]


def test_clipping_comes_before_the_subset_means():
    """Every example's difference is clipped, then averaged.

    With one heavy example that turns signs, neither no clipping nor clipping the means gives the same.
    """
    n, m, c = 40, 12, 1.0
    design = SubsetDesign(n, m, 5)
    inside = design.membership
    ghat = np.full(n, -0.5)
    ghat[0] = 100.0
    right = plain_signs(np.clip(ghat, -c, c), inside)
    released, = ZPL().bind(design).step(ghat[None], clip=c)
    assert released.sign_vector.tolist() == right == [-1] * m
    assert released.scalar == -1                                    # unanimous, so this is not a coin
    unclipped, = ZPL().bind(design).step(ghat[None])
    wrong = plain_signs(ghat, inside)
    assert unclipped.sign_vector.tolist() == wrong == plain_signs(ghat, inside, clip_means=c)
    assert wrong == [1 if inside[0, j] else -1 for j in range(m)]


def test_the_best_checkpoint_is_that_of_the_development_set(tmp_path):
    """Looked at every `eval_every` steps and at the end.

    The lowest development loss wins, and its weights are what comes back.
    """
    task = load_task("reviews", seed=0, n_train=40, n_dev=30, n_eval=10)
    model, tokenizer = load_model("tiny-opt")
    config = FineTuneConfig(steps=10, lr=2e-2, m=8, eval_every=3, seed=2)
    r = finetune(model, tokenizer, task, ZPL(), config, folder=tmp_path / "run", runtime=Runtime(test=False))
    entries = map(json.loads, (tmp_path / "run" / "ledger.jsonl").read_text().splitlines())
    looked = [(e["at"], e["dev"]["loss"]) for e in entries if "dev" in e]
    assert [at for at, _ in looked] == [0, 3, 6, 9, 10]
    best_at, best_loss = min(looked[1:], key=lambda x: x[1])
    assert r.metrics["best_step"] == best_at
    now = make_objective(model, tokenizer, task, task.dev, None).evaluate()["loss"]
    assert now == pytest.approx(best_loss, rel=1e-5)
