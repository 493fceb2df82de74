"""What torch is set to outside never changes a bit: codecs, decoding, verbs, threads."""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from checkpoints import PairFiles, read_checkpoint, same_bits
from test_codecs import EXACT, LOSSY, delta
from tiny_models import write_family

import deltafold
from deltafold import compress, restore, verify
from deltafold.archive import Archive
from deltafold.codecs import delta_codec, exact_codec
from deltafold.codecs.base import DeltaCodec
from deltafold.errors import UsageError
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import DenseMatrix
from deltafold.restoring.load import load_state
from deltafold.running.engine import Task, run_tasks
from deltafold.running.neutral import neutral

SHAPE = (48, 80)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def matmul_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def another_seed() -> Iterator[None]:
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(123)
    try:
        yield
    finally:
        torch.set_rng_state(before)


STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp16": lambda: default_dtype(torch.float16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "meta set": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "matmul precision": matmul_precision,
    "flushed denormals": flushing,
    "another seed": another_seed,
}
STATE = pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())


def coded(name: str, d: torch.Tensor) -> tuple[dict, dict, torch.Tensor]:
    """(settings, parts, what they decode to); only the codec's own calls."""
    codec: DeltaCodec = delta_codec(name)
    factors = spectrum = None
    if codec.uses_factors:
        with neutral():  # a step of its own, whose borders are the verb's
            factors = truncated_svd(DenseMatrix(d), min(SHAPE), 1)
            spectrum = factors.s.double().numpy()
    chosen = codec.settings_for(SHAPE, 0.15, spectrum)
    matrix = DenseMatrix(d)
    chosen, parts = codec.encode(matrix, chosen, 1, factors)
    rows = [rows for _, rows in codec.decode(parts, chosen, SHAPE, 1)]
    with neutral():
        return chosen, parts, torch.cat(rows)


@STATE
@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_codec_gives_the_same_bits(name: str, state) -> None:
    d = delta(*SHAPE)
    settings, parts, rows = coded(name, d)
    with state():
        found = coded(name, d)
    assert found[0] == settings
    assert same_bits(found[1], parts)
    assert same_bits({"": found[2]}, {"": rows})
    assert not found[2].is_inference()


@STATE
@pytest.mark.parametrize("name", ["svd-quant", "auto"])
def test_codecs_on_tensors_give_the_same_bits(name: str, state) -> None:
    d = delta(*SHAPE)
    plain = deltafold.codec(name)
    parts = plain.encode(d)
    with state():
        again = deltafold.codec(name).encode(d)
        back = plain.decode(parts)
    assert again.settings == parts.settings and same_bits(again.tensors, parts.tensors)
    assert same_bits({"": back}, {"": plain.decode(parts)})


@STATE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32])
@pytest.mark.parametrize("name", [name for name in EXACT if name != "skip"])
def test_an_exact_codec_gives_every_bit(name: str, dtype: torch.dtype, state) -> None:
    reference = (delta(*SHAPE) * 1e4).to(dtype)
    tuned = reference.clone()
    tuned[::3] = (delta(*SHAPE, seed=1) * 1e4).to(dtype)[::3]
    codec = exact_codec(name)
    settings, parts = codec.encode(reference, tuned)
    with state():
        again = codec.encode(reference, tuned)
        back = codec.decode(parts, settings, reference)
    assert again[0] == settings and same_bits(again[1], parts)
    assert same_bits({"": back}, {"": tuned})


@pytest.fixture(scope="module")
def plain(_template: PairFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives and restored folders made while nothing was set."""
    folder = tmp_path_factory.mktemp("plain")
    for method in ("auto", "svd-quant"):
        written(_template, folder, method)
        restore(folder / f"{method}.delta", _template.base, folder / method)
    return folder


def written(pair: PairFiles, folder: Path, method: str) -> Path:
    out = folder / f"{method}.delta"
    compress(pair.base, pair.finetuned, out, method, file_ratio=8, calibration="none")
    return out


@STATE
def test_restore_load_and_verify_are_undisturbed(state, plain: Path, _template, tmp_path: Path):
    archive, base = plain / "svd-quant.delta", _template.base
    with state():
        restore(archive, base, tmp_path / "other")
        loaded = load_state(archive, base)
        verify(archive, base)
        one_by_one = dict(deltafold.tensors(archive, base))
    expected = read_checkpoint(plain / "svd-quant")
    assert same_bits(read_checkpoint(tmp_path / "other"), expected)
    assert same_bits(loaded, expected)
    assert same_bits(one_by_one, expected)


@pytest.mark.integration
@pytest.mark.parametrize("state", ["bf16", "fp64", "meta"])
@pytest.mark.parametrize("method", ["auto", "svd-quant"])
def test_compress_is_undisturbed(method: str, state, plain: Path, _template, tmp_path: Path):
    with STATES[state]():
        found = written(_template, tmp_path, method)
    with Archive(found) as a, Archive(plain / f"{method}.delta") as b:
        assert a.identity == b.identity  # of the manifest, which has every part's checksum


ROOMS = ("codecs", "coding", "linalg", "restoring", "checkpoint", "archive", "compressing")
FACTORIES = {
    "zeros", "ones", "empty", "full", "eye", "tensor", "as_tensor", "scalar_tensor", "arange",
    "linspace", "logspace", "rand", "randn", "randint", "randperm",
}  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_factories_name_dtype_and_device(room: str) -> None:
    """The guard would do; that bits hold without it, too, is two words a call."""
    folder = Path(deltafold.__file__).parent / room
    calls = [
        (f"{file.name}:{node.lineno}", {keyword.arg for keyword in node.keywords})
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
    ]
    assert [where for where, named in calls if not {"dtype", "device"} <= named] == []


@STATE
def test_what_was_set_is_there_again(state) -> None:
    def seen() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.empty(0).device,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(),
            float(torch.full((1,), 1e-39, dtype=torch.float32, device="cpu").mul(1)) == 0,
        )

    with state():
        before = seen()
        with neutral():
            inside = seen()
        with contextlib.suppress(ValueError), neutral():
            raise ValueError
        assert seen() == before
    assert inside == (torch.float32, torch.device("cpu"), False, False, False, "highest", False)


def test_threads_leave_in_any_order() -> None:
    """The first to enter leaves first: the other goes on undisturbed, then all is as it was."""
    entered, left = threading.Event(), threading.Event()
    seen = []

    def second() -> None:
        with neutral():
            entered.set()
            left.wait(10)
            seen.append(torch.get_default_dtype())

    with default_dtype(torch.bfloat16):
        with neutral():
            thread = threading.Thread(target=second)
            thread.start()
            entered.wait(10)
        left.set()
        thread.join()
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == torch.bfloat16


def test_a_loader_inside_a_verb_keeps_its_dtype() -> None:
    with neutral(), default_dtype(torch.float16):
        with neutral():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float16


def test_tasks_of_the_engine_are_undisturbed() -> None:
    seen = []
    with default_dtype(torch.bfloat16), torch.device("meta"), flushing():
        run_tasks("look", [Task("one", lambda: seen.append(torch.zeros(1) + 1e-39))], workers=2)
    assert seen[0].dtype == torch.float32 and float(seen[0]) > 0


def test_replaced_factories_are_named() -> None:
    """As `accelerate.init_empty_weights(include_buffers=True)` does."""
    real = torch.empty

    def replaced(*args, **kwargs):
        return real(*args, **{**kwargs, "device": "meta"})

    torch.empty = replaced
    try:
        with pytest.raises(UsageError, match="no real tensors"), neutral():
            pass
    finally:
        torch.empty = real


@pytest.mark.integration
@pytest.mark.parametrize("name", ["bf16", "fp64", "meta", "meta set", "inference mode"])
def test_a_loaded_model_is_the_same(name: str, tmp_path: Path) -> None:
    base, tuned = write_family(tmp_path, "llama")
    compress(base, tuned, tmp_path / "a.delta", "svd-quant", nominal_ratio=4, calibration="none")
    expected = deltafold.load(tmp_path / "a.delta", base)
    with STATES[name]():
        found = deltafold.load(tmp_path / "a.delta", base)
    assert same_bits(dict(found.named_parameters()), dict(expected.named_parameters()))
    tokens = torch.arange(8)[None]
    assert torch.equal(found(tokens).logits, expected(tokens).logits)
