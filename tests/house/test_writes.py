"""Who writes, and who deletes: everything goes through `check`, or stands below with the reason why it may not."""
import ast

import census

# Calls that make, change or delete a file or folder by its name.
WRITES = {"write_text", "write_bytes", "to_parquet", "to_csv", "to_json", "to_pickle", "to_excel", "savefig", "touch",
          "save_pretrained", "save_file", "write_table", "execute_notebook", "mkdir", "makedirs", "mkdtemp", "rmtree",
          "unlink", "remove", "rmdir", "rename", "symlink_to", "hardlink_to", "symlink", "link", "ParquetWriter",
          "ZipFile", "TarFile", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"}
AS_METHOD = {"os": {"replace"}, "shutil": {"move", "copy", "copy2", "copyfile", "copytree"}, "json": {"dump"}}
OWN = "within a `workplace`, a new folder of this process alone"
SAFE = {
    ("check", "replacing"): "creates a new name, or nothing",
    ("check", "own_folder"): "refuses a link first",
    ("check", "workplace"): "mkdtemp, and what it made is what it removes",
    ("check", "move_into"): "refuses links first, then renames",
    ("check", "swap_folder"): "renames a folder, follows no link, and removes the one that it put aside",
    ("check", "recover_folder"): "renames a folder, follows no link",
    ("publish.write", "_write_model"): OWN,
    ("publish.write", "save_release"): "an empty folder, which is no link, makes room for the release",
    ("run.outcome", "write_outcome"): "a table into an open file; the run's secret, by its own name",
    ("run.outcome", "_write_weights"): OWN,
    ("run.pack", "open"): "a table into memory",
    ("run.pack", "_member"): "reads",
    ("run.pack", "_put_table"): OWN,
    ("run.pack", "_write"): OWN,
    ("run.pack", "_remove"): "files that are in the pack now, or that the caller gave up; links stay (`_others`)",
    ("run.pack", "write_pack"): OWN,
    ("run.folder", None): "a run's folder that the user named may be a link of theirs, what is in it may not; the "
                          "user's own state folder; a secret by its own name: a link would go, not its target",
    ("run.mark", None): "the user's own state folder",
    ("transcript.log", None): "a log: no link, and nobody else's",
    ("run.best", "_spill"): "a file without a name",
    ("mechanisms.secret", "write_secret"): "creates a new name, or nothing",
    ("publish.write", "push_to_hub"): "a new folder in the system's place for such",
    ("finetune", "finetune"): "a new folder in the system's place for such",
    ("cli.main", "_reader_is_gone"): "the null device",
    ("lab.job", "_outcome"): "failed.json by its own name: a link would go, not its target",
    ("lab.kernel", "run_job"): "papermill writes by name: a link is refused first",
    ("lab.sweep", None): "runs/ of the folder of results that the user named",
    ("lab.tuning", "write_tuning"): "the folder above a file that the user named; a table into memory",
    ("show.draw", "save"): "a table into memory",
    ("show.style", "save_figure"): "a figure into an open file",
    ("audit.watch", None): "private tables into open files; its own record, which is no link",
    ("models.gguf", None): "an entry of the package's own cache, under its lock; mkdir refuses a link",
    ("models.pickles", "convert_to_safetensors"): "an empty folder, which is no link, makes room for the new one",
    ("models.pickles", "_copy_others"): OWN,
    ("models.pickles", "_convert_parts"): OWN,
}


def opens_to_write(call):
    "Whether a call of open, os.open or .open may write."
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    text = any(isinstance(m, str) and set(m) & set("wax+") and set(m) <= set("rwaxbt+") for m in modes)
    by_number = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os"
    return text or by_number and "O_RDONLY" not in ast.dump(call)


def writers(source):
    "(function, line, call) of each call that writes."
    def walk(node, name):
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef) else name
            if isinstance(child, ast.Call):
                f = child.func
                called = f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")
                of = getattr(f.value, "id", "") if isinstance(f, ast.Attribute) else ""
                known = called in WRITES or called in AS_METHOD.get(of, ())
                if known or called == "open" and opens_to_write(child):
                    yield inner, child.lineno, called
            yield from walk(child, inner)
    return list(walk(ast.parse(source), None))


def test_everything_that_writes_is_known():
    found = {}
    for room, path in census.modules():
        for function, line, call in writers(path.read_text(encoding="utf-8")):
            found.setdefault((room, function), []).append(f"paczero/{room.replace('.', '/')}.py:{line}: {call}")
    unknown = [x for (room, f), xs in found.items() if (room, f) not in SAFE and (room, None) not in SAFE for x in xs]
    assert not unknown, "write through paczero.check (replacing, write_atomically, own_folder, workplace):\n" + \
        "\n".join(unknown)
    rooms = {room for room, _ in found}
    gone = [(room, f) for room, f in SAFE if room in rooms and f is not None and (room, f) not in found]
    assert not gone, f"nothing is written there any more: {gone}"


WRITERS = ("open(p, 'w')", "p.open('r+b')", "open(p, mode='a')", "os.open(p, os.O_RDWR)", "os.open(p, flags)",
           "p.write_text('')", "os.replace(a, b)", "shutil.rmtree(p)", "shutil.copy(a, b)", "d.to_csv(p)",
           "with_name(a).unlink()")
READERS = ("open(p)", "p.open('rb')", "text.replace('a', 'b')", "open(p, encoding='ascii')", "x.copy()",
           "os.open(d, os.O_RDONLY)")


def test_a_writer_is_seen():
    for line in WRITERS:
        assert writers(f"def f():\n    {line}\n") and writers(line)[0][0] is None, line
    assert not any(map(writers, READERS))
