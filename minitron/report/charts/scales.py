"""From values to positions: linear and logarithmic scales with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from minitron.report.formats import count, number


@dataclass(frozen=True)
class Scale:
    """Maps ``low``–``high`` to ``start``–``end`` in user units."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value."""
        low, high, here = (math.log(v) for v in (self.low, self.high, max(value, self.low))) if self.log else (self.low, self.high, value)
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        """A tick's value in as many digits as tell it from its neighbours."""
        if tick == 0:
            return "0"
        if self.log:
            return f"{tick:g}" if 0.001 <= tick < 1000 else number(tick)
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(tick)
        if abs(self.high) >= 10_000:
            return count(tick).replace(".0", "")
        if max(abs(self.low), abs(self.high)) < 1e-3:
            return number(tick)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{tick:,.{min(digits, 6)}f}"


def _step(span: float, count_of_ticks: int) -> float:
    raw = span / max(count_of_ticks, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)


def linear(values: Iterable[float], *, start: float, end: float, zero: bool = False, num_ticks: int = 5, exact: bool = False) -> Scale:
    """A linear scale over all values; ``zero`` starts it at nought, ``exact`` ends it at the last value rather than at a tick."""
    known = list(values) or [0.0, 1.0]
    low, high = (min(0.0, *known) if zero else min(known)), max(known)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        pad = abs(high) * 0.5 or 1.0
        low, high = (low if zero else low - pad), high + pad
    step = _step(high - low, num_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1))
    if exact:
        return Scale(low, high, start, end, tuple(t for t in ticks if low - 1e-9 * step <= t <= high + 1e-9 * step))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def logarithmic(values: Iterable[float], *, start: float, end: float) -> Scale:
    """A logarithmic scale over the positive values; at most about six ticks."""
    known = [value for value in values if value > 0] or [1.0, 10.0]
    low, high = min(known), max(known)
    if high / low < 1.05:
        low, high = low / 1.5, high * 1.5
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 5))
    factors = (1,) if last - first > 2 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    inside = tuple(tick for tick in ticks if low <= tick <= high)
    return Scale(low, high, start, end, inside or (low, high), log=True)
