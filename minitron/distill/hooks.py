"""What happens beside the loop: metrics, validation, checkpoints, a clean stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minitron.checkpoint import Checkpointer, random_state
from minitron.core.protocols import Engine, Tracker
from minitron.distill.best import BestWeights
from minitron.distill.loop import Hook, StepReport
from minitron.distill.pair import TeacherStudent
from minitron.distill.validation import validate
from minitron.log import Progress


def log_hook(tracker: Tracker, bar: Progress, *, every: int, num_steps: int) -> Hook:
    """Metrics to the trackers every few steps, and a progress line."""

    def hook(report: StepReport) -> None:
        if report.step % every == 0 or report.step == num_steps:
            metrics = report.read()
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


def checkpoint_hook(
    engine: Engine,
    pair: TeacherStudent,
    data_state: Callable[[], dict[str, Any]],
    checkpointer: Checkpointer,
    best: BestWeights | None,
    stop: Callable[[], bool],
    *,
    every: int,
    num_steps: int,
) -> Hook:
    """A checkpoint every few steps, and one at once when a stop is asked for."""

    def hook(report: StepReport) -> bool:
        stopping = stop() and report.step < num_steps
        if stopping or (every > 0 and report.step % every == 0 and report.step < num_steps):
            state = {**engine.state_dict(), **pair.state_dict(), **random_state()}
            kept = {"best": best.state_dict()} if best is not None else {}
            checkpointer.save(report.step, state, {"tokens": report.tokens, "data": data_state(), "engine": engine.name, **kept})
            if best is not None:
                best.drop_old()
        return stopping

    return hook
