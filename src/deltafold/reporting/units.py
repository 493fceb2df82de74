"""Numbers as people read them. Bytes are decimal: 1 MB is 1,000,000 bytes."""

from __future__ import annotations

import math

MISSING = "–"
EXACT_KL = 1e-9  # a divergence below this is the rounding of equal outputs


def bytes_text(n_bytes: float | None) -> str:
    """Three digits and a unit.

    >>> bytes_text(8_412_000), bytes_text(999_999), bytes_text(12)
    ('8.41 MB', '1 MB', '12 B')
    """
    if n_bytes is None:
        return MISSING
    size, units = float(n_bytes), ["TB", "GB", "MB", "kB", "B"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop()
    return f"{size:.3g} {units[-1]}" if size < 999.5 else f"{size:,.0f} {units[-1]}"


def ratio_text(ratio: float | None) -> str:
    """A ratio as a factor: `32.1x`."""
    if ratio is None:
        return MISSING
    return f"{ratio:,.0f}x" if ratio >= 99.95 else f"{ratio:.1f}x"


def ratio_words(ratio: float) -> str:
    """A ratio that was asked for, as short as it can be.

    >>> ratio_words(32.0)
    '32x'
    """
    return f"{ratio:g}x"


def smaller_text(ratio: float | None) -> str:
    """A file_ratio in words.

    >>> smaller_text(32.08), smaller_text(0.5)
    ('32.1x smaller', '2.0x larger')
    """
    if ratio is None or ratio <= 0:
        return MISSING
    return f"{ratio_text(ratio)} smaller" if ratio >= 1 else f"{ratio_text(1 / ratio)} larger"


def number_text(value: float | None, stderr: float | None = None) -> str:
    """Three digits; with a standard error, as many decimals as that error has in two digits."""
    if value is None:
        return MISSING
    if not stderr:
        return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
    decimals = 0
    while stderr * 10**decimals < 9.95 and decimals < 8:
        decimals += 1
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def kl_text(value: float | None, stderr: float | None = None) -> str:
    """A KL divergence; that of equal outputs is said in words."""
    return "0 (exact)" if value is not None and value <= EXACT_KL else number_text(value, stderr)


def plain_text(value: float, deviation: float | None = None, digits: int = 3) -> str:
    """A few digits, never an exponent; a deviation with as many decimals.

    >>> plain_text(0.00015712, 0.0000098), plain_text(471.2)
    ('0.000157 ± 0.000010', '471')
    """
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{decimals}f}"
    return text if deviation is None else f"{text} ± {deviation:,.{decimals}f}"


def lowered_text(scale: float) -> str:
    """What is said of a learning rate that was lowered on the way; nothing if it was not.

    >>> lowered_text(1 / 3), lowered_text(1.0)
    (', the rate lowered 3-fold', '')
    """
    return f", the rate lowered {round(1 / scale)}-fold" if scale < 1 else ""


def percent_text(share: float | None, stderr: float | None = None) -> str:
    """A share between 0 and 1 as a percentage with one decimal."""
    if share is None:
        return MISSING
    error = f" ± {100 * stderr:.1f}" if stderr else ""
    return f"{100 * share:.1f}{error} %"


def norm_text(share: float | None) -> str:
    """A share that may be very small as a percentage, two digits."""
    return MISSING if share is None else f"{plain_text(100 * share, digits=2)} %"


def seconds_text(seconds: float | None) -> str:
    """Seconds, or minutes and seconds from two minutes on."""
    if seconds is None:
        return MISSING
    if seconds < 119.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
