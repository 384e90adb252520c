"""A cell of the paper follows the paper's code to the token; everything else does what a user wants."""
import json

import numpy as np
import pytest
from realdata import folder, rows

from paczero.finetune import FineTuneConfig, finetune
from paczero.lab.choose import choose_recipe
from paczero.lab.start import recipe_data, recipe_network
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.paper import cell, recipe_for
from paczero.publish import load_release, save_release
from paczero.tasks import load_task
from paczero.tasks.metrics import mezo_f1
from paczero.transcript import Transcript, TranscriptError, check_identity, replay

CONFIG = FineTuneConfig(steps=2, lr=1e-3, m=8, eval_every=1, seed=3)


def test_the_real_squad_differs_in_stripped_questions_alone():
    data = folder("squad")
    question = {r["id"]: r["question"] for split in ("train", "validation") for r in rows(data, split)}
    ours, paper = (load_task("squad", path=data, fidelity=f, n_train=1000, n_dev=500) for f in (None, "paper"))
    changed = 0
    for mine, theirs in zip(ours.pool + ours.dev, paper.pool + paper.dev):
        asked = question[mine.uid.partition(":")[2]]
        assert theirs.prompt == mine.prompt.replace(f"\nQuestion: {asked}\n", f"\nQuestion: {asked.strip()}\n")
        assert (mine.uid, mine.answers) == (theirs.uid, theirs.answers)
        changed += mine.prompt != theirs.prompt
    assert changed == sum(question[e.uid.partition(":")[2]] != question[e.uid.partition(":")[2]].strip()
                          for e in ours.pool + ours.dev) > 0


def test_the_real_squad_is_tested_on_rows_of_the_runs_seed():
    data = folder("squad")
    known = rows(data, "validation")
    for seed in (0, 2):
        sizes = dict(path=data, seed=seed, n_train=50, n_dev=5)
        order = np.random.RandomState(seed).permutation(len(known))[:1000]
        assert [e.uid for e in load_task("squad", fidelity="paper", **sizes).test] == \
            [f"validation:{known[i]['id']}" for i in order]
        fixed = np.random.RandomState(0).permutation(len(known))[:1000]
        assert [e.uid for e in load_task("squad", **sizes).test] == [f"validation:{known[i]['id']}" for i in fixed]


def test_the_real_sst2_is_the_same_but_for_the_first_token():
    data = folder("sst2")
    ours, paper = (load_task("sst2", path=data, fidelity=f, n_eval=1000) for f in (None, "paper"))
    assert (ours.pool, ours.dev, ours.test) == (paper.pool, paper.dev, paper.test)
    tokenizers = [load_model("tiny-opt", first_token=t)[1] for t in (None, "<s>")]
    for e in ours.pool[:200]:
        for option in ours.options:
            own, theirs = (t(e.prompt + option).input_ids for t in tokenizers)
            assert (own[0], theirs[0], own[1:]) == (2, 0, theirs[1:])


@pytest.mark.parametrize("task", ["reviews", "facts"])
def test_a_run_of_the_papers_fidelity_says_so_and_is_rebuilt(task, tmp_path):
    model, tokenizer = load_model("tiny-opt", first_token="<s>")
    data = load_task(task, n_train=12, n_dev=4, n_eval=4, fidelity="paper")
    result = finetune(model, tokenizer, data, ZPL(), CONFIG, folder=tmp_path / "run")
    header = Transcript.load(tmp_path / "run/transcript.jsonl").header
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (header["fidelity"], header["model"]["first_token"]) == ("paper", "<s>")
    assert (config["fidelity"], config["task"]["fidelity"]) == ("paper", "paper")
    replay(load_model("tiny-opt", first_token="<s>")[0], result.transcript, tokenizer=tokenizer)
    with pytest.raises(TranscriptError, match="another tokenizer.*first_token='<s>'"):
        check_identity(header, *load_model("tiny-opt"))
    for what in ("transcript", "weights"):
        save_release(result, tokenizer, tmp_path / what, what)
        assert load_release(tmp_path / what)[1]("It was").input_ids[0] == 0
        assert "first_token='<s>'" in (tmp_path / what / "README.md").read_text()


def test_a_default_run_says_nothing_and_cannot_go_on_as_the_papers(tmp_path):
    def run(fidelity, first_token, **more):
        model, tokenizer = load_model("tiny-opt", first_token=first_token)
        data = load_task("reviews", n_train=12, n_dev=4, n_eval=4, fidelity=fidelity)
        return finetune(model, tokenizer, data, ZPL(), CONFIG, folder=tmp_path / "run", **more)

    run(None, None)
    header = Transcript.load(tmp_path / "run/transcript.jsonl").header
    assert "fidelity" not in header and "first_token" not in header["model"]
    (tmp_path / "run/metrics.json").unlink()
    with pytest.raises((ValueError, RuntimeError), match="fidelity|first_token|tokenizer"):
        run("paper", "<s>")


def test_cells_are_the_papers_and_nothing_else_is():
    name = "sst2_1p3b_ft_paczpl_s0"
    assert cell(name).fidelity == choose_recipe(cell=name)[0].fidelity == "paper"
    recipe, changed = choose_recipe(cell=name, fidelity="default")
    assert recipe.fidelity is None and changed == {"fidelity": ("paper", None)}
    for asked in (dict(), dict(model="opt-1.3b"), dict(model="opt-125m"), dict(cell=f"miniature:{name}")):
        assert choose_recipe(**asked)[0].fidelity is None
    with pytest.raises(ValueError, match="unknown fidelity 'papr'; did you mean 'paper'"):
        choose_recipe(cell=name, fidelity="papr")
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        load_task("reviews", fidelity="papr")
    with pytest.raises(ValueError, match="unknown first_token '<S>'; did you mean '<s>'"):
        load_model("tiny-opt", first_token="<S>")


def test_a_recipe_starts_with_its_own_first_token():
    small = dict(n_train=8, n_dev=2, n_eval=2, steps=1, m=4)
    for fidelity, first in ((None, 2), ("paper", 0)):
        recipe = recipe_for("tiny-opt", fidelity=fidelity, **small)
        assert recipe_network(recipe, "cpu")[1]("x").input_ids[0] == first
        assert recipe_data(recipe).rules.name == (fidelity or "default")


def test_only_opt_takes_another_first_token(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = load_model("tiny-opt")
    LlamaForCausalLM(LlamaConfig(vocab_size=6000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, own = load_model(str(tmp_path), first_token="<s>")
    assert own("x").input_ids == tokenizer("x").input_ids and "first_token" not in model.paczero


def test_what_the_papers_f1_calls_right():
    assert mezo_f1("Oslo\n\nOslo is", ["Oslo"]) == 0.5      # an answer that is not cut
    assert (mezo_f1("the", ["a"]), mezo_f1("Oslo", ["no answer", "Oslo"]), mezo_f1("No answer", ["no answer"])) \
        == (0, 0, 1)
