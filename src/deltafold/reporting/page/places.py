"""What the maps of several pages are alike in: blocks downwards, roles across, tensors behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from deltafold.names import ROLES
from deltafold.reporting.page.view import Map, Measure, Place
from deltafold.reporting.style import role_look

MOST_LINES = 400
"""Tensors listed of one block: a model of many experts would make the page too long to open."""


class Placed(Protocol):
    """A tensor's line in a record."""

    @property
    def block(self) -> int | None: ...
    @property
    def role(self) -> str: ...


L = TypeVar("L", bound=Placed)


def roles_in_blocks(lines: Sequence[Placed]) -> list[str]:
    """The roles that tensors of blocks have, in the order of columns."""
    found = {line.role for line in lines if line.block is not None}
    return [role for role in ROLES if role in found]


def by_block(lines: Sequence[L]) -> list[tuple[str, str, list[L]]]:
    """(label, title, lines) of each block, the first one first."""
    blocks = sorted({line.block for line in lines if line.block is not None})
    return [
        (str(block), f"Block {block}", [line for line in lines if line.block == block])
        for block in blocks
    ]


def column_of(line: Placed, roles: Sequence[str]) -> int:
    """The map's column that a tensor belongs to: its role's, or 0, the whole place's."""
    known = line.block is not None and line.role in roles
    return 1 + roles.index(line.role) if known else 0


def role_map(
    measures: Sequence[Measure],
    roles: Sequence[str],
    places: Sequence[Place],
    line_columns: Sequence[str],
) -> Map:
    """A map whose columns are the whole place and each role."""
    return Map(
        title="Block by block",
        measures=measures,
        columns=["all", *(role_look(role).label for role in roles)],
        colours=["", *roles],
        places=places,
        line_columns=line_columns,
        hint="Choose a place to see its tensors.",
    )
