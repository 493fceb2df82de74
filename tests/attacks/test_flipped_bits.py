"""One flipped bit anywhere in an archive: refused, or restored as if nothing were.

Never other weights, never an error of another kind than ours.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import PairFiles, tree_hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import nothing_left

from deltafold import compress, inspect, restore, verify
from deltafold.archive import Archive
from deltafold.errors import DeltafoldError
from deltafold.running.record import record_path

METHODS = ("impart", "lowrank", "dare", "magnitude", "lossless", "sparse-patch")


@dataclass
class Whole:
    """Sound archives by method, and the hashes of what they restore to."""

    base: Path
    archives: dict[str, Path]
    hashes: dict[str, dict[str, str]]
    folder: Path


@pytest.fixture(scope="module")
def whole(_template: PairFiles, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    made = Whole(_template.base, {}, {}, folder)
    for method in METHODS:
        exact = method in ("lossless", "sparse-patch")
        made.archives[method] = folder / f"{method}.delta"
        budget = {} if exact else {"file_ratio": 8}
        compress(_template.base, _template.finetuned, made.archives[method], method, **budget)
        restore(made.archives[method], made.base, folder / method)
        made.hashes[method] = tree_hashes(folder / method)
    return made


def flip(file: Path, position: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def header_length(payload: Path) -> int:
    return 8 + int.from_bytes(payload.read_bytes()[:8], "little")


def region(archive: Path, name: str) -> tuple[Path, range]:
    """A file of the archive and the positions in it that the region covers."""
    payload = archive / "payload-00001-of-00001.safetensors"
    if name == "manifest":
        file = archive / "delta.json"
        return file, range(file.stat().st_size)
    if name == "payload header":
        return payload, range(header_length(payload))
    if name == "payload data":
        return payload, range(header_length(payload), payload.stat().st_size)
    file = archive / "files" / name
    return file, range(file.stat().st_size)


def check_refused_or_same(whole: Whole, method: str, damaged: Path) -> bool:
    """True if the damage was refused."""
    out = whole.folder / "out"
    try:
        restore(damaged, whole.base, out)
    except DeltafoldError as error:
        assert "\n" not in str(error)
        nothing_left(out)
        return True
    same = tree_hashes(out) == whole.hashes[method]
    shutil.rmtree(out)
    record_path(out).unlink()
    assert same, "a flipped bit gave another restore"
    return False


@pytest.mark.parametrize(
    "name",
    ["manifest", "payload header", "payload data", "config.json.zst", "chat_template.jinja.zst"],
)
@pytest.mark.parametrize("method", ["impart", "lossless"])
def test_restore_after_one_flipped_bit(whole: Whole, method: str, name: str) -> None:
    damaged = whole.folder / "damaged.delta"
    refusals = []

    @given(at=st.integers(0, 10**9), bit=st.integers(0, 7))
    @settings(max_examples=20, deadline=None)
    def attack(at: int, bit: int) -> None:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(whole.archives[method], damaged)
        file, positions = region(damaged, name)
        flip(file, positions[at % len(positions)], bit)
        refusals.append(check_refused_or_same(whole, method, damaged))

    attack()
    if not name.endswith(".zst"):  # a frame has bits that mean nothing
        assert all(refusals)


@pytest.mark.parametrize("method", METHODS)
def test_one_flipped_bit_in_each_part(whole: Whole, method: str, tmp_path: Path) -> None:
    """Every part of every codec: the first byte, and one in the middle."""
    with Archive(whole.archives[method]) as archive:
        infos = [info for s in set(archive._payload.values()) for info in s.tensors.values()]
    assert infos
    for number, info in enumerate(info for info in infos if info.n_bytes):
        damaged = shutil.copytree(whole.archives[method], tmp_path / str(number))
        flip(damaged / info.file.name, info.start_bytes + (number % 2) * info.n_bytes // 2, 3)
        with pytest.raises(DeltafoldError, match=f"{info.name} in .* is damaged"):
            verify(damaged)
        shutil.rmtree(damaged)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["manifest", "payload header"])
def test_every_byte_that_opening_reads(whole: Whole, name: str, tmp_path: Path) -> None:
    """One bit of every byte of manifest and payload header: refused when opened."""
    damaged = shutil.copytree(whole.archives["impart"], tmp_path / "damaged.delta")
    file, positions = region(damaged, name)
    sound = file.read_bytes()
    with file.open("r+b", buffering=0) as held:

        def put(position: int, byte: int) -> None:
            held.seek(position)
            held.write(bytes([byte]))

        for position in positions:
            put(position, sound[position] ^ 1 << position % 8)
            with pytest.raises(DeltafoldError):
                inspect(damaged)
            put(position, sound[position])
    inspect(damaged)  # whole again: each refusal was of one byte


def test_truncated_and_missing_files(whole: Whole, tmp_path: Path) -> None:
    archive = whole.archives["impart"]
    for number, file in enumerate(sorted(archive.rglob("*"))):
        if not file.is_file():
            continue
        damaged = shutil.copytree(archive, tmp_path / str(number))
        victim = damaged / file.relative_to(archive)
        victim.write_bytes(victim.read_bytes()[:-3])
        assert check_refused_or_same(whole, "impart", damaged)
        victim.write_bytes(b"")
        assert check_refused_or_same(whole, "impart", damaged)
        victim.unlink()
        assert check_refused_or_same(whole, "impart", damaged)


def test_parts_of_two_archives_do_not_mix(whole: Whole, tmp_path: Path) -> None:
    """Payload of one seed, manifest of another: sizes agree, checksums do not."""
    mixed = tmp_path / "mixed.delta"
    tuned = whole.base.parent / "finetuned"
    compress(whole.base, tuned, mixed, "impart", file_ratio=8, seed=1)
    shutil.copy(whole.archives["impart"] / "delta.json", mixed / "delta.json")
    assert check_refused_or_same(whole, "impart", mixed)
