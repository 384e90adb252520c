"""Finished runs into a pack, and out of it again: `python tools/pack.py results/miniature`.

Every finished run below the folder goes into its pack/ (four files), and its folder goes, but for figures. What
a pack would not keep stays as a folder, with the reason; `--drop` names files that may be deleted.
`--unpack TO [NAME …]` writes runs out as folders, and leaves the pack as it is.
"""
import argparse
import sys
from pathlib import Path

from paczero.run.pack import pack_runs
from paczero.run.runs import open_runs, unpack


def parser():
    "The grammar of this script."
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("folder", type=Path, help="a folder of results, e.g. results/miniature")
    top.add_argument("--drop", nargs="+", default=[], metavar="PATTERN",
                     help="files that may be deleted, by their path in the run, e.g. ledger.jsonl 'figures/*.svg'")
    top.add_argument("--unpack", nargs="+", metavar=("TO", "NAME"), help="a new folder, and names of runs (none: all)")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    if not args.folder.is_dir():
        parser().error(f"{args.folder}: no such folder")
    if args.unpack:
        to, *names = args.unpack
        runs = open_runs(args.folder)
        for name, run in [(n, runs[n]) for n in names] or runs.items():
            print(unpack(run, Path(to) / name))
        return 0
    packed, left = pack_runs(args.folder, args.drop)
    print(f"packed {len(packed)} runs into {args.folder / 'pack'}" if packed else "nothing new to pack")
    for name, why in left.items():
        print(f"  left as a folder: {name}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
