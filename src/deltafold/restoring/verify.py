"""`verify`: is an archive whole, is this its base, and how far is it from the fine-tune?"""

from __future__ import annotations

import math
import threading
from functools import partial
from pathlib import Path
from typing import Any

from deltafold.archive import Archive, Tensor, TensorDigest
from deltafold.checkpoint import Checkpoint, open_checkpoint, tensor_bytes
from deltafold.coding.sums import squared_distance
from deltafold.errors import MismatchError
from deltafold.restoring.decode import (
    check_base_tensor,
    check_codecs,
    check_digest,
    decoded_rows,
)
from deltafold.restoring.ground import fitted_base
from deltafold.restoring.request import VerifyRequest
from deltafold.running.engine import Task, run_tasks
from deltafold.running.front import front
from deltafold.running.memory import Meter
from deltafold.running.record import RECORD_VERSION, Record, machine

TASK_MEMORY_BYTES = 250 << 20


def run_verify(request: VerifyRequest) -> Record:
    """Verify what a request names; see `VerifyRequest`."""
    archive, base, against = request.archive, request.base, request.against
    if against is not None and base is None:
        raise MismatchError("--against compares restored weights; give --base too.")
    results: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()
    with Meter() as meter, Archive(Path(archive)) as opened:
        check_codecs(opened)
        base_checkpoint = open_checkpoint(base) if base is not None else None
        tuned = open_checkpoint(against) if against is not None else None
        if base_checkpoint:
            base_checkpoint = fitted_base(opened, base_checkpoint)
        if tuned:
            _check_same_tensors(opened, tuned)

        def one(tensor: Tensor) -> None:
            if base_checkpoint is None:
                for piece in tensor.pieces:
                    opened.check_parts(tensor, piece)
                found: dict[str, Any] = {}
            else:
                check_base_tensor(opened, tensor, base_checkpoint)
                found = _compare(opened, tensor, base_checkpoint, tuned)
            with lock:
                results[tensor.name] = found

        tasks = [
            Task(
                t.name,
                partial(one, t),
                TASK_MEMORY_BYTES,
                float(math.prod(t.shape)),
                tensors=base_checkpoint is not None,
            )
            for t in opened.manifest.tensors
        ]
        run_tasks("verify", tasks, request.workers, request.memory_bytes, request.progress)
        files = _check_files(opened, base_checkpoint)
    return {
        "record_version": RECORD_VERSION,
        "kind": "verify",
        "archive": str(archive),
        "base": str(base) if base else None,
        "against": str(against) if against else None,
        "tensors_checked": len(results),
        **files,
        **_summary(results),
        "tensors": [{"name": name, **results[name]} for name in sorted(results)],
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "settings": {},
        "machine": machine(),
    }


verify = front("verify", VerifyRequest, run_verify)


def _check_files(archive: Archive, base: Checkpoint | None) -> dict[str, Any]:
    """Every small file, or as much of it as the archive holds; and what else lies in the folder."""
    checked, unchecked = 0, []
    for entry in archive.manifest.files:
        if base is not None:
            archive.side_file(entry, base)
            checked += 1
        elif entry.is_stored and archive.check_side_file(entry):
            checked += 1
        elif entry.is_stored:
            unchecked.append(entry.name)
    return {
        "files_checked": checked,
        "files_unchecked": unchecked,
        "strangers": archive.strangers(),
    }


def _check_same_tensors(archive: Archive, tuned: Checkpoint) -> None:
    for tensor in archive.manifest.tensors:
        found = tuned.tensors.get(tensor.name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            has = f"{found.dtype} {list(found.shape)}" if found else "nothing"
            raise MismatchError(
                f"{tuned.label} is not the fine-tune of {archive.folder}: tensor {tensor.name} is "
                f"{tensor.dtype} {list(tensor.shape)} in the archive, {has} there."
            )


def _compare(
    archive: Archive, tensor: Tensor, base: Checkpoint, tuned: Checkpoint | None
) -> dict[str, Any]:
    """Decode one tensor; it must come back with its digest."""
    digest = TensorDigest(tensor.dtype, tensor.shape)
    wrong = total = 0.0
    for start, rows in decoded_rows(archive, tensor, base):
        digest.update(tensor_bytes(rows))
        if tuned is not None and rows.dtype.is_floating_point:
            true = tuned.rows(tensor.name, start, start + len(rows))
            wrong += squared_distance(true, rows)
            if (
                tensor.base is not None
                and start + len(rows) <= base.tensors[tensor.name].matrix_shape[0]
            ):
                before = base.rows(tensor.name, start, start + len(rows))
                total += squared_distance(true, before)
    exact = digest.identity() == tensor.tuned
    check_digest(archive, tensor, digest)
    found: dict[str, Any] = {"exact": exact}
    if tuned is not None:
        info = tuned.tensors[tensor.name]
        theirs = TensorDigest(info.dtype, info.shape)
        for _, rows in tuned.row_chunks(tensor.name, 16 << 20):
            theirs.update(tensor_bytes(rows))
        if theirs.identity() != tensor.tuned:
            raise MismatchError(
                f"{tuned.label} is not the fine-tune of {archive.folder}: tensor {tensor.name} "
                "differs from the one that was compressed."
            )
        found |= {"wrong_squared": wrong, "delta_squared": total}
    return found


def _summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    compared = [r for r in results.values() if "delta_squared" in r]
    total = sum(r["delta_squared"] for r in compared)
    decoded = [r for r in results.values() if "exact" in r]
    return {
        "tensors_decoded": len(decoded),
        "tensors_exact": sum(r["exact"] for r in decoded),
        "relative_error": math.sqrt(sum(r["wrong_squared"] for r in compared) / total)
        if total
        else (0.0 if compared else None),
    }
