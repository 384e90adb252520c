"What a wrong version is, and where its text stands: in a module, and in the notebook that the module comes from."
import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Mutant:
    "A wrong version of the library: one text in one room exchanged for another."
    room: str           # "mechanisms/zpl"
    name: str           # short, unique in its room
    wrong: str          # what it does wrong
    old: str            # a text that stands once in the room's module, and once in its notebook's exported cells
    new: str            # what stands there instead
    test: str = None    # the test that must fail: a notebook, or a pytest id; None: the room's own notebook

    @property
    def id(self):
        "How it is called on the command line."
        return f"{self.room}:{self.name}"

    @property
    def module(self):
        "Relative to the repository."
        return f"paczero/{self.room}.py"

    @property
    def notebook(self):
        "Relative to the repository."
        return f"nbs/rooms/{self.room}.ipynb"

    @property
    def killer(self):
        "The test that must fail."
        return self.test or self.notebook


def exported(nb):
    "The exported code cells of a notebook."
    return [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).startswith("#| export")]


def misplaced(mutant, root=ROOT):
    "Why a wrong version cannot be made from the library as it is now; None where it can."
    module = (root / mutant.module).read_text(encoding="utf-8").count(mutant.old)
    nb = json.loads((root / mutant.notebook).read_text(encoding="utf-8"))
    cells = sum("".join(c["source"]).count(mutant.old) for c in exported(nb))
    if (module, cells) != (1, 1):
        return f"{mutant.id}: its text stands {module} times in {mutant.module}, {cells} times in {mutant.notebook}"
    return f"{mutant.id}: it changes nothing" if mutant.old == mutant.new else None


def put(mutant, root):
    "Make a tree the wrong version; the texts that were there, by path."
    kept = {root / f: (root / f).read_text(encoding="utf-8") for f in (mutant.module, mutant.notebook)}
    module, notebook = kept
    module.write_text(kept[module].replace(mutant.old, mutant.new), encoding="utf-8")
    nb = json.loads(kept[notebook])
    for c in exported(nb):
        c["source"] = "".join(c["source"]).replace(mutant.old, mutant.new).splitlines(keepends=True)
    notebook.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return kept
