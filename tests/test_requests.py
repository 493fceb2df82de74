"""Requests: each option is written once, and command line, Python, help, record and identity follow."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from checkpoints import tree_hashes
from typer.core import TyperOption

import deltafold
from deltafold.cli import app
from deltafold.errors import UsageError
from deltafold.evaluation.request import EvaluateRequest
from deltafold.factoring.request import FactorRequest
from deltafold.running.front import front, options_table
from deltafold.running.request import (
    PANELS,
    SIZE,
    Request,
    argument,
    asked,
    option,
    options_of,
    parse_bytes,
    parse_numbers,
)

FRONTS = [
    name
    for name in deltafold.__all__
    if name not in ("DeltafoldError", "Model", "Recipe", "__version__", "codec", "load", "tensors")
]

COMMANDS: list[Any] = [each.callback for each in app.registered_commands]


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
        assert (option_name in shown) == each.python
        if not each.python:
            continue
        assert shown[option_name].annotation
        assert f"{option_name}: {each.doc}" in words


@pytest.mark.parametrize("name", [command.__name__ for command in COMMANDS])
def test_a_command_is_its_request(name: str) -> None:
    """Every option in a panel, `--json` and `--settings` on all, bounds in the request alone."""
    found = typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]
    shown = [each for each in found if isinstance(each, TyperOption) and not each.hidden]
    assert {each.rich_help_panel for each in shown if each.name != "help"} <= set(PANELS)
    assert {"json_output", "settings_file"} <= {each.name for each in shown}
    kind = next(each.request for each in COMMANDS if each.__name__ == name)
    assert {n for n, each in options_of(kind).items() if each.cli} <= {each.name for each in found}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "nowhere", "--text", "x", "--limit", "0"], "--limit 0 is too small"),
        (["evaluate", "nowhere"], "There is nothing to measure"),
        (["compare", "a", "b", "c", "--prompt", " "], "The prompt is empty"),
        (["compare", "a", "b", "c", "--dtype", "fp61"], "did you mean 'fp16'"),
        (["serve", "base", "--delta", "math"], "is not NAME=ARCHIVE"),
        (["serve", "base", "-d", "a=x", "--port", "70000"], "--port 70000 is too large"),
        (["push", "folder", "nobody"], "write it like owner/name"),
        (["report", "record.json", "--dark"], "--dark is about figures"),
        (["plan", "model"], "Give the fine-tune of model"),
        (["plan", "a", "b", "--shared", "3"], "--shared is for deltallm"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else None,
)
def test_what_cannot_be_is_said_before_torch_is_loaded(arguments: list[str], words: str) -> None:
    script = (
        f"import sys\nsys.argv = ['deltafold', *{arguments!r}]\n"
        "from deltafold.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.returncode == 2 and words in told.stderr
    assert told.stderr.splitlines()[-1] == "False"


def test_tasks_and_texts_by_place_as_before(tmp_path: Path) -> None:
    asked, _ = EvaluateRequest.former(("a", ["b"], "c", ["t"], ["x"]), {"limit": 3})
    assert asked == ("a", ["b"], "c")
    with pytest.raises(deltafold.DeltafoldError, match="nowhere"):
        deltafold.evaluate(tmp_path / "nowhere", (), None, (), ["x"])  # type: ignore[call-arg]


def test_what_only_the_command_line_shows_is_no_keyword(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inspect takes no 'tensors'"):
        deltafold.inspect(tmp_path, tensors=True)


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


def test_merge_as_one_would_guess_and_as_before(pair: Any, tmp_path: Path) -> None:
    """A list of models and an output; the base is the one in the record of an archive."""
    archive = tmp_path / "x.delta"
    deltafold.compress(pair.base, pair.finetuned, archive, "lossless")
    made = deltafold.merge([archive], tmp_path / "one", method="average")
    assert made["models"] and made["recipe"]["method"] == "average"
    recipe = deltafold.Recipe((deltafold.Model(str(archive)),), "average")
    with pytest.warns(FutureWarning, match="is written merge"):
        deltafold.merge(pair.base, recipe, tmp_path / "two")
    assert tree_hashes(tmp_path / "one") == tree_hashes(tmp_path / "two")


@pytest.mark.parametrize("name", ["compress", "restore", "merge", "export"])
def test_an_output_is_a_place_and_never_a_hub_id(
    name: str, pair: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`out/x` is written like `owner/name`: it is written to all the same, and nothing is asked for."""
    from deltafold.checkpoint import hub
    from deltafold.errors import CheckpointError

    def asked(place: Any, *_: Any, **__: Any) -> Any:
        raise CheckpointError(f"{place} was looked for on the hub.")

    monkeypatch.setattr(hub, "_downloaded", asked)
    monkeypatch.chdir(tmp_path)
    base = pair.base
    calls: dict[str, Any] = {
        "compress": lambda: deltafold.compress(base, pair.finetuned, "out/x", "lossless"),
        "restore": lambda: deltafold.restore(archive, base, "out/x"),
        "merge": lambda: deltafold.merge([archive], "out/x", method="average", base=base),
        "export": lambda: deltafold.export(archive, "out/x", base=base),
    }
    calls[name]()
    assert (tmp_path / "out" / "x").is_dir()
