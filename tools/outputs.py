"""Keep the text that notebooks show equal to what they make.

    python tools/outputs.py --write nbs/story/one_bit.ipynb …   # run each twice and store what it showed both times
    python tools/outputs.py --check nbs/story/one_bit.ipynb …   # run each and compare; the tests do this
    python tools/outputs.py --clear nbs/rooms/subsets.ipynb …   # drop all text, keep pictures

Of a cell's text, `--write` keeps what both runs made and what shows no path of the machine: times and what hangs on a
secret go. The second run computes with other kernels (AVX2), so that what only this processor rounds so goes as well.
Images are kept from the first run and never compared.
"""
import difflib
import html
import json
import re
import subprocess
import sys
from pathlib import Path

from notebooks import ROOT, Server

OTHER_KERNELS = dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
MACHINE = re.compile(r"/(?:root|home|Users|work|tmp)/[\w.]+")
NUMBER = re.compile(r"[-+−]?\d+(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]?\d+)?")
REL = 2e-3          # how far a number with decimals may be from the committed one, as in tests/test_pins.py


def text_of(output):
    "Text as a reader sees it: what was printed, or a page without its tags, or plain text; nothing for an image."
    if output["output_type"] == "stream":
        return "".join(output["text"])
    shown = {k: "".join(v) for k, v in output.get("data", {}).items()}
    if is_image(output):
        return ""
    if "text/html" in shown:
        return html.unescape(re.sub(r"(?s)<(style|script).*?</\1>|<[^>]+>", " ", shown["text/html"]))
    return next((shown[k] for k in ("text/markdown", "text/latex", "text/plain") if k in shown), "")


def is_image(output):
    "Whether an output is a picture."
    return any(k.startswith("image/") for k in output.get("data", {}))


def texts(outputs):
    "All text of a cell: what was printed, then what was displayed; spaces and addresses do not count."
    printed = "".join(text_of(o) for o in outputs if o["output_type"] == "stream")
    displayed = [text_of(o) for o in outputs if o["output_type"] != "stream"]
    return [t for t in map(_plain, [printed, *displayed]) if t]


def _plain(text):
    "Text without addresses, colours, rules and the width of columns."
    text = re.sub(r"0x[0-9a-fA-F]{6,}", "0x", re.sub(r"\x1b\[[0-9;]*m", "", text))
    lines = (re.sub(r"\s+", " ", re.sub(r"[-─═]{3,}", "---", line)).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def same(a, b):
    "Whether two texts agree: words and whole numbers exactly, decimals up to their last place or REL."
    if a == b:
        return True
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    return all(_near(x, y) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))


def _near(x, y):
    "Whether two printed numbers agree."
    if x == y:
        return True
    if not any(c in x + y for c in ".e"):
        return False
    a, b = (float(v.replace(",", "").replace("−", "-")) for v in (x, y))
    mantissa, _, exponent = x.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= max(1.01 * last, REL * max(abs(a), abs(b)))


def compare(path, made):
    "Where a notebook's committed text is not what it makes now: a list of differences, each ready to print."
    found = []
    for i, cell in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))["cells"]):
        kept = texts(cell.get("outputs", []))
        if any(o.get("name") == "stderr" for o in cell.get("outputs", [])):
            found.append(f"cell {i} keeps warnings or progress bars (stderr)")
        if not kept:
            continue
        if i not in made:
            found.append(f"cell {i} keeps text, and is not run in the tests: nothing compares it")
            continue
        new = texts(made[i])
        if not all(any(same(k, n) for n in new) for k in kept):
            lines = difflib.unified_diff("\n".join(kept).splitlines(), "\n".join(new).splitlines(),
                                         f"cell {i}, committed", "what it makes now", lineterm="", n=1)
            found.append("\n".join(lines))
    return found


def stored(first, second):
    "A cell's outputs as they are committed: text that both runs showed, and images."
    again = texts(second)

    def keep(output):
        if output.get("name") == "stderr" or MACHINE.search(json.dumps(output)):
            return False
        text = _plain(text_of(output))
        return not text or any(same(text, t) for t in again)

    return [_tidy(o) for o in first if keep(o)]


def _tidy(output):
    "An output in the notebook's own format."
    more = dict(execution_count=None) if output["output_type"] == "execute_result" else {}
    return output if output["output_type"] == "stream" else dict(output, **more, metadata=output.get("metadata") or {})


def write(path, server):
    "Run a notebook twice and store its outputs; says which texts were dropped."
    runs = [server.run(path), server.run(path, **OTHER_KERNELS)]
    for run in runs:
        if not run.ok:
            raise SystemExit(f"{path} fails:\n{run.log}")
    nb = json.loads(Path(path).read_text(encoding="utf-8"))
    dropped = []
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] != "code":
            continue
        if i not in runs[0].outputs:
            cell["outputs"] = [o for o in cell.get("outputs", []) if is_image(o)]
            continue
        hidden = re.search(r"^#\|\s*hide\b", "".join(cell["source"]), re.M)
        first, second = ([] if hidden else run.outputs[i] for run in runs)
        cell["outputs"] = stored(first, second)
        dropped += [f"\n  cell {i}: {t[:100]!r}" for t in texts(first) if t not in texts(cell["outputs"])]
    save(path, nb)
    return "not kept, for it differs between two runs or shows a path:" + "".join(dropped) if dropped else ""


def save(path, nb):
    "Write a notebook, and clean it as nbdev does."
    Path(path).write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", str(path)], check=True, cwd=ROOT)


def clear(path, server=None):
    "Drop all text that a notebook shows; pictures stay."
    nb = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [o for o in cell.get("outputs", []) if is_image(o)]
    save(path, nb)


def check(path, server):
    "Run a notebook and compare; what is wrong, as text."
    run = server.run(path)
    return "\n".join(compare(path, run.outputs)) if run.ok else run.log


def main(args):
    "Write, check or clear; the status is 1 where a check found something."
    verbs = {"--write": write, "--check": check, "--clear": clear}
    if args[:1] not in ([v] for v in verbs) or len(args) < 2:
        raise SystemExit(__doc__)
    server, found = Server(), False
    for path in map(Path, args[1:]):
        said = verbs[args[0]](path.resolve(), server)
        found = found or bool(said)
        print(f"{path}: {said or 'ok'}", flush=True)
    server.close()
    return found and args[0] == "--check"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
