"""`inspect`: what an archive is and holds, from its manifest and headers; decodes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltafold.archive import Archive
from deltafold.checkpoint.store import shown
from deltafold.names import block_of, role_of
from deltafold.restoring.decode import check_codecs
from deltafold.restoring.named import names_of
from deltafold.restoring.request import InspectRequest
from deltafold.restoring.totals import archive_totals, codec_names, tensor_bytes
from deltafold.running.front import front


def run_inspect(request: InspectRequest) -> dict[str, Any]:
    """Sizes, settings, and one row a tensor. Raises ArchiveError."""
    archive = request.archive
    with Archive(Path(archive)) as opened:
        check_codecs(opened)
        manifest, (base, finetuned) = opened.manifest, names_of(opened)
        return {
            "archive": shown(archive),
            "format_version": manifest.format_version,
            "tool_version": manifest.tool_version,
            "method": manifest.method,
            "seed": manifest.seed,
            "budget": dict(manifest.budget),
            "codecs": {name: entry.model_dump() for name, entry in manifest.codecs.items()},
            "base": base,
            "finetuned": finetuned,
            "removed": sorted(manifest.removed),
            "files": [
                {"name": entry.name, "n_bytes": entry.n_bytes, "stored": entry.stored}
                for entry in manifest.files
            ],
            "totals": archive_totals(opened),
            "tensors": [
                {
                    "name": tensor.name,
                    "role": role_of(tensor.name),
                    "block": block_of(tensor.name),
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "codec": codec_names(tensor),
                    "bytes": tensor_bytes(tensor, opened),
                    "error": max(
                        (p.error for p in tensor.pieces if p.error is not None), default=None
                    ),
                    "why": next((p.why for p in tensor.pieces if p.why), None),
                }
                for tensor in manifest.tensors
            ],
        }


inspect = front("inspect", InspectRequest, run_inspect)
