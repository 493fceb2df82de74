"""One `share` run from its plan to the values that are written."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from deltafold.blocks.structure import Structure
from deltafold.calibration import Sampling, calibrate
from deltafold.calibration.building import find_blocks
from deltafold.composed.write import Source
from deltafold.running.engine import Resources, Step
from deltafold.running.record import Record
from deltafold.running.workspace import Workspace
from deltafold.sharing.fit import fit
from deltafold.sharing.methods.plan import Place, Plan, make_plan
from deltafold.sharing.record import training_record
from deltafold.sharing.request import DELTA, FIT, ShareRequest
from deltafold.sharing.search import Numbers, NumberSearch
from deltafold.sharing.start import Start
from deltafold.sharing.text import CALIBRATION_SAMPLES, ShareText
from deltafold.sharing.train import ShareModel, quality, rounded, set_values, whole_quality
from deltafold.training import Processes, Rows, Settings, State, Watch, exam, forward_tokens, train

STATE, TRIALS = "training.safetensors", "trials.json"
COST_ROWS = 8  # held-out rows on which the placement `searched` judges a block

Tensors = dict[str, torch.Tensor]


class ShareRun:
    """After `do`: `plan`, `values` of the factors, and `changed`, other parameters that moved.

    The workspace is the main process's; the others have none.
    """

    plan: Plan

    def __init__(
        self,
        request: ShareRequest,
        structure: Structure,
        source: Source,
        processes: Processes,
        resources: Resources,
        workspace: Workspace | None,
    ):
        self.request, self.structure, self.source = request, structure, source
        self.processes, self.resources, self.workspace = processes, resources, workspace
        self.numbers = Numbers.of(request)
        self.text = ShareText(source.checkpoint.path, request, processes)
        self.device = processes.device()
        self.values: Tensors = {}
        self.changed: Tensors = {}

    @functools.cached_property
    def model(self) -> ShareModel:
        """The model in memory, loaded when it is first needed."""
        folder, request = self.source.checkpoint.path, self.request
        return ShareModel.load(folder, request.bf16, self.device, request.recompute)

    def do(self) -> Record:
        """Everything but writing; what the record says of it."""
        rows = self.text.training()
        learn, held = rows.split(self.request.seed) if rows is not None else (None, None)
        measured = self.text.measured()
        found: Record = {}
        costs = None
        if self.request.placement == "searched":
            assert held is not None
            costs = self._costs(held.chosen(range(min(COST_ROWS, len(held)))))
            found["costs"] = [{"block": block, "kl": kl} for block, kl in sorted(costs.items())]
        if self.request.trials and learn is not None and held is not None:
            found["search"] = self._search(costs, learn, held)
        self.plan = make_plan(self.structure, self.numbers.request, costs)
        self.values, self.changed = self._start(self.plan)
        if self.request.start == FIT:
            self.values |= self._fitted(self.plan, learn)
        judged = held if measured is None else measured
        if judged is not None:
            found |= self._trained(learn, held, judged)
        if rows is not None and held is not None:
            found["text"] = self.text.to_record(rows, held)
        return found | {"numbers": self.numbers.to_json()}

    # --- start --------------------------------------------------------------------------------

    def _start(self, plan: Plan) -> tuple[Tensors, Tensors]:
        """(factors, biases that moved with their neurons), made by the main process for all."""
        found: tuple[Tensors, Tensors] = ({}, {})
        if self.workspace is not None:
            start = self._starter(plan)
            found = (start.factors(self.workspace, self.resources), start.changed)
        return self.processes.shared(found)

    def _starter(self, plan: Plan) -> Start:
        request, calibration = self.request, None
        if request.start in ("activation", FIT):
            calibration = calibrate(
                self.source.checkpoint.path,
                Sampling(
                    self.text.calibration, CALIBRATION_SAMPLES, request.max_tokens, request.seed
                ),
                memory_bytes=request.memory_bytes,
                progress=request.progress,
            )
        return Start(
            self.source, plan, "activation" if request.start == FIT else request.start,
            request.align and plan.request.method in (DELTA, "tie"), calibration, request.seed,
        )  # fmt: skip

    def _fitted(self, plan: Plan, learn: Rows | None) -> Tensors:
        """Values of what writes, fitted to the original's outputs by the main process."""
        rows = self.text.fitting(learn)
        found: Tensors = {}
        if self.processes.is_main:
            student = self.model.student(
                plan, self.values, self.changed, self.numbers.schedule, 1, 0
            )
            blocks, _ = find_blocks(self.model.model, self.source.checkpoint.path)
            progress, seed = self.request.progress, self.request.seed
            found = fit(student, blocks, plan, rows, self.device, seed, progress)
            self.model.close()
        return self.processes.shared(found)

    def _costs(self, rows: Rows) -> dict[int, float]:
        """KL that each block costs when it alone shares, with the block before it as its anchor."""
        request = self.request.but(method=DELTA)
        sample = make_plan(self.structure, request.but(placement="alternating")).places[0]
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
        workspace, trials = self.workspace, self.request.trials
        done = workspace.load_json(TRIALS) if workspace and workspace.has(TRIALS) else []

        def short(numbers: Numbers) -> float:
            plan, settings = make_plan(self.structure, numbers.request, costs), numbers.settings
            student = self.model.student(
                plan, *self._start(plan), numbers.schedule, settings.steps, settings.seed
            )
            state = train(
                student, self.model.teacher(student), learn, held, self._sized(settings),
                processes=self.processes,
            )  # fmt: skip
            self.model.close()
            return float(state.exams[-1][2])

        search = NumberSearch(
            self.processes,
            done,
            save=lambda rows: workspace.save_json(TRIALS, rows) if workspace else None,
            report=lambda n, kl: self._tell("search", f"KL {kl:.3g}", n, trials),
        )
        self.numbers, rows = search.run(self.numbers, short)
        return rows

    def _trained(self, learn: Rows | None, held: Rows | None, judged: Rows) -> Record:
        """Train, if asked; measure the whole model, the start, and what is written."""
        settings, form = self.numbers.settings, self.plan.form()
        tune = self.request.tune if self.request.steps else "delta"
        student = self.model.student(
            self.plan, self.values, self.changed, self.numbers.schedule, settings.steps,
            settings.seed, tune,
        )  # fmt: skip
        teacher = self.model.teacher(student)
        found: Record = {"quality": {"whole": whole_quality(teacher, judged, self.device)}}
        exact = {name: p.detach().clone() for name, p in student.parameters.items()}
        set_values(student, rounded(exact, self.source, form))
        found["quality"]["start"] = quality(student, teacher, judged, self.device)
        set_values(student, exact)
        del exact
        if self.request.steps and learn is not None and held is not None:
            state = train(
                student, teacher, learn, held, self._sized(settings),
                watch=Watch(self._saved(), self._save, self._report), processes=self.processes,
            )  # fmt: skip
            found |= training_record(state, self.plan, self.numbers, self.processes.world)
            trained = {name: p.detach().cpu() for name, p in student.parameters.items()}
            values = rounded(trained, self.source, form)
            set_values(student, values)
            found["quality"]["trained"] = quality(student, teacher, judged, self.device)
            factors = set(form.factors())
            self.values = {name: value for name, value in values.items() if name in factors}
            self.changed |= {name: value for name, value in values.items() if name not in factors}
        self.model.close()
        return found

    def _sized(self, settings: Settings) -> Settings:
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
        self._tell("train", f"{words}, {speed:.0f} tokens/s", state.step, self.request.steps)

    def _tell(self, stage: str, words: str, done: int, total: int) -> None:
        if self.request.progress:
            self.request.progress(Step(stage, words, done, total, 0))
