"""Intervals of paired differences, and rank correlation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

#: Two-sided 95 % quantiles of Student's t by degrees of freedom (any table); beyond the table the normal quantile's successor is close enough.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 15: 2.131, 20: 2.086, 30: 2.042}
_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % interval and what it was taken over."""

    mean: float
    low: float
    high: float
    over: str

    def shown(self) -> str:
        """``-0.031 [-0.040, -0.022]``."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile; between table rows that of the smaller number, which is on the safe side.

    Raises:
        ValueError: no degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom give no interval")
    return _T[max(d for d in _T if d <= degrees)]


def t_interval(values: Sequence[float], *, over: str = "seeds") -> Interval:
    """Mean and t-interval of independent values."""
    count = len(values)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1)) if count > 1 else 0.0
    half = t_quantile(count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, f"{count} {over}")


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, over: str = "windows") -> Interval:
    """Mean and percentile bootstrap interval of paired differences, one of each held-out window.

    It holds for other windows of this text only: it does not know how another seed would have come out.
    """
    generator = random.Random(seed)
    count = len(values)
    means = sorted(sum(generator.choices(values, k=count)) / count for _ in range(_RESAMPLES))
    return Interval(sum(values) / count, means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1], f"{count} {over}, one seed")


def paired(first: dict[int, list[float]], second: dict[int, list[float]]) -> Interval | None:
    """Loss of the first arm minus the second's, over the seeds that both have; None without any.

    Args:
        first, second: seed → losses of the same held-out windows.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    if len(seeds) == 1:
        return bootstrap_interval([a - b for a, b in zip(first[seeds[0]], second[seeds[0]], strict=True)])
    means = [sum(first[seed]) / len(first[seed]) - sum(second[seed]) / len(second[seed]) for seed in seeds]
    return t_interval(means)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, the smallest first; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for index in order[start : end + 1]:
            found[index] = (start + end) / 2
        start = end + 1
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks; 0 where one side is all equal."""
    a, b = ranks(first), ranks(second)
    middle = (len(a) - 1) / 2
    covariance = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return covariance / spread if spread else 0.0
