"""`compress` with measurement: settings given as `auto`, `kl_at_most`, scores on tasks.

Each candidate becomes a real archive; its model is compared with the fine-tune on calibration text
(KL divergence of the next token's distribution; no labels, no validation set). Settings: the
candidate of the size asked for with the lowest KL is kept. `kl_at_most`: the smallest archive whose
KL stays below, found by bisection on the file ratio.

Without text, settings are chosen by the error of the restored delta, which the weights alone give: a
weaker guide (ImPart's section 3 notes that it does not rank methods; here it ranks settings of one
method at equal bytes).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from deltafold.checkpoint import open_checkpoint
from deltafold.compressing.compress import compress as compress_verb
from deltafold.compressing.job import budget_of
from deltafold.compressing.scores import check_tasks, compress_scores
from deltafold.errors import BudgetError, DeltafoldError, UsageError
from deltafold.running.devices import computes, identity
from deltafold.running.engine import Step
from deltafold.running.record import Meter, Record, record_path, write_record
from deltafold.running.stored import storable
from deltafold.running.workspace import check_output

# What the papers pick from per model on a validation set.
CANDIDATES: dict[str, dict[str, tuple[float, ...]]] = {
    "impart": {"beta": (0.6, 0.7, 0.8), "c": (0.5, 1.0)},
    "impart-qt": {"beta": (0.6, 0.7, 0.8), "c": (0.5, 1.0)},
    "dare-qt": {"bits": (2, 4, 8)},
}
FIRST_RATIO, LOWEST_RATIO, HIGHEST_RATIO = 32.0, 2.0, 4096.0
RATIO_CLOSE = 1.05  # `kl_at_most` stops when the ratio is known to 5 %

Candidate = dict[str, Any]
Score = Callable[[Path, Record], tuple[str, float]]


@storable
@computes
def compress(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    method: str = "auto",
    *,
    calibration: str | Path | None = None,
    kl_at_most: float | None = None,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    answers: int = 4,
    device: str | None = None,
    **settings: Any,
) -> Record:
    """Compress `finetuned` against `base` into the archive folder `output`; returns the record.

    Args:
        base, finetuned: local Hugging Face folders, safetensors files, or hub ids (`org/name@rev`).
        output: the archive's folder; by convention `NAME.delta`.
        method: a codec's name, see `deltafold methods`.
        calibration: text that shows what errors cost, and on which KL is measured: a JSONL file of
            prompts (and answers), plain text, `datasets:NAME`, `self` (written by the fine-tune),
            `general` (comes with deltafold; what `auto` takes by default) or `none`.
        kl_at_most: instead of a budget: the smallest archive whose KL to the fine-tune, in nats a
            token on the calibration text (default `self`), stays at or below this.
        tasks: files of rows, as `evaluate` takes them, that base, fine-tune and archive answer; at
            most `limit` rows of each. Then the record has `scores`, and what all three wrote to the
            first `answers` rows of each.
        device: where heavy steps compute: `cpu` (default), `cuda`, `cuda:N` or `auto`; tasks are
            answered on `cuda` if there is one.
        settings: `file_ratio`, `nominal_ratio` or `n_bytes` (the budget), `samples`, `max_tokens`,
            `distill`, `seed`, `workers`, `memory_bytes`, `engine`, `overwrite`, `restart`, `fallback`,
            `progress`, `record` (see `deltafold.compressing.compress.compress`), and the method's own,
            e.g. `beta=0.6, c="auto"`.

    Raises DeltafoldError (see `deltafold.errors`); nothing is left under `output` then.
    """
    if not tasks:
        return _searched(base, finetuned, output, method, calibration, kl_at_most, settings)
    check_tasks(tasks, finetuned, limit)
    destination = Path(settings.get("record") or record_path(Path(output)))
    progress = settings.get("progress")
    record = _searched(base, finetuned, output, method, calibration, kl_at_most, settings)
    with Meter() as meter:
        record["scores"] = compress_scores(
            base, finetuned, Path(output), tasks, progress, limit=limit, answers=answers
        )
    record["score_seconds"] = meter.seconds
    write_record(record, destination)
    return record


def _searched(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    method: str,
    calibration: str | Path | None,
    kl_at_most: float | None,
    settings: dict[str, Any],
) -> Record:
    """The archive, what was left open found first."""
    open_names = [name for name, value in settings.items() if value == "auto"]
    if not open_names and kl_at_most is None:
        return compress_verb(base, finetuned, output, method, calibration=calibration, **settings)
    _check(method, open_names, kl_at_most, settings)
    if kl_at_most is not None and str(calibration) == "none":
        raise UsageError("--kl-at-most measures on text; drop --calibration none.")
    if kl_at_most is not None and calibration is None:
        calibration = "self"
    overwrite = settings.pop("overwrite", False)
    destination = Path(settings.pop("record", None) or record_path(Path(output)))
    check_output(Path(output), overwrite, [base, finetuned])
    search = _Search(base, finetuned, Path(output), method, calibration, settings, open_names)
    try:
        best, tried = search.below(kl_at_most) if kl_at_most is not None else search.best()
    except DeltafoldError:
        shutil.rmtree(search.folder, ignore_errors=True)  # the same command would fail again
        raise
    archive, record = search.made(best)
    if overwrite and Path(output).exists():
        shutil.rmtree(output)
    archive.replace(output)
    shutil.rmtree(search.folder)
    record |= {"archive": str(output), "tried": tried}
    write_record(record, destination)
    return record


def _check(
    method: str, open_names: list[str], kl_at_most: float | None, settings: dict[str, Any]
) -> None:
    known = CANDIDATES.get(method, {})
    if wrong := [name for name in open_names if name not in known]:
        raise UsageError(
            f"{', '.join(wrong)} of {method} cannot be auto; that is for beta and C of impart and "
            "impart-qt, and for bits of dare-qt."
        )
    if kl_at_most is None:
        return
    if not 0 < kl_at_most < math.inf:
        raise UsageError(f"--kl-at-most must be a number above 0, not {kl_at_most}.")
    if open_names:
        raise UsageError("--kl-at-most searches the size; give beta, C and bits as numbers.")
    if any(settings.get(name) is not None for name in ("file_ratio", "nominal_ratio", "n_bytes")):
        raise UsageError("--kl-at-most takes the place of a budget; give one of them.")
    if budget_of(method) is None:
        raise UsageError(f"{method} is exact: its KL is 0 at any size; drop --kl-at-most.")


class _Search:
    """Candidates of one command, their archives and scores."""

    def __init__(
        self,
        base: str | Path,
        finetuned: str | Path,
        output: Path,
        method: str,
        calibration: str | Path | None,
        settings: dict[str, Any],
        open_names: list[str],
    ):
        self.base, self.finetuned, self.method = base, finetuned, method
        self.calibration = calibration
        self.open_names = open_names
        self.fixed = {k: v for k, v in settings.items() if k not in open_names}
        self.folder = output.with_name(f"{output.name}.candidates")
        self.folder.mkdir(parents=True, exist_ok=True)

    def best(self) -> tuple[Candidate, list[dict[str, Any]]]:
        """The best of all combinations of open settings, and what was tried."""
        known = CANDIDATES[self.method]
        combinations = [
            dict(zip(self.open_names, values, strict=True))
            for values in itertools.product(*(known[name] for name in self.open_names))
        ]
        tried = []
        with self._scoring() as score:
            for chosen in combinations:
                criterion, value = score(*self.made(chosen))
                tried.append({"settings": chosen, "criterion": criterion, "value": value})
        kept = min(range(len(tried)), key=lambda k: (tried[k]["value"], k))
        tried[kept]["kept"] = True
        return combinations[kept], tried

    def below(self, limit: float) -> tuple[Candidate, list[dict[str, Any]]]:
        """The highest file ratio found whose KL is at most `limit`. Raises BudgetError."""
        tried: list[dict[str, Any]] = []

        with self._scoring() as score:

            def fits(ratio: float) -> bool:
                chosen = {"file_ratio": ratio}
                try:
                    criterion, value = score(*self.made(chosen))
                except BudgetError:  # so small that not even the manifest fits
                    return False
                tried.append({"settings": chosen, "criterion": criterion, "value": value})
                return value <= limit

            low, high = _bracket(fits)
            while low is not None and high is not None and high / low > RATIO_CLOSE:
                middle = float(f"{math.sqrt(low * high):.4g}")
                low, high = (middle, high) if fits(middle) else (low, middle)
        if low is None:
            lowest = min((each["value"] for each in tried), default=math.nan)
            raise BudgetError(
                f"KL {limit:g} cannot be met: at file ratio {LOWEST_RATIO:g} {self.method} still has "
                f"{lowest:.3g}; ask for more, or use --method lossless."
            )
        kept = next(each for each in tried if each["settings"]["file_ratio"] == low)
        kept["kept"] = True
        return {"file_ratio": low}, tried

    def made(self, chosen: Candidate) -> tuple[Path, Record]:
        """Archive and record of one candidate; made once, found again when a run goes on."""
        quiet = ("progress", "workers", "memory_bytes", "engine", "restart")
        named = {k: v for k, v in self.fixed.items() if k not in quiet}
        with open_checkpoint(self.base) as one, open_checkpoint(self.finetuned) as two:
            inputs = [one.fingerprint(), two.fingerprint(), str(self.calibration)]
        inputs += list(identity().values())  # of a GPU
        named_by = json.dumps([inputs, self.method, named, chosen], sort_keys=True)
        archive = self.folder / hashlib.sha256(named_by.encode()).hexdigest()[:16]
        if not (archive.is_dir() and record_path(archive).is_file()):
            shutil.rmtree(archive, ignore_errors=True)
            compress_verb(
                self.base,
                self.finetuned,
                archive,
                self.method,
                calibration=self.calibration,
                **(self.fixed | chosen),
            )
        return archive, json.loads(record_path(archive).read_text())

    def _scoring(self) -> AbstractContextManager[Score]:
        return (
            nullcontext(_delta_error)
            if self.calibration is None or str(self.calibration) == "none"
            else _Scorer(self)
        )


def _bracket(fits: Callable[[float], bool]) -> tuple[float | None, float | None]:
    """(a ratio that fits, one that does not), a factor of two apart; None where there is none."""
    ratio = FIRST_RATIO
    if fits(ratio):
        while ratio < HIGHEST_RATIO:
            if not fits(2 * ratio):
                return ratio, 2 * ratio
            ratio *= 2
        return ratio, None
    while ratio > LOWEST_RATIO:
        ratio /= 2
        if fits(ratio):
            return ratio, 2 * ratio
    return None, ratio


def _delta_error(archive: Path, record: Record) -> tuple[str, float]:
    rows = [row for row in record["tensors"] if row["relative_error"] is not None]
    wrong = sum((row["relative_error"] * row["delta_norm"]) ** 2 for row in rows)
    total = sum(row["delta_norm"] ** 2 for row in rows)
    return "relative error of the delta", math.sqrt(wrong / total) if total else 0.0


class _Scorer:
    """KL to the fine-tune on the calibration text, one block in memory at a time."""

    def __init__(self, search: _Search):
        self._search = search
        self._open = ExitStack()

    def __enter__(self) -> Score:
        from deltafold.calibration.divergence import Judge
        from deltafold.calibration.gather import gather_samples
        from deltafold.calibration.kept import cache_folder
        from deltafold.calibration.stream import StreamedModel, default_memory_bytes

        search, fixed = self._search, self._search.fixed
        if progress := fixed.get("progress"):
            progress(Step("reading the fine-tune", "", 0.0, 1.0, 0))
        allowance = fixed.get("memory_bytes") or default_memory_bytes()
        root = cache_folder(None)
        model = StreamedModel(search.finetuned, memory_bytes=allowance // 2, scratch=root)
        self._open.callback(model.checkpoint.close)
        samples = gather_samples(
            model,
            search.calibration or "self",
            samples=fixed.get("samples", 128),
            max_tokens=fixed.get("max_tokens", 256),
            memory_bytes=allowance,
            cache=root,
        )
        self._judge = self._open.enter_context(Judge(model, search.base, samples, allowance))
        return self._score

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _score(self, archive: Path, record: Record) -> tuple[str, float]:
        from deltafold.restoring.load import archive_weights

        with archive_weights(archive, self._search.base) as weights:
            return "KL to the fine-tune", self._judge.kl(weights)
