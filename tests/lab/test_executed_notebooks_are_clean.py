"""An executed notebook is kept without this machine's folders, and a failure without a terminal's colours."""
import nbformat

from paczero.lab.kernel import clean_notebook, plain


def test_colours_are_dropped():
    assert plain(" \x1b[0;31mValueError\x1b[0m: no \x1b[1msuch\x1b[0m file\n") == "ValueError: no such file"


def test_only_the_names_of_files_are_kept(tmp_path):
    file = tmp_path / "run.ipynb"
    nb = nbformat.v4.new_notebook(metadata=dict(papermill=dict(
        input_path=str(tmp_path / "run_experiment.ipynb"), output_path=str(file), exception=None)))
    nbformat.write(nb, file)
    clean_notebook(file, tmp_path / "run_experiment.ipynb")
    assert str(tmp_path) not in file.read_text()
    said = nbformat.read(file, as_version=4).metadata.papermill
    assert (said.input_path, said.output_path) == ("run_experiment.ipynb", "run.ipynb")
