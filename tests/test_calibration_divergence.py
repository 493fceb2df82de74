"""KL between a candidate and the fine-tune, against the formula on whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import VOCABULARY, make_llama, nudged, save

from deltafold.calibration import Judge, Sample, StreamedModel, backward, make_batches
from deltafold.calibration.divergence import divergence_sums, norms
from deltafold.checkpoint import open_checkpoint
from deltafold.errors import NonFiniteError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fine-tune, and a base that knows four tokens less."""
    folder = tmp_path_factory.mktemp("pair")
    tuned = make_llama(0, VOCABULARY + 4)
    nudged(tuned, 1, 0.3)
    return save(tuned, folder / "tuned"), save(make_llama(0), folder / "base")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    return [
        Sample(tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()), start)
        for n, start in ((20, 1), (19, 15), (33, 30), (8, 4))
    ]


def formula(model: Any, other: Any, samples: list[Sample]) -> tuple[float, float]:
    """(mean KL, agreement) over all counted tokens, one sample at a time, in float64."""
    kl, agreed = [], []
    for sample in samples:
        p, q = (
            each(torch.tensor([sample.ids])).logits[0, sample.start - 1 : -1].double()
            for each in (model, other)
        )
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreed.append((p.argmax(-1) == q.argmax(-1)).double())
    return float(torch.cat(kl).mean()), float(torch.cat(agreed).mean())


def whole_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def noisy(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a candidate: the fine-tune's with noise."""
    checkpoint, generator = open_checkpoint(folder), torch.Generator().manual_seed(7)
    weights = {}
    for name in checkpoint.tensors:
        tensor = checkpoint.tensor(name)
        weights[name] = tensor + 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return weights


@pytest.mark.parametrize("memory_bytes", [None, 1])
@torch.no_grad()
def test_a_candidate(
    folders: tuple[Path, Path], samples: list[Sample], memory_bytes: int | None
) -> None:
    weights = noisy(folders[0])
    other = whole_model(folders[0])
    other.load_state_dict(weights, strict=False)
    kl, agreement = formula(whole_model(folders[0]), other, samples)
    with Judge(*folders, samples, memory_bytes) as judge:
        found = judge.compare(weights.__getitem__)
        assert found.kl == pytest.approx(kl, rel=1e-5) and kl > 0.01
        assert found.agreement == pytest.approx(agreement) and 0 < agreement < 1
        assert found.tokens == judge.tokens == 19 + 4 + 3 + 4
        assert judge.kl(weights.__getitem__) == found.kl
        assert judge.kl(judge.model.weights) == 0.0


@torch.no_grad()
def test_the_base_as_a_candidate(folders: tuple[Path, Path], samples: list[Sample]) -> None:
    """Rows of tokens that the base does not know are the fine-tune's."""
    tuned, base = whole_model(folders[0]), whole_model(folders[1])
    grown = whole_model(folders[0])
    state = dict(base.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], tuned.state_dict()[name][VOCABULARY:]])
    grown.load_state_dict(state)
    kl, _ = formula(tuned, grown, samples)
    with Judge(*folders, samples) as judge:
        assert judge.kl(judge.base_weights) == pytest.approx(kl, rel=1e-5)
    with (
        Judge(folders[0], None, samples) as judge,
        pytest.raises(ValueError, match="given no base"),
    ):
        judge.kl(judge.base_weights)


def test_a_candidate_that_breaks_down(folders: tuple[Path, Path], samples: list[Sample]) -> None:
    weights = noisy(folders[0])
    weights["model.norm.weight"].fill_(torch.inf)
    with (
        Judge(*folders, samples) as judge,
        pytest.raises(NonFiniteError, match="NaN or infinite predictions"),
    ):
        judge.kl(weights.__getitem__)


def test_rows_of_the_teacher(
    folders: tuple[Path, Path], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafold.calibration.stream.LOGITS_BYTES", 4 * (VOCABULARY + 4) * 7)
    with Judge(*folders, samples) as judge:
        with judge.model.forward(judge.batches) as done:
            rows = torch.cat([logits for _, logits in judge.model.logits(done)])
        assert len(judge._teacher) > len(judge.batches)
        for start, stop in ((0, 30), (5, 9), (6, 22), (29, 30)):
            assert torch.equal(judge.teacher_logits(start, stop), rows[start:stop])
        for start, stop in ((0, 31), (4, 4), (-1, 3)):
            with pytest.raises(ValueError, match="there are 30 rows"):
                judge.teacher_logits(start, stop)


def test_gradient_of_the_divergence(folders: tuple[Path, Path], samples: list[Sample]) -> None:
    """A step against the gradient of KL, tensor by tensor, lowers it."""
    weights = noisy(folders[0])
    with Judge(*folders, samples) as judge:

        def loss(first: int, logits: torch.Tensor) -> torch.Tensor:
            p = judge.teacher_logits(first, first + len(logits)).log_softmax(-1)
            return (p.exp() * (p - logits.log_softmax(-1))).sum() / judge.tokens

        model = judge.model.with_weights(weights.__getitem__)
        gradients: dict[str, torch.Tensor] = {}
        before = backward(model, judge.batches, loss, gradients.__setitem__)
        assert before == pytest.approx(judge.kl(weights.__getitem__), rel=1e-4)
        squares = sum(float(each.square().sum()) for each in gradients.values())
        step = 1e-3 / squares
        moved = {name: tensor - step * gradients[name] for name, tensor in weights.items()}
        # To first order the loss falls by step * |gradient|^2.
        assert before - judge.kl(moved.__getitem__) == pytest.approx(1e-3, rel=0.2)


def test_a_streamed_model_can_be_shared(
    folders: tuple[Path, Path], samples: list[Sample], tmp_path: Path
) -> None:
    model = StreamedModel(folders[0], memory_bytes=1, scratch=tmp_path)
    with Judge(model, None, samples, memory_bytes=1) as judge:
        assert judge.model is model and judge._teacher.on_disk
        assert judge.kl(model.weights) == 0.0
    assert len(make_batches(samples)) == len(judge.batches)


def test_sums_of_logits_far_apart() -> None:
    """Far beyond what exp() takes: KL of two certain and opposed predictions is their gap."""
    p, q = torch.tensor([[900.0, 0.0]]), torch.tensor([[0.0, 900.0]])
    assert divergence_sums(p, norms(p), q) == (900.0, 0)
    assert divergence_sums(p, norms(p), p + 7) == (0.0, 1)
