"""Numbers as a person would write them: 134.5M, 8.81, 75.2%, 1.2 GiB."""

from __future__ import annotations

import math
from typing import Any

from minitron.log import duration

MISSING = "–"


def finite(value: Any) -> float | None:
    """A JSON value as a float, or None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def count(value: float | None) -> str:
    """A number of things: 9,216 · 49.2K · 134.5M · 1.2B."""
    if value is None:
        return MISSING
    if abs(value) < 9_999.5:
        return f"{value:,.0f}"
    for size, unit in ((1e3, "K"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        if abs(value) / size < 999.95:
            return f"{value / size:.1f}{unit}"
    return f"{value:.2e}"


def exact(value: float | None) -> str:
    """A whole number with all its digits."""
    return MISSING if value is None else f"{value:,.0f}"


def number(value: float | None) -> str:
    """A measured value with about three digits."""
    if value is None:
        return MISSING
    size = abs(value)
    if size >= 1000:
        return count(value)
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.1 or size == 0:
        return f"{value:.2f}"
    if size >= 0.001:
        return f"{value:.2g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def loss(value: float | None) -> str:
    """A loss in nats per token, to three decimals."""
    return MISSING if value is None else f"{value:.3f}"


def percent(share: float | None, *, digits: int = 1) -> str:
    """A share of one as per cent; nothing but the whole reads 100%."""
    if share is None:
        return MISSING
    text = f"{100 * share:.{digits}f}"
    if share < 1 and float(text) >= 100:
        text = f"{100 - 10**-digits:.{digits}f}" if digits else "99"
    return "100%" if float(text) == 100 else f"{text}%"


def size(num_bytes: float | None) -> str:
    """Bytes in binary units."""
    if num_bytes is None:
        return MISSING
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def seconds(value: float | None) -> str:
    """A wall time: 0.4s, 12s, 3m05s, 2h14m."""
    if value is None:
        return MISSING
    return f"{value:.1f}s" if value < 9.95 else duration(value)


def moment(iso: Any) -> str:
    """An ISO time to the minute."""
    return str(iso)[:16].replace("T", " ") if iso else MISSING


def words(names: list[str]) -> str:
    """A list in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
