"""Ranks of a run: by one share, by singular values, or by a search over the split between groups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from deltafold.calibration.probe import Probe
from deltafold.errors import UsageError
from deltafold.factoring.job import FactorJob
from deltafold.factoring.methods import bolaco, lorc, welore
from deltafold.factoring.methods.units import Ranks, Unit, ranks_for
from deltafold.factoring.parts import MomentsOf, read_matrix
from deltafold.factoring.store import Candidate, FactorStore
from deltafold.factoring.units import make_and_save
from deltafold.linalg.decomposition import svd_memory_bytes
from deltafold.running.engine import Progress, Resources, Step, Task
from deltafold.running.workspace import Workspace

Notes = dict[str, Any]


def shared_ranks(job: FactorJob) -> Ranks:
    """Every unit keeps the same share of its parameters."""
    return ranks_for(job.units, job.budget)


def threshold_ranks(job: FactorJob, spectra: Sequence[torch.Tensor]) -> tuple[Ranks, Notes]:
    """WeLore: the threshold, and what lies above it. `spectra`: singular values (r,) of each unit."""
    threshold, ranks = welore.threshold_ranks(job.units, spectra, job.budget)
    return ranks, {"threshold": threshold}


def depth_ranks(job: FactorJob, spectra: Sequence[torch.Tensor]) -> tuple[Ranks, Notes]:
    """LoRC: weights by depth, from cumulative condition numbers of the weights.

    `spectra`: singular values (r,) of each unit.
    """
    conditions: dict[int, list[float]] = {}
    for unit, values in zip(job.units, spectra, strict=True):
        conditions.setdefault(unit.blocks[0], []).append(lorc.log_condition(values))
    weights = lorc.schedule(conditions)
    ranks = ranks_for(job.units, job.budget, [weights[unit.blocks[0]] for unit in job.units])
    return ranks, {"weights": [weights[block] for block in sorted(weights)]}


def unit_spectra(job: FactorJob, workspace: Workspace, resources: Resources) -> list[torch.Tensor]:
    """All singular values (r,) of every unit, descending; of its first expert, if it has several."""
    files = [f"spectra/{number:05d}.safetensors" for number in range(len(job.units))]
    tasks = [
        Task(unit.name, partial(_save_spectrum, job, unit, workspace, file), 16 * unit.dense)
        for unit, file in zip(job.units, files, strict=True)
        if not workspace.has(file)
    ]
    resources.run("spectra", tasks)
    return [workspace.load_tensor(file, "values") for file in files]


def _save_spectrum(job: FactorJob, unit: Unit, workspace: Workspace, file: str) -> None:
    """From the smaller Gram matrix, without vectors."""
    held = read_matrix(job, job.matrices[unit.name]).double()
    gram = held @ held.T if held.shape[0] < held.shape[1] else held.T @ held
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    workspace.save_tensors(file, {"values": values.cpu()})


class SplitSearch:
    """Bolaco's search: trials of a split, each judged by perplexity and KL on samples."""

    def __init__(self, job: FactorJob, probe: Probe, reach: FactorStore):
        self.job, self.probe, self.reach = job, probe, reach
        self.groups = bolaco.groups_of(job.units)

    def prepare(self, moments_of: MomentsOf, resources: Resources) -> None:
        """Factors of every unit at the largest rank that saves; trials cut them."""
        tasks = []
        for number, unit in enumerate(self.job.units):
            if unit.most and unit.role != bolaco.DENSE and not self.reach.has(number):
                needed = svd_memory_bytes((sum(unit.rows), unit.columns), unit.most)
                run = partial(make_and_save, self.reach, number, unit.most, moments_of)
                tasks.append(Task(unit.name, run, needed + 40 * unit.dense))
        resources.run("reach", tasks)

    def run(self, progress: Progress | None) -> tuple[Ranks, Notes]:
        """The best of so many splits as are asked for, the first of which is the same share for all groups."""
        optuna, trials, seed = _optuna(), self.job.request.trials, self.job.request.seed
        rows: list[dict[str, Any]] = []

        def judge(trial: Any) -> float:
            weights = {
                group: trial.suggest_float(group, bolaco.LOWEST, bolaco.HIGHEST)
                for group in self.groups
            }
            ranks = bolaco.split_ranks(self.job.units, weights, self.job.budget)
            found = self.probe.measure(CutCandidate(self.job, self.reach, ranks))
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


class CutCandidate(Candidate):
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
