"""Similarities of states, on cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from deltafold.folding.methods.similarity import ABSENCES, SIMILARITIES, cosine, mahalanobis
from deltafold.folding.methods.similarity import angular as angular_of

MATRICES = [name for name in SIMILARITIES if name not in ABSENCES]


def random_states(s: int = 4, n: int = 40, w: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, n, w, generator=generator)
    steps = torch.randn(s - 1, n, w, generator=generator)
    return torch.cat([first, first + 0.5 * steps.cumsum(0)])


@pytest.mark.parametrize("name", MATRICES)
def test_every_similarity_ranks_equal_before_near_before_far(name: str) -> None:
    alike = SIMILARITIES[name].matrix(random_states())
    assert alike.shape == (4, 4) and alike.isfinite().all()
    assert torch.allclose(alike, alike.T, atol=1e-9)
    assert alike[0, 0] > alike[0, 1] > alike[0, 3]
    if SIMILARITIES[name].ratio:
        assert (alike >= 0).all() and (alike <= 1 + 1e-12).all()


@pytest.mark.parametrize("name", MATRICES)
def test_every_similarity_reads_every_row(name: str) -> None:
    states = random_states()
    other = states.clone()
    other[1, -1] = -3 * states[1, -1]
    one, two = (SIMILARITIES[name].matrix(each)[0, 1] for each in (states, other))
    assert one != two


def test_block_influence_by_hand() -> None:
    """Two tokens: unchanged, and turned by 90 degrees. Row by row, so BI = 1 - (1 + 0) / 2.

    Taken over the whole at once the cosine would be 1 / (1 + 9) x ..., led by the longer row.
    """
    states = torch.tensor([[[1.0, 0], [0, 3]], [[1, 0], [3, 0]]])
    assert 1 - cosine(states)[0, 1] == pytest.approx(0.5)


def test_zero_rows_are_counted_openly() -> None:
    states = torch.tensor([[[0.0, 0], [0, 0]], [[0, 0], [1, 0]]])
    assert cosine(states)[0, 1] == pytest.approx((1 + 0) / 2)


def test_angles_by_hand() -> None:
    half = 2**-0.5
    states = torch.tensor([[[1.0, 0]], [[half, half]], [[0, 1]], [[-1, 0]]])
    found = 1 - angular_of(states)
    assert found[0].tolist() == pytest.approx([0, 0.25, 0.5, 1], abs=1e-7)


def test_cka_does_not_mind_rotation_and_scale() -> None:
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)).double()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double())[
        0
    ]
    assert SIMILARITIES["cka"].matrix(torch.stack([x, 4 * x @ turn + 2]))[0, 1] == pytest.approx(1)
    # One axis each of a square's corners: centred Grams (1,1,-1,-1), (1,-1,1,-1) are orthogonal.
    square = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]])[:, :, None]
    assert SIMILARITIES["cka"].matrix(square)[0, 1] == pytest.approx(0, abs=1e-12)


def test_euclidean_by_hand() -> None:
    states = torch.tensor([[[3.0, 4]], [[3, 4]], [[-3, -4]], [[0, 4]]])
    assert SIMILARITIES["euclidean"].matrix(states)[0].tolist() == pytest.approx(
        [1, 1, 0, 1 - 3 / 9]
    )


def test_mahalanobis_counts_a_step_by_the_spread_of_its_axis() -> None:
    """Axis 0 spreads ten times as far: a step of ten along it is as long as one along axis 1."""
    base = torch.tensor([[10.0, 0], [-10, 0], [0, 1], [0, -1]])
    along = torch.stack([base, base + torch.tensor([5.0, 0]), base + torch.tensor([0.0, 5.0])])
    alike = mahalanobis(along)
    assert alike[0, 1] > 2 * alike[0, 2]
    # C = diag(200/3, 2/3) + 0.01 x mean; d^2 = 25 / (200/3 + 0.01 x 101/3) / 2
    c = 200 / 3 + 0.01 * (200 / 3 + 2 / 3) / 2
    assert alike[0, 1] == pytest.approx(1 / (1 + math.sqrt(25 / c / 2)))
