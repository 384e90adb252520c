"Wrong versions of the library, each of which a test must notice: `python tools/mutants` tries them all."
from . import after, mathematics, mechanisms, odds, record, together
from .mutant import misplaced, Mutant, ROOT
from .slot import Outcome, Slot, UNSOUND

MUTANTS = [*mathematics.MUTANTS, *mechanisms.MUTANTS, *record.MUTANTS, *together.MUTANTS, *after.MUTANTS,
           *odds.MUTANTS]


def chosen(names):
    "The wrong versions of some rooms, or of some names; all where none is given."
    fits = lambda m, n: n in (m.id, m.name, m.room) or m.room.startswith(n.rstrip("/") + "/")
    unknown = [n for n in names if not any(fits(m, n) for m in MUTANTS)]
    if unknown:
        raise SystemExit(f"no room and no wrong version is called {', '.join(unknown)}: see --list")
    return [m for m in MUTANTS if not names or any(fits(m, n) for n in names)]
