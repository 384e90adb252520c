"""A run on somebody's own rows: repeated texts have the prior they have, and rows cut from its file are named."""
import json
import warnings

import numpy as np
import pytest

from paczero.accounts import accounts
from paczero.finetune import FineTuneConfig, Runtime, finetune, load_result
from paczero.information import posterior_bound
from paczero.mechanisms import make_mechanism
from paczero.models import load_model
from paczero.publish import load_release, model_card, save_release
from paczero.run.visibility import LEVELS, field_level, fields_of
from paczero.subsets import KINDS, SubsetDesign
from paczero.tasks import TaskSpec, load_task
from paczero.transcript import Transcript

SPEC = TaskSpec(name="own", template="{text} It was", options=(" terrible", " great"))
CONFIG = FineTuneConfig(steps=2, lr=1e-4, m=16, seed=1, eval_every=2)
TEXTS = ["a fine film", "a dull  film", "a dull film", "a dull film ", *(f"film {i}" for i in range(20))]


def task(**kw):
    "A pool in which one text is there three times, up to white space."
    rows = [dict(text=t, label=i % 2) for i, t in enumerate(TEXTS)]
    more = [dict(text=f"other {i}", label=i % 2) for i in range(12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_task(SPEC, data=dict(train=rows, development=more, test=more), n_train=24, n_dev=6, **kw)


def run(mechanism, folder, task):
    "A short run on it."
    model, tokenizer = load_model("tiny-opt")
    return finetune(model, tokenizer, task, make_mechanism(mechanism), CONFIG, folder=folder,
                    runtime=Runtime(parallel=False))


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    "Secrets of unfinished runs, elsewhere."
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))


def by_hand(task, design):
    "In how many of the subsets the text with copies is, counted one by one."
    copies = [i for i, e in enumerate(task.pool) if "dull" in e.prompt]
    assert len(copies) == 3
    return sum(any(design.membership[i, j] for i in copies) for j in range(design.m)) / design.m


@pytest.mark.parametrize("mechanism", [dict(name="zpl"), dict(name="mi", budget=0.05, steps=2)])
def test_the_bound_on_a_repeated_text_starts_at_its_own_prior(mechanism, tmp_path):
    data = task()
    result = run(mechanism, tmp_path / "run", data)
    prior, nats = by_hand(data, CONFIG.subset_design(24)), mechanism.get("budget", 0.0)
    g = result.guarantee
    assert prior > 0.7 and (g.text_prior, g.best_guess, g.prior) == (prior, prior, 0.5)
    assert g.posterior_bound == posterior_bound(nats, prior) and g.once_bound == posterior_bound(nats, 0.5)
    loaded = load_result(tmp_path / "run")
    assert loaded.guarantee.text_prior == prior and loaded.guarantee.posterior_bound == g.posterior_bound
    for page in ((tmp_path / "run" / "guarantee.md").read_text(), loaded.guarantee.markdown(), model_card(result)):
        assert f"| {prior:g}" in page and "that the pool has once" in page
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["text_prior"] == prior
    assert Transcript.load(tmp_path / "run" / "transcript.jsonl").header["design"]["text_prior"] == prior
    assert accounts(tmp_path).posterior_bound == posterior_bound(nats, prior)
    for name in ("metrics.json", "config.json"):
        written = json.loads((tmp_path / "run" / name).read_text())
        assert {field_level(name, f) for f in fields_of(written)} <= set(LEVELS)      # every field has its level


def test_a_release_promises_the_same(tmp_path):
    data = task()
    result = run(dict(name="zpl"), None, data)
    folder = save_release(result, None, tmp_path / "release")
    load_release(folder)
    prior = by_hand(data, CONFIG.subset_design(24))
    assert json.loads((folder / "release.json").read_text())["guarantee"]["text_prior"] == prior


@pytest.mark.parametrize("mechanism", [dict(name="nonprivate"),
                                       dict(name="dpzero", epsilon=2.0, sample_rate=0.5, steps=2, clip=20.0)])
def test_repeats_are_not_told_where_no_guarantee_rests_on_them(mechanism, tmp_path):
    data, name = task(), mechanism["name"]
    config = FineTuneConfig(steps=2, lr=1e-4, m=16, seed=1, eval_every=2, clip=mechanism.get("clip"))
    design = config.design_for(data, make_mechanism(mechanism))
    assert design.text_prior is None and design.to_dict() == CONFIG.subset_design(24).to_dict(), name


def test_a_pool_without_repeats_is_written_as_before(tmp_path):
    data = load_task("reviews", seed=0, n_train=24, n_dev=6, n_eval=6)
    result = run(dict(name="zpl"), tmp_path / "run", data)
    assert result.transcript.header["design"] == CONFIG.subset_design(24).to_dict()
    assert not {"text_prior", "once_bound", "cut_from_own_file"} & set(result.metrics)
    assert not {"text_prior", "once_bound"} & set(result.guarantee.to_dict())
    assert "cut_from_own_file" not in json.loads((tmp_path / "run" / "config.json").read_text())["task"]
    assert "own file" not in (tmp_path / "run" / "guarantee.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_likelier_to_be_guessed_than_the_design_says(kind):
    "Every text of pools with every multiplicity, by going through the subsets."
    rng = np.random.default_rng(0)
    design = SubsetDesign(60, 12, 0, kind, r=5 if kind == "fixed" else None)
    for _ in range(20):
        groups = rng.integers(0, rng.integers(1, 60), 60)
        best = design.with_repeats(groups).best_guess
        shares = [design.membership[groups == g].any(axis=0).mean() for g in np.unique(groups)]
        alone = max(design.prior, 1 - design.prior)
        assert best == max(alone, *(max(p, 1 - p) for p in shares))


def test_rows_cut_from_the_pools_own_table_are_named_everywhere(tmp_path):
    rows = [dict(text=f"film {i}", label=i % 2) for i in range(50)]
    with pytest.warns(UserWarning, match="6 development rows and 8 test rows were cut .* does not protect them"):
        data = load_task(SPEC, data=rows, n_train=24, n_dev=6, n_eval=8)
    result = run(dict(name="zpl"), tmp_path / "run", data)
    note = "The development set of 6 rows and the test set of 8 rows were cut from the pool's own file"
    assert note in (tmp_path / "run" / "guarantee.md").read_text() and note in model_card(result)
    assert note in model_card(load_result(tmp_path / "run"))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["task"]["cut_from_own_file"]
    assert kept == result.metrics["cut_from_own_file"] == dict(dev=6, test=8)


def test_a_folder_of_ones_own_warns_until_it_has_a_development_file(tmp_path, recwarn):
    text = "text,label\n" + "".join(f"film {i},{i % 2}\n" for i in range(40))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(text.replace("film", split))
    with pytest.warns(UserWarning, match="10 development rows were cut"):
        cut = load_task(SPEC, path=tmp_path, n_train=20, n_dev=10)
    (tmp_path / "development.csv").write_text(text.replace("film", "public"))
    recwarn.clear()
    apart = load_task(SPEC, path=tmp_path, n_train=20, n_dev=10)
    assert not recwarn.list and (cut.own_file, apart.own_file) == (("dev",), ())
    assert apart.pool == cut.pool and all(e.prompt.startswith("public") for e in apart.dev) and len(apart.dev) == 10
