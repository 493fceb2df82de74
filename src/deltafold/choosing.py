"""`compress` with settings left to measurement: `beta="auto"`, `c="auto"`.

Each candidate becomes a real archive of the size asked for; the one whose model stays closest to the
fine-tune on the user's text (KL divergence, no labels needed) is kept. Without text the criterion is
the error of the restored delta, which the weights alone give: a weaker guide (ImPart's section 3
notes that it does not rank methods; here it ranks settings of one method at equal bytes).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

from deltafold.checkpoint import open_checkpoint
from deltafold.errors import DeltafoldError, UsageError
from deltafold.record import Record, record_path, write_record
from deltafold.verbs.compress import compress as compress_verb
from deltafold.verbs.workspace import check_output

# What the paper picks from per model on a validation set (its section 5).
CANDIDATES: dict[str, tuple[float, ...]] = {"beta": (0.6, 0.7, 0.8), "c": (0.5, 1.0)}


def compress(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    method: str = "impart",
    *,
    text: str | Path | None = None,
    **settings: Any,
) -> Record:
    """Compress `finetuned` against `base` into the archive folder `output`; returns the record.

    Args:
        base, finetuned: local Hugging Face folders, safetensors files, or hub ids (`org/name@rev`).
        output: the archive's folder; by convention `NAME.delta`.
        method: a codec's name, see `deltafold methods`.
        text: plain text file on which settings given as "auto" are chosen.
        settings: `file_ratio`, `nominal_ratio` or `n_bytes` (the budget), `seed`, `workers`,
            `memory_bytes`, `overwrite`, `restart`, `fallback`, `progress`, `record` (see
            `deltafold.verbs.compress.compress`), and the method's own, e.g. `beta=0.6, c="auto"`.

    Raises DeltafoldError (see `deltafold.errors`); nothing is left under `output` then.
    """
    open_names = [name for name, value in settings.items() if value == "auto"]
    if not open_names:
        return compress_verb(base, finetuned, output, method, **settings)
    if method != "impart" or not set(open_names) <= set(CANDIDATES):
        raise UsageError(
            f"{', '.join(open_names)} of {method} cannot be auto; that is for beta and C of impart."
        )
    return _choose(base, finetuned, Path(output), method, text, open_names, settings)


def _choose(
    base: str | Path,
    finetuned: str | Path,
    output: Path,
    method: str,
    text: str | Path | None,
    open_names: list[str],
    settings: dict[str, Any],
) -> Record:
    overwrite = settings.pop("overwrite", False)
    destination = Path(settings.pop("record", None) or record_path(output))
    check_output(output, overwrite, [base, finetuned])
    if text is not None and not Path(text).is_file():
        raise UsageError(f"{text} does not exist; give a plain text file to choose settings on.")
    fixed = {name: value for name, value in settings.items() if name not in open_names}
    folder = output.with_name(f"{output.name}.candidates")
    folder.mkdir(parents=True, exist_ok=True)
    tried: list[dict[str, Any]] = []
    try:
        for values in itertools.product(*(CANDIDATES[name] for name in open_names)):
            chosen = dict(zip(open_names, values, strict=True))
            archive, record = _candidate(base, finetuned, folder, method, fixed, chosen)
            criterion, value = _score(base, finetuned, archive, record, text)
            tried.append({"settings": chosen, "criterion": criterion, "value": value})
    except DeltafoldError:
        shutil.rmtree(folder)  # the same command would fail again; after Ctrl-C it goes on
        raise
    best = min(range(len(tried)), key=lambda k: (tried[k]["value"], k))
    archive, record = _candidate(base, finetuned, folder, method, fixed, tried[best]["settings"])
    if overwrite and output.exists():
        shutil.rmtree(output)
    archive.replace(output)
    shutil.rmtree(folder)
    record |= {"archive": str(output), "tried": tried}
    write_record(record, destination)
    return record


def _candidate(
    base: str | Path,
    finetuned: str | Path,
    folder: Path,
    method: str,
    fixed: dict[str, Any],
    chosen: dict[str, float],
) -> tuple[Path, Record]:
    """Archive and record of one candidate; made once, found again when a run goes on."""
    named = {k: v for k, v in fixed.items() if k not in ("progress", "workers", "memory_bytes")}
    with open_checkpoint(base) as one, open_checkpoint(finetuned) as two:
        inputs = [one.fingerprint(), two.fingerprint()]
    identity = json.dumps([inputs, method, named, chosen], sort_keys=True)
    archive = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not (archive.is_dir() and record_path(archive).is_file()):
        shutil.rmtree(archive, ignore_errors=True)
        compress_verb(base, finetuned, archive, method, **(fixed | chosen))
    return archive, json.loads(record_path(archive).read_text())


def _score(
    base: str | Path,
    finetuned: str | Path,
    archive: Path,
    record: Record,
    text: str | Path | None,
) -> tuple[str, float]:
    if text is None:
        rows = [row for row in record["tensors"] if row["relative_error"] is not None]
        wrong = sum((row["relative_error"] * row["delta_norm"]) ** 2 for row in rows)
        total = sum(row["delta_norm"] ** 2 for row in rows)
        return "relative error of the delta", math.sqrt(wrong / total) if total else 0.0
    from deltafold.evaluation import evaluate

    measured = evaluate(finetuned, [archive], base=base, texts=[text])
    candidate = next(model for model in measured["models"] if model["role"] == "candidate")
    return "KL to the fine-tune", float(candidate["metrics"]["kl_text"]["value"])
