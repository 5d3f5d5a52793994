"""How much of the machine's time becomes training when GPUs fail, and how often a checkpoint pays. Pure functions; times in seconds.

The model is the classical one (Young 1974, Daly 2006): failures come at a constant rate, a save stops training for its stall, a failure costs half an
interval of lost steps and a restart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Unexpected interruptions per GPU and second: 419 on 16,384 GPUs in 54 days (The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4).
FAILURES_PER_GPU_SECOND = 419 / (16384 * 54 * 24 * 3600)


@dataclass(frozen=True)
class Goodput:
    """Predicted for one size of a job: mean time between failures, best interval of checkpoints, and the share of time that is training."""

    mtbf: float
    interval: float
    share: float


def mean_time_between_failures(num_gpus: int, *, rate: float = FAILURES_PER_GPU_SECOND) -> float:
    """Of a job that any GPU's failure stops."""
    return 1.0 / (num_gpus * rate)


def best_interval(stall: float, mtbf: float) -> float:
    """Between the starts of two saves: √(2 · stall · MTBF) (Young 1974), where saves and lost steps cost the same."""
    return math.sqrt(2.0 * stall * mtbf)


def training_share(*, interval: float, stall: float, restart: float, mtbf: float) -> float:
    """The share of time that becomes training: 1 − stall/interval − interval/(2·MTBF) − restart/MTBF, never below 0."""
    return max(0.0, 1.0 - stall / interval - interval / (2.0 * mtbf) - restart / mtbf)


def predict(num_gpus: int, *, stall: float, restart: float = 300.0, write: float = 0.0, rate: float = FAILURES_PER_GPU_SECOND) -> Goodput:
    """Goodput of a job at its best interval, which is no shorter than the ``write`` of one checkpoint behind the training."""
    mtbf = mean_time_between_failures(num_gpus, rate=rate)
    interval = max(best_interval(stall, mtbf), write + stall)
    return Goodput(mtbf, interval, training_share(interval=interval, stall=stall, restart=restart, mtbf=mtbf))


def steps_between(interval: float, step_seconds: float) -> int:
    """An interval as ``training.checkpoint_every``."""
    return max(1, round(interval / step_seconds))
