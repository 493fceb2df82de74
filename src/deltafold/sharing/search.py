"""Numbers of a `share` run searched by Bayesian optimisation (Optuna), short trainings as trials."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deltafold.errors import UsageError
from deltafold.running.record import Record
from deltafold.sharing.methods.plan import Request
from deltafold.sharing.methods.replacing import Schedule
from deltafold.training import Settings
from deltafold.training.processes import Processes


@dataclass(frozen=True)
class Numbers:
    """What is searched: the loop's, the schedule's, and how ranks are split."""

    settings: Settings
    schedule: Schedule
    request: Request

    def to_json(self) -> Record:
        """The searched ones, for records."""
        return {
            "rate": self.settings.rate,
            "kl_share": self.settings.kl_share,
            "temperature": self.settings.temperature,
            "replace_from": self.schedule.start,
            "replace_until": self.schedule.until,
            "replace_stagger": self.schedule.stagger,
            "split": self.request.split,
        }

    def changed(self, found: Record) -> Numbers:
        """With numbers that a trial proposes."""
        return Numbers(
            replace(
                self.settings,
                rate=found["rate"],
                kl_share=found["kl_share"],
                temperature=found["temperature"],
            ),
            Schedule(found["replace_from"], found["replace_until"], found["replace_stagger"]),
            replace(self.request, split=found["split"]),
        )


def check_search() -> None:
    """Raises UsageError where Optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UsageError(
            "Searching needs the package optuna: pip install 'deltafold[search]'."
        ) from None


def search(
    trials: int,
    numbers: Numbers,
    steps: int,
    train: Callable[[Numbers], float],
    *,
    done: list[Record],
    save: Callable[[list[Record]], None],
    report: Callable[[int, float], None],
    processes: Processes,
) -> tuple[Numbers, list[Record]]:
    """The best of `trials` trainings of `steps` steps, by the KL on held-out text; and all of them.

    The first trial is what was asked for. `done` are trials of an interrupted run: they are told to
    the sampler again, which then proposes what it would have.
    """
    study = _study(numbers.settings.seed) if processes.is_main else None
    if study is not None:
        study.enqueue_trial(numbers.to_json())
    rows: list[Record] = []
    for number in range(trials):
        trial = None if study is None else study.ask()
        found: Record = processes.shared({} if trial is None else _propose(trial))
        earlier = processes.shared(done[number]["kl"] if number < len(done) else None)
        short = numbers.changed(found)
        kl = earlier
        if kl is None:
            kl = train(replace(short, settings=replace(short.settings, steps=steps)))
        if study is not None:
            study.tell(trial, kl)
        rows.append({"kl": kl, "steps": steps, **found})
        if processes.is_main:
            save(rows)
            report(number + 1, min(row["kl"] for row in rows))
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
