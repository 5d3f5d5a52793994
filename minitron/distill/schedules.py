"""Learning rate by step: linear warm-up, a stable part at the peak, a decay to the minimum. One row a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: How a decay falls from 1 to 0 over its progress from 0 to 1. ``sqrt``: 1 − √x, the best of those compared in arXiv 2405.18392, section 4.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}
#: Name → share of the steps that decay (all that follow the warm-up: 1) and the decay's shape; None: as the settings say.
SCHEDULES: dict[str, tuple[float | None, str | None]] = {
    "cosine": (1.0, "cosine"),
    "linear": (1.0, "linear"),
    "constant": (0.0, "linear"),
    "wsd": (None, None),
}


@dataclass(frozen=True)
class Schedule:
    """A row of ``SCHEDULES`` over a number of steps. ``decay_fraction`` (of all steps) and ``decay_shape`` are those of ``wsd``: warm-up,
    stable, decay (arXiv 2404.06395, section 4)."""

    peak: float
    minimum: float
    num_warmup_steps: int
    num_steps: int
    name: str = "cosine"
    decay_fraction: float = 0.2
    decay_shape: str = "sqrt"

    def at(self, step: int) -> float:
        """The rate of optimiser step ``step``, counted from 0."""
        if step < self.num_warmup_steps:
            return self.peak * (step + 1) / self.num_warmup_steps
        fraction, shape = SCHEDULES[self.name]
        fraction = self.decay_fraction if fraction is None else fraction
        num_decay_steps = min(round(fraction * self.num_steps), self.num_steps - self.num_warmup_steps)
        first = self.num_steps - num_decay_steps
        if step < first or num_decay_steps == 0:
            return self.peak
        left = DECAYS[shape or self.decay_shape](min(1.0, (step - first) / num_decay_steps))
        return self.minimum + (self.peak - self.minimum) * left
