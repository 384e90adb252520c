"""Tables from real, tiny runs: what is missing, broken, foreign or half done costs its own place and no other."""
import json
import math
import re
import shutil
import statistics

import numpy as np
import pandas as pd
import pytest
from common import ROOT
from mill import parameters, run_papermill

from paczero import paper, show
from paczero.finetune import finetune
from paczero.models import load_model
from paczero.tasks import load_task

ZPL = [f"sst2_1p3b_ft_paczpl_s{s}" for s in range(3)]
MI = "plateau_sst2_1p3b_ft_mi0p11_s0"
SIZES = dict(n_train=32, n_dev=20, n_eval=50)


def run_cell(root, run_id):
    "A real run of four steps on tiny-opt, left as a sweep leaves the miniature of a cell."
    row = paper.cells().set_index("run_id", drop=False).loc[run_id].to_dict()
    more = dict(mechanism="mi", budget=float(row["mi"])) if row["mechanism"] == "mi" else {}
    recipe = paper.recipe_for("tiny-opt", seed=int(row["seed"]), steps=4, m=8, eval_every=2, **SIZES, **more)
    task, folder = load_task(recipe.task, seed=recipe.seed, **SIZES), root / "miniature" / "runs" / run_id
    finetune(*load_model(recipe.model), task, recipe.make_mechanism(), recipe.config, folder=folder)
    about = dict(run_id=run_id, set="miniature", recipe=recipe.flat(), stands_for=row)
    (folder / "cell.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PACZERO_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        for run_id in [*ZPL, MI]:
            run_cell(root, run_id)
    return root


@pytest.fixture
def results(kept, tmp_path):
    "A copy that a test may break."
    shutil.copytree(kept, tmp_path / "r")
    return tmp_path / "r"


def folder(results, run_id):
    return results / "miniature" / "runs" / run_id


def edit(file, **changes):
    "Change a JSON file."
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(results, cell, file="metrics.json", /, **changes):
    edit(folder(results, cell) / file, **changes)


def row(results, run_id, which="miniature"):
    return show.results(run_id, results, which).iloc[0]


# ---------------------------------------------------------------- what there is


def test_registry_is_the_papers():
    a, b = show.select(), paper.cells()
    assert a.run_id.tolist() == b.run_id.tolist() and len(a) == 143
    for f in show.NUMBERS:
        read = [None if math.isnan(x) else x for x in a[f]]
        assert read == [None if x in ("", "none") else float(x) for x in b[f]], f
    with pytest.raises(ValueError, match="did you mean 'app-rank'"):
        show.select("app-rnk")


def commands(text):
    "With every command on a line of its own."
    return re.sub(r" \\\n +", " ", text)


@pytest.mark.parametrize("there", [False, True])
def test_empty_folder(tmp_path, there):
    "No results at all: every cell is missing, reported values stand alone, and the way to run them is named."
    if there:
        (tmp_path / "runs").mkdir()
    rows = show.results(None, tmp_path)
    assert len(rows) == 286 and set(rows.status) == {"missing"}
    groups = show.grouped(rows)
    assert (groups.n == 0).all() and show.by_set(groups) == [] and show.agrees(groups, tmp_path)
    view = show.readable(show.grouped(show.results("table1", tmp_path), ("model", "task", "track", "mechanism", "mi")))
    assert view["reported"].tolist().count("88.99 ± 0.91 %") == 1 and (view["reported"] != "–").sum() == 1
    text = commands(show.missing(rows))
    for table in show.select().table.unique():
        assert f"sweep --table {table}\n" in text and f"sweep --miniature --table {table}" in text


@pytest.mark.parametrize("run_id", [*ZPL, MI])
def test_real_runs_have_nothing_to_remark(kept, run_id):
    r = row(kept, run_id)
    m = json.loads((folder(kept, run_id) / "metrics.json").read_text())
    p = m["test_after"]["accuracy"]
    assert (r.status, r.note) == ("finished", "") and r.score == 100 * p
    assert r.standard_error == pytest.approx(100 * math.sqrt(p * (1 - p) / 50))
    assert r.unanimity == pytest.approx(100 * m["unanimity"]) and r.mi_spent == m["mi_spent"]
    assert (r.ran_steps, r.ran_lr, r.lr) == (4, 2e-3, 1e-4)


def test_mean_and_spread(results):
    for run_id, p in zip(ZPL, (0.5, 0.6, 0.8)):
        change(results, run_id, test_after=dict(accuracy=p, loss=1.0))
    groups = show.grouped(show.results(ZPL, results))
    assert len(groups[groups.n > 0]) == 1
    g = groups[groups.n > 0].iloc[0]
    assert g["n"] == 3 and g["mean"] == pytest.approx(statistics.mean([50, 60, 80]))
    assert g["std"] == pytest.approx(statistics.stdev([50, 60, 80]))
    assert show.readable(groups).iloc[0]["tiny-opt miniature"] == "63.3 ± 15.3 % (n = 3)"
    assert show.agrees(groups, results)
    change(results, ZPL[1], test_after=dict(accuracy=0.62, loss=1.0))
    assert not show.agrees(groups, results)


# ---------------------------------------------------------------- what is broken

BROKEN = {"half": "{\"model\": \"tiny-opt\", ", "list": "[]", "empty": "", "deep": "[" * 100000, "binary": "\x00\x01"}
NO_SCORE = {"nan": math.nan, "text": "0.9", "none": None}


@pytest.mark.parametrize("how", [*BROKEN, *NO_SCORE])
def test_corrupt_metrics_cost_one_place(results, how):
    if how in NO_SCORE:
        change(results, ZPL[1], test_after=dict(accuracy=NO_SCORE[how]))
    else:
        (folder(results, ZPL[1]) / "metrics.json").write_text(BROKEN[how])
    rows = show.results(ZPL, results, "miniature")
    assert rows.status.tolist() == ["finished", "unreadable", "finished"]
    assert "metrics.json" in rows.note[1] and str(results) not in rows.note[1]
    assert show.grouped(rows).iloc[0].n == 2 and f"{ZPL[1]}: unreadable" in show.missing(rows)


STRANGE = [
    (dict(versions=dict(paczero="7.1.0")), "written by paczero 7.1.0"),
    (dict(versions={}), "written by paczero None"),
    (dict(colour="red"), "colour"),
    (dict(steps=3), "stopped after 3 of 4"),
    (dict(stamp="secret fixed for audit: no guarantee"), "no guarantee"),
]


@pytest.mark.parametrize("changes, says", STRANGE)
def test_strange_metrics_are_drawn_with_a_note(results, changes, says):
    change(results, ZPL[0], **changes)
    r, rows = row(results, ZPL[0]), show.results(ZPL, results)
    assert r.status == "finished" and says in r.note and says in show.missing(rows)
    assert says in show.readable(show.grouped(rows)).note.iloc[0]


def test_unfinished_and_failed(results):
    for run_id in ZPL:
        (folder(results, run_id) / "metrics.json").unlink()
    f = folder(results, ZPL[0]) / "transcript.jsonl"
    f.write_text("".join(x for x in f.read_text().splitlines(True) if '"end"' not in x and '"t":3' not in x))
    failure = dict(exception="MemoryError", message="needs 40 GiB\nand more", last_lines=[])
    (folder(results, ZPL[1]) / "failed.json").write_text(json.dumps(failure))
    (folder(results, ZPL[2]) / "failed.json").write_text("{")
    rows = show.results(ZPL, results, "miniature")
    assert rows.status.tolist() == ["unfinished", "failed", "failed"] and rows.steps_done[0] == 3
    assert rows.note[1] == "MemoryError: needs 40 GiB" and "failed.json" in rows.note[2]
    text = commands(show.missing(rows))
    assert "after 3 steps" in text and "needs 40 GiB" in text
    assert f"sweep --miniature --cell {' '.join(ZPL)}" in text


def test_a_failure_of_before_does_not_hide_a_finish(results):
    (folder(results, ZPL[0]) / "failed.json").write_text(json.dumps(dict(exception="MemoryError")))
    assert row(results, ZPL[0]).status == "finished"


# ---------------------------------------------------------------- what is not what it says


@pytest.mark.parametrize("where", ["name", "cell.json"])
def test_a_miniature_is_never_the_papers(results, where):
    "A tiny-opt run under a paper cell's name, or with a cell.json that calls it the paper's, is refused."
    to = shutil.copytree(folder(results, ZPL[0]), results / "runs" / ZPL[0])
    if where == "name":
        (to / "cell.json").unlink()
    else:
        edit(to / "cell.json", set="paper")
    rows = show.results(ZPL, results)
    p = rows[(rows.set == "paper") & (rows.run_id == ZPL[0])].iloc[0]
    assert p.status == "unreadable" and "tiny-opt" in p.note and math.isnan(p.score)
    groups = show.grouped(rows)
    assert groups.set_index("set").n.to_dict() == {"paper": 0, "miniature": 3}
    assert [w for w, _ in show.by_set(groups)] == ["miniature"]
    assert groups[groups.set == "miniature"].reported.isna().all()


def test_another_seed_or_recipe_is_refused(results):
    change(results, ZPL[0], seed=5)
    change(results, ZPL[1], mechanism=dict(name="nonprivate", signal="raw_full"))
    rows = show.results(ZPL, results, "miniature")
    assert rows.status.tolist() == ["unreadable", "unreadable", "finished"]
    assert "seed is 5, not 0" in rows.note[0] and "nonprivate" in rows.note[1]


CLAIMS = [dict(set="large"), dict(stands_for=None, run_id="mine"), dict(recipe="none"), dict(stands_for=[])]


@pytest.mark.parametrize("changes", CLAIMS)
def test_broken_claims(results, changes):
    change(results, ZPL[0], "cell.json", **changes)
    rows = show.results(ZPL, results, "miniature")
    assert rows.status.tolist()[1:] == ["finished"] * 2
    assert rows.status[0] == "unreadable" or changes == dict(stands_for=[])
    assert rows.status[0] == "finished" or "cell.json" in rows.note[0]


# ---------------------------------------------------------------- does my run match?


def paper_run(results, run_id, accuracy):
    "A folder as a run at the paper's size leaves it (scores made up, to test the reading)."
    to = shutil.copytree(folder(results, ZPL[0]), results / "runs" / run_id)
    (to / "cell.json").unlink()
    r, c = show.select(run_id).iloc[0], json.loads((to / "config.json").read_text())
    edit(to / "metrics.json", model=r.model, task=r.task, seed=int(r.seed), steps=int(r.steps),
         steps_planned=int(r.steps), n_test=872, test_after=dict(accuracy=accuracy))
    clip = None if math.isnan(r["clip"]) else r["clip"]
    c["recipe"] |= dict(lr=r.lr, clip=clip, steps=int(r.steps), m=int(r.m), seed=int(r.seed))
    c["model"] |= dict(name=r.model)
    c["design"] |= dict(n=1000)
    (to / "config.json").write_text(json.dumps(c))
    return to


def set_rate(run, lr):
    "Another learning rate in a run's configuration."
    c = json.loads((run / "config.json").read_text())
    c["recipe"]["lr"] = lr
    (run / "config.json").write_text(json.dumps(c))


def test_does_my_run_match(results):
    to = paper_run(results, ZPL[0], 0.885)
    r = row(results, ZPL[0], "paper")
    assert r.status == "finished", r.note
    m = show.matches(r)
    assert m.verdict == "inside" and m.low < 88.99 < m.high
    assert "reported: paper abstract" in m.text and "registry" in m.text
    assert show.matches(to) == m                                    # a folder says the same as its row
    moved = shutil.copytree(to, results / "runs" / "my-own")
    assert show.matches(moved) == m                                 # whatever it is called
    set_rate(moved, 3e-4)
    assert show.matches(moved).verdict == "no reported value"       # but not with another recipe


def test_a_score_that_does_not_match(results):
    to = paper_run(results, ZPL[0], 0.885)
    shutil.copytree(to, results / "runs" / "my-own")
    edit(to / "metrics.json", test_after=dict(accuracy=0.7))
    assert show.matches(row(results, ZPL[0], "paper")).verdict == "outside"
    view = show.readable(show.grouped(show.results(ZPL, results))).iloc[0]
    assert (view["reported"], view["measured"]) == ("88.99 ± 0.91 %", "70.0 % (n = 1 of 3)")
    assert "(n = 3)" in view["tiny-opt miniature"]


def test_what_cannot_be_compared(results):
    rows = show.results([*ZPL, MI], results, "miniature").set_index("run_id", drop=False)
    with pytest.raises(ValueError, match="tiny-opt is not OPT-1.3B"):
        show.matches(rows.loc[ZPL[0]])
    with pytest.raises(ValueError, match="tiny-opt is not OPT-1.3B"):
        show.matches(folder(results, ZPL[0]))
    with pytest.raises(ValueError, match="different kinds"):
        show.matches(rows.loc[ZPL[0]], others=rows.loc[[ZPL[1], MI]])
    with pytest.raises(ValueError, match=ZPL[0]):
        show.matches(rows.loc[ZPL[0]], others=rows.loc[ZPL])
    with pytest.raises(ValueError, match="a finished run is needed"):
        show.matches(results / "nowhere")
    with pytest.raises(ValueError, match="missing"):
        show.matches(show.results(ZPL[0], results, "paper").iloc[0])
    m = show.matches(rows.loc[ZPL[0]], others=rows.loc[ZPL[1:]])
    assert m.verdict in ("inside", "outside") and m.low <= rows.loc[ZPL[1:]].score.mean() <= m.high


def scored(scores, name):
    "Finished runs of one kind with these scores."
    kind = dict(status="finished", set="miniature", ran_model="tiny-opt", ran_task="reviews", track="ft",
                mechanism="zpl", mi=0.0, ablation="", n_test=10**6, standard_error=0.0)
    return [dict(kind, score=float(s), run=f"{name}{i}") for i, s in enumerate(scores)]


@pytest.mark.parametrize("n, k", [(3, 1), (5, 1), (4, 3)])
def test_seeds_of_one_distribution_lie_inside(n, k):
    """95 % of runs whose scores come from the same distribution are 'inside', through the whole of `matches`.

    Few of those far away are.
    """
    rng = np.random.default_rng(n * 10 + k)

    def inside(shift, trials):
        verdicts = []
        for _ in range(trials):
            new = scored(rng.normal(80 + shift, 0.7, k), "new")
            verdicts.append(show.matches(new, others=scored(rng.normal(80, 0.7, n), "old")).verdict)
        return verdicts.count("inside") / trials

    assert abs(inside(0, 800) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 800)
    assert inside(8, 200) < 0.5


# ---------------------------------------------------------------- figures


@pytest.fixture
def drawn(results):
    "(group, figure, axes) of a figure with two kinds of runs."
    (which, g), = show.by_set(show.grouped(show.results([*ZPL, MI], results)))
    fig, ax = show.axes(which, "A title")
    show.draw(ax, g[g.mechanism == "zpl"], "ran_steps")
    show.draw(ax, g[g.mechanism == "mi"], "ran_mi")
    show.legend(fig, ax)
    return which, g, fig, ax


def test_a_figure_shows_the_means(drawn):
    _, g, _, ax = drawn
    at = sorted(float(line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o")
    assert at == sorted(g["mean"][g.n > 0]) and len(at) == 2 and "tiny-opt miniature" in ax.get_title(loc="left")


def test_a_figure_and_its_numbers_are_kept(drawn, results):
    which, g, fig, _ = drawn
    csv, *pictures = show.save(fig, g, "look", results, which)
    assert sorted((results / "paper").iterdir()) == sorted([csv, *pictures]) and pictures
    assert csv.name == "look-miniature.csv" and all(p.stem == "look-miniature" for p in pictures)
    assert all(p.stat().st_size > 3000 for p in pictures)
    assert pd.read_csv(csv)["mean"].tolist() == pytest.approx(g["mean"].tolist(), nan_ok=True)
    text = "".join(p.read_text() for p in (csv, *pictures) if p.suffix != ".png")
    assert str(results) not in text
    with pytest.raises(ValueError, match="miniature"):
        show.save(fig, g, "look", results, "small")


def test_a_cells_run_with_another_fidelity_says_so(results):
    to = paper_run(results, ZPL[0], 0.885)
    note = "ran with fidelity 'default': a cell of the paper means 'paper'"
    assert row(results, ZPL[0], "paper").note == note
    assert show.matches(to).text.endswith(f"; {note}")
    edit(to / "config.json", fidelity="paper")
    assert row(results, ZPL[0], "paper").note == "" and "fidelity" not in show.matches(to).text


def test_the_papers_spread_is_not_one_of_independent_runs(results):
    paper_run(results, ZPL[0], 0.885)
    r = row(results, ZPL[0], "paper")
    assert "the secret and the first direction did not depend on the seed" in show.matches(r).text
    assert "did not depend" not in show.matches(row(results, ZPL[1], "miniature"),
                                                others=show.results(ZPL, results, "miniature").iloc[[0, 2]]).text


def test_a_reported_value_of_ones_own_is_used_everywhere(results, tmp_path):
    paper_run(results, ZPL[0], 0.7)
    mine = tmp_path / "my.csv"
    mine.write_text("table,model,task,track,mechanism,mi,metric,mean,std,source\n"
                    "table1,opt-1.3b,sst2,ft,zpl,0,accuracy_percent,70.5,0.5,made up\n")
    r = row(results, ZPL[0], "paper")
    assert (show.matches(r).verdict, show.matches(r, reported=mine).verdict) == ("outside", "inside")
    view = show.readable(show.grouped(show.results(ZPL, results), reported=mine)).iloc[0]
    assert view["reported"] == "70.5 ± 0.5 % (yours)"
    for page in ("headline", "does_my_run_match"):
        done = tmp_path / f"{page}.ipynb"
        given = parameters(results_dir=results, reported=mine)
        run_papermill([ROOT / f"nbs/paper/{page}.ipynb", done, *given], tmp_path)
        assert ("70.5 ± 0.5 % (yours)" if page == "headline" else "reported (yours): made up") in done.read_text()
    mine.write_text(mine.read_text().replace("70.5", "705"))
    with pytest.raises(ValueError, match="my.csv, row 2 .*mean must be a number from 0 to 100"):
        show.grouped(show.results(ZPL, results), reported=mine)
