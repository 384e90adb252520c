"""One file is a mechanism: somebody else's runs by name, has its own parameters, and its look in figures."""
import json
import subprocess
from dataclasses import FrozenInstanceError

import pytest
from common import BIN, ROOT, environment
from paczero import show
from paczero.lab.choose import choose_recipe, parameters
from paczero.lab.experiment import run_or_load
from paczero.lab.start import recipe_data, recipe_network
from paczero.mechanisms import look, make_mechanism, MECHANISM_NAMES, MECHANISMS, register_mechanism, ZPL
from paczero.paper import recipe_for

OWN = '''
"ZPL that goes a shorter way where the subsets disagree."
from dataclasses import replace
from paczero.mechanisms import Field, ZPL, register_mechanism


@register_mechanism
class Abstaining(ZPL):
    "ZPL whose coins are worth less than its unanimous signs."
    name, title, colour, marker = "abstaining", "ZPL that abstains", "#117733", "*"
    real_valued = True
    fields = (Field(name="hold", help="a coin's worth", default=0.5, fits=lambda v: 0 < v <= 1, short="h",
                    need="a number in (0, 1], since mechanism={mechanism} goes shorter ways"),)

    def __init__(self, *, hold=0.5, audit_seed=None):
        self.hold = hold
        super().__init__(audit_seed=audit_seed)

    @classmethod
    def label(cls, spec):
        return cls.title + (f", {spec['hold']:g}" if "hold" in spec else "")

    def _arguments(self):
        return dict(hold=self.hold)

    def release(self, subset_means, *, pool_mean=None):
        rel = super().release(subset_means)
        return rel if rel.kind == "unanimous" else replace(rel, scalar=self.hold * rel.sign)

    def _verify(self, rel):
        super()._verify(replace(rel, scalar=float(rel.sign)))
'''
TINY = dict(steps=6, m=16, n_train=20, n_dev=10, n_eval=10, eval_every=3)


@pytest.fixture
def own(tmp_path):
    "The file; what it registers is gone afterwards."
    before = dict(MECHANISMS)
    file = tmp_path / "abstaining.py"
    file.write_text(OWN)
    yield file
    MECHANISMS.clear()
    MECHANISMS.update(before)


def test_its_file_is_its_name_in_recipes(own):
    recipe, changed = choose_recipe(mechanism=str(own), hold=0.25, steps=40)
    assert (recipe.mechanism, recipe.hold, recipe.m) == ("abstaining", 0.25, 126)
    assert changed == {"hold": (0.5, 0.25), "steps": (150, 40)}
    assert recipe.name() == "reviews_tiny-opt_full_abstaining_h0.25_T40_s0"
    assert "hold" in parameters() and "abstaining" in MECHANISM_NAMES
    assert recipe_for("opt-1.3b", mechanism="abstaining").lr == recipe_for("opt-1.3b").lr
    assert recipe.but(mechanism="mi").flat()["hold"] is None
    assert repr(make_mechanism(json.loads(json.dumps(recipe.make_mechanism().describe())))) == "Abstaining(hold=0.25)"
    with pytest.raises(FrozenInstanceError):
        recipe.source = "mine"


@pytest.mark.parametrize("given, says", [
    (dict(hold=2), r"hold must be a number in \(0, 1\], since mechanism='abstaining' goes shorter ways, got 2"),
    (dict(hold=0.5, mechanism="zpl"), "hold=0.5 contradicts mechanism='zpl': it belongs to mechanism='abstaining'"),
    (dict(hodl=1), "unknown parameter 'hodl'; did you mean 'hold'"),
    (dict(budget=1), "it belongs to mechanism='mi'"),
    (dict(mechanism="abstainin"), "did you mean 'abstaining'"),
])
def test_its_fields_are_checked_as_all_others(own, given, says):
    choose_recipe(mechanism=str(own))
    with pytest.raises(ValueError, match=says):
        choose_recipe(**dict(mechanism="abstaining") | given)


def test_a_name_belongs_to_one_class(own):
    choose_recipe(mechanism=str(own))
    with pytest.raises(ValueError, match="belongs to Abstaining"):
        register_mechanism(type("Other", (ZPL,), dict(name="abstaining")))
    assert [n for n in MECHANISM_NAMES if n != "abstaining"] == ["zpl", "mi", "nonprivate", "dpzero", "dp-aggzo"]


@pytest.mark.slow
def test_it_runs_and_is_drawn_and_resumed_under_its_name(own, tmp_path):
    recipe, _ = choose_recipe(mechanism=str(own), hold=0.25, **TINY)
    made = lambda: (*recipe_network(recipe, "cpu"), recipe_data(recipe), recipe.make_mechanism(), recipe.config)
    result = run_or_load(tmp_path / "run", *made())
    again = run_or_load(tmp_path / "run", *made())
    assert again.transcript.digest == result.transcript.digest and "**nothing**" in again.guarantee.statement()
    assert {abs(r) for step in result.transcript.releases for r in step} <= {0.25, 1.0}
    fig = show.plot_run(result)
    text = [t.get_text() for ax in fig.axes if ax.get_legend() for t in ax.get_legend().get_texts()]
    assert "ZPL that abstains, 0.25" in text
    assert look("abstaining").colour in {line.get_color() for ax in fig.axes for line in ax.lines}


@pytest.mark.slow
def test_papermill_runs_it_by_its_file(own, tmp_path):
    given = dict(TINY, mechanism=own.name, hold=0.25, reference=False, run_id="own", results_dir="results")
    args = [x for k, v in given.items() for x in ("-p", k, str(v))]
    command = [str(BIN / "papermill"), str(ROOT / "nbs" / "run_experiment.ipynb"), "out.ipynb", *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600,
                          env=environment(PACZERO_STATE_DIR=str(tmp_path / "state")))
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    metrics = json.loads((tmp_path / "results" / "runs" / "own" / "metrics.json").read_text())
    assert metrics["mechanism"] == dict(name="abstaining", hold=0.25, real_valued=True) and metrics["mi_spent"] == 0
    assert "ZPL that abstains, 0.25" in (tmp_path / "out.ipynb").read_text()
