"""A model run block by block gives the logits and gradients of the model in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_checkpoint
from safetensors.torch import save_file
from tiny_models import FAMILIES, build, tune

from deltafold.calibration import wiring
from deltafold.calibration.backward import backward
from deltafold.calibration.batches import Sample, make_batches
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import StreamedModel
from deltafold.errors import (
    CheckpointError,
    DeltafoldWarning,
    MismatchError,
    NonFiniteError,
)

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SCALES = {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Families whose forward has something of its own: blocks that answer tuples, scaled or capped
# logits, projections around the blocks, experts behind a dense block, recurrence.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 64}),
    "falcon": ("falcon", SIZES),
    "opt": ("opt", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "cohere": ("cohere", SIZES | ENDS | {"intermediate_size": 96}),
    "granite": ("granite", SIZES | ENDS | SCALES | {"intermediate_size": 96}),
    "gemma2": ("gemma2", SIZES | {"intermediate_size": 96, "head_dim": 16, "sliding_window": 8,
                                  "num_key_value_heads": 2, "final_logit_softcapping": 0.5}),
    "gemma4": ("gemma4_text", SIZES | {"intermediate_size": 96, "head_dim": 16,
                                       "num_key_value_heads": 2, "hidden_size_per_layer_input": 8,
                                       "vocab_size_per_layer_input": 160}),
    "gpt-neox": ("gpt_neox", SIZES | {"intermediate_size": 96}),
    "mamba": ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
}  # fmt: skip


def make(family: str) -> Any:
    """A fine-tuned tiny model."""
    if family in FAMILIES:
        model = build(family)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, more = MORE[family]
        config = AutoConfig.for_model(kind, **({"vocab_size": 160} | more))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tune(model)
    return model


def whole_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("family")
            make(family).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture
def llama(folder_of: Any, tmp_path: Path) -> Path:
    return shutil.copytree(folder_of("llama"), tmp_path / "llama")


@pytest.fixture
def samples() -> list[Sample]:
    """Lengths that share batches, and starts anywhere."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(20, 1), (19, 5), (33, 30), (40, 1), (40, 39), (12, 11)]
    return [
        Sample(tuple(torch.randint(3, 160, (n,), generator=generator).tolist()), start)
        for n, start in shapes
    ]


def streamed_logits(model: StreamedModel, samples: list[Sample], **options: Any) -> torch.Tensor:
    with model.forward(make_batches(samples), **options) as done:
        return torch.cat([logits for _, logits in model.logits(done)])


def normed_rows(model: StreamedModel, samples: list[Sample]) -> torch.Tensor:
    batches = make_batches(samples)
    with model.forward(batches) as done, torch.no_grad(), model.last_norm() as normed:
        return torch.cat([normed(done.rows(place)) for place in range(len(batches))])


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "bloom", "granite", "gemma2"])
def test_the_last_norm(folder_of: Any, samples: list[Sample], family: str) -> None:
    """As the projection of the whole model is given it."""
    model, given = whole_model(folder_of(family)), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, x: given.append(x[0][0]))
    rows = []
    with torch.no_grad():
        for batch in make_batches(samples):
            for number in batch.numbers:
                model(torch.tensor([samples[number].ids]))
                rows.append(given.pop()[samples[number].start - 1 : -1])
    found = normed_rows(StreamedModel(folder_of(family)), samples)
    assert torch.allclose(found, torch.cat(rows), rtol=1e-4, atol=1e-4)


def whole_logits(model: Any, samples: list[Sample]) -> torch.Tensor:
    """The same rows in the same order, each sample alone and without padding."""
    rows = []
    for batch in make_batches(samples):
        for number in batch.numbers:
            sample = samples[number]
            rows.append(model(torch.tensor([sample.ids])).logits[0, sample.start - 1 : -1])
    return torch.cat(rows)


@pytest.mark.integration
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_logits_are_those_of_the_whole_model(
    folder_of: Any, samples: list[Sample], family: str
) -> None:
    folder = folder_of(family)
    model = StreamedModel(folder)
    assert not model.skeleton.is_whole
    with torch.no_grad():
        wanted = whole_logits(whole_model(folder), samples)
    found = streamed_logits(model, samples)
    assert found.shape == wanted.shape == (sum(each.counted for each in samples), 160)
    assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max()


@pytest.mark.integration
@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "cohere", "mamba"])
def test_gradients_are_those_of_autograd(
    folder_of: Any, samples: list[Sample], family: str
) -> None:
    folder = folder_of(family)
    model, whole = StreamedModel(folder), whole_model(folder)
    weights = torch.randn(sum(s.counted for s in samples), generator=torch.manual_seed(2))

    def loss(first: int, logits: torch.Tensor) -> torch.Tensor:
        scores = logits.log_softmax(-1)[:, 7]
        return (weights[first : first + len(logits)] * scores).sum()

    found: dict[str, torch.Tensor] = {}

    def hook(name: str, gradient: torch.Tensor) -> None:
        assert name not in found
        found[name] = gradient.clone()

    total = backward(model, make_batches(samples), loss, hook)
    wanted_total = loss(0, whole_logits(whole, samples))
    wanted_total.backward()
    assert total == pytest.approx(float(wanted_total.detach()), rel=1e-5)
    assert set(found) == set(model.checkpoint.tensors)
    scale = max(float(p.grad.norm()) for p in whole.parameters() if p.grad is not None)
    for name, parameter in whole.named_parameters():
        for source, gradient in model.skeleton.pieces(name, parameter.grad):
            # The true gradient of a key's bias is zero: there only the scale of the rest tells.
            assert (found[source] - gradient).norm() < 2e-5 * gradient.norm() + 1e-6 * scale, source


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_mixed_products_of_a_bf16_model(
    family: str, folder_of: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the exact ones but not the same, stored in fp32; `exact` has nothing of it."""
    monkeypatch.setattr("deltafold.calibration.stream.multiplies_bf16", lambda device: True)
    mixed = StreamedModel(folder_of(family), mixed=True)
    batches = make_batches(samples)
    with (
        mixed.forward(batches) as near,
        mixed.exact().forward(batches) as exact,
        StreamedModel(folder_of(family)).forward(batches) as plain,
    ):
        for place, batch in enumerate(batches):
            found, wanted = near.last[place][batch.real], exact.last[place][batch.real]
            assert torch.equal(wanted, plain.last[place][batch.real])
            assert found.dtype == torch.float32 and not torch.equal(found, wanted)
            assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_mixed_products_have_the_same_bits_with_any_number_of_threads(
    folder_of: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafold.calibration.stream.multiplies_bf16", lambda device: True)
    monkeypatch.setattr("deltafold.running.engine.default_workers", lambda: 3)
    model = StreamedModel(folder_of("llama"), mixed=True)
    batches = make_batches(samples, batch_tokens=32)
    assert len(batches) > 2
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with model.forward(batches) as done:
                found.append([done.last[place] for place in range(len(batches))])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_model_in_fp32_is_never_mixed(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).save_pretrained(tmp_path / "a")
    assert not StreamedModel(tmp_path / "a", mixed=True).mixed


def test_only_wanted_gradients(folder_of: Any, samples: list[Sample]) -> None:
    model = StreamedModel(folder_of("mixtral"))
    wanted = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    names: list[str] = []
    backward(
        model,
        make_batches(samples),
        lambda first, logits: logits.square().sum(),
        lambda name, gradient: names.append(name),
        lambda name: name == wanted,
    )
    assert names == [wanted]


def test_gradients_that_would_be_incomplete(folder_of: Any, samples: list[Sample]) -> None:
    """Gemma 4 feeds an embedding of its own into every block: that one is refused, others are not."""
    model, found = StreamedModel(folder_of("gemma4")), []

    def run(wanted: Any) -> None:
        backward(
            model,
            make_batches(samples),
            lambda first, logits: logits.square().sum(),
            lambda name, gradient: found.append(name),
            wanted,
        )

    run(lambda name: ".layers.1." in name)
    assert found and all(".layers.1." in name for name in found)
    with pytest.raises(MismatchError, match="beside hidden states"):
        run(lambda name: "embed" in name)


def test_hidden_states_on_disk_change_nothing(folder_of: Any, samples: list[Sample]) -> None:
    folder = folder_of("llama")
    in_memory, on_disk = StreamedModel(folder), StreamedModel(folder, memory_bytes=1)
    assert torch.equal(streamed_logits(in_memory, samples), streamed_logits(on_disk, samples))
    kept = streamed_logits(on_disk, samples, keep=True)
    assert torch.equal(kept, streamed_logits(in_memory, samples))


def test_inputs_of_blocks_are_kept(folder_of: Any, samples: list[Sample]) -> None:
    model, whole = StreamedModel(folder_of("llama")), whole_model(folder_of("llama"))
    with model.forward(make_batches(samples[:1]), keep=True) as done:
        ids = torch.tensor([samples[0].ids])
        with torch.no_grad():
            states = whole(ids, output_hidden_states=True).hidden_states
        assert len(done.stores) == 3
        assert torch.allclose(done.stores[1][0], states[1], atol=1e-6)


def test_one_block_at_a_time(folder_of: Any, samples: list[Sample]) -> None:
    """No more than one block's parameters are off the meta device, and none afterwards."""
    model = StreamedModel(folder_of("llama"))
    blocks = model.skeleton.blocks
    seen = []

    class Visitor:
        def running(self, number: int, parameters: Any) -> Any:
            filled = [n for n, b in enumerate(blocks) if not next(b.parameters()).is_meta]
            seen.append((number, filled))
            return torch.no_grad()

        def finished(self, number: int) -> None:
            seen.append((number, "finished"))

    with model.forward(make_batches(samples[:1]), visitor=Visitor()) as done:
        list(model.logits(done))
    assert seen == [(0, [0]), (0, "finished"), (1, [1]), (1, "finished")]
    assert all(parameter.is_meta for parameter in model.skeleton.model.parameters())


def test_a_candidate_has_weights_of_its_own(folder_of: Any, samples: list[Sample]) -> None:
    model = StreamedModel(folder_of("mixtral"))
    before = streamed_logits(model, samples)
    scaled = model.with_weights(lambda name: 0.9 * model.checkpoint.tensor(name).float())
    whole = whole_model(folder_of("mixtral"))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter *= 0.9
        wanted = whole_logits(whole, samples)
    assert torch.allclose(streamed_logits(scaled, samples), wanted, atol=1e-6)
    assert torch.equal(streamed_logits(model, samples), before)


def test_head_that_is_stored_although_tied(llama: Path, samples: list[Sample]) -> None:
    """A tied config with a head of its own in the files: the file counts, as in transformers."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with torch.no_grad():
        wanted = whole_logits(whole_model(llama), samples)
    assert torch.allclose(streamed_logits(StreamedModel(llama), samples), wanted, atol=1e-6)


def test_whole_model_as_last_resort(
    folder_of: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the rules of transformers are out of reach, it loads the model, and that is said."""

    def by_name(model: Any, names: Any) -> list[wiring.Group]:
        return [wiring.Group((name,), {name: (name,)}) for name in names]

    wanted = streamed_logits(StreamedModel(folder_of("mixtral")), samples)
    monkeypatch.setattr(wiring, "_groups", by_name)
    with pytest.warns(DeltafoldWarning, match="whole model is held in memory"):
        model = StreamedModel(folder_of("mixtral"))
    assert torch.allclose(streamed_logits(model, samples), wanted, atol=1e-6)
    doubled = model.with_weights(lambda name: 1.1 * model.checkpoint.tensor(name).float())
    assert not torch.allclose(streamed_logits(doubled, samples), wanted, atol=1e-3)
    assert not StreamedModel(folder_of("llama")).skeleton.is_whole


def test_batches_keep_like_lengths_together() -> None:
    samples = [Sample(tuple(range(n)), 1) for n in (5, 40, 38, 5, 3, 20)]
    batches = make_batches(samples)
    assert [each.numbers for each in batches] == [(1, 2), (5,), (0, 3), (4,)]
    assert [each.numbers for each in make_batches(samples, padded=False)] == [
        (1,), (2,), (5,), (0, 3), (4,)
    ]  # fmt: skip
    assert batches[0].real.sum() == 78
    few = make_batches([Sample((1, 2, 3))] * 5, batch_tokens=6)
    assert [len(each.numbers) for each in few] == [2, 2, 1]


def test_counted_positions() -> None:
    for ids, start in (((1, 2), 0), ((1, 2), 2), ((1,), 1)):
        with pytest.raises(ValueError, match="cannot count from"):
            Sample(ids, start)
    batch = make_batches([Sample((9, 8, 7, 6, 5), 3), Sample((4, 3, 2, 1), 1)])[0]
    assert batch.counted.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("allowance_bytes", [0, 1 << 20])
def test_store_gives_back_what_it_was_given(tmp_path: Path, allowance_bytes: int) -> None:
    tensors = [torch.randn(2, 3), torch.randn(5), torch.randn(0, 4)]
    with TensorStore([t.shape for t in tensors], allowance_bytes, tmp_path) as store:
        assert store.on_disk == (allowance_bytes == 0)
        for place in (2, 0, 1):
            store[place] = tensors[place]
        store[0] = 2 * tensors[0]
        assert torch.equal(store[0], 2 * tensors[0])
        assert torch.equal(store[1], tensors[1]) and torch.equal(store[2], tensors[2])
        assert list(tmp_path.iterdir()) == []  # nothing that a killed process could leave
        with pytest.raises(ValueError, match="place 0 is for"):
            store[0] = torch.zeros(3)


def edit(folder: Path, change: Any) -> None:
    tensors = read_checkpoint(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weight(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the weight model.layers.1.mlp.up_proj"):
        StreamedModel(llama)


def test_weight_of_another_shape(llama: Path, samples: list[Sample]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(llama, lambda tensors: tensors.update({name: torch.zeros(7, 64)}))
    with pytest.raises(MismatchError, match=rf"{name} has shape \[7, 64\]"):
        streamed_logits(StreamedModel(llama), samples)


def test_weights_that_give_nan(llama: Path, samples: list[Sample]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(llama, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match="NaN or infinite predictions"):
        streamed_logits(StreamedModel(llama), samples)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (None, CheckpointError, "holds no config.json"),
        ("{", CheckpointError, "cannot be read"),
        ({"model_type": "t5"}, MismatchError, "no causal language model for 't5'"),
        ({"quantization_config": {"quant_method": "fp8"}}, MismatchError, "quantised weights"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, CheckpointError, "be read"),
        ({"num_attention_heads": 5}, CheckpointError, "No model can be built|cannot be read"),
    ],
)
def test_bad_configs(llama: Path, change: Any, error: Any, message: str) -> None:
    path = llama / "config.json"
    config = json.loads(path.read_text())
    if change is None:
        path.unlink()
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(config | change))
    with pytest.raises(error, match=message):
        StreamedModel(llama)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(tuple(range(3, 70)) * 2), "takes at most 64 tokens"),
        (Sample((3, 4, 160)), "samples hold token 160"),
        (None, "no samples"),
    ],
)
def test_samples_that_do_not_suit(folder_of: Any, sample: Sample | None, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        StreamedModel(folder_of("llama")).forward(make_batches([sample] if sample else []))


def test_blocks_that_hand_on_more_are_refused(folder_of: Any) -> None:
    """A model that passes something of one block to the next, beside hidden states."""
    model = StreamedModel(folder_of("llama"))
    decoder: Any = model.skeleton.model.get_decoder()
    forward = decoder.forward

    def leaking(*args: Any, **kwargs: Any) -> Any:
        hidden = decoder.layers[0](decoder.embed_tokens(kwargs["input_ids"]), position_ids=None)
        decoder.layers[1](hidden, value_residual=hidden.mean(0))

    decoder.forward = leaking
    with pytest.raises(MismatchError, match="reaches another beside the hidden states"):
        model.forward(make_batches([Sample((3, 4, 5))]))
    decoder.forward = forward
    assert streamed_logits(StreamedModel(folder_of("llama")), [Sample((3, 4, 5))]).shape == (2, 160)


@pytest.mark.integration
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_some_blocks_alone(family: str, folder_of: Any) -> None:
    """Left out blocks hand their inputs on; a pass that goes on is the pass that never stopped."""
    folder = folder_of(family)
    batches = make_batches([Sample(tuple(range(3, 20))), Sample(tuple(range(30, 41)))])
    model = StreamedModel(folder)
    with (
        model.forward(batches, keep=True) as whole,
        model.forward(batches, blocks=[1]) as second,
        model.resume(whole, 0, [1]) as again,
        model.resume(whole, 1, [1]) as rest,
        model.resume(whole, 1, []) as nothing,
        model.forward(batches, blocks=[]) as none,
    ):
        for place in range(len(batches)):
            assert torch.equal(again.last[place], second.last[place])
            assert torch.equal(rest.last[place], whole.last[place])
            assert torch.equal(nothing.last[place], whole.stores[1][place])
            assert torch.equal(none.last[place], whole.stores[0][place])
            assert not torch.equal(second.last[place], whole.last[place])
