"""What is light stays light: which packages each door loads, in a fresh process."""
import ast
import subprocess
import sys

import pytest

from common import ROOT, environment

HEAVY = {"torch", "transformers", "peft", "datasets", "pandas", "pyarrow", "matplotlib", "seaborn", "scipy",
         "opacus", "IPython", "ipywidgets", "papermill", "nbformat", "distributed"}


def loaded(code):
    "The top packages that a fresh interpreter has loaded after this code."
    report = "\nimport sys; print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + report], env=environment(), cwd=ROOT, text=True,
                          capture_output=True, check=True)
    return set(done.stdout.split("LOADED")[1].split())


def test_importing_the_package_costs_no_more_than_numpy():
    "`import paczero` loads nothing that `import numpy` does not, but itself and the standard library."
    more = loaded("import paczero") - loaded("import numpy")
    assert not {m for m in more if m not in sys.stdlib_module_names and not m.startswith(("paczero", "_"))}


MATHEMATICS = ["check", "markup", "information", "subsets", "schedule", "mechanisms"]


@pytest.mark.parametrize("room", MATHEMATICS)
def test_the_mathematics_loads_neither_torch_nor_transformers(room):
    assert not HEAVY - {"scipy"} & loaded(f"import paczero.{room}")


@pytest.mark.parametrize("verb", ["['cells']", "['cells', '--where', 'track=lora']"])
def test_listing_the_cells_loads_no_heavy_package(verb):
    "`python -m paczero cells` prints a table of text."
    assert not HEAVY & loaded(f"from paczero.cli.main import main\nassert main({verb}) == 0")


def test_tables_load_no_torch():
    code = "from paczero import show\nshow.readable(show.grouped(show.results('table1')))"
    assert not {"torch", "transformers"} & loaded(code)


DRAWS = {"rand", "randn", "randint", "normal", "permutation", "choice", "shuffle", "random"}


def draws_globally(call):
    "Whether a call seeds or draws from a global generator of numpy, random or torch."
    name = ast.unparse(call.func)
    if name.startswith("torch."):
        draws = name in ("torch.rand", "torch.randn") and "generator" not in {k.arg for k in call.keywords}
        return draws or name == "torch.manual_seed"
    library, _, function = name.rpartition(".")
    return library in ("np.random", "numpy.random", "random") and function in {"seed", *DRAWS}


def test_global_generators_are_left_alone():
    "No room seeds or draws from the global generators of numpy, random or torch."
    for p in (ROOT / "paczero").rglob("*.py"):
        for x in ast.walk(ast.parse(p.read_text(encoding="utf-8"))):
            assert not isinstance(x, ast.Call) or not draws_globally(x), f"{p}:{x.lineno}: {ast.unparse(x)}"


@pytest.mark.parametrize("code", ["np.random.seed(1)", "torch.randn(3)", "random.random()", "torch.manual_seed(0)"])
def test_a_global_draw_would_be_seen(code):
    assert draws_globally(ast.parse(code).body[0].value)
    assert not draws_globally(ast.parse("torch.randn(3, generator=g)").body[0].value)
