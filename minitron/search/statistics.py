"""How sure an order is: Kendall's τ between two rankings, the paired bootstrap of two candidates' held-out losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Agreement of two rankings of the same things, from -1 to 1: pairs in the same order less pairs in the opposite one, over all pairs.

    A pair that ties in one of them counts as neither (τ-a; Kendall 1938). One thing alone agrees.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) < 2:
        return 1.0
    upper = np.triu_indices(len(a), k=1)
    agree = np.sign(a[:, None] - a[None, :])[upper] * np.sign(b[:, None] - b[None, :])[upper]
    return float(agree.mean())


def paired_gap(better: Sequence[float], worse: Sequence[float], *, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean of ``worse - better`` over the same held-out sequences, and its standard error by resampling the sequences (Efron 1979)."""
    difference = np.asarray(worse, dtype=np.float64) - np.asarray(better, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(difference), size=(num_resamples, len(difference)))
    return float(difference.mean()), float(difference[draws].mean(axis=1).std(ddof=1))
