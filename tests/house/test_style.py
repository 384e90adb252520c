"""The house is in order: floors, no circles, and lines, functions, cells and modules that fit on a page."""
import subprocess

import pytest

import census
from common import BIN, ROOT


def say(found):
    "Findings as lines; all that pytest need show."
    return "\n".join(f"{where}:{line}: {what}" for where, line, what in found)


def test_ruff():
    command = [BIN / "ruff", "check", "--no-cache", "--output-format", "concise", "paczero", "nbs", "tests", "tools"]
    done = subprocess.run(command,
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_circles():
    assert census.circles() == []


@pytest.mark.parametrize("rule", census.RULES, ids=lambda f: f.__name__)
def test_within_bounds(rule):
    found = list(rule())
    assert not found, f"{rule.__doc__}\n{say(found)}"


def test_the_census_counts():
    "The command that anyone can run, `make census`, has every number, and its zeros are zeros."
    numbers = dict(census.summary())
    assert numbers["circles of imports"] == numbers["imports that go up"] == 0
    assert numbers["module lines over 120 characters"] == numbers["notebook code lines over 120 characters"] == 0
    assert numbers["largest module"][0] <= census.MODULE and numbers["longest function"][0] <= census.FUNCTION


BAD = {
    "x" * 121: "121 characters",
    "a = 1; b = 2": "two statements on a line",
    "def f():\n" + "    pass\n" * 25: "f has 26 lines",
    "if a_condition_of_some_length_that_holds: " + "a_function_with_a_long_name(" + "1, " * 12 + ")":
        "behind its colon",
}


@pytest.mark.parametrize("source, says", BAD.items())
def test_the_census_sees(source, says):
    "Each rule finds what it is for."
    assert any(says in what for _, _, what in census.style("here", source))


def test_the_census_sees_imports_that_go_up(tmp_path, monkeypatch):
    package = tmp_path / "paczero"
    (package / "mechanisms").mkdir(parents=True)
    (package / "check.py").write_text("from .finetune import finetune, _step\ndef f():\n    from . import audit\n")
    (package / "finetune.py").write_text("from .check import f\n")
    (package / "audit.py").write_text("")
    (package / "mechanisms" / "__init__.py").write_text("def f():\n    import torch\n")
    (package / "elsewhere.py").write_text("")
    monkeypatch.setattr(census, "ROOT", tmp_path)
    assert {name for name, _, _ in census.upward()} == {"check", "elsewhere"}
    assert census.circles() == [("check", "finetune")]
    assert [what for _, _, what in census.private_names()] == ["takes _step from finetune"]
    late = [what for _, _, what in census.late_imports()]
    assert late == ["late import of .", "torch in a room of mathematics"]
