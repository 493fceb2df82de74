"""Counter-based positions, packing, Elias-Fano, byte planes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.coding import counter, packing, planes

few = settings(deadline=None, max_examples=40)


def splitmix64(key: int, index: int) -> int:
    """The generator in plain Python integers: what a stranger would write from the format page."""
    mask = (1 << 64) - 1
    z = ((index + 1) * 0x9E3779B97F4A7C15 + key) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_generator_test_vector():
    """Pinned for ever: archives hold positions that follow from these numbers."""
    assert counter.random_u64(0, 0, 3).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    key = counter.derive_key(0, "model.layers.0.mlp.up_proj.weight", "0")
    assert key == 0xA6A7854E2D6C487D


@few
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 50))
def test_generator_equals_its_definition(key: int, start: int, count: int):
    expected = [splitmix64(key, start + n) for n in range(count)]
    assert counter.random_u64(key, start, start + count).tolist() == expected


@few
@given(st.integers(0, 2**63), st.integers(0, 300_000), st.floats(0, 1))
def test_exactly_the_promised_number_is_kept(key: int, total: int, share: float):
    keep = int(total * share)
    threshold, drawn = counter.draw(key, total, keep)
    positions = counter.kept_positions(key, 0, total, threshold)
    assert positions.tolist() == drawn.tolist()
    assert abs(len(drawn) - keep) <= 1  # a tie of 32-bit keys moves the count by one
    assert np.all(np.diff(drawn) > 0)


def test_draw_takes_the_smallest_keys():
    keys = np.array([splitmix64(9, n) >> 32 for n in range(3000)])
    _, drawn = counter.draw(9, 3000, 40)
    assert drawn.tolist() == np.sort(np.argsort(keys)[:40]).tolist()
    assert counter.keys_at(9, drawn).tolist() == keys[drawn].tolist()


def test_kept_positions_do_not_depend_on_how_they_are_read():
    threshold, _ = counter.draw(7, 200_000, 9_000)
    whole = counter.kept_positions(7, 0, 200_000, threshold)
    pieces = [counter.kept_positions(7, a, a + 777, threshold) for a in range(0, 199_689, 777)]
    joined = np.concatenate(pieces)
    assert joined.tolist() == whole[whole < 777 * 257].tolist()


@few
@given(st.integers(0, 2**63), st.integers(0, 40), st.integers(1, 500), st.integers(0, 500))
def test_subset_is_exact_and_ascending(key: int, column: int, size: int, keep: int):
    chosen = counter.subset(key, column, size, keep)
    assert len(chosen) == min(keep, size)
    assert np.all(np.diff(chosen) > 0)
    assert len(chosen) == 0 or (chosen[0] >= 0 and chosen[-1] < size)


def test_subset_keeps_the_smallest_keys():
    keys = [splitmix64(5, 3 * 20 + row) >> 32 for row in range(20)]
    expected = sorted(np.argsort(keys, kind="stable")[:6].tolist())
    assert counter.subset(5, 3, 20, 6).tolist() == expected


def test_every_position_is_drawn_equally_often():
    counts = np.zeros(50)
    for key in range(2000):
        counts[counter.subset(key, 0, 50, 10)] += 1
    assert abs(counts.mean() - 400) < 1e-9
    assert counts.std() < 3 * np.sqrt(2000 * 0.2 * 0.8)


def test_gaussian_has_its_moments():
    sample = counter.gaussian(3, 400, 500)
    assert abs(sample.mean()) < 0.01
    assert abs(sample.std() - 1) < 0.01
    assert abs((sample**4).mean() - 3) < 0.1


@few
@given(st.integers(0, 32), st.data())
def test_packing_comes_back(width: int, data: st.DataObject):
    values = data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=70))
    packed = packing.pack(np.array(values, dtype=np.uint64), width)
    assert len(packed) == packing.packed_bytes(len(values), width)
    assert packing.unpack(packed, width, len(values)).tolist() == values


def test_packing_by_hand():
    assert packing.pack(np.array([5, 2, 7]), 3).tolist() == [0b10101011, 0b10000000]


def test_unpacking_refuses_the_wrong_length():
    with pytest.raises(ValueError, match="cannot hold"):
        packing.unpack(np.zeros(3, dtype=np.uint8), 4, 100)


@few
@given(st.integers(1, 5000), st.data())
def test_elias_fano_comes_back_at_its_stated_size(universe: int, data: st.DataObject):
    positions = sorted(data.draw(st.sets(st.integers(0, universe - 1), max_size=80)))
    coder = packing.EliasFano(len(positions), universe)
    low, high = coder.encode(np.array(positions, dtype=np.int64))
    assert (len(low), len(high)) == (coder.low_bytes, coder.high_bytes)
    assert coder.decode(low, high).tolist() == positions


def test_elias_fano_of_the_docstring():
    low, high = packing.EliasFano(3, 16).encode(np.array([2, 5, 13]))
    assert low.tolist() == [0b10010100]
    assert high.tolist() == [0b10100100]


def test_elias_fano_is_near_its_bound():
    total, kept = 1 << 20, 1 << 14
    positions = np.sort(np.random.default_rng(0).choice(total, kept, replace=False))
    low, high = packing.EliasFano(kept, total).encode(positions)
    assert 8 * (len(low) + len(high)) / kept < 2 + np.log2(total / kept) + 0.1


def test_elias_fano_refuses_damage():
    coder = packing.EliasFano(3, 16)
    low, high = coder.encode(np.array([2, 5, 13]))
    damaged = high.copy()
    damaged[0] ^= 1
    with pytest.raises(ValueError, match="positions found"):
        coder.decode(low, damaged)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8]


@few
@given(st.sampled_from(DTYPES), st.binary(min_size=0, max_size=160), st.integers(0, 2**32))
def test_difference_is_lossless_on_any_bits(dtype: torch.dtype, raw: bytes, seed: int):
    """Any bit pattern: NaN payloads, infinities, negative zero, subnormals."""
    n = len(raw) // dtype.itemsize
    tuned = np.frombuffer(raw[: n * dtype.itemsize], dtype=np.uint8).copy()
    other = np.random.default_rng(seed).integers(0, 256, len(tuned), dtype=np.uint8)
    a, b = (planes.from_bit_pattern(x, dtype, (n,)) for x in (tuned, other))
    zigzag = planes.difference(a, b)
    back = planes.undo_difference(zigzag, b)
    assert planes.bit_pattern(back).tobytes() == tuned.tobytes()
    parts = planes.compress_planes(zigzag)
    assert planes.decompress_planes(parts, dtype.itemsize, n).tolist() == zigzag.tolist()


def test_difference_counts_values_between():
    """Neighbouring floats differ by one, also across zero; zig-zag makes -1, 1 into 1, 2."""
    one = torch.tensor([1.0], dtype=torch.bfloat16)
    above = torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)
    assert planes.difference(above, one).tolist() == [2]
    assert planes.difference(one, above).tolist() == [1]
    tiny = planes.from_bit_pattern(np.array([1], dtype=np.uint16), torch.bfloat16, (1,))
    assert planes.difference(tiny, torch.zeros(1, dtype=torch.bfloat16)).tolist() == [2]


def test_inflate_refuses_another_size():
    part = planes.deflate(b"abc" * 100)
    with pytest.raises(ValueError, match="promised"):
        planes.inflate(part, 299)
    part[-1] ^= 255
    with pytest.raises(ValueError):
        planes.inflate(part[:-4], 300)
