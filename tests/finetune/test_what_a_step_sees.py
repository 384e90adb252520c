"""What goes into a step and into the choice: differences that are derivatives, clipped, and no untrained model."""
import pytest
import torch

from paczero.directions import Theta, direction, direction_seed
from paczero.finetune import FineTuneConfig, Runtime, differences, finetune
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.tasks import load_task


@pytest.mark.parametrize("eps", [1e-3, 0.25])
@pytest.mark.parametrize("mode", ["copy", "inplace"])
def test_differences_are_derivatives_along_z(eps, mode):
    "Of losses that are linear in θ, exactly: g_i = z·∇l_i, whatever ε."
    gen = torch.Generator().manual_seed(0)
    p, slopes = torch.randn(5, 4, generator=gen), torch.randn(7, 20, generator=gen, dtype=torch.float64)
    theta = Theta([p], 3, eps, mode)
    ghat, loss = differences(theta, lambda: slopes @ p.double().flatten(), 2, 3)
    theta.restore(2, 2)
    zs = torch.stack([next(direction([p], direction_seed(3, 2, k))).flatten() for k in range(3)]).double()
    assert ghat.shape == (3, 7)
    assert torch.allclose(torch.from_numpy(ghat), zs @ slopes.T, atol=2e-6 / eps)
    assert loss == pytest.approx(float((slopes @ p.double().flatten()).mean()), abs=1e-4)


class Keeps(ZPL):
    "Keeps what it was asked for."
    def step(self, ghat, *, clip=None):
        self.__dict__.setdefault("asked", []).append((ghat.shape, clip))
        return super().step(ghat, clip=clip)


@pytest.fixture(scope="module")
def task():
    return load_task("reviews", seed=0, n_train=24, n_dev=8, n_eval=8)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_is_clipped_as_the_recipe_says(task, clip):
    mechanism, config = Keeps(), FineTuneConfig(steps=2, lr=1e-3, m=8, k=3, clip=clip, eval_every=2)
    finetune(*load_model("tiny-opt"), task, mechanism, config, runtime=Runtime(test=False))
    assert mechanism.asked == [((3, 24), clip)] * 2


def test_the_untrained_model_is_no_outcome(task):
    "Where training only does harm, the least harm is what comes out."
    config = FineTuneConfig(steps=2, lr=1.0, m=8, eval_every=1)
    r = finetune(*load_model("tiny-opt"), task, ZPL(), config, runtime=Runtime(test=False))
    loss = dict(zip(r.evaluations.step, r.evaluations.loss))
    assert loss[0] < min(loss[1], loss[2]) and r.metrics["best_step"] == min((1, 2), key=loss.get)
