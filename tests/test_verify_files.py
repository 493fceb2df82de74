"""`verify` without the base: no file of an archive goes unchecked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoints import PairFiles
from command_line import deltafold
from refusals import edit_manifest, refused

from deltafold import restore, verify
from deltafold.archive import read_manifest
from deltafold.errors import ArchiveError

AGAINST_BASE = "config.json.zst"


@pytest.fixture
def frame(archive: Path) -> Path:
    """A stored file that only the base can unpack."""
    entry = next(each for each in read_manifest(archive).files if each.stored == "zstd-base")
    assert f"{entry.name}.zst" == AGAINST_BASE
    return archive / "files" / AGAINST_BASE


def test_every_flipped_bit_of_a_file_against_the_base(archive: Path, frame: Path) -> None:
    sound = frame.read_bytes()
    for at in range(len(sound)):
        frame.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :])
        refused(ArchiveError, lambda: verify(archive), AGAINST_BASE, "damaged", "fetch")
    frame.write_bytes(sound)
    assert verify(archive)["files_checked"] == len(list(frame.parent.iterdir()))


@pytest.mark.parametrize("harm", ["missing", "empty", "longer", "a folder"])
def test_what_else_may_be_wrong_with_it(archive: Path, frame: Path, harm: str) -> None:
    data = frame.read_bytes()
    frame.unlink()
    if harm == "a folder":
        frame.mkdir()
    elif harm != "missing":
        frame.write_bytes(b"" if harm == "empty" else data + b"\0")
    refused(ArchiveError, lambda: verify(archive), AGAINST_BASE, "fetch")


def test_exchanged_files(archive: Path, frame: Path) -> None:
    other = next(file for file in frame.parent.iterdir() if file != frame)
    one, two = frame.read_bytes(), other.read_bytes()
    frame.write_bytes(two)
    other.write_bytes(one)
    refused(ArchiveError, lambda: verify(archive), "damaged")


def older(raw: dict) -> None:
    """As versions before wrote it."""
    raw["format_version"] = 2
    for entry in raw["files"]:
        entry.pop("frame", None)


def test_an_older_archive_says_what_cannot_be_checked(
    archive: Path, frame: Path, pair: PairFiles
) -> None:
    edit_manifest(archive, older)
    assert verify(archive)["files_unchecked"] == ["config.json"]
    told = deltafold("verify", archive)
    assert told.code == 0
    assert "not checked: config.json" in told.out
    assert "give --base" in told.out
    assert verify(archive, pair.base)["files_unchecked"] == []
    frame.unlink()
    refused(ArchiveError, lambda: verify(archive), AGAINST_BASE, "missing")


def test_an_archive_of_today_has_all_digests(archive: Path, pair: PairFiles) -> None:
    edit_manifest(archive, lambda raw: [entry.pop("frame", None) for entry in raw["files"]])
    refused(ArchiveError, lambda: verify(archive, pair.base), "config.json", "frame")


def test_files_of_another_archive_are_named(archive: Path, tmp_path: Path, pair: PairFiles) -> None:
    shutil.copy(archive / "payload-00001-of-00001.safetensors", archive / "payload-x.safetensors")
    (archive / "files" / "a").mkdir()
    (archive / "files" / "a" / "x.json.zst").write_bytes(b"x")
    (archive / "README.md").write_text("a card")
    found = verify(archive)
    assert found["strangers"] == ["files/a/x.json.zst", "payload-x.safetensors"]
    told = deltafold("verify", archive, "--base", pair.base)
    assert told.code == 0
    assert "payload-x.safetensors" in told.out
    restore(archive, pair.base, tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()
