"""Writing an archive: payload shards from finished pieces, side files, the manifest last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import zstandard

from deltafold.archive.digest import file_digest
from deltafold.archive.manifest import MANIFEST_FILE, Manifest, PayloadFile, SideFile
from deltafold.archive.reader import FILES_FOLDER, raw_dictionary
from deltafold.checkpoint import Checkpoint
from deltafold.checkpoint.header import build_header
from deltafold.checkpoint.writer import (
    TensorSpec,
    guard_storage,
    plan_shards,
    put_file,
    tensor_bytes,
)
from deltafold.dtypes import stored_bytes
from deltafold.lazy import torch

PAYLOAD_SHARD_BYTES = 1 << 30


def payload_layout(
    parts: list[TensorSpec], shard_bytes: int = PAYLOAD_SHARD_BYTES
) -> list[tuple[str, list[TensorSpec]]]:
    """Payload file names and the parts in each, in order. No parts: no files."""
    groups = list(plan_shards(parts, shard_bytes).values()) if parts else []
    total = len(groups)
    return [
        (f"payload-{index:05d}-of-{total:05d}.safetensors", group)
        for index, group in enumerate(groups, start=1)
    ]


def payload_bytes(parts: list[TensorSpec]) -> int:
    """Exact bytes of the payload files for these parts, headers included."""
    total = 0
    for _, group in payload_layout(parts):
        header, starts = build_header(group, None)
        last = group[-1]
        total += starts[last[0]] + stored_bytes(last[1], last[2]) if starts else len(header)
    return total


def write_payload(
    folder: Path, parts: list[TensorSpec], load: Callable[[str], torch.Tensor]
) -> tuple[PayloadFile, ...]:
    """Write all parts, one in memory at a time; `load(name)` gives a part's tensor."""
    written = []
    for file, group in payload_layout(parts):
        header, _ = build_header(group, None)
        path = folder / file

        def write(
            path: Path = path, header: bytes = header, group: list[TensorSpec] = group
        ) -> None:
            with path.open("wb") as out:
                out.write(header)
                for name, _, _ in group:
                    out.write(tensor_bytes(load(name)))

        guard_storage(path, write)
        written.append(PayloadFile(name=file, n_bytes=path.stat().st_size))
    return tuple(written)


def encode_side_files(
    finetuned: Checkpoint, base: Checkpoint
) -> tuple[tuple[SideFile, ...], dict[str, bytes]]:
    """Manifest entries of the fine-tune's side files, and the frames to store by file name."""
    base_files = {base.relative(file): file for file in base.side_files}
    entries, frames = [], {}
    for file in finetuned.side_files:
        name, data = finetuned.relative(file), finetuned.side_file(file)
        digest = file_digest(data)
        base_data = base.side_file(base_files[name]) if name in base_files else None
        base_digest = file_digest(base_data) if base_data is not None else None
        if digest == base_digest:
            stored = "base"
        else:
            plain = _compress(data, None)
            against = _compress(data, base_data) if base_data else plain
            stored = "zstd-base" if len(against) < len(plain) else "zstd"
            frames[name] = against if stored == "zstd-base" else plain
        entries.append(
            SideFile(
                name=name,
                n_bytes=len(data),
                digest=digest,
                stored=stored,  # type: ignore[arg-type]
                base=base_digest if stored != "zstd" else None,
                frame=file_digest(frames[name]) if stored == "zstd-base" else None,
            )
        )
    return tuple(entries), frames


def _compress(data: bytes, against: bytes | None) -> bytes:
    window_log = max(10, min(27, (len(data) + len(against or b"")).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        12, window_log=window_log, write_content_size=True
    )
    dictionary = raw_dictionary(against) if against else None
    return zstandard.ZstdCompressor(compression_params=parameters, dict_data=dictionary).compress(
        data
    )


def write_side_files(folder: Path, frames: dict[str, bytes]) -> None:
    """Store compressed side files under `files/`."""
    for name, frame in frames.items():
        put_file(folder, f"{FILES_FOLDER}/{name}.zst", frame)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `delta.json`; last, so that a folder with a manifest is a whole archive."""
    path = folder / MANIFEST_FILE
    guard_storage(path, lambda: path.write_text(manifest.to_text(), encoding="utf-8"))
