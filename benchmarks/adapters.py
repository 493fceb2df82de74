"""What the benchmarks of exported adapters share: fine-tunes with their tasks, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltafold.evaluation.data import AnswerRow, read_tasks
from deltafold.evaluation.evaluate import evaluate
from deltafold.evaluation.exact_match import first_lines

MAX_TOKENS = 24
Rows = tuple[AnswerRow, ...]


@dataclass(frozen=True)
class Tune:
    """A fine-tune, its archive, and the rows of its task."""

    name: str
    finetuned: str
    archive: str
    task: str

    @classmethod
    def parse(cls, text: str) -> Tune:
        parts = text.split("=")
        if len(parts) != 4:
            raise SystemExit(f"{text!r} is not NAME=FINETUNED=ARCHIVE=TASK.jsonl.")
        return cls(*parts)

    def rows(self, limit: int) -> Rows:
        """The first rows of its task."""
        return read_tasks([self.task], limit)[0].answer_rows


@dataclass(frozen=True)
class Reference:
    """Exact match of base, fine-tune and restored model by `evaluate`, and what the last one wrote."""

    base: float
    finetuned: float
    restored: float
    dtype: str
    texts: list[str]

    @classmethod
    def measure(cls, base: str, tune: Tune, limit: int) -> Reference:
        """In the fine-tune's own dtype."""
        record = evaluate(
            tune.finetuned, [tune.archive], base, [tune.task],
            limit=limit, max_new_tokens=MAX_TOKENS, answers=limit,
        )  # fmt: skip
        found = {entry["role"]: entry["metrics"] for entry in record["models"]}
        name = Path(tune.task).stem
        shares = {
            role: float(each["tasks"][name]["exact_match"]["value"]) for role, each in found.items()
        }
        texts = [answer["text"] for answer in found["candidate"]["answers"]]
        return cls(
            shares["base"], shares["fine-tune"], shares["candidate"],
            record["settings"]["dtype"], texts,
        )  # fmt: skip

    def row(self) -> dict[str, float]:
        """Its columns of a record."""
        return {"base": self.base, "finetuned": self.finetuned, "restored": self.restored}


def hits(texts: list[str], rows: Rows) -> float:
    """Share of rows answered to the letter."""
    return same(texts, [row.answer.strip() for row in rows])


def same(texts: list[str], others: list[str]) -> float:
    """Share of texts whose first lines agree."""
    pairs = zip(texts, others, strict=True)
    return sum(first_lines(a, 1) == first_lines(b, 1) for a, b in pairs) / len(texts)
