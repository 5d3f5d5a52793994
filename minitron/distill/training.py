"""From models and text to a trained student: engine, pair, data, checkpoints and loop put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.checkpoint import Checkpointer, restore_random_state
from minitron.core.protocols import Engine, Tracker
from minitron.data import GlobalBatches, SequenceStream
from minitron.distill.hooks import checkpoint_hook, log_hook, validation_hook
from minitron.distill.loop import Hook, Progress, StepReport, train
from minitron.distill.losses import LossConfig
from minitron.distill.pair import StudentLosses, TeacherSignal, TeacherStudent
from minitron.distill.settings import TrainingConfig
from minitron.distill.validation import validate, validation_batches
from minitron.engine import EngineConfig, build_engine
from minitron.errors import CheckpointError, Interrupted
from minitron.log import Progress as ProgressBar
from minitron.log import get_logger
from minitron.models.head import check_linear_head

logger = get_logger(__name__)


@dataclass
class TrainingRun:
    """One student (and perhaps a teacher) on one stream of text.

    ``blocks_of`` names the repeated layers of a model; ``open_tracker`` makes the trackers, given the step to go on from; ``folder``
    receives checkpoints, None trains without any; ``signal`` is a teacher that is already in place.
    """

    student: nn.Module
    teacher: nn.Module | None
    stream: SequenceStream
    validation: torch.Tensor
    sequence_length: int
    training: TrainingConfig
    loss: LossConfig
    engine: EngineConfig
    blocks_of: Callable[[nn.Module], list[nn.Module]]
    open_tracker: Callable[[int], Tracker]
    what: str
    placement: str = "replicate"
    folder: Path | None = None
    stop: Callable[[], bool] = lambda: False
    signal: TeacherSignal | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    def run(self) -> TrainingResult:
        """Train to the end of the budget, going on from the newest checkpoint.

        Raises:
            Interrupted: a signal asked for a stop; a checkpoint was written.
        """
        num_steps = self.training.steps(self.sequence_length)
        engine = build_engine(self.engine, optimizer=self.training.optimizer(), precision=self.training.precision)
        pair = self._prepare(engine)
        batches = GlobalBatches(
            self.stream,
            batch_size=self.training.batch_size,
            micro_batch_size=self.training.micro_batch(self.sequence_length),
            rank=dist.rank(),
            world_size=dist.world_size(),
        )
        checkpointer = Checkpointer(self.folder / "checkpoints", keep=self.training.keep_checkpoints) if self.folder else None
        progress = self._resume(engine, batches, checkpointer)
        tracker = _Curve(self.open_tracker(progress.step), self.curve)
        hooks = self._hooks(engine, pair, tracker, batches, checkpointer, num_steps, progress)
        rates = self.training.learning_rates(num_steps)
        progress = train(pair, engine, batches, learning_rate=rates.at, num_steps=num_steps, progress=progress, hooks=hooks)
        tracker.close()
        if progress.step < num_steps:
            raise Interrupted(f"{self.what} stopped at step {progress.step} of {num_steps}; the same command goes on from there")
        return TrainingResult(engine, progress.step, progress.tokens, self.curve)

    def _prepare(self, engine: Engine) -> TeacherStudent:
        check_linear_head(self.student)
        root = StudentLosses(self.student, self.loss, compute_dtype=engine.compute_dtype)
        if self.engine.activation_checkpointing:
            self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        self.student.train()
        signal = self.signal
        if self.teacher is not None and signal is None:
            signal = TeacherSignal(self.teacher, engine, blocks=self.blocks_of(self.teacher), placement=self.placement)
        return TeacherStudent(engine.prepare(root, blocks=self.blocks_of(self.student)), signal)

    def _resume(self, engine: Engine, batches: GlobalBatches, checkpointer: Checkpointer | None) -> Progress:
        found = checkpointer.load_latest() if checkpointer is not None else None
        if found is None:
            return Progress()
        tensors, meta = found
        if meta["engine"] != engine.name:
            raise CheckpointError(f"{self.folder} was begun under engine={meta['engine']}; go on with it, or remove the folder")
        engine.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("random/")})
        restore_random_state(tensors)
        batches.load_state_dict(meta["data"])
        logger.info("  %s goes on from step %d", self.what, meta["step"])
        return Progress(meta["step"], meta["tokens"])

    def _hooks(
        self,
        engine: Engine,
        pair: TeacherStudent,
        tracker: Tracker,
        batches: GlobalBatches,
        checkpointer: Checkpointer | None,
        num_steps: int,
        progress: Progress,
    ) -> list[Hook]:
        settings = self.training
        held_out = validation_batches(self.validation, micro_batch_size=settings.micro_batch(self.sequence_length))
        if progress.step == 0:
            tracker.log(0, {"tokens": 0, **validate(pair, held_out)})
        bar = ProgressBar(self.what, total=num_steps, done=progress.step)
        hooks = [
            log_hook(tracker, bar, every=settings.log_every, num_steps=num_steps),
            validation_hook(pair, held_out, tracker, every=settings.evaluate_every, num_steps=num_steps),
        ]
        if checkpointer is not None:
            hooks.append(checkpoint_hook(engine, batches.state_dict, checkpointer, self.stop, every=settings.checkpoint_every, num_steps=num_steps))
        else:
            hooks.append(self._stop_hook)
        return hooks

    def _stop_hook(self, report: StepReport) -> bool:
        return self.stop()


@dataclass
class TrainingResult:
    """A finished training: step and token counts, validation curve, and the weights behind the engine."""

    engine: Engine
    steps: int
    tokens: int
    curve: list[dict[str, float]]

    def student_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole float32 weights of the student by their Hugging Face names; every rank must iterate."""
        prefix = "student."
        for name, tensor in self.engine.full_weights():
            if name.startswith(prefix):
                yield name[len(prefix) :], tensor


class _Curve:
    """A tracker that also keeps the validation points."""

    def __init__(self, inner: Tracker, points: list[dict[str, float]]) -> None:
        self._inner, self._points = inner, points

    def log(self, step: int, metrics: Any) -> None:
        if "validation_loss" in metrics:
            self._points.append(
                {"step": step, "tokens": metrics["tokens"], "loss": metrics["validation_loss"], "kl": metrics.get("validation_kl", 0.0)}
            )
        self._inner.log(step, metrics)

    def close(self) -> None:
        self._inner.close()
