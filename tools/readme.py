"""README.md from nbs/index.ipynb, by nbconvert.

    python tools/readme.py              # print it
    python tools/readme.py --write      # write README.md
    python tools/readme.py --command 1  # the second command of the section "Two commands", counted from 0
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"


def build() -> str:
    "The README's text."
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    for cell in nb.cells:
        directives = re.findall(r"^#\|\s*(\S+)", cell.source, re.M) if cell.cell_type == "code" else []
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if "hide_input" in directives:
            cell.source = ""
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"```python\n\s*```\n", "", text)
    text = re.sub(r"\]\((?!https?:|#|\.\./|/)", "](nbs/", text)          # a notebook's neighbours
    text = text.replace("](../", "](").replace('src="../', 'src="')
    return HEAD + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def command(number: int) -> str:
    "The README's n-th shell command of the section 'Two commands', counted from 0."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Two commands")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)\n```", section, re.S)[number].strip()


def main(args):
    "Print the README or one of its commands, or write it."
    if args[:1] == ["--command"]:
        print(command(int(args[1])))
    elif args == ["--write"]:
        (ROOT / "README.md").write_text(build(), encoding="utf-8")
    else:
        print(build())


if __name__ == "__main__":
    main(sys.argv[1:])
