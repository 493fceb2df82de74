"""Requests: each option is written once, and command line, Python, help, record and identity follow."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree_hashes

import deltafold
from deltafold.errors import UsageError
from deltafold.factoring.request import FactorRequest
from deltafold.running.front import front, options_table
from deltafold.running.request import (
    SIZE,
    Request,
    argument,
    asked,
    option,
    options_of,
    parse_bytes,
    parse_numbers,
)

FRONTS = ("compress", "plan", "restore", "verify", "export", "merge", "fold", "share", "factor")


@asked
class CutRequest(Request):
    """Cut a thing.

    Returns what is left.
    """

    thing: str = argument("What is cut.", kw_only=False)
    pieces: int = option("Into how many.", default=2, panel=SIZE, low=1, high=9, old=("parts",))
    most: int | None = option("Largest.", default=None, flag="--max", parse=parse_bytes, low=1)
    leave: list[int] = option("Not these.", default=(), parse=parse_numbers, record=False)
    how: str = option("Saw or axe.", default="saw", choices=("saw", "axe"), identity=False)


cut = front("cut", CutRequest, lambda request: {"request": request})


def request_of(*args: Any, **kwargs: Any) -> Any:
    return cut(*args, **kwargs)["request"]


def test_settings_and_identity_are_the_fields() -> None:
    made = request_of("bread", most="8MB", leave="0,-1")
    assert made.most == 8_000_000 and made.leave == [0, -1]
    assert made.settings() == {"pieces": 2, "most": 8_000_000, "how": "saw"}
    assert made.identity() == {"pieces": 2, "most": 8_000_000, "leave": [0, -1]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pieces": 0}, "--pieces 0 is too small; give at least 1."),
        ({"pieces": 10}, "--pieces 10 is too large; give at most 9."),
        ({"pieces": float("nan")}, "pieces must be a number"),
        ({"pieces": "two"}, "pieces must be a number, not 'two'."),
        ({"how": "axes"}, "did you mean 'axe'"),
        ({"most": "a lot"}, "--max 'a lot' is no size"),
        ({"leave": "first"}, "write their numbers"),
        ({"piece": 3}, "cut takes no 'piece'; did you mean 'pieces'"),
    ],
)
def test_what_cannot_be_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        cut("bread", **given)
    assert words in str(caught.value)


def test_a_former_name_works_and_says_so() -> None:
    with pytest.warns(FutureWarning, match="parts is called pieces now"):
        assert request_of("bread", parts=3).pieces == 3


def test_one_value_under_two_names_is_refused() -> None:
    with (
        pytest.warns(FutureWarning),
        pytest.raises(UsageError, match="pieces is given twice, once by its former name"),
    ):
        request_of("bread", pieces=2, parts=3)


def test_a_request_goes_elsewhere_without_its_progress() -> None:
    asked = FactorRequest("model", "output", group=3, progress=lambda step: None)
    sent = pickle.loads(pickle.dumps(asked))
    assert sent == asked.but(progress=None) and asked.progress is not None


def test_what_is_missing_is_a_type_error_of_the_verb() -> None:
    with pytest.raises(
        TypeError, match=r"^cut\(\) missing 1 required positional argument: 'thing'"
    ):
        cut()  # type: ignore[call-arg]


def test_signature_and_help() -> None:
    signature = inspect.signature(cut)
    assert signature.parameters["pieces"].default == 2
    assert signature.parameters["pieces"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.parameters["thing"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert "pieces: Into how many." in (inspect.getdoc(cut) or "")
    assert "| `--max` | `most` |  | Largest. |" in options_table(CutRequest)


@pytest.mark.parametrize("name", FRONTS)
def test_every_option_of_a_verb_is_shown_and_explained(name: str) -> None:
    verb: Any = getattr(deltafold, name)
    shown, words = inspect.signature(verb).parameters, inspect.getdoc(verb) or ""
    for option_name, each in options_of(verb.request).items():
        assert option_name in shown
        assert shown[option_name].annotation
        assert f"{option_name}: {each.doc}" in words


def test_a_file_of_settings(tmp_path: Path, deltafold: Any) -> None:
    """Options by their names, those of the command line first; an unknown one is refused."""
    file = tmp_path / "fold.yaml"
    file.write_text("blocks: 99\nsteps: -1\n")
    run = deltafold("fold", "nowhere", "-o", tmp_path / "out", "--settings", file)
    assert run.returncode == 2 and "-1 steps of healing cannot be" in run.stderr
    file.write_text("block: 2\n")
    run = deltafold("fold", "nowhere", "-o", tmp_path / "out", "--settings", file)
    assert run.returncode == 2 and "there is no option 'block'; did you mean 'blocks'" in run.stderr
    toml = tmp_path / "fold.toml"
    toml.write_text('pool = "first"\n')
    run = deltafold("fold", "nowhere", "-o", tmp_path / "out", "--settings", toml)
    assert run.returncode == 2 and "There is no pooling 'first'" in run.stderr


def test_a_former_option_works_and_says_so(tmp_path: Path, deltafold: Any) -> None:
    run = deltafold("fold", "nowhere", "-o", tmp_path / "out", "--heal", "-1")
    assert run.returncode == 2
    assert run.stderr.splitlines()[0] == (
        "deltafold: --heal is called --steps now; the former name goes with the next release."
    )
    assert "-1 steps of healing cannot be" in run.stderr


def test_engine_once_meant_what_runs_the_adapter(tmp_path: Path) -> None:
    with (
        pytest.warns(FutureWarning, match="engine is called runtime now"),
        pytest.raises(deltafold.DeltafoldError),
    ):
        deltafold.export(tmp_path / "no.delta", tmp_path / "out", engine="vllm")


def test_merge_as_one_would_guess_and_as_before(archive: Path, pair: Any, tmp_path: Path) -> None:
    """A list of models and an output; the base is the one that the archives name."""
    made = deltafold.merge([archive], tmp_path / "one", method="average")
    assert made["models"] and made["recipe"]["method"] == "average"
    recipe = deltafold.Recipe((deltafold.Model(str(archive)),), "average")
    with pytest.warns(FutureWarning, match="is written merge"):
        deltafold.merge(pair.base, recipe, tmp_path / "two")
    assert tree_hashes(tmp_path / "one") == tree_hashes(tmp_path / "two")
