"""`delta-come`: singular vectors in mixed precision, 8, 3 and 2 bits.

Source: Ping et al. 2024, "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large
Language Models" (arXiv 2406.08903). Singular values of a delta fall quickly, so bits go to the
leading components:

    components 1-2 at 8 bits, 3-34 at 3 bits, after that as many at 2 bits as fit

A share pays for B = 16 o i share / (o + i) bits a pair of entries. In that order each kind takes as
many components as B still pays for: min(2, B / 8) at 8 bits, min(32, rest / 3) at 3, rest / 2 at 2,
rounded down. A small share thus drops the components at 2 bits first, then some at 3, then at 8.

Band after band, V is rounded by GPTQ under E[x x^T] of the layer's inputs, then U under that of
diag(s) V^T x, with the V that was rounded; without moments both to nearest. The inputs are those of
the fine-tune, seen once a layer. (The released code adds each coded band to the base and runs the
layer again before the next: that moves the inputs a little, not the targets.) Here it is the target
that follows: the U of the next band is what is left of the delta on that band's vectors, after all
coded bands,

    U_k diag(s_k) = (D - sum of coded bands) V_k

Layout (`coding/coded_vectors.py`), for r components, entries of a vector in order, vector after
vector:

    codes   uint8      V 8 bit | U 8 bit | V 3 bit | U 3 bit | V 2 bit | U 2 bit    packed
    scales  fp16/bf16  in the same order, one for 128 entries
    s       bf16       r

Lost: every component after the r-th, and the rounding of U and V to their levels.
"""

from __future__ import annotations

from deltafold.codecs.base import Settings, Shape, Spectrum
from deltafold.codecs.svd_quant import CodedFactors
from deltafold.coding.coded_vectors import Band, bands

MOST = {8: 2, 3: 32}  # components at 8 and at 3 bits, where the share pays for them


class DeltaCoMe(CodedFactors):
    name = "delta-come"
    title = "truncated SVD, 8/3/2 bits"
    paper = "arXiv 2406.08903"

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        o, i = shape
        bits = int(16 * o * i * share / (o + i))
        rank = min(shape) if spectrum is None else min(len(spectrum), *shape)
        settings: Settings = {}
        for width in (8, 3, 2):
            count = min(bits // width, MOST.get(width, rank), rank)
            settings[f"at{width}"] = count
            bits, rank = bits - count * width, rank - count
        return settings

    def cut(self, settings: Settings) -> list[Band]:
        return bands([(int(settings[f"at{width}"]), width) for width in (8, 3, 2)])

    def within(self, settings: Settings, rank: int) -> Settings:
        clipped: Settings = {}
        for name in ("at8", "at3", "at2"):
            clipped[name] = min(int(settings[name]), rank)
            rank -= clipped[name]
        return clipped


CODEC = DeltaCoMe
