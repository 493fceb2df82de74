"""Fixed-width packing: pinned bits, speed paths equal to the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.coding import packing

few = settings(deadline=None, max_examples=60)
CHUNK = packing._CHUNK


def by_definition(values: list[int], width: int) -> list[int]:
    """Bits as text, most significant first, filled up with zeros."""
    text = "".join(format(value, f"0{width}b") for value in values)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


PINNED = {  # pack([0, 1, 2, ..., 9] mod 2^width)
    1: "5540",
    2: "1b1b10",
    3: "05397704",
    4: "0123456789",
    5: "00443214c74240",
    6: "0010831051872090",
    7: "000410308143071024",
    8: "00010203040506070809",
}


@pytest.mark.parametrize("width", range(1, 9))
def test_packed_bytes_are_pinned(width: int):
    values = np.arange(10) % (1 << width)
    assert packing.pack(values, width).tobytes().hex() == PINNED[width]


@few
@given(st.integers(1, 8), st.data())
def test_every_narrow_width_follows_the_definition(width: int, data: st.DataObject):
    values = data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=40))
    dtype = data.draw(st.sampled_from([np.uint8, np.int16, np.int64, np.uint64]))
    packed = packing.pack(np.array(values, dtype=dtype), width)
    assert packed.dtype == np.uint8
    assert packed.tolist() == by_definition(values, width)
    assert packing.unpack_u8(packed, width, len(values)).tolist() == values
    wide = packing.unpack(packed, width, len(values))
    assert wide.dtype == np.uint64
    assert wide.tolist() == values


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 8, 9, 13, 32])
@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_chunks_join_without_a_seam(width: int, count: int):
    values = np.random.default_rng(width).integers(0, 1 << width, count, dtype=np.uint64)
    packed = packing.pack(values, width)
    assert len(packed) == packing.packed_bytes(count, width)
    assert np.array_equal(packing.unpack(packed, width, count), values)
    seam = slice(CHUNK - 8, CHUNK + 8)
    around = packed[(CHUNK - 8) * width // 8 : (CHUNK + 8) * width // 8]
    expected = by_definition([int(v) for v in values[seam]], width)
    assert around.tolist() == expected[: len(around)]


def test_values_are_cut_to_their_low_bits():
    assert (
        packing.pack(np.array([255, 9]), 3).tolist() == packing.pack(np.array([7, 1]), 3).tolist()
    )


def test_inputs_may_be_strided_and_read_only():
    values = np.arange(100, dtype=np.uint8)[::2] % 8
    packed = packing.pack(values, 3)
    packed.flags.writeable = False
    assert packing.unpack_u8(packed, 3, 50).tolist() == values.tolist()
    assert packing.unpack_u8(np.repeat(packed, 2)[::2], 3, 50).tolist() == values.tolist()


def test_unpacked_bytes_are_a_copy():
    packed = np.arange(10, dtype=np.uint8)
    packing.unpack_u8(packed, 8, 10)[0] = 99
    assert packed[0] == 0


@pytest.mark.parametrize("width", [0, 9, -1])
def test_only_narrow_widths_come_as_bytes(width: int):
    with pytest.raises(ValueError, match="do not come as bytes"):
        packing.unpack_u8(np.zeros(4, dtype=np.uint8), width, 4)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_wrong_length_is_refused(width: int):
    packed = packing.pack(np.zeros(20, dtype=np.uint8), width)
    for count in (20 - 9, 20 + 9):
        with pytest.raises(ValueError, match="cannot hold"):
            packing.unpack_u8(packed, width, count)
