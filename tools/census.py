"""The house, counted: `python tools/census.py [room …]` prints what is over a bound; `--summary` prints the totals."""
import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE, FUNCTION, CELL, MODULE, OUTPUT = 120, 25, 25, 300, 120

# The floors, from the ground up; in a floor, a room may import those that stand before it.
FLOORS = {
    "0 ground": ["check", "information", "subsets", "schedule", "directions"],
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
PURE = ["check", "information", "subsets", "schedule", "mechanisms"]


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
    "Imports that do not go down: (module, line, what)."
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
    "Imports inside functions that are neither heavy nor allowed: (module, line, what)."
    for name, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for f in ast.walk(tree):
            if not isinstance(f, ast.FunctionDef):
                continue
            for x in ast.walk(f):
                for what in _imported(x):
                    if what.split(".")[0] not in HEAVY:
                        yield name, x.lineno, f"late import of {what}"
                    elif name.split(".")[0] in PURE and what.split(".")[0] in ("torch", "transformers"):
                        yield name, x.lineno, f"{what} in a room of mathematics"


def _imported(x):
    "What an import statement imports."
    if isinstance(x, ast.Import):
        return [a.name for a in x.names]
    if isinstance(x, ast.ImportFrom):
        return ["." * x.level + (x.module or "")]
    return []


def private_names():
    "Private names that one room takes from another: (module, line, what)."
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
    "Several statements on one line: (line, what); a short body behind its colon is none."
    seen = {}
    for x in ast.walk(ast.parse(source)):
        for block in (getattr(x, k, None) for k in ("body", "orelse", "finalbody")):
            for s in block if isinstance(block, list) else []:
                if s.lineno in seen and seen[s.lineno] is block:
                    yield s.lineno, "two statements on a line"
                seen[s.end_lineno] = block


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
    where = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    for i, source in cells(path):
        yield from ((f"nbs/{w}", line, what) for w, line, what in style(f"{where}[{i}]", source))
        exported = source.lstrip().startswith(("#| export", "#|export"))
        lines = [x for x in source.splitlines() if x.strip() and not x.startswith("#|")]
        if exported and len(lines) > CELL:
            yield f"nbs/{where}[{i}]", 1, f"exported cell of {len(lines)} lines"
    for i, source in cells(path, "markdown"):
        for j, line in enumerate(source.splitlines(), 1):
            if len(line) > LINE and "|" not in line and "](" not in line and "<" not in line:
                yield f"nbs/{where}[{i}]", j, f"{len(line)} characters of text"
    yield from wide_outputs(path, where)


def wide_outputs(path, where):
    "Text outputs that run off the page."
    for i, c in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        for out in c.get("outputs", []):
            data = out.get("data", {})
            text = out.get("text", data.get("text/plain", "") if "text/html" not in data else "")
            for line in "".join(text).splitlines():
                if len(line) > OUTPUT:
                    yield f"nbs/{where}[{i}]", 1, f"output of {len(line)} characters"
                    break


def findings():
    "Everything over a bound: (where, line, what)."
    yield from upward()
    yield from late_imports()
    yield from private_names()
    for group in circles():
        yield group[0], 1, "circle: " + " ↔ ".join(group)
    for name, path in modules():
        source = path.read_text(encoding="utf-8")
        if (n := len(source.splitlines())) > MODULE:
            yield name, 1, f"module of {n} lines"
        yield from style(name, source)
    for path in notebooks():
        yield from notebook_style(path)
    for path in (*sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))):
        yield from style(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def summary():
    "The totals, as (what, number)."
    sources = {n: p.read_text(encoding="utf-8") for n, p in modules()}
    lengths = [(f.end_lineno - f.lineno + 1, f"{n}.{f.name}") for n, s in sources.items() for f in ast.walk(ast.parse(s))
               if isinstance(f, ast.FunctionDef)]
    exported = [(len(s.splitlines()) - 1, f"{p.stem}[{i}]") for p in notebooks() for i, s in cells(p)
                if s.startswith("#| export")]
    wide = sum(len(line) > LINE for s in sources.values() for line in s.splitlines())
    wide_cells = sum(len(line) > LINE for p in notebooks() for _, s in cells(p) for line in s.splitlines())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    yield "circles of imports", len(circles())
    yield "imports that go up", len(list(upward()))
    yield "late imports of what is not heavy", len(list(late_imports()))
    yield "private names across rooms", len(list(private_names()))
    yield "module lines over 120 characters", wide
    yield "notebook code lines over 120 characters", wide_cells
    yield "modules, and their lines", (len(sources), sum(len(s.splitlines()) for s in sources.values()))
    yield "largest module", max((len(s.splitlines()), n) for n, s in sources.items())
    yield "longest function", max(lengths)
    yield "longest exported cell", max(exported)
    yield "tracked files, of them in results/", (len(tracked), sum(t.startswith("results/") for t in tracked))


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
