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
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from deltafold.checkpoint import open_checkpoint
from deltafold.checkpoint.noted import save_note, take_up_folder
from deltafold.compressing.job import budget_of
from deltafold.compressing.request import CompressRequest
from deltafold.errors import BudgetError, UsageError
from deltafold.running.devices import identity
from deltafold.running.engine import Step
from deltafold.running.folders import WorkFolder
from deltafold.running.outputs import check_output
from deltafold.running.record import Record, check_record_path, record_path, write_afterwards

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
Make = Callable[[CompressRequest], Record]


def searched(request: CompressRequest, archive_of: Make) -> Record:
    """The archive of a request in which settings or the size are left open. Raises DeltafoldError."""
    _check(request)
    if request.kl_at_most is not None and str(request.calibration) == "none":
        raise UsageError("--kl-at-most measures on text; drop --calibration none.")
    if request.kl_at_most is not None and request.calibration is None:
        request = request.but(calibration="self")
    output = Path(request.output)
    check_output(output, request.overwrite, [request.base, request.finetuned])
    check_record_path(request.record)
    with WorkFolder(output, "candidates") as work:
        search = ArchiveSearch(request, archive_of, work.folder)
        best, tried = (
            search.best() if request.kl_at_most is None else search.below(request.kl_at_most)
        )
        archive, record = search.made(best)
        work.put_in_place(archive, request.overwrite)
    record |= {"archive": str(output), "tried": tried}
    write_afterwards(record, Path(request.record or record_path(output)), output)
    return record


def _check(request: CompressRequest) -> None:
    method, limit = request.method, request.kl_at_most
    known = CANDIDATES.get(method, {})
    if wrong := [name for name in request.open_settings if name not in known]:
        raise UsageError(
            f"{', '.join(wrong)} of {method} cannot be auto; only beta and C of impart and "
            "impart-qt, and bits of dare-qt, can."
        )
    if limit is None:
        return
    if not 0 < limit < math.inf:
        raise UsageError(f"--kl-at-most must be a number above 0, not {limit}.")
    if request.open_settings:
        raise UsageError("--kl-at-most searches the size; give beta, C and bits as numbers.")
    if any(value is not None for value in request.budget):
        raise UsageError("--kl-at-most takes the place of a budget; give one of them.")
    if budget_of(method) is None:
        raise UsageError(f"{method} is exact: its KL is 0 at any size; drop --kl-at-most.")


class ArchiveSearch:
    """Candidates of one command, their archives and scores."""

    def __init__(self, request: CompressRequest, archive_of: Make, folder: Path):
        self.request, self.archive_of, self.folder = request, archive_of, folder

    def best(self) -> tuple[Candidate, list[dict[str, Any]]]:
        """The best of all combinations of open settings, and what was tried."""
        known, names = CANDIDATES[self.request.method], self.request.open_settings
        combinations = [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*(known[name] for name in names))
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
                f"KL {limit:g} cannot be met: at file ratio {LOWEST_RATIO:g} {self.request.method} still has "
                f"{lowest:.3g}; ask for more, or use --method lossless."
            )
        kept = next(each for each in tried if each["settings"]["file_ratio"] == low)
        kept["kept"] = True
        return {"file_ratio": low}, tried

    def made(self, chosen: Candidate) -> tuple[Path, Record]:
        """Archive and record of one candidate; made once, found again when a run goes on."""
        settings = {**self.request.method_settings, **chosen}
        ratio = settings.pop("file_ratio", self.request.file_ratio)
        request = self.request.but(
            method_settings=settings, file_ratio=ratio, kl_at_most=None, tasks=(), overwrite=False,
            record=None,
        )  # fmt: skip
        with open_checkpoint(request.base) as one, open_checkpoint(request.finetuned) as two:
            inputs = [one.fingerprint(), two.fingerprint(), *identity().values()]  # of a GPU
        named_by = json.dumps([inputs, request.settings(), settings], sort_keys=True)
        archive = self.folder / hashlib.sha256(named_by.encode()).hexdigest()[:16]
        if (record := take_up_folder(archive)) is None:
            record = json.loads(json.dumps(self.archive_of(request.but(output=archive))))
            save_note(archive, record)
        return archive, record

    def _scoring(self) -> AbstractContextManager[Score]:
        return (
            nullcontext(_delta_error)
            if self.request.calibration is None or str(self.request.calibration) == "none"
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

    def __init__(self, search: ArchiveSearch):
        self._search = search
        self._open = ExitStack()

    def __enter__(self) -> Score:
        from deltafold.calibration.divergence import Judge
        from deltafold.calibration.gather import Sampling, gather_samples
        from deltafold.calibration.kept import cache_folder
        from deltafold.calibration.stream import StreamedModel, default_memory_bytes

        request = self._search.request
        if request.progress:
            request.progress(Step("reading the fine-tune", "", 0.0, 1.0, 0))
        allowance = request.memory_bytes or default_memory_bytes()
        root = cache_folder(None)
        model = StreamedModel(request.finetuned, memory_bytes=allowance // 2, scratch=root)
        self._open.callback(model.checkpoint.close)
        samples = gather_samples(
            model,
            Sampling(request.calibration or "self", request.samples, request.max_tokens),
            memory_bytes=allowance,
            cache=root,
        )
        self._judge = self._open.enter_context(Judge(model, request.base, samples, allowance))
        return self._score

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _score(self, archive: Path, record: Record) -> tuple[str, float]:
        from deltafold.restoring.load import archive_weights

        with archive_weights(archive, self._search.request.base) as weights:
            return "KL to the fine-tune", self._judge.kl(weights)
