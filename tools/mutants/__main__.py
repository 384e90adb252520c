"""Try every wrong version of the library on the test that must notice it, in a copy of the tree.

    python tools/mutants                            # all of them, a table at the end; status 1 where one is not killed
    python tools/mutants --only mechanisms/zpl      # of a room, or a name; may be given several times
    python tools/mutants --list                     # what they are
    python tools/mutants --jobs 2 --write           # in two copies at once; the table into results/mutants.md
    python tools/mutants --at HEAD                  # of a commit, whatever stands in the working tree
"""
import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mutants import chosen, misplaced, Outcome, ROOT, Slot, UNSOUND

TABLE = ROOT / "results" / "mutants.md"
HEAD = """# Wrong versions

{count} wrong versions of the library, each tried in a copy of the tree on the test that must notice it (`python
tools/mutants`): **{killed} killed, {survived} survived, {invalid} invalid**. {day}, {seconds:.0f} s, on top
of commit {commit}.

`AssertionError`: an assertion of the test failed. Any other kind: the library itself refused, in the middle of a test.

| room | wrong version | what it does wrong | verdict | by | raised | seconds |
|---|---|---|---|---|---|---|
"""
SLOT = None


def open_slot(folder, at):
    "In a worker: its own copy of the tree."
    global SLOT
    SLOT = Slot(tempfile.mkdtemp(dir=folder), at)


def sound(killer):
    "In a worker: whether a test passes on the library as it is."
    return killer, SLOT.test(killer)


def trial(mutant, sound):
    "In a worker: what came of a wrong version, if its test is sound."
    outcome = SLOT.trial(mutant) if sound else Outcome(False, UNSOUND, mutant.killer, 0.0)
    print(f"{outcome.verdict:8} {outcome.seconds:6.1f} s  {mutant.id}  {outcome.how}: {outcome.says[:90]}", flush=True)
    return mutant, outcome


def say_unsound(tests):
    "Say which tests fail on the library as it is."
    for killer, outcome in tests:
        if not outcome.ok:
            print(f"{killer} fails on the library as it is, so it can kill nothing:\n{outcome.log[-3000:]}", flush=True)


def commit(at):
    "What the tree is based on."
    say = ["git", "rev-parse", "--short", at or "HEAD"]
    return subprocess.run(say, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def table(results, seconds, at=None):
    "All outcomes as a page of markdown."
    count = lambda v: sum(o.verdict == v for _, o in results)
    cell = lambda x: str(x).replace("|", "\\|")
    head = HEAD.format(count=len(results), day=date.today().isoformat(), commit=commit(at), seconds=seconds,
                       **{v: count(v) for v in ("killed", "survived", "invalid")})
    rows = [(f"`{m.room}`", m.name, m.wrong, o.verdict, "its notebook" if m.test is None else f"`{m.test}`",
             "" if o.ok else o.how, f"{o.seconds:.1f}") for m, o in results]
    return head + "".join(f"| {' | '.join(map(cell, row))} |\n" for row in rows)


def run(mutants, jobs, at=None):
    "The outcomes, in order."
    with tempfile.TemporaryDirectory(prefix="mutants-") as tmp:
        with ProcessPoolExecutor(jobs, initializer=open_slot, initargs=(tmp, at)) as pool:
            tests = dict(pool.map(sound, dict.fromkeys(m.killer for m in mutants)))
            say_unsound(tests.items())
            return list(pool.map(trial, mutants, [tests[m.killer].ok for m in mutants]))


def main(argv=None):
    "The command; its status."
    parser = argparse.ArgumentParser(prog="tools/mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="ROOM|NAME", help="of a room, or one of them")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree at once")
    parser.add_argument("--list", action="store_true", help="say what they are, and stop")
    parser.add_argument("--at", metavar="COMMIT", help="a commit's tree; else the working tree")
    parser.add_argument("--write", action="store_true", help="the table into results/mutants.md; of some: behind it")
    args = parser.parse_args(argv)
    mutants = chosen(args.only)
    if args.list:
        print("\n".join(f"{m.id}: {m.wrong}  [{m.killer}]" for m in mutants))
    lost = [why for m in mutants if not args.at and (why := misplaced(m))]
    if lost or args.list:
        print("\n".join(lost), end="\n" if lost else "")
        return 2 if lost else 0
    start = time.monotonic()
    results = run(mutants, args.jobs, args.at)
    page = table(results, time.monotonic() - start, args.at)
    print(page)
    if args.write:
        before = TABLE.read_text(encoding="utf-8") + "\n" if args.only else ""
        TABLE.write_text(before + (page.replace("# Wrong", "## Later: wrong") if before else page), encoding="utf-8")
    return int(any(o.verdict != "killed" for _, o in results))


if __name__ == "__main__":
    sys.exit(main())
