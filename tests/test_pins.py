"""What small runs, recipes and kept transcripts were when this was written; what moves any of it shows here.

`python tests/test_pins.py --write` writes pins.json and recipes.json anew, from the package that it
imports. On the machine of pins.json (`machine`: processor, libraries, threads) all must be the same to the
last bit, digests too. On another one, signs, kinds, words and keys must be the same, real numbers up to REL
or ABS, and digests are not compared; where it draws other normals (the transcript's fingerprint z says so)
its runs are others and are skipped.

Not pinned: times, memory, the number of cores, versions (torch's in a transcript's first line and opacus's
in an accountant's name among them), and the links `~` of lines, which times go into; a transcript's file is
pinned whole by its hash, without what its first line names since (`as_pinned`). Runs whose audit seed is
fixed are stamped and promise nothing, so what a run with a secret of its own promises is pinned by `PAGES`:
one step each, after which nothing on the page depends on chance.
"""

import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch

from paczero.finetune import FineTuneConfig, Runtime, finetune, load_result
from paczero.mechanisms import make_mechanism
from paczero.models import load_model
from paczero.paper import cell, cells, recipe_for
from paczero.run.runs import open_runs
from paczero.tasks import load_task
from paczero.transcript import Chain, Transcript, replay, weights_digest
from stops import Stop

HERE = Path(__file__).resolve().parent
PINS, RECIPES, RESULTS = HERE / "pins.json", HERE / "recipes.json", HERE.parent / "results"
REL, ABS = 2e-3, 1e-6  # of real numbers, on another machine than that of the pins
TIMES = {"seconds", "seconds_per_step", "peak_memory_bytes", "cpus", "machine", "versions", "torch", "~"}
LIBRARIES = ("torch", "transformers", "peft", "numpy", "scipy", "opacus")

# ---------------------------------------------------------------- the runs

REVIEWS = dict(name="reviews", seed=0, n_train=32, n_dev=12, n_eval=12)
FACTS = dict(name="facts", seed=0, n_train=16, n_dev=6, n_eval=6)
CONFIG = dict(steps=6, lr=2e-3, m=8, seed=3, eval_every=3)
MI = dict(name="mi", budget=1.0, steps=5, schedule="adaptive", directions=4, audit_seed=2)
UNIFORM = dict(name="mi", budget=0.5, steps=6, schedule="uniform", directions=1, audit_seed=5)
DP = dict(name="dpzero", epsilon=2.0, delta=1e-5, sample_rate=0.25, steps=6, clip=20.0, audit_seed=4)
RUNS = {
    "zpl-full": dict(task=REVIEWS, mechanism=dict(name="zpl", audit_seed=1), config={}),
    "zpl-lora": dict(
        task=REVIEWS,
        mechanism=dict(name="zpl", audit_seed=1),
        track="lora",
        config=dict(design="complementary", clip=5.0, lr=5e-3, seed=5),
    ),
    "mi-4-directions": dict(task=REVIEWS, mechanism=MI, config=dict(steps=5, k=4, design="fixed", r=5)),
    "dpzero": dict(task=REVIEWS, mechanism=DP, config=dict(lr=1e-4, lr_schedule="constant", clip=20.0, m=2)),
    "facts-zpl": dict(
        task=FACTS,
        mechanism=dict(name="zpl", audit_seed=1),
        config=dict(steps=4, lr=4e-3, m=4, seed=4, zo_eps=1e-2, restore="inplace", eval_every=2,
                                  select="last"),
    ),
    "mi-resumed": dict(task=REVIEWS, mechanism=UNIFORM, config=dict(m=16), stop=3),
}
PAGES = {
    "zpl": dict(name="zpl"),
    "mi": dict(name="mi", budget=0.33, steps=1),
    "nonprivate": dict(name="nonprivate"),
    "dpzero": dict(name="dpzero", epsilon=2.0, sample_rate=0.25, steps=1, clip=20.0),
    "dp-aggzo": dict(name="dp-aggzo", epsilon=2.0, sample_rate=0.25, steps=1, clip=20.0, directions=2),
}


@contextmanager
def one_thread(state):
    "One thread, and the secrets of unfinished runs in the folder `state`."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.dict(os.environ, PACZERO_STATE_DIR=str(state)):
            yield
    finally:
        torch.set_num_threads(before)


def start(run, folder, callbacks=()):
    "The run in `folder`, from where that folder stands."
    model, tokenizer = load_model("tiny-opt", track=run.get("track", "full"))
    config = FineTuneConfig(**{**CONFIG, **run["config"]})
    return finetune(
        model,
        tokenizer,
        load_task(**run["task"]),
        make_mechanism(run["mechanism"]),
        config,
        folder=folder,
        callbacks=callbacks,
        runtime=Runtime(parallel=False),
    )


def finished(run, folder):
    "The run in `folder`, stopped and taken up again where it says so."
    if "stop" in run:
        with pytest.raises(KeyboardInterrupt):
            start(run, folder, [Stop(run["stop"])])
        assert len(Transcript.load(folder / "transcript.jsonl")) == run["stop"]
    return start(run, folder)


def page(spec, folder):
    "guarantee.md of one step of a mechanism with a secret of its own, without the transcript's digest."
    config = dict(steps=1, lr=1e-4, seed=10, clip=spec.get("clip"), k=spec.get("directions", 1))
    result = start(dict(task=REVIEWS, mechanism=spec, config=config), folder)
    return plain((folder / "guarantee.md").read_text(), {result.transcript.digest: "TRANSCRIPT"})


# ---------------------------------------------------------------- what is kept of them


def plain(x, names):
    "Without what may change, and with digests by their names."
    if isinstance(x, dict):
        return {k: plain(v, names) for k, v in x.items() if k not in TIMES}
    if isinstance(x, list):
        return [plain(v, names) for v in x]
    if isinstance(x, str):
        x = re.sub(r"opacus \d[\w.+]*", "opacus", x)
        for digest, name in names.items():
            x = x.replace(digest, name)
    return x


def lines(path):
    "The objects of a chained log."
    return [json.loads(line) for line in path.read_text().splitlines()]


def moved(model, track):
    "How far each tensor is from where it began."
    began = dict(load_model("tiny-opt", track=track)[0].named_parameters())
    far = {k: float((p - began[k]).detach().norm()) for k, p in model.named_parameters()}
    return {k: v for k, v in far.items() if v}


NAMED_SINCE = {"config", "buffers", "lora_scaling"}  # of a model, and its tokenizer: in first lines since the pins


def as_pinned(told):
    "A description without what it names since the pins were made: configuration, buffers and tokenizer."
    model = {k: v for k, v in told["model"].items() if k not in NAMED_SINCE}
    return {k: v for k, v in told.items() if k != "tokenizer"} | dict(model=model)


def without_name(ledger, mechanism):
    "A ledger's lines without the run's random name, which those have that are kept to a mark since the pins were made."
    first, *rest = ledger
    assert (set(first) == {"run", "~"}) == (mechanism["name"] != "zpl")
    return rest if "run" in first else ledger


INSIDE = {"clipped", "ghat_max", "subset_var", "posterior_entropy"}  # of a step, in ledgers since the pins


def without_inside(ledger, mechanism):
    "A ledger's lines without what they tell of a step's inside since the pins were made; of secret batches, nothing."
    told = {"clipped", "ghat_max", "subset_var"} | ({"posterior_entropy"} if mechanism["name"] == "mi" else set())
    out = []
    for e in ledger:
        if "diagnostics" in e:
            d = e["diagnostics"]
            assert INSIDE & set(d) == (set() if mechanism["name"] == "dpzero" else told)
            e = dict(e, diagnostics={k: v for k, v in d.items() if k not in INSIDE})
        out.append(e)
    return out


def transcript_as_pinned(folder):
    "The text of a run's transcript, and its digest, as they were before its first line named more."
    header, *steps = [{k: v for k, v in e.items() if k != "~"} for e in lines(folder / "transcript.jsonl")]
    named = {*header["model"], *header} >= {"config", "buffers", "tokenizer"}
    assert named, "a transcript names its model's configuration and buffers, and its tokenizer"
    chain = Chain()
    return "".join(chain.line(e) for e in (as_pinned(header), *steps)), chain.digest


def told(run, folder, result):
    "All that is pinned of a finished run."
    text, digest = transcript_as_pinned(folder)
    file = hashlib.sha256(text.encode()).hexdigest()
    exact = dict(transcript=digest, weights=weights_digest(result.model), file=file)
    metrics = json.loads((folder / "metrics.json").read_text())
    out = dict(
        config=as_pinned(json.loads((folder / "config.json").read_text())),
        transcript=[json.loads(line) for line in text.splitlines()],
        ledger=without_inside(without_name(lines(folder / "ledger.jsonl"), run["mechanism"]), run["mechanism"]),
        guarantee=(folder / "guarantee.md").read_text(),
        metrics=metrics,
        metrics_keys=sorted(metrics),
        moved=moved(result.model, run.get("track", "full")),
        files=sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")),
        history=[c for c in result.history.columns if c not in INSIDE],
        looks=list(result.evaluations.columns),
    )
    names = {result.transcript.digest: "TRANSCRIPT", exact["weights"]: "WEIGHTS"}
    return dict(plain(out, names), exact=exact)


def machine():
    "What decides the last bits of a run."
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = ("vendor_id", "cpu family", "model", "model name")
    found = {k: re.search(rf"^{k}\s*:\s*(.*)$", text, re.M) for k in names}
    out = {k: m.group(1) if m else "" for k, m in found.items()}
    out |= dict(capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads())
    return out | {k: version(k) for k in LIBRARIES}


# ---------------------------------------------------------------- comparing


def number_by_number(text):
    "A text as a list, with its numbers as numbers."
    parts = re.split(r"(?<![\w.])(\d+\.\d+(?:e[-+]?\d+)?)", text)
    return [float(x) if i % 2 else x for i, x in enumerate(parts)]


def apart(got, want, rel, where=""):
    "Where two pins differ by more than rounding, in words."
    if isinstance(want, dict) and isinstance(got, dict):
        keys = sorted(set(got) | set(want))
        pairs = [(got.get(k, "nothing"), want.get(k, "nothing"), f"{where}.{k}") for k in keys]
        return [d for g, w, at in pairs for d in apart(g, w, rel, at)]
    if isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        return [d for i, (g, w) in enumerate(zip(got, want)) for d in apart(g, w, rel, f"{where}[{i}]")]
    if isinstance(want, float) and isinstance(got, float):
        same = got == want or bool(rel) and math.isclose(got, want, rel_tol=rel, abs_tol=ABS)
    else:
        same = type(got) is type(want) and got == want
    return [] if same else [f"{where or 'it'} is {got!r}, was {want!r}"]


@lru_cache(maxsize=None)
def pinned(path):
    "A file of pins."
    return json.loads(path.read_text())


@lru_cache(maxsize=None)
def at_home():
    "Whether this machine is the one of the pins."
    return machine_of_one_thread() == pinned(PINS)["machine"]


def machine_of_one_thread():
    "The machine as the runs meet it."
    with one_thread(""):
        return machine()


def check(got, want):
    "The same: to the last bit on the machine of the pins, up to rounding elsewhere."
    differences = apart(got, want, 0 if at_home() else REL)
    assert not differences, "\n".join(differences[:20])


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    "(what is told of a run now, what was pinned, its folder, its model's track)"
    name, root = request.param, tmp_path_factory.mktemp("pins")
    want = pinned(PINS)["runs"][name]
    with one_thread(root / "state"):
        got = told(RUNS[name], root / "run", finished(RUNS[name], root / "run"))
    z = [x["transcript"][0]["directions"]["z"] for x in (got, want)]
    if z[0] != z[1] and not at_home():
        pytest.skip("this machine draws other normals than that of the pins")
    return got, want, root / "run", RUNS[name].get("track", "full")


def test_a_run_is_described_in_the_same_words(run):
    for part in ("config", "files", "history", "looks"):
        check(run[0][part], run[1][part])


def test_the_same_transcript_is_released(run):
    check(run[0]["transcript"], run[1]["transcript"])


def test_the_same_ledger_is_kept(run):
    check(run[0]["ledger"], run[1]["ledger"])


def test_the_weights_move_as_far(run):
    check(run[0]["moved"], run[1]["moved"])


def test_the_same_guarantee_is_written(run):
    check(number_by_number(run[0]["guarantee"]), number_by_number(run[1]["guarantee"]))


def test_the_same_metrics_are_written(run):
    check(run[0]["metrics_keys"], run[1]["metrics_keys"])
    check(run[0]["metrics"], run[1]["metrics"])


def test_transcript_and_weights_have_the_same_digests_on_the_same_machine(run):
    if not at_home():
        pytest.skip("another machine than that of the pins: its values were compared up to rounding")
    assert run[0]["exact"] == run[1]["exact"]


def test_a_folder_gives_its_run_and_its_weights_again(run):
    got, _, folder, track = run
    loaded = load_result(folder)
    assert loaded.transcript.digest == json.loads((folder / "metrics.json").read_text())["transcript_digest"]
    with one_thread(folder):
        again = replay(load_model("tiny-opt", track=track)[0], loaded.transcript)
    assert weights_digest(again) == got["exact"]["weights"]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    stopped = RUNS["mi-resumed"]
    straight = {k: v for k, v in stopped.items() if k != "stop"}
    with one_thread(tmp_path / "state"):
        a, b = (finished(r, tmp_path / n) for r, n in ((stopped, "stopped"), (straight, "straight")))
    assert a.transcript == b.transcript and weights_digest(a.model) == weights_digest(b.model)


@pytest.mark.parametrize("name", PAGES)
def test_a_run_with_a_secret_of_its_own_promises_the_same(name, tmp_path):
    with one_thread(tmp_path / "state"):
        got = page(PAGES[name], tmp_path / "run")
    check(number_by_number(got), number_by_number(pinned(PINS)["pages"][name]))


# ---------------------------------------------------------------- transcripts that the repository keeps


def kept():
    "(the run's path, its transcript's digest) of every run under results/, in a folder of its own or packed."
    return [[f"{home}/{name}", run.transcript.digest] for home in ("default", "miniature", "smollm2-135m")
            for name, run in open_runs(RESULTS / home).items()]


def test_every_kept_transcript_is_still_the_same():
    now = dict(kept())
    changed = [path for path, digest in pinned(PINS)["kept"] if now.get(path) != digest]
    assert not changed, f"{len(changed)} of {len(pinned(PINS)['kept'])} are gone or others: {changed[:5]}"


# ---------------------------------------------------------------- recipes

MODELS = ("tiny-opt", "smollm2-135m", "opt-1.3b", "opt-6.7b", "opt-125m")
TASKS, TRACKS = ("sst2", "squad", "reviews", "facts"), ("full", "lora")
MECHANISMS = ("zpl", "mi", "nonprivate", "dpzero", "dp-aggzo")
SIGNALS = ("raw_full", "quant_full", "raw_half", "quant_half", "random_sign")


def flat(recipe):
    "Every field of a recipe, by name."
    return recipe.flat()


def asked():
    "What is asked of `recipe_for`: nothing but the model, one thing more, all three, or a signal."
    for model in MODELS:
        yield dict(model=model)
        for name, values in dict(task=TASKS, track=TRACKS, mechanism=MECHANISMS).items():
            yield from (dict(model=model, **{name: v}) for v in values)
        for task, track, mechanism in itertools.product(TASKS, TRACKS, MECHANISMS):
            yield dict(model=model, task=task, track=track, mechanism=mechanism)
        for track, signal in itertools.product(TRACKS, SIGNALS):
            yield dict(model=model, track=track, mechanism="nonprivate", signal=signal)


def answer(ask):
    "The recipe, or None where there is none."
    try:
        return flat(recipe_for(**ask))
    except ValueError:
        return None


@contextmanager
def remembered():
    "`cell` makes each recipe once: `recipe_for` asks for all 143 of them again and again."
    once = lru_cache(maxsize=None)(cell)
    rooms = [m for k, m in sys.modules.items() if k.startswith("paczero") and vars(m).get("cell") is cell]
    for room in rooms:
        room.cell = once
    try:
        yield
    finally:
        for room in rooms:
            room.cell = cell


def recipes_now():
    "The recipes of all cells, and those that `recipe_for` has for every known model, by what was asked."
    with remembered():
        return dict(
            cells={i: flat(cell(i)) for i in cells().run_id},
            recipe_for={" ".join(ask.values()): answer(ask) for ask in asked()},
        )


def changed_since(recipe):
    "The pinned recipe, with what was changed on purpose since: DP and K > 1 cells look every 200 steps."
    if recipe and recipe["source"].startswith("paper") and (recipe["m"] is None or recipe["k"] > 1):
        return dict(recipe, eval_every=200)
    return recipe


def with_fidelity(recipe, kind):
    "The pinned recipe with the word that recipes have since: a cell of the paper follows the paper's code."
    return recipe and dict(recipe, fidelity="paper" if kind == "cells" else None)


def recipes_then(kind):
    "The pinned recipes, by name."
    return {name: with_fidelity(changed_since(r), kind) for name, r in unpacked(pinned(RECIPES))[kind].items()}


def test_every_cell_of_the_paper_has_the_same_recipe():
    assert len(recipes_then("cells")) == 143
    differences = apart({i: flat(cell(i)) for i in cells().run_id}, recipes_then("cells"), 0)
    assert not differences, "\n".join(differences[:20])


def test_every_known_model_has_the_same_recipes():
    differences = apart(recipes_now()["recipe_for"], recipes_then("recipe_for"), 0)
    assert not differences, "\n".join(differences[:20])


# ---------------------------------------------------------------- writing


def packed(recipes):
    "Fields once, then values."
    fields = list(next(iter(recipes["cells"].values())))
    table = {k: {i: r and [r[f] for f in fields] for i, r in v.items()} for k, v in recipes.items()}
    return dict(fields=fields, **table)


def unpacked(table):
    "The inverse of `packed`."
    fields = table["fields"]
    rows = {k: v for k, v in table.items() if k != "fields"}
    return {k: {i: r and dict(zip(fields, r)) for i, r in v.items()} for k, v in rows.items()}


def laid_out(x, depth):
    "JSON with a line for each value at `depth`."
    if not depth or not x or not isinstance(x, (dict, list)):
        return json.dumps(x, ensure_ascii=False)
    inner = [laid_out(v, depth - 1) for v in (x.values() if isinstance(x, dict) else x)]
    if isinstance(x, dict):
        inner = [f"{json.dumps(k)}: {v}" for k, v in zip(x, inner)]
    left, right = "{}" if isinstance(x, dict) else "[]"
    return left + "\n" + ",\n".join(inner) + "\n" + right


def pins_now(root):
    "Everything of pins.json."
    with one_thread(root / "state"):
        runs = {name: told(r, root / name, finished(r, root / name)) for name, r in RUNS.items()}
        pages = {name: page(spec, root / "pages" / name) for name, spec in PAGES.items()}
        return dict(machine=machine(), runs=runs, pages=pages, kept=kept())


def write():
    "Pin what is so now."
    with tempfile.TemporaryDirectory() as root:
        PINS.write_text(laid_out(pins_now(Path(root)), 4) + "\n")
    RECIPES.write_text(laid_out(packed(recipes_now()), 2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_pins.py --write")
    write()
