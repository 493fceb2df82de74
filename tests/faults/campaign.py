"""Faults by number: what the seed says, done, judged, counted."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from faults.kinds import KINDS
from faults.models import make_models, use_cache
from faults.scene import BAD, GOOD, Known, Scene

COLUMNS = (*GOOD, *BAD)


@dataclass(frozen=True)
class Fault:
    """One fault and what came of it."""

    seed: int
    number: int
    kind: str
    outcome: str
    note: str
    seconds: float


def prepared(folder: Path) -> Known:
    """Models, and every job done once without faults."""
    use_cache(folder / "cache")
    known = Known(make_models(folder / "models"), folder / "known")
    known.learn()
    gc.collect()
    gc.freeze()  # children share what is there
    return known


def kind_of(seed: int, number: int) -> str:
    """Which kind a fault is: its number alone says it, so that all kinds come in any stretch."""
    rng = random.Random(f"{seed}/{number // len(ORDER)}")
    order = list(ORDER)
    rng.shuffle(order)
    return order[number % len(order)]


def chosen(seed: int, first: int, count: int, kinds: Sequence[str] | None = None) -> list[int]:
    """Numbers of faults from `first` on, of some kinds or of all."""
    numbers = (n for n in itertools.count(first) if not kinds or kind_of(seed, n) in kinds)
    return list(itertools.islice(numbers, count))


ORDER = tuple(kind.name for kind in KINDS.values() for _ in range(kind.weight))


def fault(known: Known, seed: int, number: int, keep: bool = False) -> Fault:
    """Do one fault."""
    kind, start = kind_of(seed, number), time.process_time()
    place = known.folder / f"{number}"
    scene = Scene(known, place / "here", random.Random(f"{seed}:{number}"))
    try:
        found = KINDS[kind].happen(scene)
        outcome, note = found.outcome, found.note
    except Exception:
        outcome, note = "traceback", f"the campaign itself: {traceback.format_exc()}"
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
    return Fault(seed, number, kind, outcome, note, time.process_time() - start)


def campaign(
    known: Known, seed: int, numbers: Sequence[int], workers: int = 1, until: float | None = None
) -> list[Fault]:
    """Do these faults, in so many processes; None is begun after `until` (of `time.monotonic`)."""
    if workers <= 1:
        return list(_share(known, seed, numbers, until))
    children = []
    for worker in range(workers):
        told = known.folder / f"worker-{worker}.jsonl"
        if (child := os.fork()) == 0:
            status = 1
            try:
                with told.open("w") as out:
                    for each in _share(known, seed, numbers[worker::workers], until):
                        out.write(json.dumps(asdict(each)) + "\n")
                        out.flush()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append((child, told))
    found = []
    for child, told in children:
        try:
            ended = os.waitpid(child, 0)[1]
        except KeyboardInterrupt:  # what was done until then is told
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            ended = 0
        if ended:
            raise RuntimeError(f"a process of the campaign has ended early ({ended}), see {told}")
        found += [Fault(**json.loads(line)) for line in told.read_text().splitlines()]
    return sorted(found, key=lambda each: each.number)


def _share(known: Known, seed: int, numbers: Iterable[int], until: float | None) -> Iterable[Fault]:
    for number in numbers:
        if until is not None and time.monotonic() > until:
            return
        yield fault(known, seed, number)


def counts(faults: Iterable[Fault]) -> dict[str, Counter[str]]:
    """Outcomes by kind."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for each in faults:
        found[each.kind][each.outcome] += 1
    return found


def added(several: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, Counter[str]]:
    """The counts of several records together."""
    found = counts([])
    for rows in several:
        for kind, row in rows.items():
            found[kind].update(row)
    return found


def table(rows: Mapping[str, Mapping[str, int]]) -> str:
    """The table of a campaign, from `counts` or from a record."""
    lines = [["kind", "faults", *COLUMNS]]
    for kind, row in rows.items():
        lines.append([kind, str(sum(row.values())), *(str(row.get(name, 0)) for name in COLUMNS)])
    sums = [sum(row.get(name, 0) for row in rows.values()) for name in COLUMNS]
    lines.append(["all", str(sum(sums)), *map(str, sums)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(_row(line, widths) for line in [lines[0], rule, *lines[1:]])


def _row(line: list[str], widths: list[int]) -> str:
    first, *rest = zip(line, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
    return f"| {' | '.join(cells)} |"
