"""`methods`: what codecs there are."""

from __future__ import annotations

from typing import Any

import numpy as np

from deltafold.codecs import delta_codec, get, names
from deltafold.compressing.request import MethodsRequest
from deltafold.running.front import front

RATIO = 32


def run_methods(request: MethodsRequest) -> list[dict[str, Any]]:
    """One row a codec; see `MethodsRequest`."""
    rows, shape = [], request.shape
    for name in names():
        codec = get(name)
        bits = None
        if codec.lossy:
            instance = delta_codec(name)
            spectrum = 1.0 / np.sqrt(np.arange(1, min(shape) + 1))
            settings = instance.settings_for(shape, 1.0 / RATIO, spectrum)
            bits = 8 * instance.part_bytes(shape, settings) / (shape[0] * shape[1])
        rows.append(
            {
                "name": name,
                "title": codec.title,
                "paper": codec.paper,
                "lossy": codec.lossy,
                "method": codec.method,
                "version": codec.version,
                "bits_per_weight": bits,
            }
        )
    return rows


methods = front("methods", MethodsRequest, run_methods)
