"""What reads headers, plans or compares checksums imports neither torch nor transformers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import PairFiles
from hypothesis import given
from hypothesis import strategies as st

from deltafold import lazy
from deltafold.codecs import get, names
from deltafold.codecs.base import PartSpec
from deltafold.codecs.impart_qt import _stored
from deltafold.dtypes import BITS, DTYPE_NAMES, DTYPES, FLOATING, ITEM_BYTES

METHODS = [name for name in names() if get(name).method]
HEAVY = ["torch", "transformers"]
LOADED = f"print('loaded:', [m for m in {HEAVY!r} if m in sys.modules])"


def run_alone(script: str) -> str:
    """What a script prints in a process of its own."""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()


def loaded_by(*arguments: object) -> tuple[int, str]:
    """Exit code of a command, and what it had loaded of `HEAVY` at its end."""
    script = (
        "import sys\n"
        f"sys.argv = ['deltafold', *{[*map(str, arguments)]!r}]\n"
        "from deltafold.cli import main\n"
        "code = 0\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    code = end.code or 0\n"
        f"print()\nprint(code)\n{LOADED}\n"
    )
    code, loaded = run_alone(script).splitlines()[-2:]
    return int(code), loaded


@pytest.mark.parametrize(
    "arguments", [["--version"], ["methods"], ["methods", "--json"]], ids=" ".join
)
def test_without_files(arguments: list[str]) -> None:
    assert loaded_by(*arguments) == (0, "loaded: []")


@pytest.mark.parametrize(
    "options", [["inspect"], ["inspect", "--tensors"], ["verify"]], ids=" ".join
)
@pytest.mark.parametrize("name", ["archive", "lossless_archive"])
def test_of_an_archive(options: list[str], name: str, request: pytest.FixtureRequest) -> None:
    assert loaded_by(*options, request.getfixturevalue(name)) == (0, "loaded: []")


@pytest.mark.parametrize("size", [[], ["--nominal-ratio", "16"]], ids=["default", "nominal"])
def test_a_plan(pair: PairFiles, size: list[str]) -> None:
    assert loaded_by("plan", pair.base, pair.finetuned, *size) == (0, "loaded: []")


def test_a_plan_by_every_method(pair: PairFiles) -> None:
    script = (
        "import sys, deltafold\n"
        f"for method in {METHODS!r}:\n"
        f"    print(deltafold.plan({str(pair.base)!r}, {str(pair.finetuned)!r}, method)['method'])\n"
        f"{LOADED}\n"
    )
    assert run_alone(script).splitlines() == [*METHODS, "loaded: []"]


def test_what_is_wrong_is_said_at_once(pair: PairFiles, archive: Path, tmp_path: Path) -> None:
    wrong: list[list[object]] = [
        ["plan", pair.base, pair.finetuned, "--method", "impartt"],
        ["plan", pair.base, tmp_path / "nowhere"],
        ["inspect", pair.base],
        ["verify", archive, "--against", pair.finetuned],
    ]
    for arguments in wrong:
        code, loaded = loaded_by(*arguments)
        assert code != 0 and loaded == "loaded: []", arguments


def test_what_decodes_has_torch(pair: PairFiles, archive: Path) -> None:
    assert loaded_by("verify", archive, "--base", pair.base) == (0, "loaded: ['torch']")


def test_dtypes_are_torch_s() -> None:
    assert set(ITEM_BYTES) == set(DTYPES) == set(DTYPE_NAMES.values()) | BITS
    for name, dtype in DTYPES.items():
        assert name in BITS or DTYPE_NAMES[dtype] == name
        assert ITEM_BYTES[name] == dtype.itemsize
        assert (name in FLOATING) == dtype.is_floating_point
    with pytest.raises(KeyError):
        DTYPE_NAMES[torch.complex64]


def test_a_part_names_its_dtype_either_way() -> None:
    ours, torch_s = PartSpec("BF16", (3, 5)), PartSpec(torch.bfloat16, (3, 5))
    assert ours == torch_s and ours.dtype is torch_s.dtype is torch.bfloat16
    assert ours.dtype_name == torch_s.dtype_name == "BF16"
    assert ours.n_bytes == 30


def test_torch_is_what_it_stands_for() -> None:
    assert lazy.torch.Tensor is torch.Tensor
    ones = torch.ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "eye", len)
        assert lazy.torch.eye is len
        patch.setattr(lazy.torch, "ones", len)
        assert torch.ones is len
    assert lazy.torch.ones is torch.ones is ones
    assert pickle.loads(pickle.dumps(lazy.torch)) is lazy.torch
    with pytest.raises(AttributeError, match="no_such"):
        _ = lazy.torch.no_such


@given(st.lists(st.floats(0, width=32), max_size=20))
def test_bf16_is_rounded_as_torch_does(values: list[float]) -> None:
    given_ = np.array(values, dtype=np.float64)
    theirs = torch.from_numpy(given_).float().bfloat16().double().numpy()
    assert _stored(given_).tolist() == theirs.tolist()
