"""Archives that were edited by someone who knows the format, and things that are no archives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from checkpoints import PairFiles
from refusals import edit_manifest, nothing_left, refused, tensor_entry

from deltafold import inspect, restore, verify
from deltafold.errors import ArchiveError, MismatchError, StorageError
from deltafold.restoring.load import load_state

QUERY = "model.layers.1.self_attn.q_proj.weight"
HUGE = 10**12
Change = Callable[[dict[str, Any]], None]


def change_tensor(name: str, /, **fields: Any) -> Change:
    return lambda raw: tensor_entry(raw, name).update(fields)


def change_piece(name: str, /, **fields: Any) -> Change:
    return lambda raw: tensor_entry(raw, name)["pieces"][0].update(fields)


def change_settings(name: str, /, **fields: Any) -> Change:
    return lambda raw: tensor_entry(raw, name)["pieces"][0]["settings"].update(fields)


def change_file(index: int, /, **fields: Any) -> Change:
    return lambda raw: raw["files"][index].update(fields)


def copy_tensor(raw: dict[str, Any]) -> None:
    raw["tensors"].append(raw["tensors"][0])


# what is edited -> words that the one sentence must hold
EDITS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "newer format": (lambda raw: raw.update(format_version=4), ("version 4", "upgrade")),
    "format is text": (lambda raw: raw.update(format_version="x"), ("format_version",)),
    "another format": (lambda raw: raw.update(format="zip"), ("not a deltafold manifest",)),
    "newer codec": (
        lambda raw: raw["codecs"]["impart"].update(version=99),
        ("version 99", "impart", "upgrade"),
    ),
    "unknown codec": (
        lambda raw: raw["codecs"].update(future={"version": 1}),
        ("'future'", "upgrade"),
    ),
    "codec not listed": (lambda raw: raw["codecs"].pop("impart"), ("impart", "not listed")),
    "codec of another kind": (change_piece(QUERY, codec="lossless"), (QUERY,)),
    "lossy codec swapped": (
        lambda raw: (
            raw["codecs"].update(lowrank={"version": 1, "config": {}}),
            change_piece(QUERY, codec="lowrank")(raw),
        ),
        (QUERY,),
    ),
    "config out of bounds": (
        lambda raw: raw["codecs"]["impart"]["config"].update(beta=7),
        ("beta",),
    ),
    "config unknown": (lambda raw: raw["codecs"]["impart"]["config"].update(x=7), ("'x'",)),
    "payload escapes": (
        lambda raw: raw["payload"][0].update(name="../payload-00001-of-00001.safetensors"),
        ("payload.0.name",),
    ),
    "payload missing": (
        lambda raw: raw["payload"][0].update(name="payload-00002-of-00002.safetensors"),
        ("payload-00002-of-00002.safetensors", "missing"),
    ),
    "payload twice": (lambda raw: raw["payload"].append(raw["payload"][0]), ("twice",)),
    "payload dropped": (lambda raw: raw.update(payload=[]), ("lacks part",)),
    "side file escapes": (change_file(0, name="../../evil.json"), ("files.0.name",)),
    "side file absolute": (change_file(0, name="/tmp/evil.json"), ("files.0.name",)),
    "side file hidden": (change_file(0, name=".bashrc"), ("files.0.name",)),
    "side file escapes from a folder": (change_file(0, name="a/../../x.json"), ("files.0.name",)),
    "side file in no folder": (change_file(0, name="a//x.json"), ("files.0.name",)),
    "side file in a hidden folder": (change_file(0, name=".git/hooks"), ("files.0.name",)),
    "side file hidden in a folder": (change_file(0, name="a/.netrc"), ("files.0.name",)),
    "side file on a drive": (change_file(0, name="C:/x.json"), ("files.0.name",)),
    "side file with a backslash": (change_file(0, name="..\\x.json"), ("files.0.name",)),
    "side file too deep": (change_file(0, name="a/" * 8 + "x"), ("files.0.name",)),
    "side file with a line feed": (change_file(0, name="a\n/x.json"), ("files.0.name",)),
    "side file is a folder": (
        lambda raw: (
            change_file(0, name="a")(raw),
            change_file(1, name="a/b")(raw),
        ),
        ("a is a file and a folder",),
    ),
    "side file over a weight folder": (
        lambda raw: (
            change_file(0, name="Sub")(raw),
            raw["finetuned"].update(files=["model.safetensors", "sub/model.safetensors"]),
        ),
        ("sub is a file and a folder",),
    ),
    "side file would be read for weights": (
        change_file(0, name="sub/diffusion_pytorch_model.safetensors"),
        ("pass for weights",),
    ),
    "side file is a pickle": (change_file(0, name="pytorch_model.bin"), ("pass for weights",)),
    "side file is the index in capitals": (
        change_file(0, name="MODEL.safetensors.index.json"),
        ("pass for weights",),
    ),
    "side file twice": (lambda raw: raw["files"].append(raw["files"][0]), ("listed twice",)),
    "side file is the weights": (change_file(0, name="model.safetensors"), ("listed twice",)),
    "weights are the index": (
        lambda raw: raw["finetuned"].update(files=["model.safetensors.index.json"]),
        ("listed twice",),
    ),
    "weight file escapes": (
        lambda raw: raw["finetuned"].update(files=["../model.safetensors"]),
        ("finetuned.files.0",),
    ),
    "weight file escapes from a folder": (
        lambda raw: raw["finetuned"].update(files=["a/../../model.safetensors"]),
        ("finetuned.files.0",),
    ),
    "weight file absolute": (
        lambda raw: raw["finetuned"].update(files=["/tmp/model.safetensors"]),
        ("finetuned.files.0",),
    ),
    "tensor not named after its folder": (
        lambda raw: raw["finetuned"].update(files=["sub/model.safetensors"]),
        ("folder of its file",),
    ),
    "weight file twice": (
        lambda raw: raw["finetuned"].update(files=["a.safetensors", "a.safetensors"]),
        ("listed twice",),
    ),
    "weight file not listed": (change_tensor(QUERY, file=3), (QUERY, "not listed")),
    "negative size": (change_tensor(QUERY, shape=[-64, 64]), ("shape",)),
    "size beyond all disks": (change_tensor(QUERY, shape=[1 << 60, 64]), ("shape",)),
    "counterpart before its version": (
        lambda raw: (
            raw.update(format_version=1),
            change_tensor(QUERY, counterpart=[{"name": QUERY, "rows": [0, 64]}])(raw),
        ),
        ("version 1", "counterpart"),
    ),
    "counterpart ends before it starts": (
        change_tensor(QUERY, counterpart=[{"name": QUERY, "rows": [64, 0]}]),
        (QUERY, "counterpart"),
    ),
    "unknown dtype": (change_tensor(QUERY, dtype="F17"), (QUERY, "'F17'")),
    "tensor twice": (copy_tensor, ("listed twice",)),
    "reserved name": (change_tensor(QUERY, name="__metadata__"), ("__metadata__",)),
    "pieces overlap": (
        lambda raw: tensor_entry(raw, QUERY)["pieces"].append({"codec": "skip", "rows": [0, 64]}),
        (QUERY, "follow one another"),
    ),
    "pieces leave a gap": (change_piece(QUERY, rows=[0, 32]), (QUERY, "cover")),
    "no base for a delta": (lambda raw: tensor_entry(raw, QUERY).pop("base"), (QUERY, "base")),
    "delta without reference": (change_piece(QUERY, reference="none"), (QUERY, "base")),
    "twin unknown": (change_tensor(QUERY, same_as="nothing", pieces=[]), (QUERY, "nothing")),
    "twin of itself": (change_tensor(QUERY, same_as=QUERY, pieces=[]), (QUERY, "no twin")),
    "twin of another shape": (
        change_tensor(QUERY, same_as="lm_head.weight", pieces=[]),
        (QUERY, "lm_head.weight"),
    ),
    "settings missing": (change_piece(QUERY, settings={}), (QUERY,)),
    "settings absurd": (change_settings(QUERY, active=HUGE, kept_u=HUGE), (QUERY,)),
    "settings negative": (change_settings(QUERY, kept_u=-1), (QUERY,)),
    "settings are text": (change_settings(QUERY, kept_u="many"), (QUERY,)),
    "settings infinite": (change_settings(QUERY, kept_u=float("inf")), ("kept_u",)),
    "part renamed": (
        lambda raw: tensor_entry(raw, QUERY)["pieces"][0]["parts"].update(w="0" * 16),
        ("lacks part", QUERY),
    ),
    "part escapes": (
        lambda raw: tensor_entry(raw, QUERY)["pieces"][0]["parts"].update({"../x": "0" * 16}),
        ("parts",),
    ),
    "part unnamed": (lambda raw: tensor_entry(raw, QUERY)["pieces"][0]["parts"].pop("u"), (QUERY,)),
    "checksum of a part": (
        lambda raw: tensor_entry(raw, QUERY)["pieces"][0]["parts"].update(u="0" * 16),
        (f"{QUERY}::u", "damaged"),
    ),
    "restored to something else": (
        change_tensor(QUERY, restored="0" * 16),
        (QUERY, "other values", "verify"),
    ),
    "restored left out": (lambda raw: tensor_entry(raw, QUERY).pop("restored"), (QUERY, "digest")),
    "restored of what is exact": (
        change_tensor("model.norm.weight", restored="0" * 16),
        ("model.norm.weight", "exact"),
    ),
    "restored in an older format": (lambda raw: raw.update(format_version=1), ("restored",)),
    "unknown field": (lambda raw: raw.update(pickle="cos"), ("pickle",)),
    "seed negative": (lambda raw: raw.update(seed=-1), ("seed",)),
    "tensors are text": (lambda raw: raw.update(tensors="all"), ("tensors",)),
}


@pytest.mark.parametrize("case", EDITS)
def test_edited_manifest(archive: Path, pair: PairFiles, tmp_path: Path, case: str) -> None:
    change, names = EDITS[case]
    edit_manifest(archive, change)
    out = tmp_path / "restored"
    refused(ArchiveError, lambda: restore(archive, pair.base, out), str(archive), *names)
    nothing_left(out)
    refused(ArchiveError, lambda: verify(archive, pair.base), *names)
    refused(ArchiveError, lambda: load_state(archive, pair.base), *names)


def test_an_edit_without_the_checksum_is_noticed(archive: Path, pair: PairFiles) -> None:
    manifest = archive / "delta.json"
    text = manifest.read_text()
    assert '"seed":0' in text
    manifest.write_text(text.replace('"seed":0', '"seed":1'))
    refused(ArchiveError, lambda: verify(archive), "delta.json", "checksum")


def test_exact_tensor_that_comes_back_otherwise(lossless_archive: Path, pair: PairFiles) -> None:
    """The digest of the fine-tune's tensor is the last word on what is exact."""
    edit_manifest(lossless_archive, change_tensor(QUERY, tuned="0" * 32))
    out = lossless_archive.parent / "restored"
    refused(
        ArchiveError, lambda: restore(lossless_archive, pair.base, out), QUERY, "stored exactly"
    )
    nothing_left(out)
    refused(ArchiveError, lambda: load_state(lossless_archive, pair.base), QUERY)
    refused(ArchiveError, lambda: verify(lossless_archive, pair.base), QUERY)


@pytest.mark.parametrize("rows", [HUGE, 1 << 22])
def test_new_rows_that_no_archive_could_hold(
    lossless_archive: Path, pair: PairFiles, rows: int
) -> None:
    """A tensor of its own (no base to compare with) that promises terabytes."""

    def grow(raw: dict[str, Any]) -> None:
        entry = tensor_entry(raw, QUERY)
        del entry["base"]
        entry["shape"] = [rows, 64]
        entry["pieces"][0]["reference"] = "none"

    edit_manifest(lossless_archive, grow)
    out = lossless_archive.parent / "restored"
    refused(ArchiveError, lambda: restore(lossless_archive, pair.base, out), QUERY, "absurdly")
    refused(ArchiveError, lambda: load_state(lossless_archive, pair.base), QUERY, "absurdly")
    nothing_left(out)


@pytest.mark.parametrize(
    ("name", "shape", "of_base"),
    [
        ("lm_head.weight", [513, 64], [512, 64]),
        ("lm_head.weight", [HUGE, 64], [512, 64]),
        (QUERY, [HUGE, 64], [64, 64]),
        (QUERY, [32, 128], [64, 64]),
    ],
)
def test_a_shape_that_the_base_does_not_have(
    archive: Path, pair: PairFiles, name: str, shape: list[int], of_base: list[int]
) -> None:
    edit_manifest(archive, change_tensor(name, shape=shape))
    out = archive.parent / "restored"
    for action in (
        lambda: restore(archive, pair.base, out),
        lambda: load_state(archive, pair.base),
        lambda: verify(archive, pair.base),
    ):
        refused(MismatchError, action, name, str(of_base))
    nothing_left(out)


def test_restore_larger_than_the_disk(
    archive: Path, pair: PairFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltafold.running import outputs

    class Full:
        free = 1000

    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: Full)
    out = archive.parent / "restored"
    refused(StorageError, lambda: restore(archive, pair.base, out), str(out), "GB free")
    nothing_left(out)


def test_compressed_bomb_in_a_side_file(archive: Path, pair: PairFiles) -> None:
    """A frame that unpacks to a gigabyte where the manifest promises little: never unpacked."""
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    (archive / "files" / "chat_template.jinja.zst").write_bytes(bomb)
    out = archive.parent / "restored"
    refused(ArchiveError, lambda: restore(archive, pair.base, out), "chat_template.jinja")
    nothing_left(out)
    refused(ArchiveError, lambda: verify(archive), "chat_template.jinja")


def test_side_file_that_promises_a_bomb(archive: Path, pair: PairFiles) -> None:
    edit_manifest(
        archive,
        lambda raw: next(
            entry for entry in raw["files"] if entry["name"] == "chat_template.jinja"
        ).update(n_bytes=1 << 40),
    )
    refused(ArchiveError, lambda: verify(archive, pair.base), "chat_template.jinja")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_side_file_of_the_base_changed(archive: Path, pair: PairFiles, name: str) -> None:
    (pair.base / name).write_text("{}")
    out = archive.parent / "restored"
    refused(ArchiveError, lambda: restore(archive, pair.base, out), name, "base")
    nothing_left(out)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "\0\0", "[" * 200_000, '{"format": 1e999}', "9" * 5000]
)
def test_manifest_that_is_none(archive: Path, text: str) -> None:
    (archive / "delta.json").write_text(text)
    refused(ArchiveError, lambda: inspect(archive), "delta.json")


def test_not_an_archive(pair: PairFiles, tmp_path: Path) -> None:
    for folder in (pair.base, tmp_path / "nowhere", pair.base / "config.json"):
        for action in (inspect, verify):
            refused(ArchiveError, lambda a=action, f=folder: a(f), str(folder), "not an archive")


def test_payload_that_no_tensor_names(archive: Path) -> None:
    edit_manifest(
        archive,
        lambda raw: tensor_entry(raw, QUERY).update(pieces=[{"codec": "skip"}], restored=None),
    )
    refused(ArchiveError, lambda: inspect(archive), QUERY, "no tensor names")


def test_edits_that_fit_are_read(archive: Path) -> None:
    """The refusals above are due to the edits, not to the editing."""
    edit_manifest(archive, lambda raw: raw["finetuned"].update(label="renamed"))
    assert inspect(archive)["finetuned"] == "renamed"
    assert json.loads((archive / "delta.json").read_text())["finetuned"]["label"] == "renamed"
