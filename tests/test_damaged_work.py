"""Unfinished work that was damaged: what does not fit is made again, to the same result.

Each verb is stopped when all is done but the last rename. Then one file of each kind that lies in
NAME.partial is damaged, and the same command must end in what an undisturbed one gives.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_pair, tree_hashes
from conftest import Run
from folding_models import write_deep, write_text

from deltafold import compress, export, factor, fold, merge, restore, share
from deltafold.merging.recipe import Model, Recipe
from deltafold.running.workspace import Workspace, partial_path

Verb = Callable[[Path], object]
Make = Callable[[Path], Verb]


def _compress(method: str, **options: Any) -> Make:
    def make(folder: Path) -> Verb:
        pair = make_pair(folder)
        return lambda out: compress(pair.base, pair.finetuned, out, method, **options)

    return make


def _trained(folder: Path) -> Verb:
    base, text = write_deep(folder / "base", "llama"), write_text(folder / "text.txt", 60)
    tuned = write_deep(folder / "tuned", "llama")
    _nudge(tuned / "model.safetensors")
    return lambda out: compress(
        base, tuned, out, "lowrank", file_ratio=3, calibration=text, steps=2, max_tokens=24
    )


def _nudge(file: Path) -> None:
    """A fine-tune of the model, near to it."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(5)
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() > 1:
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    save_file(tensors, file, metadata={"format": "pt"})


def _restore(folder: Path) -> Verb:
    pair = make_pair(folder, shards=3)
    compress(pair.base, pair.finetuned, folder / "x.delta", "impart", file_ratio=8)
    return lambda out: restore(folder / "x.delta", pair.base, out)


def _merge(folder: Path) -> Verb:
    pair = make_pair(folder)
    other = shutil.copytree(pair.finetuned, folder / "other")
    _nudge(other / "model.safetensors")
    recipe = Recipe((Model(str(pair.finetuned)), Model(str(other))), "ties")
    return lambda out: merge(recipe, out, base=pair.base)


def _merge_search(folder: Path) -> Verb:
    base, tuned = write_deep(folder / "base", "llama"), write_deep(folder / "tuned", "llama")
    _nudge(tuned / "model.safetensors")
    text = write_text(folder / "text.txt")
    recipe = Recipe((Model(str(tuned)), Model(str(base))), "ties")
    return lambda out: merge(
        recipe, out, base=base, search={"scale": [0.5, 1.0]}, texts=[text], max_tokens=24
    )


def _fold(folder: Path) -> Verb:
    model, text = write_deep(folder / "model", "llama"), write_text(folder / "text.txt", 12)
    return lambda out: fold(
        model, out, "reverse", blocks=1, calibration=text, max_tokens=24, steps=2
    )


def _factor(method: str) -> Make:
    def make(folder: Path) -> Verb:
        model, text = write_deep(folder / "model", "llama"), write_text(folder / "text.txt")
        return lambda out: factor(
            model, out, method, parameters=0.75, calibration=text, max_tokens=40, trials=2
        )

    return make


def _share(folder: Path) -> Verb:
    model, text = write_deep(folder / "model", "llama"), write_text(folder / "text.txt", 12)
    return lambda out: share(
        model, out, shared=1, rank=4, protect=(0, -1), max_tokens=16, batch=2, check_steps=2,
        calibration=text, steps=4,
    )  # fmt: skip


def _export(folder: Path) -> Verb:
    pair = make_pair(folder)
    compress(pair.base, pair.finetuned, folder / "x.delta", "lowrank", file_ratio=4)
    return lambda out: export(folder / "x.delta", out, base=pair.base)


def _export_measured(folder: Path) -> Verb:
    base, tuned = write_deep(folder / "base", "llama"), write_deep(folder / "tuned", "llama")
    _nudge(tuned / "model.safetensors")
    compress(base, tuned, folder / "x.delta", "lossless")
    text = write_text(folder / "text.txt")
    return lambda out: export(
        folder / "x.delta", out, base=base, rank=4, calibration=text, max_tokens=24
    )


def _marked(name: str, make: Make) -> Any:
    return pytest.param(make, id=name, marks=pytest.mark.integration)


VERBS = [
    pytest.param(_compress("impart", file_ratio=8), id="compress"),
    pytest.param(_compress("auto", file_ratio=8), id="compress to a size"),
    _marked("compress exactly", _compress("lossless")),
    _marked("compress trained", _trained),
    pytest.param(_restore, id="restore"),
    pytest.param(_merge, id="merge"),
    _marked("merge searched", _merge_search),
    _marked("fold", _fold),
    _marked("factor", _factor("lord")),
    _marked("factor searched", _factor("bolaco")),
    _marked("factor welore", _factor("welore")),
    _marked("share", _share),
    pytest.param(_export, id="export"),
    _marked("export measured", _export_measured),
]


class _Stop(KeyboardInterrupt):
    """As Ctrl-C, right before the output would get its name."""


def stopped(verb: Verb, out: Path) -> Path:
    """The working folder of a run that has done all but publish."""

    def stop(self: Workspace, *_: object) -> None:
        raise _Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "publish", stop)
        with pytest.raises(_Stop):
            verb(out)
    return partial_path(out)


def kinds(partial: Path) -> dict[str, list[Path]]:
    """Files by the folder that they are in and by their suffix, as paths below the working folder."""
    found: dict[str, list[Path]] = {}
    for file in sorted(partial.rglob("*")):
        if file.is_file() and file.stat().st_size:
            name = file.relative_to(partial)
            found.setdefault(f"{name.parent}/*{name.suffix}", []).append(name)
    return found


def flipped(file: Path) -> None:
    """One bit, past the middle: of a value, or of a mark."""
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    """The end of a file is lost."""
    file.write_bytes(file.read_bytes()[: -1 - file.stat().st_size // 3])


def zeroed(file: Path) -> None:
    """As a power failure leaves a file whose bytes were never written."""
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = [
    flipped,
    pytest.param(cut, marks=pytest.mark.integration),
    pytest.param(zeroed, marks=pytest.mark.integration),
    pytest.param(Path.unlink, id="gone", marks=pytest.mark.integration),
]


@pytest.fixture(scope="module")
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Verb, dict[str, str], Path]:
    """A verb, what it makes, and its unfinished work."""
    folder = tmp_path_factory.mktemp("work")
    verb = request.param(folder)
    verb(folder / "whole")
    return verb, tree_hashes(folder / "whole"), stopped(verb, folder / "out")


@pytest.mark.filterwarnings("ignore::deltafold.errors.StorageWarning")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("prepared", VERBS, indirect=True)
def test_damaged_work_is_made_again(
    prepared: tuple[Verb, dict[str, str], Path], damage: Callable[[Path], None], tmp_path: Path
) -> None:
    verb, whole, partial = prepared
    for kind, files in kinds(partial).items():
        out = tmp_path / kind.replace("/", "_").replace("*", "") / "out"
        out.parent.mkdir()
        shutil.copytree(partial, partial_path(out))
        damage(partial_path(out) / files[len(files) // 2])
        verb(out)
        assert tree_hashes(out) == whole, kind
        assert not partial_path(out).exists()


def test_the_command_says_in_one_line_what_it_makes_again(tmp_path: Path, deltafold: Run) -> None:
    pair, out = make_pair(tmp_path), tmp_path / "out.delta"
    partial = stopped(lambda where: compress(pair.base, pair.finetuned, where, "lossless"), out)
    flipped(partial / "survey" / "000003.json")
    done = deltafold("compress", pair.base, pair.finetuned, "-o", out, "-m", "lossless")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"deltafold: {partial}/survey/000003.json, of an earlier run, is damaged or not whole; it is "
        "made again."
    ]
