"""What each verb must do with a model of the zoo: the right thing, looked at in bits or outputs.

A check returns when all is right, lets the DeltafoldError of a refusal through, and fails otherwise: by
an assertion, or with whatever else was raised. There is no third way.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture
from building import DEPTH, build, run, silent
from checkpoints import decaying_delta, read_checkpoint, same_bits, tree_hashes
from evaluation_models import make_tokenizer

import deltafold

NEAR = 1e-3
"""Of the largest output: the same numbers added in another order."""
RATIO = 1.8
"""Of archives that approximate: half of so small a model's archive is its manifest."""


class Specimen:
    """One architecture: a base and two fine-tunes in a folder, written when first asked for."""

    def __init__(self, architecture: Architecture, folder: Path):
        self.architecture, self.folder = architecture, folder

    @cached_property
    def model(self) -> Any:
        """The base in fp32."""
        return build(self.architecture)

    def save(self, model: Any, name: str) -> Path:
        """The model as transformers writes it, with a tokenizer where it is run on text."""
        folder = self.folder / name
        with silent():
            model.save_pretrained(folder)
        if "text" in self.architecture.takes:
            make_tokenizer().save_pretrained(folder)
        return folder

    @cached_property
    def base(self) -> Path:
        return self.save(stored(self.model), "base")

    @cached_property
    def tuned(self) -> Path:
        return self.save(moved(self.model, 1), "tuned")

    @cached_property
    def other(self) -> Path:
        return self.save(moved(self.model, 2), "other")

    @cached_property
    def archive(self) -> Path:
        """The fine-tune, every bit."""
        deltafold.compress(self.base, self.tuned, self.folder / "exact.delta", "lossless")
        return self.folder / "exact.delta"

    def open(self, folder: Path) -> Any:
        """The model of a folder by its class of transformers, whole, in fp32."""
        kind = type(self.model)
        with silent():
            model, info = kind.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        return model.eval()

    def outputs(self, model: Any) -> torch.Tensor:
        made = run(model, self.architecture.takes)
        assert made.isfinite().all()
        return made

    def outputs_of(self, folder: Path) -> torch.Tensor:
        return self.outputs(self.open(folder))

    def new(self, name: str) -> Path:
        """A place for what a verb writes, with nothing there."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def stored(model: Any) -> Any:
    """A copy in bf16, but for what its class keeps in fp32."""
    return copy.deepcopy(model).to(torch.bfloat16).eval()


def moved(model: Any, seed: int) -> Any:
    """A fine-tune in bf16: every matrix moves by a low-rank delta, all else a little."""
    generator = torch.Generator().manual_seed(seed)
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() < 2:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
                continue
            for matrix in parameter.view(-1, *parameter.shape[-2:]) if parameter.numel() else ():
                matrix += decaying_delta(tuple(matrix.shape), generator)
    return made.to(torch.bfloat16).eval()


def near(found: torch.Tensor, wanted: torch.Tensor, share: float = NEAR) -> None:
    """Raises AssertionError, with how far they are apart."""
    assert found.shape == wanted.shape
    apart, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    assert apart <= share * size, f"outputs differ by {apart:.3g} of {size:.3g}"


def exact(it: Specimen) -> None:
    """Every file back, every bit; the same outputs."""
    out = it.new("restored")
    deltafold.verify(it.archive, it.base, it.tuned)
    deltafold.restore(it.archive, it.base, out)
    assert tree_hashes(out) == tree_hashes(it.tuned)
    assert same_bits(read_checkpoint(out), read_checkpoint(it.tuned))
    assert torch.equal(it.outputs_of(out), it.outputs_of(it.tuned))


def auto(it: Specimen) -> None:
    """Little over half of the bytes, and nearer to the fine-tune than the base is; text where it can be run."""
    archive, out = it.new("auto.delta"), it.new("near")
    deltafold.compress(it.base, it.tuned, archive, file_ratio=RATIO, samples=4)
    deltafold.verify(archive, it.base, it.tuned)
    deltafold.restore(archive, it.base, out)
    found, tuned, base = (it.outputs_of(each) for each in (out, it.tuned, it.base))
    assert share_left(found, tuned, base) < 0.9


def load(it: Specimen) -> None:
    """The model in memory is the one that transformers opens."""
    with silent():
        model = deltafold.load(it.archive, it.base, dtype=torch.float32)
    assert type(model) is type(it.model)
    assert torch.equal(it.outputs(model), it.outputs_of(it.tuned))


def fold(it: Specimen) -> None:
    """Without one block: what the model computes where that block hands on what it is given."""
    out = it.new("folded")
    kept = [0, *range(2, DEPTH)]
    record = deltafold.fold(it.tuned, out, "random", blocks=1, protect=kept, calibration="none")
    gone = record["removed"]["blocks"]
    assert [n for n in range(DEPTH) if n not in record["kept"]] == gone == [1]
    whole, left = it.open(it.tuned), it.open(out)
    shorter = dict(left.named_modules())
    lists = [
        (name, module) for name, module in whole.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(shorter[name]) < len(module)
    ]  # fmt: skip
    assert len(lists) == 1 and len(lists[0][1]) == DEPTH
    lists[0][1][1].register_forward_hook(_hand_on, with_kwargs=True)
    near(it.outputs(left), it.outputs(whole))


def _hand_on(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def factor(it: Specimen) -> None:
    """Of a model whose matrices have rank 2, factors are the model itself."""
    folder, out = it.folder / "thin", it.new("factored")
    if not folder.exists():
        it.save(thin(it.model), "thin")
    deltafold.factor(folder, out, "svd", parameters=0.97, calibration="none")
    near(it.outputs(opened(out)), it.outputs_of(folder))


def share(it: Specimen) -> None:
    """Of a model whose blocks are alike, a block that refers to another is that block."""
    folder, out = it.folder / "alike", it.new("shared")
    if not folder.exists():
        it.save(alike(it.model), "alike")
    deltafold.share(folder, out, shared=1, rank=1, protect=(0, -1))
    near(it.outputs(opened(out)), it.outputs_of(folder))


def opened(folder: Path) -> Any:
    """A composed model in fp32."""
    with silent():
        return deltafold.load(folder, dtype=torch.float32)


def thin(model: Any) -> Any:
    """A copy whose matrices, tables aside, have rank 2, and narrow ones rank 1."""
    made = copy.deepcopy(model)
    tables = {id(m.weight) for m in made.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() in (2, 3) and parameter.numel() and id(parameter) not in tables:
                u, s, v = torch.linalg.svd(parameter, full_matrices=False)
                rank = 2 if min(parameter.shape[-2:]) > 4 else 1
                parameter.copy_((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :])
    return made.eval()


def alike(model: Any) -> Any:
    """A copy in which the matrices of every block are those of the first of their shape."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == DEPTH:
                first = dict(module[0].named_parameters())
                for block in module[1:]:
                    for name, parameter in block.named_parameters():
                        if name in first and first[name].shape == parameter.shape:
                            parameter.copy_(first[name])
    return made.eval()


def merge(it: Specimen) -> None:
    """The mean of two fine-tunes, in every tensor; it opens and runs."""
    out = it.new("merged")
    deltafold.merge([it.tuned, it.other], out, "average", base=it.base)
    means_of(out, it.base, it.tuned, it.other)
    it.outputs_of(out)


def means_of(out: Path, base: Path, one: Path, two: Path) -> None:
    """Every tensor is the mean of both, rounded to its dtype."""
    found, sides = read_checkpoint(out), [read_checkpoint(each) for each in (base, one, two)]
    assert set(found) == set(sides[0])
    for name, tensor in found.items():
        first, second = sides[1][name], sides[2][name]
        assert tensor.dtype == first.dtype and tensor.shape == first.shape
        if not tensor.is_floating_point():
            assert torch.equal(tensor, first), name
            continue
        wanted = (first.double() + second.double()) / 2
        unit = torch.finfo(tensor.dtype).eps * wanted.abs().clamp(min=1e-4)
        assert ((tensor.double() - wanted).abs() <= unit).all(), name


def export(it: Specimen) -> None:
    """Base and adapter, put together by PEFT: the fine-tune, but for what the record leaves out."""
    from peft import PeftModel

    out = it.new("adapter")
    record = deltafold.export(it.archive, out, base=it.base, rank=64)
    wanted = it.open(it.tuned)
    left_out = {row["name"] for row in record["tensors"] if row["how"] == "none"}
    if left_out:
        mixed = it.new("mixed")
        put_back(it.tuned, it.base, left_out, mixed)
        wanted = it.open(mixed)
    base = it.open(it.base)
    before = it.outputs(base)
    with silent():
        model = PeftModel.from_pretrained(base, str(out)).eval()
    found, target = it.outputs(model.base_model.model), it.outputs(wanted)
    assert share_left(found, target, before) < 0.1


def share_left(found: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> float:
    """How far outputs are from what is wanted, as a share of how far they were before.

    The median over rows that move at all: rounding may send a token to another expert.
    """
    apart, moved_by = (found - wanted).norm(dim=-1), (before - wanted).norm(dim=-1)
    return float((apart / moved_by).nanmedian())


def put_back(tuned: Path, base: Path, names: set[str], out: Path) -> None:
    """The fine-tune with some tensors as the base has them."""
    from safetensors.torch import save_file

    shutil.copytree(tuned, out)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    theirs = read_checkpoint(base)
    mixed = {n: theirs.get(n, t) if n in names else t for n, t in read_checkpoint(tuned).items()}
    save_file(mixed, out / "model.safetensors", {"format": "pt"})


VERBS: dict[str, Callable[[Specimen], None]] = {
    "exact": exact, "auto": auto, "load": load, "fold": fold, "factor": factor, "share": share,
    "merge": merge, "export": export,
}  # fmt: skip
