"""The command line: what it prints, its exit codes, and that help costs nothing."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    PairFiles,
    base_tensors,
    make_pair,
    read_checkpoint,
    same_bits,
    tree_hashes,
    tuned_tensors,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import nothing_left, refused

from deltafold.cli import main
from deltafold.cli.method_settings import with_method_settings
from deltafold.cli.show import duration, size
from deltafold.errors import UsageError
from deltafold.running.request import parse_bytes

Result = tuple[int, str, str]
Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `main` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["deltafold", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        told = capsys.readouterr()
        return int(code or 0), told.out, told.err

    return run


HEAVY = ["torch", "transformers", "numpy", "safetensors", "zstandard", "huggingface_hub"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compress", "--help"], ["restore", "-h"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['deltafold', *{arguments!r}]\n"
        "from deltafold.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    print('loaded:', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip().endswith("loaded: []")


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, deltafold\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], sorted(deltafold.__all__)[:3])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.stdout.startswith("[] ["), told.stderr


@pytest.mark.parametrize(
    "command",
    ["plan", "compress", "inspect", "verify", "restore", "evaluate", "report", "methods"],
)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"deltafold {command}" in out
    assert command in cli("--help")[1]


def test_from_compress_to_restore(cli: Cli, pair: PairFiles, tmp_path: Path) -> None:
    archive, out = tmp_path / "x.delta", tmp_path / "restored"
    code, told, _ = cli("compress", pair.base, pair.finetuned, "-o", archive, "-m", "lossless")
    assert code == 0
    assert "smaller on disk, everything counted" in told
    code, told, _ = cli("inspect", archive)
    assert code == 0
    assert "method lossless" in told
    code, told, _ = cli("inspect", archive, "--tensors")
    assert all(name in told for name in pair.tensors)
    code, told, _ = cli("verify", archive)
    assert code == 0
    assert f"all parts of {len(pair.tensors)} tensors and 2 small files are whole" in told
    code, told, _ = cli("verify", archive, "--base", pair.base, "--against", pair.finetuned)
    assert code == 0
    assert f"{len(pair.tensors)} of them equal the fine-tune bit for bit" in told
    code, told, _ = cli("restore", archive, "--base", pair.base, "-o", out)
    assert code == 0
    assert f"{len(pair.tensors)} tensors restored" in told
    assert same_bits(read_checkpoint(out), pair.tensors)


def test_json_is_json_alone(cli: Cli, pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "y.delta"
    for arguments, key in (
        (("inspect", archive), "totals"),
        (("verify", archive), "tensors_checked"),
        (("plan", pair.base, pair.finetuned), "roles"),
        (("compress", pair.base, pair.finetuned, "-o", out, "--dry-run"), "roles"),
        (("compress", pair.base, pair.finetuned, "-o", out, "--file-ratio", 8), "totals"),
    ):
        code, told, _ = cli(*arguments, "--json")
        assert code == 0
        assert key in json.loads(told)


def test_options_reach_the_verb(cli: Cli, pair: PairFiles, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    code, told, _ = cli(
        "compress", pair.base, pair.finetuned, "-o", tmp_path / "x.delta", "--bytes", "40kB",
        "-m", "impart", "--beta", "0.5", "--C", "0.8", "--value-dtype", "bf16", "--seed", "5", "-j", "1",
        "--memory", "1GB", "--record", record,
    )  # fmt: skip
    assert code == 0
    found = json.loads(record.read_text())
    settings_ = found["settings"]
    assert settings_["beta"] == 0.5
    assert settings_["c"] == 0.8
    assert settings_["value_dtype"] == "bf16"
    assert settings_["seed"] == 5
    assert settings_["workers"] == 1
    assert found["budget"]["asked"] == 40_000
    assert "bytes: asked 40,000" in told


def test_dry_run_writes_nothing(cli: Cli, pair: PairFiles, tmp_path: Path) -> None:
    before = tree_hashes(tmp_path)
    code, told, _ = cli(
        "compress", pair.base, pair.finetuned, "-o", tmp_path / "x.delta", "--dry-run"
    )
    assert code == 0
    assert "attention" in told
    assert tree_hashes(tmp_path) == before


def test_restore_one_tensor(cli: Cli, pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    code, told, _ = cli(
        "restore", archive, "--base", pair.base, "-o", tmp_path / "x", "--tensor", name
    )
    assert code == 0
    assert "1 tensors restored" in told
    assert same_bits(read_checkpoint(tmp_path / "x"), {name: pair.tensors[name]})


# --- refusals -------------------------------------------------------------------------------------


def one_sentence(result: Result, code: int, *names: str) -> None:
    assert result[0] == code, result
    assert result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1, result[2]
    assert lines[0].startswith("deltafold: ")
    for name in names:
        assert name in lines[0]


SHELL_REFUSALS: dict[str, tuple[int, str, str]] = {
    "wrong base": (1, "is not the base", "restore {archive} --base {other} -o {out}"),
    "no archive": (1, "not an archive", "restore {base} --base {base} -o {out}"),
    "unknown method": (2, "did you mean", "compress {base} {tuned} -o {out} -m impar"),
    "budget": (2, "cannot be met", "compress {base} {tuned} -o {out} --bytes 3000"),
    "two budgets": (
        2,
        "one of them",
        "compress {base} {tuned} -o {out} --bytes 9kB --file-ratio 8",
    ),
    "no checkpoint": (1, "does not exist", "compress {base} {out} -o {out}"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case == "wrong base" else pytest.mark.integration)
        for case in SHELL_REFUSALS
    ],
)
def test_refusals_in_a_process_of_their_own(
    deltafold: Any, pair: PairFiles, archive: Path, tmp_path: Path, case: str
) -> None:
    """The whole way to the shell: one line on stderr, an exit code, no output."""
    code, words, command = SHELL_REFUSALS[case]
    out = tmp_path / "out"
    paths = {"archive": archive, "base": pair.base, "tuned": pair.finetuned, "out": out}
    if case == "wrong base":
        paths["other"] = make_pair(tmp_path / "other", seed=9).base
    arguments = command.format(**paths).split()
    if case == "wrong base":  # started as a shell does, not forked
        start = [sys.executable, "-m", "deltafold", *arguments]
        told = subprocess.run(start, capture_output=True, text=True)
    else:
        told = deltafold(*arguments)
    one_sentence((told.returncode, told.stdout, told.stderr), code, words)
    nothing_left(out)


def test_refusals(cli: Cli, pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    base, tuned, out = pair.base, pair.finetuned, tmp_path / "out"
    compress = ("compress", base, tuned, "-o", out)
    one_sentence(cli("inspect", base), 1, "not an archive")
    one_sentence(cli("verify", archive, "--against", tuned), 1, "--base")
    one_sentence(cli("compress", base, tuned, "-o", archive), 2, "exists", "--overwrite")
    one_sentence(cli(*compress, "--file-ratio", 1000), 2, "cannot be met", "smallest")
    one_sentence(cli(*compress, "--bytes", "many"), 2, "--bytes", "'many'")
    one_sentence(cli(*compress, "--memory", "0"), 2, "--memory")
    one_sentence(cli(*compress, "--beta", "much"), 2, "--beta")
    one_sentence(cli(*compress, "--beta", "0.5"), 2, "auto", "'beta'")
    one_sentence(cli(*compress, "--set", "beta"), 2, "KEY=VALUE")
    one_sentence(cli(*compress, "-m", "impart", "--set", "betta=1"), 2, "'betta'", "'beta'")
    one_sentence(cli(*compress, "--set", "seed=1"), 2, "seed=1", "option")
    one_sentence(cli(*compress, "--kl-at-most", "0"), 2, "--kl-at-most", "above 0")
    one_sentence(cli(*compress, "--kl-at-most", "0.1", "--bytes", "9kB"), 2, "one of them")
    one_sentence(cli(*compress, "--steps", "-3"), 2, "steps")
    one_sentence(cli("plan", base, tmp_path / "nowhere"), 1, "nowhere")
    one_sentence(
        cli("restore", archive, "--base", base, "-o", out, "--tensor", "x"), 2, "no tensor 'x'"
    )
    (archive / "delta.json").unlink()
    one_sentence(cli("restore", archive, "--base", base, "-o", out), 1, "delta.json")
    nothing_left(out)


@pytest.fixture
def readable(tmp_path: Path) -> tuple[Path, Path]:
    """Two tiny models with a tokenizer. Saving them prints, so it comes before `cli` listens."""
    from evaluation_models import make_llama, make_tokenizer, save

    base, tuned = (
        save(make_llama(seed), tmp_path / str(seed), make_tokenizer()) for seed in (0, 1)
    )
    return base, tuned


@pytest.mark.parametrize(
    "command",
    [
        "compress {base} {tuned}", "restore {archive} --base {base}", "export {archive} --base {base}",
        "merge {base} {archive} {archive} --method task-arithmetic", "fold {tuned} --blocks 1",
        "factor {tuned} --parameters 0.9", "share {tuned} --shared 1 --rank 2 --protect=",
    ],
    ids=lambda command: command.split()[0],
)  # fmt: skip
def test_a_device_that_is_not_there(
    readable: tuple[Path, Path], cli: Cli, archive: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, command: str,
) -> None:  # fmt: skip
    """Every heavy command computes where it is told to, or says that it cannot."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    named = command.format(base=readable[0], tuned=readable[1], archive=archive).split()
    out = tmp_path / "out"
    one_sentence(cli(*named, "-o", out, "--device", "cuda"), 2, "no CUDA device", "--device cpu")
    nothing_left(out)


@pytest.mark.parametrize("option", ["--calibration"])
@pytest.mark.parametrize("method", [(), ("-m", "impart", "--beta", "auto")], ids=["auto", "beta"])
def test_text_that_is_not_there(
    readable: tuple[Path, Path],
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    method: tuple[str, ...],
) -> None:
    monkeypatch.setenv("DELTAFOLD_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    text = (option, tmp_path / "no.txt")
    one_sentence(cli("compress", *readable, "-o", out, *text, *method), 1, "no.txt")
    nothing_left(out)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "/mnt/disk"), "/mnt/disk"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (MemoryError(), "Out of memory"),
    ],
)
def test_failures_of_the_machine(
    cli: Cli, archive: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    from deltafold.restoring import inspect as module

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "Archive", fail)
    one_sentence(cli("inspect", archive), 1, words)


def test_wrong_usage_is_told_by_the_parser(cli: Cli) -> None:
    for arguments in (["compress"], ["restor"], ["compress", "a", "b", "-o", "c", "-j", "0"]):
        code, _, told = cli(*arguments)
        assert code == 2
        assert "Traceback" not in told


# --- small helpers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8MB", 8_000_000),
        ("8 MB", 8_000_000),
        ("1.5GiB", 3 << 29),
        ("120000", 120_000),
        ("3k", 3000),
        ("2 KiB", 2048),
        ("1e6", 1_000_000),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text, "--bytes") == expected


@pytest.mark.parametrize(
    "text", ["", "MB", "-3", "0", "0.2", "nan", "inf", "1e400", "8TB!", "8 8", "0x10", "8MBB"]
)
def test_sizes_that_are_none(text: str) -> None:
    refused(UsageError, lambda: parse_bytes(text, "--bytes"), "--bytes", repr(text))


@given(st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        found = parse_bytes(text, "--bytes")
    except UsageError:
        return
    assert found is not None
    assert found >= 1


def test_settings_keep_their_types() -> None:
    given = ["rank=3", "share=0.25", "value-dtype=bf16"]
    found = with_method_settings({"beta": "auto", "c": "0.5", "setting": given})
    assert found["method_settings"] == {
        "beta": "auto",
        "c": 0.5,
        "rank": 3,
        "share": 0.25,
        "value_dtype": "bf16",
    }


def test_numbers_for_people() -> None:
    assert [size(n) for n in (12, 8_409_321, 999_400, 2.5e9)] == [
        "12 B", "8.41 MB", "999 kB", "2.5 GB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.04, 59.94, 61, 3600)] == [
        "0.0 s", "59.9 s", "1 min 01 s", "60 min 00 s",
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["compress", "compress --dry-run", "plan"])
def test_the_first_line_names_both_sides(
    cli: Cli, pair: PairFiles, tmp_path: Path, command: str
) -> None:
    output = () if command == "plan" else ("-o", tmp_path / "x.delta")
    method = ("-m", "lossless")
    code, said, _ = cli(*command.split(), pair.base, pair.finetuned, *output, *method)
    assert code == 0
    first = said.splitlines()[0]
    assert first.startswith(f"base {pair.base} (") and f" -> fine-tune {pair.finetuned} (" in first


def test_a_summary_says_what_was_looked_past_and_what_has_no_counterpart(
    cli: Cli, tmp_path: Path
) -> None:
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    wrapped = {f"_orig_mod.{name}": t for name, t in tuned.items()}
    wrapped["_orig_mod.vision.patches"] = next(iter(tuned.values())).flip(0).contiguous()[:300]
    sides = (
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "tuned", wrapped),
    )
    code, said, _ = cli("compress", *sides, "-o", tmp_path / "x.delta", "-m", "lossless")
    assert code == 0
    assert "names of the fine-tune in the base: without _orig_mod." in said
    assert "only in the fine-tune, stored whole" in said and "_orig_mod.vision.patches" in said
