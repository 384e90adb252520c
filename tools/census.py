"""The house, counted: `python tools/census.py [room …]` prints what is over a bound; `--summary` prints the totals."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE, FUNCTION, CELL, MODULE, OUTPUT = 120, 25, 25, 300, 120
SHORT = 100         # a line with a body behind its colon

# The floors, from the ground up; in a floor, a room may import those that stand before it.
FLOORS = {
    "0 ground": ["check", "markup", "information", "subsets", "schedule", "directions"],
    "1 ideas": ["mechanisms", "tasks"],
    "2 machine": ["models", "objectives"],
    "3 record": ["transcript", "run"],
    "4 loop": ["finetune"],
    "5 after": ["audit", "accounts", "publish", "forecast", "predict"],
    "6 lab": ["lab", "paper"],
    "7 show": ["show"],
    "8 door": ["cli", "__main__"],
}
# Heavy packages, which alone may be imported inside a function.
HEAVY = ["torch", "transformers", "peft", "datasets", "pandas", "pyarrow", "matplotlib", "seaborn", "opacus", "scipy",
         "distributed", "safetensors", "tokenizers", "huggingface_hub", "accelerate", "gguf", "IPython", "ipywidgets",
         "papermill", "nbformat", "nbclient", "psutil"]
# The mathematics: these never load torch or transformers, not even inside a function.
PURE = ["check", "markup", "information", "subsets", "schedule", "mechanisms"]


def modules():
    "Every exported module as (dotted name below paczero, path)."
    for p in sorted((ROOT / "paczero").rglob("*.py")):
        if p.name == "_modidx.py" or p == ROOT / "paczero" / "__init__.py":
            continue
        parts = p.relative_to(ROOT / "paczero").with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), p


def notebooks():
    "Every committed notebook."
    return [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def cells(path, kind="code"):
    "(number, source) of a notebook's cells of one kind."
    nb = json.loads(path.read_text(encoding="utf-8"))
    return [(i, "".join(c["source"])) for i, c in enumerate(nb["cells"]) if c["cell_type"] == kind]


def package_imports(name, path):
    "Imports of the package's own rooms: (line, room imported, names, inside a function?)."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(x) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.ClassDef)) for x in ast.walk(f)}
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for x in ast.walk(tree):
        if isinstance(x, ast.ImportFrom):
            base = package[: len(package) - x.level + 1] if x.level else []
            full = base + (x.module.split(".") if x.module else [])
            if not x.level and full[:1] != ["paczero"]:
                continue
            room = ".".join(full if x.level else full[1:])
            yield x.lineno, room, [a.name for a in x.names], id(x) in inside
        elif isinstance(x, ast.Import):
            for a in x.names:
                if a.name.startswith("paczero."):
                    yield x.lineno, a.name[8:], [], id(x) in inside


def imported_rooms(name, path, known):
    "The modules that a module imports, as far as the syntax tells: `from paczero.x import y` may mean x.y."
    for line, room, names, late in package_imports(name, path):
        submodules = [f"{room}.{n}".lstrip(".") for n in names if f"{room}.{n}".lstrip(".") in known]
        for target in submodules or ([room] if room else []):
            yield line, target, names, late


def floor(name):
    "(floor, place in its row) of a module; None where the table has no such room."
    for i, rooms in enumerate(FLOORS.values()):
        if name.split(".")[0] in rooms:
            return i, rooms.index(name.split(".")[0])
    return None


def upward():
    "Every import goes down, by the table of floors."
    known = {n for n, _ in modules()}
    for name, path in modules():
        if floor(name) is None:
            yield name, 1, "no floor in the table"
            continue
        for line, target, _, _ in imported_rooms(name, path, known):
            if target.split(".")[0] != name.split(".")[0] and floor(target) and floor(target) >= floor(name):
                yield name, line, f"imports {target}, which is not below"


def circles():
    "Groups of modules that import each other, as lists of names."
    known = {n for n, _ in modules()}
    graph = {n: {t for _, t, _, _ in imported_rooms(n, p, known) if t in known and t != n} for n, p in modules()}
    reach = {n: set(to) for n, to in graph.items()}
    for middle in graph:
        for n in graph:
            if middle in reach[n]:
                reach[n] |= reach[middle]
    groups = {tuple(sorted(k for k in graph if n in reach[k] and k in reach[n])) for n in graph if n in reach[n]}
    return sorted(groups)


def late_imports():
    "Imports inside functions are of heavy packages only, and the mathematics loads neither torch nor transformers."
    for name, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
        late = {id(x) for f in functions for x in ast.walk(f)}
        for x in ast.walk(tree):
            for what in _imported(x):
                package = what.split(".")[0]
                if id(x) in late and package not in HEAVY:
                    yield name, x.lineno, f"late import of {what}"
                if name.split(".")[0] in PURE and package in ("torch", "transformers"):
                    yield name, x.lineno, f"{what} in a room of mathematics"


def _imported(x):
    "What an import statement imports."
    if isinstance(x, ast.Import):
        return [a.name for a in x.names]
    if isinstance(x, ast.ImportFrom):
        return ["." * x.level + (x.module or "")]
    return []


def private_names():
    "No room takes a private name from another."
    for name, path in modules():
        for line, room, names, _ in package_imports(name, path):
            for n in names:
                if n.startswith("_") and not n.startswith("__"):
                    yield name, line, f"takes {n} from {room}"


def long_functions(source):
    "Functions of more than FUNCTION lines: (line, what)."
    for f in ast.walk(ast.parse(source)):
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = f.end_lineno - f.lineno + 1
            if length > FUNCTION:
                yield f.lineno, f"{f.name} has {length} lines"


def crowded(source):
    "Several statements on one line, and long bodies behind their colon: (line, what)."
    lines, seen = source.splitlines(), {}
    for x in ast.walk(ast.parse(source)):
        for block in (getattr(x, k, None) for k in ("body", "orelse", "finalbody")):
            if not isinstance(block, list):
                continue
            width = len(lines[block[0].lineno - 1]) if isinstance(x, ast.stmt) and block else 0
            if width > SHORT and _behind(block[0], lines):
                yield block[0].lineno, f"a body behind its colon, in a line of {width} characters"
            for s in block:
                if seen.get(s.lineno) is block:
                    yield s.lineno, "two statements on a line"
                seen[s.end_lineno] = block


def _behind(statement, lines):
    "Whether a statement stands behind the colon of another one."
    return bool(lines[statement.lineno - 1].encode()[:statement.col_offset].strip())


def style(where, source):
    "What is over a bound in a piece of source: (where, line, what)."
    for i, line in enumerate(source.splitlines(), 1):
        if len(line) > LINE:
            yield where, i, f"{len(line)} characters"
    try:
        for i, what in (*long_functions(source), *crowded(source)):
            yield where, i, what
    except SyntaxError:
        pass        # a cell with a line for the shell


def notebook_style(path):
    "A notebook's wide lines, crowded lines, long functions, long exported cells, and wide text outputs."
    where = path.relative_to(ROOT).with_suffix("").as_posix()
    for i, source in cells(path):
        yield from style(f"{where}[{i}]", source)
        if _exported(source) and _length(source) > CELL:
            yield f"{where}[{i}]", 1, f"exported cell of {_length(source)} lines"
    for i, source in cells(path, "markdown"):
        for j, line in enumerate(source.splitlines(), 1):
            if len(line) > LINE and "|" not in line and "](" not in line and "<" not in line:
                yield f"{where}[{i}]", j, f"{len(line)} characters of text"
    yield from wide_outputs(path, where)


def _exported(source):
    "Whether a cell goes into a module."
    return source.lstrip().startswith(("#| export", "#|export"))


def _length(source):
    "A cell's lines, without directives and blank ones."
    return sum(bool(x.strip()) and not x.startswith("#|") for x in source.splitlines())


def wide_outputs(path, where):
    "Text outputs that run off the page."
    for i, c in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        for out in c.get("outputs", []):
            data = out.get("data", {})
            text = out.get("text", data.get("text/plain", "") if "text/html" not in data else "")
            for line in "".join(text).splitlines():
                if len(line) > OUTPUT:
                    yield f"{where}[{i}]", 1, f"output of {len(line)} characters"
                    break


def no_circles():
    "No modules import each other."
    for group in circles():
        yield group[0], 1, "circle: " + " ↔ ".join(group)


def module_bounds():
    "Modules have at most MODULE lines."
    for name, path in modules():
        n = len(path.read_text(encoding="utf-8").splitlines())
        if n > MODULE:
            yield name, 1, f"module of {n} lines"


def source_bounds():
    "Lines and functions of modules, tests and tools fit; one statement a line."
    files = [*modules(), *((p.relative_to(ROOT).as_posix(), p) for d in ("tests", "tools")
                           for p in sorted((ROOT / d).rglob("*.py")))]
    for name, path in files:
        yield from style(name, written(path.read_text(encoding="utf-8")))


def notebook_bounds():
    "Lines, functions, exported cells and outputs of notebooks fit on a page."
    for path in notebooks():
        yield from notebook_style(path)


RULES = [upward, no_circles, late_imports, private_names, module_bounds, source_bounds, notebook_bounds]


def findings():
    "Everything over a bound: (where, line, what)."
    for rule in RULES:
        yield from rule()


def summary():
    "The totals, as (what, number)."
    sources = {n: p.read_text(encoding="utf-8") for n, p in modules()}
    code = [(p, i, s) for p in notebooks() for i, s in cells(p)]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    yield "circles of imports", len(circles())
    yield "imports that go up", len(list(upward()))
    yield "late imports of what is not heavy", len(list(late_imports()))
    yield "private names across rooms", len(list(private_names()))
    yield "module lines over 120 characters", _wide(sources.values())
    yield "notebook code lines over 120 characters", _wide(s for _, _, s in code)
    yield "modules, and their lines", (len(sources), sum(len(s.splitlines()) for s in sources.values()))
    yield "largest module", max((len(s.splitlines()), n) for n, s in sources.items())
    yield "longest function", max(_functions(sources))
    yield "longest exported cell", max((_length(s), f"{p.relative_to(ROOT).as_posix()}[{i}]") for p, i, s in code
                                       if _exported(s))
    yield "tracked files, of them in results/", (len(tracked), sum(t.startswith("results/") for t in tracked))


def _wide(sources):
    "How many lines are over the bound."
    return sum(len(line) > LINE for s in sources for line in written(s).splitlines())


def written(source):
    "A module's source as somebody wrote it: nbdev's own list of exported names is blanked."
    return re.sub(r"^__all__ = \[[^\]]*\]", lambda m: "\n" * m[0].count("\n"), source, count=1, flags=re.M)


def _functions(sources):
    "Every function's length and name."
    for name, source in sources.items():
        for f in ast.walk(ast.parse(source)):
            if isinstance(f, ast.FunctionDef):
                yield f.end_lineno - f.lineno + 1, f"{name}.{f.name}"


def main(args):
    "Print what is asked for; the status is 1 where something is over a bound."
    if args == ["--summary"]:
        for what, number in summary():
            print(f"{what:45} {number if not isinstance(number, tuple) else ', '.join(map(str, number))}")
        return 0
    found = [f for f in findings() if not args or any(a in str(f[0]) for a in args)]
    for where, line, what in found:
        print(f"{where}:{line}: {what}")
    print(f"{len(found)} over a bound" if found else "all within the bounds")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
