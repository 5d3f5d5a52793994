"""A trace of a few optimiser steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.distill.loop import StepReport
from minitron.errors import ConfigError
from minitron.log import get_logger

logger = get_logger(__name__)

FOLDER = "profile"


def check_profile(steps: list[int] | None) -> None:
    """Refuse a range that is none.

    Raises:
        ConfigError: not two step numbers that ascend from 1.
    """
    if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise ConfigError(f"training.profile={steps} is no range of steps: give the first and the last one, as in training.profile=[10,12]")


class Profiler:
    """Traces rank 0 from the first to the last step of a range; of a range that a resumed run begins inside, what is left.

    The file is ``profile/steps-<first>-<last>.json.gz`` in the stage's folder.
    """

    def __init__(self, folder: Path, steps: list[int], *, step: int) -> None:
        """``step`` is the one that training goes on from."""
        self._folder, (self._first, self._last) = folder / FOLDER, steps
        self._from, self._trace = step + 1, None if not dist.is_main() or step >= steps[1] else self._make()
        self._running, self._at = False, step
        self._begin(step)

    def _make(self) -> Any:
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        return torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)

    def hook(self, report: StepReport) -> None:
        """After a step: begin before the first one of the range, write after the last one."""
        self._at = report.step
        self._begin(report.step)
        if self._running and report.step >= self._last:
            self._end(report.step)

    def close(self) -> None:
        """Write what there is when training ends inside the range."""
        if self._running:
            self._end(self._at)

    def _begin(self, step: int) -> None:
        if self._trace is not None and not self._running and self._first <= step + 1 <= self._last:
            self._from, self._running = step + 1, True
            self._trace.start()

    def _end(self, step: int) -> None:
        assert self._trace is not None
        self._trace.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._from}-{step}.json.gz"
        self._trace.export_chrome_trace(str(path))
        logger.info("  trace of steps %d to %d: %s", self._from, step, path)
        self._trace, self._running = None, False
