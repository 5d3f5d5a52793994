"""What happens beside the loop: metrics, validation, checkpoints, a clean stop."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minitron.core.protocols import Tracker
from minitron.distill.best import BestWeights
from minitron.distill.loop import Hook, StepReport
from minitron.distill.pace import Pace
from minitron.distill.pair import TeacherStudent
from minitron.distill.resume import TrainingState
from minitron.distill.validation import validate
from minitron.log import Progress


def log_hook(tracker: Tracker, bar: Progress, pace: Pace, *, every: int, num_steps: int) -> Hook:
    """Metrics to the trackers every few steps, and a progress line."""

    def hook(report: StepReport) -> None:
        pace.count(report)
        if report.step % every == 0 or report.step == num_steps:
            metrics = pace.read(report)
            tracker.log(report.step, metrics)
            bar.advance(report.step - bar.done, f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:.0f} tokens/s")

    return hook


def validation_hook(
    pair: TeacherStudent, batches: list[dict[str, torch.Tensor]], tracker: Tracker, best: BestWeights | None, *, every: int, num_steps: int
) -> Hook:
    """Held-out loss every few steps and at the end; ``best`` keeps the weights that do best there."""

    def hook(report: StepReport) -> None:
        if report.step == num_steps or (every > 0 and report.step % every == 0):
            metrics = validate(pair, batches)
            tracker.log(report.step, {"tokens": report.tokens, **metrics})
            if best is not None:
                best.offer(report.step, metrics)

    return hook


def checkpoint_hook(state: TrainingState, stop: Callable[[], bool], *, every: int, num_steps: int, wait: bool) -> Hook:
    """A checkpoint every few steps, written while training goes on unless told to ``wait``; one at once when a stop is asked for."""

    def hook(report: StepReport) -> bool:
        state.poll()
        stopping = stop() and report.step < num_steps
        if stopping or (every > 0 and report.step % every == 0 and report.step < num_steps):
            state.save(report.step, report.tokens, wait=wait or stopping)
        return stopping

    return hook
