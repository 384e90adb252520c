"""What strangers send: values of every kind, mutated logs, and the rule that only a readable ValueError follows."""
import json
import re

from hypothesis import HealthCheck, settings, strategies as st

from paczero.transcript import Chain

HUGE = (10**400, -(10**400), 10**30, 1e308, -1e308, 5e-324, 2**63, -1)
ODD = (None, True, False, 0, 1, -1, 2, 0.5, "", "x", "1", [], [1], {}, {"a": 1}, [[[]]],
       "../../etc/passwd", "\x00", "é", 10**9, *HUGE)
WORDS = ("mi", "zpl", "nonprivate", "half", "fixed", "noisy", "coin", "8:+", "8:ff", "adaptive", "quant_half")
BREAKS = (b"{", b"[", b"}", b'"', b" ", b",", b"\n", b"null", b"NaN", b"1e999", b"[" * 5000, b"\\ud800")

fuzz = settings(max_examples=300, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck))
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from(HUGE), st.floats(),
                   st.text(max_size=8), st.sampled_from(WORDS))
anything = st.recursive(
    leaves, lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=6), c, max_size=4), max_leaves=8)


def fields(*names):
    "A dictionary with any of these keys and any values."
    return st.fixed_dictionaries({}, optional={n: anything for n in names})


def only_value_error(f, *a, **k):
    "Call it: anything but a ValueError (TranscriptError is one), with a readable message, is a fault."
    try:
        return f(*a, **k)
    except ValueError as e:
        assert len(str(e)) < 2000


def rechain(entries):
    "Entries as a log with an honest chain."
    chain = Chain()
    return "".join(chain.line(e) for e in entries).encode()


def entries_of(raw):
    "A log's entries without their links."
    return [{k: v for k, v in json.loads(line).items() if k != "~"} for line in raw.splitlines()]


def places(x, path=()):
    "Every place in a JSON value."
    yield path
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from places(v, path + (k,))


def odd(rng):
    "A value that nobody expects."
    return rng.choice(ODD)


def change(rng, entries):
    "Another value, type, key or line, one more, one less, or two exchanged: and then an honest chain over it."
    e = json.loads(json.dumps(entries))
    what = rng.randrange(6)
    if what == 0:
        i, j = rng.randrange(len(e)), rng.randrange(len(e))
        e[i], e[j] = e[j], e[i]
    elif what == 1:
        del e[rng.randrange(len(e))]
    elif what == 2:
        e.insert(rng.randrange(len(e) + 1), rng.choice([{}, {"t": 0}, {"y": [1]}, {"end": None}, dict(rng.choice(e))]))
    else:
        _change_value(rng, e[rng.randrange(len(e)) if rng.random() < 0.5 else 0], what)
    return rechain(e)


def _change_value(rng, entry, what):
    "Another value at some place of an entry."
    path = rng.choice(list(places(entry)))
    if not path:
        entry["more"] = odd(rng)
        return
    at, key = entry, path[-1]
    for k in path[:-1]:
        at = at[k]
    if what == 3 and isinstance(at, dict):
        del at[key]
    elif what == 4 and isinstance(at[key], (int, float)) and not isinstance(at[key], bool):
        at[key] = rng.choice([at[key] + 1, -at[key], at[key] * 1.0000001, at[key] * 10])
    else:
        at[key] = odd(rng)


def scratch(rng, raw):
    "Bytes changed, with the chain left as it was."
    i = rng.randrange(len(raw))
    return bytes(rng.choice(SCRATCHES)(rng, bytearray(raw), i))


def _flip(rng, b, i):
    b[i] ^= 1 << rng.randrange(8)
    return b


def _replace(rng, b, i):
    b[i] = rng.randrange(256)
    return b


def _insert(rng, b, i):
    b[i:i] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 1, 1, 5])))
    return b


def _delete(rng, b, i):
    del b[i : i + rng.choice([1, 1, 1, 7, 100])]
    return b


def _cut(rng, b, i):
    return b[:i]


def _shuffle(rng, b, i):
    lines = b.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def _repeat(rng, b, i):
    lines = b.splitlines(keepends=True)
    j = rng.randrange(len(lines))
    return b"".join(lines[: j + 1] + lines[j:])


def _number(rng, b, i):
    m = rng.choice(list(re.finditer(rb"-?\d+", bytes(b))))
    b[m.start() : m.end()] = str(rng.choice([int(m.group()) + 1, -int(m.group()), *HUGE])).encode()
    return b


def _syntax(rng, b, i):
    m = rng.choice(list(re.finditer(rb'[{}\[\]",:]', bytes(b))))
    b[m.start() : m.end()] = rng.choice(BREAKS)
    return b


SCRATCHES = (_flip, _replace, _insert, _delete, _cut, _shuffle, _repeat, _number, _syntax)


def small_run(folder):
    "A finished run of six steps in a folder; its transcript's bytes."
    from paczero.finetune import FineTuneConfig, Runtime, finetune
    from paczero.mechanisms import MIBudget
    from paczero.models import load_model
    from paczero.tasks import load_task

    task = load_task("reviews", seed=0, n_train=30, n_dev=6, n_eval=6)
    config = FineTuneConfig(steps=6, lr=1e-3, m=8, eval_every=3, seed=1)
    mechanism, runtime = MIBudget(budget=0.5, steps=6), Runtime(test=False)
    finetune(*load_model("tiny-opt"), task, mechanism, config, folder=folder, runtime=runtime)
    return (folder / "transcript.jsonl").read_bytes()
