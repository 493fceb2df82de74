"""One `share` run from its plan to the values that are written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deltafold.blocks.structure import Structure
from deltafold.calibration import Sample, calibrate, gather_samples
from deltafold.calibration.building import find_blocks
from deltafold.composed.write import Source
from deltafold.running.engine import Progress, Step
from deltafold.running.record import Record
from deltafold.running.workspace import Workspace
from deltafold.sharing.fit import fit
from deltafold.sharing.methods.plan import DELTA, Place, Plan, make_plan
from deltafold.sharing.search import Numbers, search
from deltafold.sharing.start import FIT, Start
from deltafold.sharing.train import Model, quality, rounded, set_values, whole_quality
from deltafold.training import Processes, Rows, Settings, State, exam, forward_tokens, pack, train

OWN_TEXT = "self"
OWN_SAMPLES, ALL_SAMPLES = 256, 1_000_000
CALIBRATION_SAMPLES, FIT_TOKENS = 128, 16_384
STATE, TRIALS = "training.safetensors", "trials.json"
COST_ROWS = 8  # held-out rows on which the placement `searched` judges a block


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Texts:
    """Where text comes from: to train on, and to measure on."""

    train: str | Path | None
    measure: str | Path | None
    samples: int | None
    max_tokens: int


class Run:
    """After `do`: `plan`, `values` of the factors, and `changed`, other parameters that moved."""

    plan: Plan

    def __init__(
        self,
        structure: Structure,
        source: Source,
        numbers: Numbers,
        texts: Texts,
        settings: Record,
        workspace: Workspace | None,
        processes: Processes,
        workers: int | None,
        memory_bytes: int | None,
        progress: Progress | None,
    ):
        self.structure, self.source, self.numbers, self.texts = structure, source, numbers, texts
        self.settings, self.workspace, self.processes = settings, workspace, processes
        self.workers, self.memory_bytes = workers, memory_bytes
        self.progress = progress if processes.is_main else None
        self.device = processes.device()
        self.values: dict[str, torch.Tensor] = {}
        self.changed: dict[str, torch.Tensor] = {}
        self._model: Model | None = None

    @property
    def steps(self) -> int:
        return int(self.settings["steps"])

    @property
    def model(self) -> Model:
        """The model in memory, loaded when it is first needed."""
        if self._model is None:
            folder = self.source.checkpoint.path
            self._model = Model.load(
                folder, self.settings["bf16"], self.device, self.settings["recompute"]
            )
        return self._model

    def do(self) -> Record:
        """Everything but writing; what the record says of it."""
        rows = self._rows(self._train_text()) if self._wants_text() else None
        learn, held = rows.split(self.numbers.settings.seed) if rows is not None else (None, None)
        judged = held
        if self.texts.measure is not None:
            judged = self._rows(self.texts.measure)
        costs = None
        if self.numbers.request.placement == "searched":
            assert held is not None
            costs = self._costs(held.chosen(range(min(COST_ROWS, len(held)))))
        found: Record = {}
        if self.settings["search"] and learn is not None and held is not None:
            found["search"] = self._search(costs, learn, held)
        self.plan = make_plan(self.structure, self.numbers.request, costs)
        self.values, self.changed = self._start(self.plan)
        if self.settings["start"] == FIT:
            self.values |= self._fitted(self.plan, learn)
        if costs is not None:
            found["costs"] = [{"block": block, "kl": kl} for block, kl in sorted(costs.items())]
        if judged is not None:
            found |= self._trained(learn, held, judged)
        if rows is not None and learn is not None and held is not None:
            found["text"] = {
                "source": str(self._train_text()), "rows": len(rows), "tokens": rows.tokens,
                "held_out_rows": len(held), "row_tokens": rows.ids.shape[1],
                "tokens_trained": self.steps * self.numbers.settings.batch_rows * rows.ids.shape[1],
            }  # fmt: skip
        return found | {"numbers": self.numbers.to_json()}

    # --- text ---------------------------------------------------------------------------------

    def _wants_text(self) -> bool:
        return self.steps > 0 or self.numbers.request.placement == "searched"

    def _train_text(self) -> str | Path:
        return OWN_TEXT if self.texts.train is None else self.texts.train

    def _rows(self, source: str | Path, most: int | None = None) -> Rows:
        """Rows of a text, of `most` samples if that is given."""
        samples = most or self.texts.samples
        if samples is None:
            samples = OWN_SAMPLES if str(source) == OWN_TEXT else ALL_SAMPLES
        found: list[Sample] = []
        if self.processes.is_main:
            found = gather_samples(
                self.source.checkpoint.path,
                source,
                samples=samples,
                max_tokens=self.texts.max_tokens,
                seed=self.numbers.settings.seed,
                memory_bytes=self.memory_bytes,
            )
        return pack(self.processes.shared(found), self.texts.max_tokens)

    # --- start --------------------------------------------------------------------------------

    def _start(self, plan: Plan) -> tuple[Tensors, Tensors]:
        """(factors, biases that moved with their neurons), made by the main process for all."""
        found: tuple[Tensors, Tensors] = ({}, {})
        if self.processes.is_main:
            start = self._starter(plan)
            found = (start.factors(self.workers, self.memory_bytes, self.progress), start.changed)
        return self.processes.shared(found)

    def _starter(self, plan: Plan) -> Start:
        calibration = None
        how = self.settings["start"]
        if how in ("activation", FIT):
            calibration = calibrate(
                self.source.checkpoint.path,
                self._calibration_text(),
                samples=CALIBRATION_SAMPLES,
                max_tokens=self.texts.max_tokens,
                seed=self.numbers.settings.seed,
                memory_bytes=self.memory_bytes,
                progress=self.progress,
            )
        return Start(
            self.source, plan, "activation" if how == FIT else how,
            self.settings["align"] and plan.request.method in (DELTA, "tie"),
            calibration, self.numbers.settings.seed,
        )  # fmt: skip

    def _calibration_text(self) -> str | Path:
        return "pages" if self.texts.train is None else self.texts.train

    def _fitted(self, plan: Plan, learn: Rows | None) -> Tensors:
        """Values of what writes, fitted to the original's outputs by the main process.

        Never on held-out rows: those could not tell then whether training gains.
        """
        rows = learn
        if rows is None:
            rows = self._rows(self._calibration_text(), CALIBRATION_SAMPLES)
        rows = rows.chosen(range(min(len(rows), max(1, FIT_TOKENS // rows.ids.shape[1]))))
        found: Tensors = {}
        if self.processes.is_main:
            student = self.model.student(
                plan, self.values, self.changed, self.numbers.schedule, 1, 0
            )
            blocks, _ = find_blocks(self.model.model, self.source.checkpoint.path)
            found = fit(
                student, blocks, plan, rows, self.device, self.numbers.settings.seed, self.progress
            )
            self.model.close()
        return self.processes.shared(found)

    def _costs(self, rows: Rows) -> dict[int, float]:
        """KL that each block costs when it alone shares, with the block before it as its anchor."""
        request = replace(self.numbers.request, method=DELTA)
        sample = make_plan(self.structure, replace(request, placement="alternating")).places[0]
        depth = self.structure.depth
        kept = {number % depth for number in request.protect}
        free = [number for number in range(1, depth) if number not in kept]
        costs = {}
        for block in free:
            place = Place(block, block - 1, sample.read_rank, sample.write_rank)
            plan = Plan(self.structure, request, (place,))
            student = self.model.student(plan, *self._start(plan), self.numbers.schedule, 1, 0)
            student.begin_exam()
            costs[block] = exam(student.logits, self.model.teacher(student), rows, self.device)[1]
            self.model.close()
            self._tell("place", f"block {block}: KL {costs[block]:.3g}", len(costs), len(free))
        return self.processes.shared(costs)

    # --- training -----------------------------------------------------------------------------

    def _search(self, costs: dict[int, float] | None, learn: Rows, held: Rows) -> list[Record]:
        workspace, steps = self.workspace, self.settings["search_steps"]
        done = workspace.load_json(TRIALS) if workspace and workspace.has(TRIALS) else []

        def short(numbers: Numbers) -> float:
            plan = make_plan(self.structure, numbers.request, costs)
            student = self.model.student(
                plan, *self._start(plan), numbers.schedule, steps, numbers.settings.seed
            )
            state = train(
                student, self.model.teacher(student), learn, held, self._roomy(numbers.settings),
                processes=self.processes,
            )  # fmt: skip
            self.model.close()
            return float(state.exams[-1][2])

        self.numbers, rows = search(
            self.settings["search"], self.numbers, steps, short, done=done,
            save=lambda rows: workspace.save_json(TRIALS, rows) if workspace else None,
            report=lambda n, kl: self._tell("search", f"KL {kl:.3g}", n, self.settings["search"]),
            processes=self.processes,
        )  # fmt: skip
        return rows

    def _trained(self, learn: Rows | None, held: Rows | None, judged: Rows) -> Record:
        """Train, if asked; measure the whole model, the start, and what is written."""
        settings, form = self.numbers.settings, self.plan.form()
        tune = self.settings["tune"] if self.steps else "delta"
        student = self.model.student(
            self.plan, self.values, self.changed, self.numbers.schedule, settings.steps,
            settings.seed, tune,
        )  # fmt: skip
        teacher = self.model.teacher(student)
        found: Record = {"quality": {"whole": whole_quality(teacher, judged, self.device)}}
        begin = rounded(
            {name: p.detach().clone() for name, p in student.parameters.items()}, self.source, form
        )
        exact = {name: p.detach().clone() for name, p in student.parameters.items()}
        set_values(student, begin)
        found["quality"]["start"] = quality(student, teacher, judged, self.device)
        set_values(student, exact)
        del begin, exact
        if self.steps and learn is not None and held is not None:
            state = train(
                student, teacher, learn, held, self._roomy(settings), state=self._saved(), save=self._save,
                report=self._report, processes=self.processes,
            )  # fmt: skip
            found |= self._curves(state)
            values = rounded(
                {name: p.detach().cpu() for name, p in student.parameters.items()},
                self.source,
                form,
            )
            set_values(student, values)
            found["quality"]["trained"] = quality(student, teacher, judged, self.device)
            factors = set(form.factors())
            self.values = {name: value for name, value in values.items() if name in factors}
            self.changed |= {name: value for name, value in values.items() if name not in factors}
        self.model.close()
        return found

    def _roomy(self, settings: Settings) -> Settings:
        """With as many tokens at a time as suit the processor."""
        return replace(settings, forward_tokens=forward_tokens(self.model.model, self.device))

    def _saved(self) -> State | None:
        held = None
        if self.workspace is not None and self.workspace.has(STATE):
            held = self.workspace.load_tensors(STATE)
        held = self.processes.shared(held)
        return None if held is None else State.from_tensors(held)

    def _save(self, state: State) -> None:
        if self.workspace is not None:
            self.workspace.save_tensors(STATE, state.to_tensors())

    def _report(self, state: State) -> None:
        words = f"loss {state.curve[-1][1]:.3f}, held-out KL {state.best_kl:.3f}"
        speed = state.tokens_per_second * self.processes.world
        self._tell("train", f"{words}, {speed:.0f} tokens/s", state.step, self.steps)

    def _tell(self, stage: str, words: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(Step(stage, words, done, total, 0))

    def _curves(self, state: State) -> Record:
        """What figures are drawn from. Of a long run every so many steps' means."""
        each = max(1, len(state.curve) // 200)
        curve = []
        for first in range(0, len(state.curve), each):
            rows = state.curve[first : first + each]
            means = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
            curve.append(
                {"step": int(rows[-1][0]), "loss": means[1], "ce": means[2], "kl": means[3]}
            )
        schedule = self.numbers.schedule
        return {
            "steps_done": state.step,
            "best_step": state.best_step,
            "rate_scale": state.scale,
            "tokens_per_second_training": state.tokens_per_second * self.processes.world,
            "trained_parameters": sum(value.numel() for value in state.best.values()),
            "curve": curve,
            "exams": [{"step": int(s), "ce": ce, "kl": kl} for s, ce, kl in state.exams],
            "replacement": {
                "modules": list(self.plan.groups),
                "steps": self.steps,
                "points": schedule.table(len(self.plan.groups), self.steps),
            },
        }
