"""Ranks of a run: by one share, by singular values, or by a search over the split between groups."""

from __future__ import annotations

from typing import Any

import torch

from deltafold.calibration import StreamedModel
from deltafold.calibration.probe import Probe
from deltafold.errors import UsageError
from deltafold.factoring.job import Job
from deltafold.factoring.methods import bolaco, lorc, welore
from deltafold.factoring.methods.units import Ranks, Unit, ranks_for
from deltafold.factoring.parts import MomentsOf, Settings, make_unit, read_matrix
from deltafold.factoring.store import Candidate, Store
from deltafold.running.engine import Progress, Step

Notes = dict[str, Any]


def shared_ranks(job: Job) -> Ranks:
    """Every unit keeps the same share of its parameters."""
    return ranks_for(job.units, job.budget)


def threshold_ranks(job: Job, progress: Progress | None) -> tuple[Ranks, Notes]:
    """WeLore: the threshold, and what lies above it."""
    spectra = _spectra(job, lambda name: None, progress)
    threshold, ranks = welore.threshold_ranks(job.units, spectra, job.budget)
    return ranks, {"threshold": threshold}


def depth_ranks(job: Job, progress: Progress | None) -> tuple[Ranks, Notes]:
    """LoRC: weights by depth, from cumulative condition numbers of the weights."""
    conditions: dict[int, list[float]] = {}
    for unit, values in zip(job.units, _spectra(job, lambda name: None, progress), strict=True):
        conditions.setdefault(unit.blocks[0], []).append(lorc.log_condition(values))
    weights = lorc.schedule(conditions)
    ranks = ranks_for(job.units, job.budget, [weights[unit.blocks[0]] for unit in job.units])
    return ranks, {"weights": [weights[block] for block in sorted(weights)]}


def _spectra(job: Job, moments_of: MomentsOf, progress: Progress | None) -> list[torch.Tensor]:
    """All singular values of every unit (of its first expert, where it has several), descending.

    From the smaller Gram matrix, without vectors.
    """
    found = []
    for number, unit in enumerate(job.units):
        held = read_matrix(job, job.matrices[unit.name]).double()
        gram = held @ held.T if held.shape[0] < held.shape[1] else held.T @ held
        found.append(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt())
        if progress:
            progress(Step("spectra", unit.name, number + 1, len(job.units), 0))
    return found


class Search:
    """Bolaco's search: trials of a split, each judged by perplexity and KL on samples."""

    def __init__(self, job: Job, model: StreamedModel, probe: Probe, reach: Store):
        self.job, self.model, self.probe, self.reach = job, model, probe, reach
        self.groups = bolaco.groups_of(job.units)

    def prepare(self, moments_of: MomentsOf, settings: Settings, progress: Progress | None) -> None:
        """Factors of every unit at the largest rank that saves; trials cut them."""
        for number, unit in enumerate(self.job.units):
            if unit.most and unit.role != bolaco.DENSE and not self.reach.has(number):
                self._reach(number, unit, moments_of, settings)
            if progress:
                progress(Step("reach", unit.name, number + 1, len(self.job.units), 0))

    def _reach(self, number: int, unit: Unit, moments_of: MomentsOf, settings: Settings) -> None:
        made = make_unit(self.job, unit, unit.most, moments_of, settings)
        self.reach.save(number, made.tensors, {})

    def run(self, trials: int, seed: int, progress: Progress | None) -> tuple[Ranks, Notes]:
        """The best split of `trials`, the first of which is the same share for all groups."""
        optuna = _optuna()
        rows: list[dict[str, Any]] = []

        def judge(trial: Any) -> float:
            weights = {
                group: trial.suggest_float(group, bolaco.LOWEST, bolaco.HIGHEST)
                for group in self.groups
            }
            ranks = bolaco.split_ranks(self.job.units, weights, self.job.budget)
            found = self.probe.measure(_Cut(self.job, self.reach, ranks))
            value = bolaco.objective(found["perplexity"], found["kl"])
            shares = bolaco.shares_of(self.job.units, ranks)
            rows.append({"shares": shares, "objective": value,
                         "perplexity": found["perplexity"], "kl": found["kl"]})  # fmt: skip
            if progress:
                progress(Step("search", f"{value:.4g}", len(rows), trials, 0))
            return value

        sampler = optuna.samplers.GPSampler(seed=seed % (1 << 32), n_startup_trials=5)
        study = optuna.create_study(direction="minimize", sampler=sampler)
        study.enqueue_trial(dict.fromkeys(self.groups, 0.6))
        study.optimize(judge, n_trials=trials)
        best = min(range(len(rows)), key=lambda n: (rows[n]["objective"], n))
        weights = study.trials[best].params
        ranks = bolaco.split_ranks(self.job.units, weights, self.job.budget)
        return ranks, {"trials": rows, "chosen": best}


class _Cut(Candidate):
    """A candidate whose factors are the first columns of larger ones."""

    def _weight(self, matrix: Any, expert: int, part: int) -> torch.Tensor:
        number, unit = self._units[matrix.module]
        rank, module = self.ranks[number], matrix.module
        assert self.store is not None
        if matrix.stacked:
            rows = matrix.shape[0] // len(matrix.tensors[expert])
            b = self.store.tensor(f"{module}_delta.b")[expert, part * rows : (part + 1) * rows]
            return (
                b[:, :rank].float() @ self.store.tensor(f"{module}_delta.a")[expert, :rank].float()
            )
        b = self.store.tensor(f"{module}.delta.0.b")[:, :rank].float()
        made = b @ self.store.tensor(f"{unit.name}.delta.0.a")[:rank].float()
        return made.T.contiguous() if matrix.transposed else made


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "bolaco searches with the package optuna (pip install 'deltafold[search]'); install it, "
            "or choose lord."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
