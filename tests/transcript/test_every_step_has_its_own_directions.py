"""z of a step and direction is that of its seed, whatever is kept from before, in every order of asking."""
import itertools

import pytest
import torch

from paczero.directions import Theta, direction, direction_seed


@pytest.mark.parametrize("mode", ["copy", "inplace"])
@pytest.mark.parametrize("k", [1, 3])
def test_updates_along_many_steps(mode, k):
    "Against the sum over all steps and directions of their own z, drawn afresh."
    p = torch.zeros(40, 3)
    theta, wanted = Theta([p], seed=5, restore=mode), torch.zeros(40, 3)
    for t in range(4):
        for j, to in itertools.product(range(k), (+1, -1)):
            theta.move(t, j, to)
        a = [0.1 * (j + 1) for j in range(k)]
        theta.update(t, a)
        for j in range(k):
            wanted -= a[j] * next(direction([p], direction_seed(5, t, j)))
        assert torch.allclose(p, wanted, atol=1e-5), t


def test_no_two_are_alike():
    seeds = [direction_seed(s, t, k) for s in range(3) for t in range(20) for k in range(20)]
    assert len(set(seeds)) == len(seeds)
