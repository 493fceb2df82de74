"""Numbers of a `share` run searched by Bayesian optimisation (Optuna), short trainings as trials."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deltafold.errors import UsageError
from deltafold.running.record import Record
from deltafold.sharing.methods.replacing import Schedule
from deltafold.sharing.request import ShareRequest
from deltafold.training import Settings
from deltafold.training.processes import Processes

SEARCHED = (
    "rate", "kl_share", "temperature", "replace_from", "replace_until", "replace_stagger", "split",
)  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """What is searched: the loop's, the schedule's, and how ranks are split."""

    settings: Settings
    schedule: Schedule
    request: ShareRequest

    @classmethod
    def of(cls, request: ShareRequest) -> Numbers:
        """As they are asked for."""
        settings = Settings(
            max(1, request.steps), request.rate, request.batch, request.kl_share, request.temperature,
            check_steps=request.check_steps, patience=request.patience,
            earliest_stop=round(request.replace_until * request.steps), seed=request.seed,
        )  # fmt: skip
        return cls(settings, _schedule(request), request)

    def to_json(self) -> Record:
        """The searched ones, for records."""
        return {name: getattr(self.request, name) for name in SEARCHED}

    def changed(self, found: Record) -> Numbers:
        """With numbers that a trial proposes."""
        request = self.request.but(**{name: found[name] for name in SEARCHED})
        settings = replace(
            self.settings,
            rate=request.rate,
            kl_share=request.kl_share,
            temperature=request.temperature,
        )
        return Numbers(settings, _schedule(request), request)


def _schedule(request: ShareRequest) -> Schedule:
    return Schedule(request.replace_from, request.replace_until, request.replace_stagger)


def check_search() -> None:
    """Raises UsageError where Optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UsageError(
            "Searching needs the package optuna: pip install 'deltafold[search]'."
        ) from None


class NumberSearch:
    """A search over numbers of the training, on held-out text, by all processes together.

    `done` are trials of an interrupted run: they are told to the sampler again, which then proposes
    what it would have. `save` keeps the trials so far, `report` is told how many there are and the
    least KL.
    """

    def __init__(
        self,
        processes: Processes,
        done: list[Record],
        save: Callable[[list[Record]], None],
        report: Callable[[int, float], None],
    ):
        self.processes, self.done, self.save, self.report = processes, done, save, report

    def run(
        self, numbers: Numbers, train: Callable[[Numbers], float]
    ) -> tuple[Numbers, list[Record]]:
        """The best of so many trainings as the request asks for, by their KL; and all of them.

        The first trial is what was asked for.
        """
        request, processes = numbers.request, self.processes
        study = _study(request.seed) if processes.is_main else None
        if study is not None:
            study.enqueue_trial(numbers.to_json())
        rows: list[Record] = []
        for number in range(request.trials):
            trial = None if study is None else study.ask()
            found: Record = processes.shared({} if trial is None else _propose(trial))
            kl = processes.shared(self.done[number]["kl"] if number < len(self.done) else None)
            if kl is None:
                short = numbers.changed(found)
                kl = train(
                    replace(short, settings=replace(short.settings, steps=request.steps_of_trial))
                )
            if study is not None:
                study.tell(trial, kl)
            rows.append({"kl": kl, "steps": request.steps_of_trial, **found})
            if processes.is_main:
                self.save(rows)
                self.report(number + 1, min(row["kl"] for row in rows))
        best = min(rows, key=lambda row: row["kl"])
        return numbers.changed(best), rows


def _study(seed: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(seed=seed % (1 << 32), n_startup_trials=6)
    return optuna.create_study(sampler=sampler, direction="minimize")


def _propose(trial: Any) -> Record:
    return {
        "rate": trial.suggest_float("rate", 1e-5, 1e-2, log=True),
        "kl_share": trial.suggest_float("kl_share", 0.0, 1.0),
        "temperature": trial.suggest_float("temperature", 0.5, 8.0, log=True),
        "replace_from": trial.suggest_float("replace_from", 0.0, 1.0),
        "replace_until": trial.suggest_float("replace_until", 0.0, 1.0),
        "replace_stagger": trial.suggest_float("replace_stagger", 0.0, 0.95),
        "split": trial.suggest_float("split", 0.25, 4.0, log=True),
    }
