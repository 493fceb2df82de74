"""Where one fault happens: models, a place for the output, a cache; and the judge of what came of it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from checkpoints import tree_hashes
from command_line import Told
from faults.calls import READING, WRITING, Calls
from faults.children import STOPPED, Child, Ended, forked
from faults.jobs import JOBS, Job, carry_out, result_of
from faults.models import Models, use_cache

from deltafold.running.workspace import partial_path

EQUAL, REFUSED, TAKEN_UP = "equal", "refused", "taken up"
WRONG, HALF, TRACEBACK, BLOCKED = "wrong", "half-written", "traceback", "blocked"
GOOD, BAD = (REFUSED, TAKEN_UP, EQUAL), (WRONG, HALF, TRACEBACK, BLOCKED)


@dataclass(frozen=True)
class Verdict:
    """What came of a fault, and the words to find out why."""

    outcome: str
    note: str = ""


@dataclass
class Known:
    """Each job without faults: its result, and how many calls it makes. Found once."""

    models: Models
    folder: Path
    results: dict[str, object] = field(default_factory=dict)
    calls: dict[tuple[str, tuple[str, ...]], int] = field(default_factory=dict)

    def learn(self) -> None:
        """Run every job in this process, for what it imports; then once for each kind of calls."""
        for job in JOBS.values():
            place = self.folder / "here"
            place.mkdir(parents=True)
            told = carry_out(job, self.models, place / "out")
            assert told.code == 0, (job.name, told.err)
            shutil.rmtree(place)
            for kinds in (WRITING, READING, READING + WRITING):
                place = self.folder / f"{job.name} {len(kinds)}".replace(" ", "-")
                scene = Scene(self, place, random.Random(0))
                calls = Calls(place, kinds)
                ended = scene.run(job, calls)
                assert ended.told.code == 0, (job.name, ended)
                found = result_of(job, scene.out, ended.told)
                assert self.results.setdefault(job.name, found) == found, f"{job.name} varies"
                self.calls[job.name, kinds] = ended.calls
                scene.close()


class Scene:
    """One fault's own folder: copies of the models, the output, the cache."""

    def __init__(self, known: Known, folder: Path, rng: random.Random):
        self.known, self.folder, self.rng = known, folder, rng
        folder.mkdir(parents=True)
        self.out = folder / "out"
        self._started = 0

    @cached_property
    def models(self) -> Models:
        """Copies, times and all, to be harmed."""
        shutil.copytree(self.known.models.folder, self.folder / "models")
        return Models(self.folder / "models")

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def pick(self, *names: str, where: Callable[[Job], bool] = lambda _: True) -> Job:
        """One of the jobs, of these names or of all, by weight."""
        jobs = [JOBS[name] for name in names or JOBS]
        jobs = [job for job in jobs if where(job)]
        return self.rng.choices(jobs, [job.weight for job in jobs])[0]

    def moment(self, job: Job, kinds: tuple[str, ...]) -> int:
        """A number of a call that the job makes."""
        return self.rng.randrange(self.known.calls[job.name, kinds])

    def work(self, job: Job, out: Path | None = None, *more: object) -> Callable[[], Told]:
        """The job here, for a child."""

        def work() -> Told:
            use_cache(self.folder / "cache")
            os.chdir(self.folder)
            return carry_out(job, models, out or self.out, *more)

        models = Models(Path(self.models.folder.name))  # where it lies is part of some results
        return work

    def run(
        self, job: Job, calls: Calls | None = None, *more: object, room_bytes: int | None = None
    ) -> Ended:
        return forked(self.work(job, None, *more), self.folder / "answer", calls, room_bytes)

    def start(
        self, job: Job, calls: Calls | None = None, out: Path | None = None, *more: object
    ) -> Child:
        self._started += 1
        answer = self.folder / f"answer-{self._started}"
        return Child(self.work(job, out, *more), answer, calls)

    # --- the judge ------------------------------------------------------------------------------------

    def fits(self, job: Job, told: Told, out: Path | None = None) -> bool:
        """Whether the result is that of a run without faults."""
        return result_of(job, out or self.out, told) == self.known.results[job.name]

    def seen(self, job: Job, ended: Ended, what: str, out: Path | None = None) -> Verdict | None:
        """What is wrong with the end of a run, whatever was done to it; None if nothing is."""
        out, told = out or self.out, ended.told
        if ended.killed:
            return Verdict(HALF, f"{what}: killed") if _is_half(self, job, out) else None
        if bad := untold(told):
            return Verdict(TRACEBACK, f"{what}: {bad}: {told.err[-1500:]}")
        if told.code and _is_half(self, job, out):
            return Verdict(HALF, f"{what}: exit {told.code}, {told.err.strip()}")
        return None

    def persists(self, job: Job, ended: Ended, what: str) -> Verdict:
        """A fault that stays, such as a damaged input: refused, or the result is as ever."""
        if (bad := self.seen(job, ended, what)) is not None:
            return bad
        if ended.told.code:
            return Verdict(REFUSED, f"{what}: {ended.told.err.strip()}")
        equal = self.fits(job, ended.told)
        return Verdict(EQUAL if equal else WRONG, what)

    def passes(self, job: Job, ended: Ended, what: str) -> Verdict:
        """A fault that is over: the same command then has to give the result, and go on by itself."""
        if (bad := self.seen(job, ended, what)) is not None:
            return bad
        if not ended.killed and ended.told.code == 0:
            return Verdict(EQUAL if self.fits(job, ended.told) else WRONG, what)
        first = "killed" if ended.killed else ended.told.err.strip()
        stopped = ended.killed or ended.told.code in STOPPED
        return self.again(job, f"{what}: {first}", TAKEN_UP if stopped else REFUSED)

    def again(self, job: Job, what: str, good: str) -> Verdict:
        """The same command once more, and with the remedy that it names if it refuses."""
        if job.writes and self.out.exists() and self.fits(job, Told(0, "", "")):
            return Verdict(good, f"{what}; published")
        for more in ((), ("--restart",)):
            ended = self.run(job, None, *more)
            if (bad := self.seen(job, ended, f"{what}; again")) is not None:
                return bad
            if ended.told.code == 0:
                if not self.fits(job, ended.told):
                    return Verdict(WRONG, f"{what}; again")
                if partial_path(self.out).exists():
                    return Verdict(BLOCKED, f"{what}; again; unfinished work is left behind")
                return Verdict(good, what)
            if "--restart" not in ended.told.err:
                break
        return Verdict(BLOCKED, f"{what}; again: {ended.told.err.strip()}")


def _is_half(scene: Scene, job: Job, out: Path) -> bool:
    return job.writes and os.path.lexists(out) and tree_hashes(out) != scene.known.results[job.name]


def untold(told: Told) -> str | None:
    """Why what was said is not one sentence with an exit code of ours; None if it is."""
    if told.code not in (0, 1, 2, *STOPPED):
        return f"exit code {told.code}"
    if "Traceback" in told.err:
        return "a traceback"
    if told.code in (0, *STOPPED):
        return None
    lines = [line for line in told.lines if line.startswith("deltafold: ")]
    if len(lines) != 1 or not lines[0].endswith("."):
        return "no sentence"
    return None


__all__ = ["Calls", "Scene", "Verdict", "untold"]
