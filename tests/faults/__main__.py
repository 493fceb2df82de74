"""Faults by hand.

python -m tests.faults --faults 1000 --seed 1
python -m tests.faults --seed 1 --only 17
python -m tests.faults --table out/faults.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> int:
    """Run a campaign, print its table, write its record. 1 if something bad came of a fault."""
    asked = _asked()
    if asked.table:
        from faults.campaign import added, table

        print(table(added([json.loads(path.read_text())["outcomes"] for path in asked.table])))
        return 0
    import torch
    from faults.campaign import campaign, chosen, counts, fault, prepared, table
    from faults.scene import BAD

    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        known = prepared(Path(folder))
        if asked.only is not None:
            for number in asked.only:
                found = fault(known, asked.seed, number)
                print(f"{number}  {found.kind}  {found.outcome}\n  {found.note}")
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        until = start + asked.minutes * 60 if asked.minutes else None
        numbers = chosen(asked.seed, asked.first, asked.faults, asked.kind)
        found = campaign(known, asked.seed, numbers, asked.workers, until)
    bad = [each for each in found if each.outcome in BAD]
    for each in found if asked.all else bad:
        print(f"{each.number}  {each.kind}  {each.outcome}\n  {each.note}\n")
    print(table({kind: dict(row) for kind, row in counts(found).items()}))
    print(f"{len(found)} faults, seed {asked.seed}, {time.monotonic() - start:.0f} s")
    if asked.record:
        record = {
            "record_version": 1,
            "kind": "faults",
            "seed": asked.seed,
            "faults": len(found),
            "outcomes": {kind: dict(row) for kind, row in counts(found).items()},
            "bad": [
                {"number": e.number, "kind": e.kind, "outcome": e.outcome, "note": e.note}
                for e in bad
            ],
            "seconds": time.monotonic() - start,
        }
        asked.record.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if bad else 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Faults, and what comes of them.")
    parser.add_argument("--faults", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--only", type=int, nargs="+", help="these alone, with what was said")
    parser.add_argument("--kind", nargs="+", help="faults of these kinds alone")
    parser.add_argument("--all", action="store_true", help="show the good ones, too")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--minutes", type=float, help="begin none after so long")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of records, no more")
    parser.add_argument("--record", type=Path, help="where a JSON record goes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
