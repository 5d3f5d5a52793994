"""What watches over the numbers of a training: steps without an update, and losses that leap."""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from minitron.core.protocols import Tracker
from minitron.distill.loop import StepReport
from minitron.log import get_logger

logger = get_logger(__name__)

#: Losses that a new one is compared with, and how many are needed to say anything.
_WINDOW, _ENOUGH = 64, 16
#: Standard deviations of a normal distribution per median absolute deviation.
_SIGMA = 1.4826


class Diverged(Exception):
    """Training cannot go on from where it is: its numbers are not finite, or its loss has leapt. The message says since when and why."""

    def __init__(self, reason: str, *, mendable: bool) -> None:
        """``mendable``: training may go on as it is when there is no way back."""
        super().__init__(reason)
        self.mendable = mendable


class Watch:
    """Counts skipped steps on the device and looks at the losses where metrics are read, so that nothing waits for it.

    A step whose gradients are not finite changes nothing (the engine masks its update) and is counted by its norm.
    """

    def __init__(
        self,
        tracker: Tracker,
        blame: Callable[[], str],
        data_state: Callable[[], dict[str, Any]],
        *,
        max_skipped: int,
        spike_deviations: float,
        back_at_spikes: bool,
        log_every: int,
    ) -> None:
        """``blame`` names the first parameter whose last gradient was not finite, empty when it is not known."""
        self._tracker, self._blame, self._data_state = tracker, blame, data_state
        self._max_skipped, self._deviations, self._back_at_spikes, self._log_every = max_skipped, spike_deviations, back_at_spikes, log_every
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._skipped: torch.Tensor | None = None
        self._in_a_row: torch.Tensor | None = None
        self._quiet_until = 0

    def count(self, report: StepReport) -> None:
        """Before the metrics are read: whether the step was skipped, on the device."""
        bad = ~torch.isfinite(report.gradient_norm.detach())
        before, row = (torch.zeros_like(bad, dtype=torch.int64) if known is None else known for known in (self._skipped, self._in_a_row))
        self._skipped, self._in_a_row = before + bad, torch.where(bad, row + 1, torch.zeros_like(row))
        report.values["skipped_steps"] = self._skipped

    def judge(self, report: StepReport) -> None:
        """After the metrics are read: go on, warn, or

        Raises:
            Diverged: too many steps in a row were skipped, or the loss has leapt and that is to be undone.
        """
        if report.step % self._log_every or self._in_a_row is None:
            return
        metrics, skipped = report.read(), int(self._in_a_row)
        if skipped > self._max_skipped:
            raise Diverged(self._describe(report.step, skipped), mendable=False)
        if skipped:
            logger.warning("  step %d was skipped: its gradients are not finite (%d in a row)", report.step, skipped)
        else:
            self._look(report.step, metrics["loss"])

    def forget(self) -> None:
        """Begin anew, as after going back."""
        self._losses.clear()
        self._in_a_row, self._quiet_until = None, 0

    def _describe(self, step: int, skipped: int) -> str:
        culprit = self._blame()
        told = f"the first gradient that is not is that of '{culprit}'" if culprit else "no single parameter can be named"
        place = json.dumps(self._data_state(), default=str)
        return (
            f"the {skipped} steps up to step {step} had gradients that are not finite; {told}, "
            f"on the batch before this place in the data: {place if len(place) <= 400 else place[:400] + '…'}"
        )

    def _look(self, step: int, loss: float) -> None:
        """Compare a loss with the last ones by the robust z-score (loss − median) / (1.4826 · median absolute deviation)."""
        score = 0.0
        if len(self._losses) >= _ENOUGH and self._deviations > 0:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(value - median) for value in self._losses)
            score = (loss - median) / max(_SIGMA * deviation, 1e-3 * abs(median), 1e-12)
        self._losses.append(loss)
        if score <= self._deviations or step < self._quiet_until:
            return
        self._quiet_until = step + _WINDOW  # a training that settles on a higher loss is told of once, not at every step
        self._tracker.log(step, {"loss_spike": score})
        reason = f"the loss leapt to {loss:.4g} at step {step}, {score:.0f} robust standard deviations above the last {len(self._losses) - 1}"
        if self._back_at_spikes:
            raise Diverged(reason, mendable=True)
        logger.warning("  %s", reason)
