"""One stream of entropy-coded symbols in order, under integer frequencies that sum to 2^24.

Asymmetric numeral systems (rANS, Duda 2013) by the library `constriction`. A message is written as a
list of runs in the order in which they are read, each under one row of frequencies or, for bits that
are about uniform, under none.

Why the symbols are the same on every machine: decoding rests on integers only. A coder's state is
64 bits, its words 32, and a symbol s has a frequency f_s, the f summing to 2^24. Decoding takes

    q = state mod 2^24;  s such that left_s <= q < left_s + f_s;  left_s = f_0 + ... + f_(s-1)
    state = floor(state / 2^24) f_s + q - left_s;  if state < 2^32: state = 2^32 state + next word

with words taken from the last to the first. The library wants floats and turns p_0 .. p_(k-1) into
left_s = s + floor((p_0 + ... + p_(s-1)) (2^24 - k) / sum(p)). Given p_s = f_s - 1, an integer below
2^24, each sum is an integer below 2^24 too, so exact in any float; sum(p) = 2^24 - k, the factor is
exactly 1, and left_s is the integer wanted. No rounding happens anywhere. The tests decode with
plain integers and pin words.
"""

from __future__ import annotations

import constriction
import numpy as np
from numpy.typing import NDArray

from deltafold.coding.frequencies import PRECISION, Frequencies

_Ans = constriction.stream.stack.AnsCoder
_Model = constriction.stream.model
_UNIFORM_BITS = 16  # at once; the library's precision is 24


class RunWriter:
    """Collects runs, then codes them last to first, since what is read first lies on top."""

    def __init__(self) -> None:
        self._runs: list[tuple[NDArray[np.integer], Frequencies | int]] = []

    def symbols(self, symbols: NDArray[np.integer], frequencies: Frequencies) -> None:
        """Symbols (n,) below 256. Raises ValueError if one has frequency 0."""
        seen = np.flatnonzero(np.bincount(symbols, minlength=len(frequencies)))
        if len(seen) and (seen[-1] >= len(frequencies) or not frequencies[seen].all()):
            raise ValueError("a symbol that its row of frequencies does not hold")
        self._runs.append((symbols, frequencies))

    def bits(self, values: NDArray[np.unsignedinteger], width: int) -> None:
        """Integers (n,) below 2^width, each with `width` bits."""
        for low in range(0, width, _UNIFORM_BITS):
            part = values >> values.dtype.type(low)
            self._runs.append((part, min(_UNIFORM_BITS, width - low)))

    def words(self) -> NDArray[np.uint32]:
        coder = _Ans()
        for symbols, how in reversed(self._runs):
            if isinstance(how, int):
                mask = symbols.dtype.type((1 << how) - 1)
                coder.encode_reverse((symbols & mask).astype(np.int32), _Model.Uniform(1 << how))
                continue
            alphabet, model = _model(how)
            if model is not None and len(symbols):
                rank = np.zeros(256, dtype=np.int32)
                rank[alphabet] = np.arange(len(alphabet))
                coder.encode_reverse(rank[symbols], model)
        return coder.get_compressed()


class RunReader:
    """Reads runs in order. Raises ValueError for words that cannot be, or are not used up."""

    def __init__(self, words: NDArray[np.uint32]):
        if len(words) and words[-1] == 0:
            raise ValueError("entropy-coded words are damaged: the last word is zero")
        self._coder = _Ans(np.ascontiguousarray(words, dtype=np.uint32))

    def symbols(self, count: int, frequencies: Frequencies) -> NDArray[np.uint8]:
        """The next `count` symbols."""
        alphabet, model = _model(frequencies)
        if model is None:
            return np.full(count, alphabet[0], dtype=np.uint8)
        return alphabet[self._coder.decode(model, count)]

    def bits(self, count: int, width: int) -> NDArray[np.uint64]:
        """The next `count` integers of `width` bits."""
        out = np.zeros(count, dtype=np.uint64)
        for low in range(0, width, _UNIFORM_BITS):
            size = min(_UNIFORM_BITS, width - low)
            part = self._coder.decode(_Model.Uniform(1 << size), count)
            out |= part.astype(np.uint64) << np.uint64(low)
        return out

    def end(self) -> None:
        if not self._coder.is_empty():
            raise ValueError("entropy-coded words are damaged: some are left over")


def _model(frequencies: Frequencies) -> tuple[NDArray[np.uint8], object | None]:
    """(symbols that occur, the library's model of them); no model where there is only one symbol."""
    if int(frequencies.sum()) != 1 << PRECISION:
        raise ValueError(f"frequencies do not sum to 2^{PRECISION}")
    alphabet = np.flatnonzero(frequencies).astype(np.uint8)
    if len(alphabet) == 1:
        return alphabet, None
    chances = (frequencies[alphabet] - 1).astype(np.float32)
    return alphabet, _Model.Categorical(chances, perfect=False)
