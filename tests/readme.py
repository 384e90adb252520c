"""README.md from nbs/index.ipynb, by nbconvert: `python tests/readme.py [--write]` prints it, or writes it."""
import re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build() -> str:
    "The README's text."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    for cell in nb.cells:
        directives = re.findall(r"^#\|\s*(\S+)", cell.source, re.M) if cell.cell_type == "code" else []
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if "hide_input" in directives: cell.source = ""
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"```python\n\s*```\n", "", text)
    text = text.replace("](../", "](").replace('src="../', 'src="')
    head = "<!-- Made from nbs/index.ipynb by tests/readme.py: edit the notebook. -->\n\n"
    return head + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def command(number: int) -> str:
    "The README's n-th shell command of the section 'Two commands', counted from 0."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Two commands")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)\n```", section, re.S)[number].strip()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--command"]: print(command(int(sys.argv[2])))
    elif sys.argv[1:] == ["--write"]: (ROOT / "README.md").write_text(build(), encoding="utf-8")
    else: print(build())
