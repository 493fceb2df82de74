"""What selections ask of a draft, answered by running text through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence

import torch

from deltafold.blocks.units import Units
from deltafold.calibration.probe import Probe
from deltafold.calibration.stream import Pass
from deltafold.errors import MismatchError
from deltafold.folding.methods.draft import Draft, Shown
from deltafold.folding.methods.presets import Method
from deltafold.folding.methods.selection import Part, Step
from deltafold.folding.methods.similarity import ABSENCES, SIMILARITIES, cosines
from deltafold.folding.request import Pool
from deltafold.folding.states import States
from deltafold.folding.watching import At, find_norms, module_of, watched


class DraftEvidence:
    """Evidence of one draft; what is not asked for is not computed. Close it.

    `protected` and steps count places in the draft. `carried` makes the draft that a step leads to.
    """

    def __init__(
        self,
        draft: Draft,
        method: Method,
        protected: Collection[int],
        key: int,
        states: States | None,
        probe: Callable[[], Probe],
        carried: Callable[[Draft, Step], Draft],
        pool: Pool = "last",
    ):
        self.draft, self.method, self.key, self.pool = draft, method, key, pool
        self.n, self.protected = len(draft), protected
        self._states, self._probe, self._carried = states, probe, carried
        self._matrix: torch.Tensor | None = None
        self._done: Pass | None = None
        self._open = contextlib.ExitStack()
        self._started: Pass | None = None
        self._base = 0.0

    def close(self) -> None:
        """Free states."""
        self._open.close()
        if self._started is not None:
            self._started.close()

    @property
    def states(self) -> States:
        if self._states is None:
            raise ValueError(f"{self.method.name} was begun without text, but needs it")
        return self._states

    @property
    def done(self) -> Pass:
        """The draft's states over all samples."""
        if self._done is None:
            self._done = self._open.enter_context(self.states.run(self.draft))
        return self._done

    def alike(self) -> torch.Tensor:
        """The similarity matrix (n+1, n+1)."""
        if self._matrix is None:
            similarity = SIMILARITIES[self.method.preset.similarity]
            try:
                self._matrix = self.states.matrix(similarity, self.done, self.pool)
            except ValueError as error:
                raise MismatchError(
                    f"{self.method.preset.similarity}: {error}; give more calibration text."
                ) from None
        return self._matrix

    @property
    def has_matrix(self) -> bool:
        return self._matrix is not None

    def absence(self, positions: Collection[int]) -> float:
        """Log-likelihood lost, or KL, without blocks; by a similarity, 1 - A of what they change."""
        measured = ABSENCES.get(self.method.preset.similarity)
        if measured is None:
            return sum(1 - float(self.alike()[place, place + 1]) for place in positions)
        probe = self._probe()
        if self._started is None:
            self._started = probe.start(self.draft)
            self._base = probe.reached(self.draft, self._started)[measured]
        return probe.without(self.draft, self._started, positions)[measured] - self._base

    def parts(self) -> dict[tuple[int, Part], float]:
        """Mean cosines over tokens of what enters and what leaves attention and MLP.

        Between the two lies what the block makes with its down projection zero.
        """
        outputs = self.draft.layout.mlp_outputs()
        found: dict[tuple[int, Part], float] = {}
        for position, block in enumerate(self.draft.blocks):
            half = self.draft.with_block(block.without_output(outputs))
            model = self.states.model.with_weights(half.tensor)
            with model.resume(self.done, position, [block.number]) as middle:
                stores = (self.done.stores[position], middle.last, self.done.stores[position + 1])
                both = [0.0, 0.0]
                count = 0
                for place, batch in enumerate(self.done.batches):
                    three = torch.stack([store[place][batch.real] for store in stores])
                    near = cosines(three).sum(-1)
                    both = [both[0] + float(near[0, 1]), both[1] + float(near[1, 2])]
                    count += three.shape[1]
            found[position, "attention"], found[position, "mlp"] = (each / count for each in both)
        return found

    def shown(self, place: int, units: Sequence[Units]) -> Shown:
        """What the calibration text shows of the block at a place."""
        block, layout = self.draft.blocks[place], self.draft.layout
        model = self.states.model.with_weights(self.draft.tensor)
        source = At(self.done, place)
        both = Pass(self.done.batches, self.done.calls, self.done.stores[place : place + 2])
        near = float(self.states.matrix(SIMILARITIES["cosine"], both, self.pool)[0, 1])
        outputs = {
            kind.name: module
            for kind in units
            if (module := module_of(model, layout, block.number, kind.outputs[0].local)) is not None
        }
        totals: dict[str, torch.Tensor] = {}
        count = 0
        walk = watched(model, block.number, list(outputs.values()), source)
        for number, seen in enumerate(walk):
            real = self.done.batches[number].real
            count += int(real.sum())
            for name, inputs in zip(outputs, seen.inputs, strict=True):
                found = inputs[real].double().abs().sum(0)
                totals[name] = totals[name] + found if name in totals else found
        activity = {
            kind.name: (totals[kind.name] / count).view(kind.count, -1)
            for kind in units
            if kind.name in totals
        }
        norms = find_norms(model, layout, block.number, source).before
        return Shown(max(0.0, 1 - near), activity, norms)

    def closeness(self, steps: Sequence[Step]) -> float:
        """Mean over the probe's samples of the cosine of all their last hidden states to the model's.

        Steps name places of this draft and are carried out in order. A sample's states are one long
        vector, as LaCo's program has it. They are those after the last norm, as the model hands them
        out: before it a few large channels are all that a cosine sees, and blocks folded into ruins
        look alike.
        """
        probe = self._probe()
        whole = Draft.of(self.draft.layout, self.draft.source)
        draft = self.draft
        for step in steps:
            draft = self._carried(draft, placed(self.draft, draft, step))
        if self._started is None:
            self._started = probe.model.with_weights(whole.tensor).forward(probe.batches)
        model = probe.model.with_weights(draft.tensor)
        total, count = 0.0, 0
        with (
            torch.no_grad(),
            model.forward(probe.batches, blocks=draft.numbers) as done,
            model.last_norm() as normed,
        ):
            for place, batch in enumerate(probe.batches):
                for row, length in enumerate(batch.lengths):
                    ends = (each.last[place][row, :length] for each in (self._started, done))
                    pair = torch.stack([normed(each).float().cpu().flatten() for each in ends])
                    total += float(cosines(pair[:, None])[0, 1].sum())
                    count += 1
        return total / count


def placed(before: Draft, now: Draft, step: Step) -> Step:
    """A step whose places are counted in `now`, of which it was chosen `before`."""
    at = {number: place for place, number in enumerate(now.numbers)}
    keep = None if step.keep is None else at[before.numbers[step.keep]]
    return Step(keep, tuple(at[before.numbers[place]] for place in step.gone))
