"""The list of wrong versions stays true: each can still be made, and the cheapest of them are indeed noticed.

`python tools/mutants` tries them all; results/mutants.md is what it said last.
"""
import json
import re

import pytest

import mutants
from common import ROOT
from mutants.mutant import exported, put
from mutants.slot import Outcome, raised, Slot

CHEAP = ["run/shares:an example twice", "mechanisms/registry:audits forgotten",
         "mechanisms/nonprivate:a sign for nothing"]


def test_every_wrong_version_can_be_made():
    "Its text stands once in the module, once in the notebook: whoever moves the code moves the list along."
    lost = [why for m in mutants.MUTANTS if (why := mutants.misplaced(m))]
    assert not lost, "\n".join(lost)
    assert len({m.id for m in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 80
    missing = [m.id for m in mutants.MUTANTS if not (ROOT / m.killer.partition("::")[0]).is_file()]
    assert not missing, missing


def test_a_wrong_version_changes_module_and_notebook_alike(tmp_path):
    m = mutants.chosen(["run/shares:an example twice"])[0]
    for file in (m.module, m.notebook):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    kept = put(m, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in kept] == [m.module, m.notebook]
    nb = json.loads((tmp_path / m.notebook).read_text(encoding="utf-8"))
    cells = "".join("".join(c["source"]) for c in exported(nb))
    for text in ((tmp_path / m.module).read_text(encoding="utf-8"), cells):
        assert (text.count(m.old), text.count(m.new)) == (0, 1)
    assert mutants.misplaced(m, tmp_path) and not mutants.misplaced(m)


LOGS = {
    "AssertionError: ==:\n[1]\n[2]": "killed",
    "ValueError in x\n\nValueError: n = 3": "killed",
    "SyntaxError: invalid syntax": "invalid",
    "paczero.x.NameError: name 'y' is not defined": "invalid",
    "nothing that anybody can read": "invalid",
}


@pytest.mark.parametrize("log, verdict", LOGS.items())
def test_what_broke_has_tested_nothing(log, verdict):
    assert Outcome(False, *raised(log), 0.0).verdict == verdict
    assert Outcome(True, *raised(log), 0.0).verdict == "survived"


def test_the_table_is_whole():
    "The last run in full: nothing survived it."
    page = (ROOT / "results" / "mutants.md").read_text(encoding="utf-8")
    tables = re.findall(r"(\d+) wrong versions.*?\*\*(\d+) killed, (\d+) survived, (\d+) invalid\*\*", page, re.S)
    count, killed, survived, invalid = (sum(map(int, column)) for column in zip(*tables))
    assert count == killed >= 80 and survived == invalid == 0
    assert page.count("| killed |") == count


@pytest.mark.slow
def test_the_cheapest_are_killed(tmp_path):
    "In a copy of the tree, which is put back each time; and a version that is only worded otherwise survives."
    slot = Slot(tmp_path / "tree")
    try:
        outcomes = {m.id: slot.trial(m) for m in mutants.chosen(CHEAP)}
        assert {i: o.verdict for i, o in outcomes.items()} == dict.fromkeys(CHEAP, "killed"), outcomes
        same = mutants.Mutant("run/shares", "same", "", "Deal n examples out so", "Give n examples out so")
        assert slot.trial(same).verdict == "survived"
        for m in (*mutants.chosen(CHEAP), same):
            for file in (m.module, m.notebook):
                assert (slot.root / file).read_bytes() == (ROOT / file).read_bytes()
    finally:
        slot.close()
