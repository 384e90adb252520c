"""Recipes by name: every cell of the paper is one, and what cannot be meant is refused with the argument's name."""
import pytest

from paczero import paper
from paczero.lab.choose import choose_recipe, reference_recipe

pytest.importorskip("opacus")
PRIVATE = ("dpzero", "dp-aggzo")


@pytest.fixture(scope="module")
def recipes():
    return {i: paper.cell(i) for i in paper.cells().run_id}


def test_every_cell_is_a_recipe(recipes):
    assert len(recipes) == 143
    dp = {i: r for i, r in recipes.items() if r.mechanism in PRIVATE}
    assert len(dp) == 12
    assert {(r.clip, r.sample_rate, r.dp_delta, r.m) for r in dp.values()} == {(25.0, 0.064, 1e-5, None)}
    m = recipes["dpaggzo_sst2_1p3b_ft_eps6p0_K64_T1000"].make_mechanism()
    assert (m.name, m.directions, m.steps) == ("dp-aggzo", 64, 1000) and 5.9 < m.booked <= 6


def test_baselines_look_at_as_many_examples_as_zpl():
    for r in (paper.recipe_for(mechanism=n) for n in PRIVATE):
        looked_at = 2 * r.k * r.steps * r.sample_rate * r.n_train
        assert abs(looked_at / (2 * 150 * 1000) - 1) < 0.03


REFUSED = [
    (dict(dp_epsilon=1), "dp_epsilon"), (dict(sample_rate=0.1), "sample_rate"),
    (dict(mechanism="dpzero", m=8), "m=8"), (dict(mechanism="dpzero", budget=0.3), "budget"),
    (dict(mechanism="dpzero", k=2), "k=2"), (dict(mechanism="dpzero", dp_epsilon=-1), "dp_epsilon"),
    (dict(mechanism="dpzero", dp_delta=1.0), "dp_delta"), (dict(mechanism="dpzero", clip="none"), "clip"),
    (dict(mechanism="dp-aggzo", sample_rate=0.0), "sample_rate"),
    (dict(mechanism="nonprivate", batch_size=1001), "larger than the pool"),
    (dict(batch_size=10), "batch_size"), (dict(mechanism="nonprivate", batch_size=0), "batch_size"),
]


@pytest.mark.parametrize("given, says", REFUSED)
def test_recipes_refuse(given, says):
    with pytest.raises(ValueError, match=says):
        choose_recipe(**given)


def test_a_cell_with_another_mechanism():
    r, _ = choose_recipe("sst2_1p3b_ft_paczpl_s0", mechanism="dpzero", clip=25.0)
    assert (r.dp_epsilon, r.m, r.k) == (2.0, None, 1)
    r, _ = choose_recipe("dpzero_sst2_1p3b_ft_eps1p0_K1_T20k", mechanism="zpl")
    assert (r.dp_epsilon, r.m, r.mechanism) == (None, 126, "zpl")


def test_the_reference_beside_a_baseline():
    beside = reference_recipe(paper.recipe_for(mechanism="dp-aggzo", seed=3, n_train=500))
    assert (beside.mechanism, beside.steps, beside.seed) == ("nonprivate", 150, 3)
    assert (beside.n_train, beside.k) == (500, 1)
