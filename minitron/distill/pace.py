"""How fast a training is: tokens per second, the share of the hardware's arithmetic that becomes training, and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch

from minitron import dist
from minitron.core.cost import DEVICES
from minitron.distill.loop import StepReport

#: Metrics that tell of the machine and not of the model: two runs with equal numbers differ in them.
MEASURED = ("tokens_per_second", "data_seconds", "model_flops_per_second", "mfu", "peak_memory_bytes")


class Pace:
    """Adds up steps between two readings of the metrics. A device works behind its host: only a reading, which waits for it, tells the time."""

    def __init__(self, flops_per_token: Callable[[int], float] | None, *, peak: float | None) -> None:
        """``flops_per_token`` at a step, over all models; ``peak`` is the dense bf16 rate [FLOP/s] of one device, None where it is not known."""
        self._flops_per_token, self._peak = flops_per_token, peak
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0

    def count(self, report: StepReport) -> None:
        """One more step, without waiting for it."""
        self._seconds += report.seconds
        self._tokens += report.step_tokens
        if self._flops_per_token is not None:
            self._flops += report.step_tokens * self._flops_per_token(report.step)

    def read(self, report: StepReport) -> dict[str, float]:
        """The step's metrics and the pace of the steps since the last reading."""
        started = time.perf_counter()
        metrics = report.read()
        seconds = max(self._seconds + time.perf_counter() - started, 1e-9)
        found = {"tokens_per_second": self._tokens / seconds}
        if self._flops_per_token is not None:
            found["model_flops_per_second"] = self._flops / seconds
            if self._peak is not None:
                found["mfu"] = self._flops / seconds / (self._peak * dist.world_size())
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0
        return {**metrics, **found, "peak_memory_bytes": peak_memory()}


def peak_memory() -> int:
    """Most bytes that this process has held at once: allocated on its GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak(name: str | None = None) -> float | None:
    """The dense bf16 rate of a GPU by the name that its driver gives it, this process's by default; None on a CPU and for one that is not known."""
    if name is None:
        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name()
    word = name.lower().replace(" ", "")
    return next((device.flops for key, device in DEVICES.items() if key in word), None)
