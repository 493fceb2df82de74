"""A hundred faults of the campaign, and that its judge can tell bad from good."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Told
from faults.calls import WRITING, Calls
from faults.campaign import chosen, counts, fault, kind_of, prepared, table
from faults.children import Ended
from faults.jobs import JOBS
from faults.kinds import KINDS
from faults.scene import (
    BAD,
    BLOCKED,
    EQUAL,
    HALF,
    REFUSED,
    TAKEN_UP,
    TRACEBACK,
    WRONG,
    Known,
    Scene,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SEED = 3


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAFOLD_CACHE", str(folder / "cache"))
        yield prepared(folder)


@pytest.fixture
def scene(known: Known, tmp_path: Path) -> Scene:
    return Scene(known, tmp_path / "scene", random.Random(0))


def test_a_hundred_faults(known: Known) -> None:
    found = [fault(known, SEED, number) for number in range(100)]
    assert {each.kind for each in found} == set(KINDS)
    assert [each for each in found if each.outcome in BAD] == []


def test_the_same_number_is_the_same_fault(known: Known) -> None:
    numbers = chosen(SEED, 100, 3, ["killed", "archive harmed", "unfinished work harmed"])
    for number in numbers:
        one, two = fault(known, SEED, number), fault(known, SEED, number)
        assert (one.kind, one.outcome, one.note) == (two.kind, two.outcome, two.note)
        assert one.kind == kind_of(SEED, number)


# --- the judge ----------------------------------------------------------------------------------------

FINE, REFUSAL = Told(0, "", ""), Told(1, "", "deltafold: x is odd; put it right.\n")


def test_a_result_that_is_another_is_wrong(scene: Scene) -> None:
    job = JOBS["restore"]
    assert scene.run(job).told.code == 0
    assert scene.persists(job, Ended(FINE), "").outcome == EQUAL
    config = scene.out / "config.json"
    config.write_text(config.read_text() + " ")
    assert scene.persists(job, Ended(FINE), "").outcome == WRONG
    assert scene.passes(job, Ended(FINE), "").outcome == WRONG


def test_a_part_of_a_result_is_half_written(scene: Scene) -> None:
    job = JOBS["restore"]
    assert scene.run(job).told.code == 0
    (scene.out / "config.json").unlink()
    for ended in (Ended(REFUSAL), Ended(FINE, signal=9)):
        assert scene.persists(job, ended, "").outcome == HALF


@pytest.mark.parametrize(
    "told",
    [
        Told(70, "", "deltafold: a mistake.\n"),
        Told(1, "", "Traceback (most recent call last):\ndeltafold: x.\n"),
        Told(1, "", "x went wrong.\n"),
        Told(1, "", "deltafold: x\n"),
        Told(1, "", "deltafold: x.\ndeltafold: y.\n"),
        Told(139, "", ""),
    ],
)
def test_what_is_no_sentence(scene: Scene, told: Told) -> None:
    assert scene.persists(JOBS["verify"], Ended(told), "").outcome == TRACEBACK


def test_what_blocks_the_next_run(scene: Scene) -> None:
    """Another's file in the output's place: no remedy of the command's own helps."""
    job = JOBS["restore"]
    assert scene.passes(job, Ended(REFUSAL), "").outcome == REFUSED
    scene.known.results["restore"], kept = {}, scene.known.results["restore"]
    try:
        assert scene.passes(job, Ended(FINE, signal=9), "").outcome == HALF
    finally:
        scene.known.results["restore"] = kept
    scene.out.rename(scene.folder / "away")
    partial = scene.folder / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("x")
    assert scene.passes(job, Ended(FINE, signal=9), "").outcome == BLOCKED


def test_a_kill_at_a_call_is_one(scene: Scene) -> None:
    job = JOBS["restore"]
    half = scene.known.calls["restore", WRITING] // 2
    ended = scene.run(job, Calls(scene.folder, WRITING, half))
    assert ended.signal == 9
    assert not scene.out.exists()
    assert scene.passes(job, ended, "").outcome == TAKEN_UP


def test_a_table_of_a_record() -> None:
    rows = counts([])
    rows["killed"][TAKEN_UP] += 2
    text = table(json.loads(json.dumps(rows)))
    line = next(line for line in text.splitlines() if line.startswith("| killed "))
    assert [cell.strip() for cell in line.split("|")[1:5]] == ["killed", "2", "0", "2"]
