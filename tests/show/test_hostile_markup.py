"""A stranger's names in everything that is rendered: shown, and nothing of them is active."""
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import mistune
import pandas as pd
import pytest
import yaml

from paczero.accounts import accounts
from paczero.audit.report import AuditReport
from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.lab.board import Board
from paczero.lab.recipe import Recipe
from paczero.mechanisms import DPZero, MIBudget, ZPL
from paczero.models import load_model
from paczero.paper import recipe_for
from paczero.publish import model_card
from paczero.run.progress import NotebookBar
from paczero.show import markdown_table
from paczero.show.match import Match
from paczero.subsets import SubsetDesign
from paczero.tasks import load_task

BAD = "<img src=x onerror=alert(1)>|[x](javascript:alert(1))`y`"
WORSE = BAD + ("\n\n# Heading\n\n[z]: javascript:alert(2)\n![i](http://e.org/i.png)<script>alert(3)</script> "
               "$\\href{javascript:x}{y}$ ```\nimport os\n```")
PLAIN = "h1 h2 h3 h4 p table thead tbody tr th td ul li strong em code pre blockquote div b progress br".split()
OURS = {"https://arxiv.org/abs/2605.06505"}


class Active(HTMLParser):
    "Collects what a page has that a name cannot have put there harmlessly."

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        allowed = {"style", "value", "max", "class"}
        href = dict(attrs).get("href")
        if tag == "a" and href in OURS:
            return
        if tag not in PLAIN or any(k not in allowed for k, _ in attrs):
            self.found.append((tag, attrs))

    def handle_comment(self, data):
        self.found.append(("comment", data))


CODE = re.compile(r"(?ms)^```python\n(.*?)^```$")
PAGE = mistune.create_markdown(escape=False, plugins=["table", "url", "strikethrough", "footnotes"])


def shape(html):
    "The tags of a page, after it was found to hold nothing active."
    seen = Active()
    seen.feed(html)
    seen.close()
    assert not seen.found, (seen.found, html[:2000])
    return seen.tags


def same_as_plain(made):
    "A page made with hostile names has the tags of the same page made with a plain word, and no formula."
    pages = [made(name) for name in ("word", BAD, WORSE)]
    word, *hostile = [shape(PAGE(page)) for page in pages]
    bare = [t for t in word if t != "code"]
    for tags, page in zip(hostile, pages[1:]):
        assert [t for t in tags if t != "code"] == bare, f"{pages[0]}\n=====\n{page}"
    outside_code = [CODE.sub("", page) for page in pages]
    assert not any("$" in text or "\n# Heading" in text for text in outside_code)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished run of two steps, and another on the same pool."
    root = tmp_path_factory.mktemp("markup")
    task = load_task("reviews", seed=0, n_train=20, n_dev=6, n_eval=6)
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(root / "state"))
        configs = [FineTuneConfig(steps=2, lr=1e-3, m=8, eval_every=2, seed=seed) for seed in (1, 2)]
        result, other = (finetune(*load_model("tiny-opt"), task, MIBudget(budget=0.1, steps=2), config,
                                  folder=root / str(config.seed), runtime=Runtime(parallel=False))
                         for config in configs)
    return SimpleNamespace(result=result, other=other)


@pytest.mark.parametrize("mechanism", [ZPL(), MIBudget(budget=0.1, steps=2), ZPL(audit_seed=1),
                                       DPZero(epsilon=2.0, sample_rate=0.25, steps=2, clip=20.0)], ids=repr)
def test_the_page_of_a_guarantee(mechanism):
    g = mechanism.bind(SubsetDesign(20, 8, seed=0)).guarantee()
    fields = ["mechanism", "design", "secret"] + (["accountant"] if hasattr(g, "accountant") else [])
    stamp = ["stamp"] if g.stamp else []
    same_as_plain(lambda x: dataclasses.replace(g, **dict.fromkeys(fields + stamp, x))._repr_markdown_())


def hostile_result(result, x):
    "The result with this text in the place of every name and score."
    def renamed(d, *kept):
        return {k: v if k in kept or not isinstance(v, str) else x for k, v in d.items()}

    h = result.transcript.header
    header = dict(h, model=renamed(h["model"], "track"), directions=renamed(h["directions"]))
    end = dict(result.transcript.end, weights=x)
    metrics = dict(result.metrics, task=x, model=x, best_step=x, test_after={x: 0.5, "accuracy": 10**400, "y": x})
    guarantee = dataclasses.replace(result.guarantee, mechanism=x, secret=x)
    transcript = dataclasses.replace(result.transcript, header=header, end=end)
    return dataclasses.replace(result, transcript=transcript, metrics=metrics, guarantee=guarantee)


@pytest.mark.parametrize("covered", [True, False])
def test_a_model_card(run, covered):
    "Its front matter is data, its page is text, and its code has no line of a stranger's."
    def card(x):
        made = hostile_result(run.result, x)
        if not covered:
            made = dataclasses.replace(made, guarantee=dataclasses.replace(made.guarantee, private=False))
        return model_card(made, license=x, datasets=[x])

    same_as_plain(lambda x: card(x).split("---\n", 2)[2])
    _, front, body = card(WORSE).split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["license"] == WORSE and told["datasets"] == [WORSE] and set(told) <= {
        "library_name", "pipeline_tag", "tags", "license", "datasets", "base_model", "base_model_relation"}
    code = "".join(CODE.findall(body))
    assert len(code.splitlines()) == len("".join(CODE.findall(card("word"))).splitlines())
    compile(code, "card", "exec")


def test_the_accounts(run, tmp_path):
    "Names of tasks, sources and folders, fields of a recipe, and errors."
    def page(x):
        home, name = tmp_path / str(len(list(tmp_path.iterdir()))), x.replace("/", "∕")
        for to, of in ((name, run.result), (name + "2", run.other), ("lost" + name, run.result)):
            shutil.copytree(of.folder, home / to)
            config = json.loads((of.folder / "config.json").read_text())
            config["recipe"][x] = to
            config["task"] |= dict(name=x, source=x, pool_fingerprint="p" + x)
            if to.startswith("lost"):
                config["task"] = {}
            (home / to / "config.json").write_text(json.dumps(config))
        shutil.copytree(home / name, home / "~other pool")
        config["task"] = dict(name=x, source=x, pool_fingerprint="q")
        (home / "~other pool" / "config.json").write_text(json.dumps(config))
        return accounts(home)._repr_markdown_()

    text = page("word")
    assert all(part in text for part in ("**The search cost.**", "Pools that may share", "Not known which pool"))
    same_as_plain(page)


def test_other_reprs():
    recipe = recipe_for(model="tiny-opt")
    flat = recipe.flat()

    def recipe_page(x):
        return Recipe.from_flat(**{k: v for k, v in flat.items() if v is not None} | dict(source=x))._repr_markdown_()

    def audit_page(x):
        line = dict(quantity="q", trials=1, estimate=0.5, low=0.1, high=0.9, allowed=0.5, exactly=False, p=0.5,
                    exceeds=True)
        return AuditReport(name=x, claim=0.1, prior=0.5, runs=2, level=0.95, lines=[line], success=None, gain=None,
                           booked=None)._repr_markdown_()

    same_as_plain(recipe_page)
    same_as_plain(audit_page)
    same_as_plain(lambda x: Match(verdict=x, score=1.0, low=0.0, high=2.0, text=x)._repr_markdown_())
    same_as_plain(lambda x: markdown_table(pd.DataFrame({x: [x, 1.0], "I(S*; Y), nats": [x, x]})))


def test_a_data_frame_is_escaped_by_pandas():
    seen = Active()
    seen.feed(pd.DataFrame({WORSE: [WORSE]})._repr_html_())
    assert not {"img", "script", "a"} & set(seen.tags)


def test_bars(monkeypatch, tmp_path):
    "The pages that a run and a sweep update in place."
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kw: shown.append(data["text/html"]))
    monkeypatch.setattr("paczero.lab.board.in_notebook", lambda: True)
    bar = NotebookBar(WORSE)
    bar.on_train_begin(None, state := SimpleNamespace(global_step=1, max_steps=2, log_history=[]), None)
    bar.show(state, force=True)
    board = Board({}, {}, tmp_path)
    board.add(dict(run_id=WORSE, outcome="failed", why=WORSE, seconds=1))
    assert len(shown) >= 2
    for html in shown:
        shape(html)
