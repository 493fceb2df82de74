"""The kinds of faults. Each takes a scene, does one fault to one job, and says what came of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoints import tree_hashes
from command_line import Told
from faults.calls import READING, WRITING, Calls
from faults.damage import files_of, harm
from faults.hostile import edit
from faults.jobs import JOBS, Job
from faults.odd import make_odd
from faults.scene import (
    BLOCKED,
    EQUAL,
    HALF,
    REFUSED,
    TAKEN_UP,
    TRACEBACK,
    WRONG,
    Scene,
    Verdict,
    untold,
)

from deltafold.running.workspace import partial_path

EVERY = READING + WRITING


@dataclass(frozen=True)
class Kind:
    """A row of the table: `weight` is how often it comes."""

    name: str
    weight: int
    happen: Callable[[Scene], Verdict]


def _reads_archive(job: Job) -> bool:
    return "lossy" in job.reads


def _writes(job: Job) -> bool:
    return job.writes


def _also_restores(scene: Scene, job: Job, found: Verdict) -> Verdict:
    """What `verify` found sound must restore to what it was."""
    if job.writes or job.name == "load" or found.outcome not in (EQUAL,):
        return found
    restore = JOBS["restore"]
    ended = scene.run(restore)
    if ended.told.code == 0 and scene.fits(restore, ended.told):
        return found
    return Verdict(WRONG, f"{found.note}; verify found it sound, restore: {ended.told.err.strip()}")


def archive(scene: Scene) -> Verdict:
    """Harm to a finished archive."""
    job = scene.pick(where=_reads_archive)
    what = f"{job.name}, {harm(files_of(scene.models.lossy), scene.rng)}"
    return _also_restores(scene, job, scene.persists(job, scene.run(job), what))


def base_of_archive(scene: Scene) -> Verdict:
    """Harm to the base that an archive refers to."""
    job = scene.pick("restore", "load", "verify", "export")
    what = f"{job.name}, {harm(files_of(scene.models.base), scene.rng)}"
    return scene.persists(job, scene.run(job), what)


def inputs(scene: Scene) -> Verdict:
    """Harm to a checkpoint that is read for the first time: nobody can know what it was."""
    job = scene.pick(where=lambda job: job.writes and not _reads_archive(job))
    name = scene.rng.choice(job.reads)
    what = f"{job.name}, {name}: {harm(files_of(scene.models.folder / name), scene.rng)}"
    return _as_given(scene, job, what)


def _as_given(scene: Scene, job: Job, what: str) -> Verdict:
    """What was given is odd: it is refused, or the output is whole and says what was given."""
    ended = scene.run(job)
    if ended.killed:
        return Verdict(TRACEBACK, f"{what}: killed by signal {ended.signal}")
    if bad := untold(ended.told):
        return Verdict(TRACEBACK, f"{what}: {bad}: {ended.told.err[-1500:]}")
    if ended.told.code:
        left = os.path.lexists(scene.out)
        return Verdict(HALF if left else REFUSED, f"{what}: {ended.told.err.strip()}")
    if job.writes and not scene.out.is_dir():
        return Verdict(WRONG, f"{what}: exit 0 without an output")
    if job.name == "compress exact":
        return _gives_back(scene, what)
    return Verdict(EQUAL, what)


def _gives_back(scene: Scene, what: str) -> Verdict:
    """An exact archive restores to the fine-tune, whatever it holds."""
    from command_line import deltafold

    back = scene.folder / "back"
    told = deltafold("restore", scene.out, "--base", scene.models.base, "-o", back)
    if told.code or untold(told):
        return Verdict(WRONG, f"{what}: written, and not restored: {told.err}")
    one, two = _weights(scene.models.tuned), _weights(back)
    return Verdict(EQUAL if one == two else WRONG, f"{what}: restored")


def _weights(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    from deltafold.checkpoint import Checkpoint

    with Checkpoint(folder) as found:
        return {n: (i.dtype, i.shape, bytes(found.data(n))) for n, i in found.tensors.items()}


def work(scene: Scene) -> Verdict:
    """A killed run, and harm to what it left unfinished."""
    job = scene.pick(where=_writes)
    at = scene.moment(job, WRITING)
    ended = scene.run(job, Calls(scene.folder, WRITING, at))
    partial = partial_path(scene.out)
    if not ended.killed or not partial.is_dir():
        return Verdict(EQUAL, f"{job.name}, ended before call {at}")
    left = [file for file in files_of(partial) if file.name != "lock"]
    what = f"{job.name}, killed at {at}, {harm(left, scene.rng)}"
    return scene.again(job, what, TAKEN_UP)


def cache(scene: Scene) -> Verdict:
    """Harm to what an earlier run has kept in the cache."""
    job = scene.pick("compress auto", "fold", "factor", "share")
    first = scene.start(job, None, scene.folder / "first").wait()
    kept = files_of(scene.folder / "cache") if (scene.folder / "cache").is_dir() else []
    what = f"{job.name}, {harm(kept, scene.rng) or 'nothing kept'}"
    if first.told.code:
        return Verdict(BLOCKED, f"{what}: {first.told.err}")
    return scene.passes(job, scene.run(job), what)


def kill(scene: Scene) -> Verdict:
    """SIGKILL at a file call, once or twice."""
    job = scene.pick(where=_writes)
    what = job.name
    for _ in range(scene.rng.choice((1, 1, 2))):
        at = scene.moment(job, EVERY)
        what += f", killed at {at}"
        ended = scene.run(job, Calls(scene.folder, EVERY, at))
        if (bad := scene.seen(job, ended, what)) is not None or not ended.killed:
            return bad or scene.passes(job, ended, what)
    return scene.again(job, what, TAKEN_UP)


def _effect(kinds: tuple[str, ...], effects: tuple[str, ...]) -> Callable[[Scene], Verdict]:
    def happen(scene: Scene) -> Verdict:
        job = scene.pick(where=_writes) if kinds == WRITING else scene.pick()
        at, effect = scene.moment(job, kinds), scene.rng.choice(effects)
        again = scene.rng.random() < 0.5
        what = f"{job.name}, {effect} at {at}{' and after' if again else ''}"
        return scene.passes(
            job, scene.run(job, Calls(scene.folder, kinds, at, effect, again)), what
        )

    return happen


def little_memory(scene: Scene) -> Verdict:
    """A limit that the system itself sets: what it ends so, is ended as by a kill."""
    job = scene.pick()
    room = scene.rng.choice((0, 1, 2, 4, 8, 16)) << 20
    return scene.passes(job, scene.run(job, room_bytes=room), f"{job.name}, {room >> 20} MiB more")


def two_at_once(scene: Scene) -> Verdict:
    """The same command twice: one is halted at a call, the other runs, then the first goes on."""
    job = scene.pick(where=_writes)
    at = scene.moment(job, EVERY)
    what = f"{job.name}, halted at {at}"
    one = scene.start(job, Calls(scene.folder, EVERY, at, "stop"))
    halted = one.until_stopped()
    two = scene.start(job, None, scene.out, "--overwrite").wait()
    if halted:
        one.go_on()
    ends = (one.wait(), two)
    for ended in ends:
        if bad := untold(ended.told):
            return Verdict(TRACEBACK, f"{what}: {bad}: {ended.told.err}")
    if not any(ended.told.code == 0 for ended in ends):
        return Verdict(BLOCKED, f"{what}: {ends[0].told.err} {ends[1].told.err}")
    told = " ".join(ended.told.err.strip() for ended in ends)
    if not scene.fits(job, Told(0, "", "")):
        return Verdict(WRONG, f"{what}: {told}")
    refused = any(ended.told.code for ended in ends)
    return Verdict(REFUSED if refused else EQUAL, f"{what}: {told}")


def read_while_written(scene: Scene) -> Verdict:
    """An archive is read while the same one is written over it."""
    job = scene.pick(where=_reads_archive)
    at = scene.moment(job, EVERY)
    what = f"{job.name}, halted at {at}, lossy.delta written again"
    one = scene.start(job, Calls(scene.folder, EVERY, at, "stop"))
    halted = one.until_stopped()
    writer = JOBS["compress lossy"]
    two = scene.start(writer, None, scene.models.lossy, "--overwrite").wait()
    if halted:
        one.go_on()
    if two.told.code:
        return Verdict(BLOCKED, f"{what}: {two.told.err}")
    return scene.persists(job, one.wait(), what)


def hostile(scene: Scene) -> Verdict:
    """An archive made to do harm: its manifest is edited, and the seal made to fit."""
    job = scene.pick(where=_reads_archive)
    what = f"{job.name}, {edit(scene.models.lossy, scene.rng)}"
    before = _outside(scene)
    found = _as_given(scene, job, what)
    if _outside(scene) != before:
        return Verdict(WRONG, f"{what}: something was written outside")
    return found


def _outside(scene: Scene) -> dict[str, str]:
    found = tree_hashes(scene.models.folder)
    return found | {each.name: "" for each in scene.folder.parent.iterdir()}


def odd(scene: Scene) -> Verdict:
    """A checkpoint that is odd, by mistake or on purpose, where no digest tells what it was."""
    job = scene.pick(
        where=lambda job: job.name == "merge" or (job.writes and not _reads_archive(job))
    )
    names = [
        each for each in job.reads if each != "lossy" and (job.name, each) != ("merge", "base")
    ]
    name = scene.rng.choice(names)
    what = f"{job.name}, {name}: {make_odd(scene.models.folder / name, scene.rng)}"
    return _as_given(scene, job, what)


def odd_place(scene: Scene) -> Verdict:
    """An output whose place is odd."""
    job = scene.pick(where=_writes)
    place, name = scene.rng.choice(_places(scene.folder))
    ended = scene.start(job, None, place).wait()
    what = f"{job.name}, {name}"
    if bad := untold(ended.told):
        return Verdict(TRACEBACK, f"{what}: {bad}: {ended.told.err[-1500:]}")
    if ended.told.code:
        return Verdict(REFUSED, f"{what}: {ended.told.err.strip()}")
    return Verdict(EQUAL if scene.fits(job, ended.told, place) else WRONG, what)


def _places(folder: Path) -> list[tuple[Path, str]]:
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "target").mkdir()
    (folder / "link").symlink_to(folder / "target")
    return [
        (folder / "file" / "out", "inside a file"), (folder / "loop", "a link to itself"),
        (folder / "dangling", "a link to nothing"), (folder / "link" / "out", "through a link"),
        (folder / ("x" * 300), "a long name"), (folder / ("x" * 250), "a name that has no room"),
        (folder / os.fsdecode(b"caf\xe9"), "not UTF-8"), (folder / "a b\nc", "a line feed"),
        (folder / "\N{SNOWMAN}", "a snowman"), (folder / "new" / "deep" / "out", "in new folders"),
        (folder / "[red]x[/]", "markup"), (folder / "models" / "base" / "out", "inside an input"),
        (folder / "file", "a file"), (folder / "out.partial", "a name of unfinished work"),
    ]  # fmt: skip


def changed_input(scene: Scene) -> Verdict:
    """A killed run; then a weight file changes and keeps its size and time; then the same command."""
    job = scene.pick("compress exact", "compress lossy", "merge", "fold", "factor")
    name = scene.rng.choice([each for each in job.reads if each != "lossy"])
    at = scene.moment(job, WRITING)
    ended = scene.run(job, Calls(scene.folder, WRITING, at))
    file = scene.models.folder / name / "model.safetensors"
    what = f"{job.name}, killed at {at}, {name} changed: {_change(file, scene)}"
    if not ended.killed or not partial_path(scene.out).is_dir() or scene.out.exists():
        return Verdict(EQUAL, f"{job.name}, no work unfinished at call {at}")
    fresh = scene.start(job, None, scene.folder / "fresh").wait()
    ended = scene.run(job)
    if bad := untold(ended.told):
        return Verdict(TRACEBACK, f"{what}: {bad}: {ended.told.err}")
    if ended.told.code and "--restart" in ended.told.err:
        ended = scene.run(job, None, "--restart")
    if ended.told.code != fresh.told.code:
        return Verdict(BLOCKED, f"{what}: {ended.told.err}")
    same = ended.told.code or tree_hashes(scene.out) == tree_hashes(scene.folder / "fresh")
    return Verdict(TAKEN_UP if same else WRONG, what)


def _change(file: Path, scene: Scene) -> str:
    """Another value in some tensor: of all of its bytes, or of one value alone."""
    from deltafold.checkpoint.header import read_header

    stat, data = file.stat(), bytearray(file.read_bytes())
    infos = [info for info in read_header(file)[0].values() if info.n_bytes]
    info = scene.rng.choice(infos)
    whole = scene.rng.random() < 0.7
    start = info.start_bytes
    stop = start + info.n_bytes if whole else start + 2
    for place in range(start, stop, 2):
        data[place] ^= 0x55
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return f"{info.name}{'' if whole else ', one value'}"


def foreign_partial(scene: Scene) -> Verdict:
    """What lies under NAME.partial is of another command, or of another person."""
    job = scene.pick(where=_writes)
    partial = partial_path(scene.out)
    way = scene.rng.choice(
        ("a file", "other files", "another command", "an empty folder", "a link")
    )
    if way == "a file":
        partial.write_text("mine")
    elif way == "other files":
        partial.mkdir()
        (partial / "thesis.txt").write_text("mine")
    elif way == "another command":
        other = scene.pick(where=lambda each: each.writes and each is not job)
        scene.run(other, Calls(scene.folder, WRITING, scene.known.calls[other.name, WRITING] // 2))
    elif way == "an empty folder":
        partial.mkdir()
    else:
        (scene.folder / "elsewhere").mkdir()
        partial.symlink_to(scene.folder / "elsewhere")
    kept = (partial / "thesis.txt").exists()
    ended = scene.run(job)
    what = f"{job.name}, NAME.partial: {way}"
    if (bad := scene.seen(job, ended, what)) is not None:
        return bad
    if kept and not (partial / "thesis.txt").exists():
        return Verdict(WRONG, f"{what}: another's file is gone")
    if ended.told.code == 0:
        return Verdict(EQUAL if scene.fits(job, ended.told) else WRONG, what)
    what += f": {ended.told.err.strip()}"
    if "--restart" in what:
        return scene.again(job, what, REFUSED)
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)
    else:
        partial.unlink()
    return scene.again(job, what, REFUSED)


SPACE = ("no space", "quota", "read-only", "no right", "input/output error")
READ_FAILS = ("input/output error", "open files", "no right")
MEMORY = ("memory", "memory of torch", "memory of a GPU")

KINDS = {
    kind.name: kind
    for kind in (
        Kind("archive harmed", 14, archive),
        Kind("base harmed", 6, base_of_archive),
        Kind("input harmed", 6, inputs),
        Kind("unfinished work harmed", 12, work),
        Kind("cache harmed", 4, cache),
        Kind("killed", 14, kill),
        Kind("interrupted", 3, _effect(EVERY, ("interrupt", "terminate"))),
        Kind("disk full or away", 10, _effect(WRITING, SPACE)),
        Kind("reads fail", 5, _effect(READING, READ_FAILS)),
        Kind("memory runs out", 6, _effect(EVERY, MEMORY)),
        Kind("memory limited", 3, little_memory),
        Kind("two at once", 4, two_at_once),
        Kind("read while written", 3, read_while_written),
        Kind("hostile archive", 6, hostile),
        Kind("odd checkpoint", 12, odd),
        Kind("odd place", 4, odd_place),
        Kind("input changed, time kept", 5, changed_input),
        Kind("another's unfinished work", 3, foreign_partial),
    )
}
