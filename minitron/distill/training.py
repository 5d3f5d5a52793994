"""From models and text to a trained student: engine, pair, data, checkpoints and loop put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.checkpoint import Checkpointer, restore_random_state
from minitron.core.protocols import Engine, Tracker
from minitron.data import GlobalBatches, SequenceStream
from minitron.distill.alpha import build_alpha
from minitron.distill.best import BestWeights
from minitron.distill.hooks import checkpoint_hook, log_hook, validation_hook
from minitron.distill.loop import Hook, Progress, StepReport, train
from minitron.distill.losses import LossConfig
from minitron.distill.on_policy import ContinuationSampler, OnPolicyBatches, OnPolicyConfig, ResumableBatches, root_class
from minitron.distill.opening import open_losses
from minitron.distill.pair import TeacherStudent
from minitron.distill.phases import Phase, PhasedBatches, phase_at
from minitron.distill.settings import TrainingConfig
from minitron.distill.states import build_states
from minitron.distill.teacher import TeacherSignal
from minitron.distill.validation import validate, validation_batches
from minitron.engine import EngineConfig, build_engine
from minitron.errors import CheckpointError, Interrupted
from minitron.log import Progress as ProgressBar
from minitron.log import get_logger

logger = get_logger(__name__)

#: From the names and tensors in memory to those of a checkpoint.
Form = Callable[[Iterator[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]


@dataclass
class TrainingRun:
    """One student (and perhaps a teacher) on one stream of text.

    ``blocks_of`` names the repeated layers of a model; ``open_tracker`` makes the trackers, given the step to go on from; ``folder``
    receives checkpoints, None trains without any; ``signal`` is a teacher that is already in place; ``end_of_text`` closes what the
    student writes, and ``seed`` fixes it, where ``on_policy`` asks for some; ``kept_hidden`` are the teacher's channels that the student
    was cut down to, where known.
    ``others`` are further teachers and their weights beside the first, which weighs 1; ``other_signals`` are such that are already in place.
    ``later_stream`` opens the stream of a phase after the first; ``describe`` puts config and tokenizer beside weights that are kept,
    and ``form`` gives these the form of a checkpoint.
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
    on_policy: OnPolicyConfig = OnPolicyConfig()
    end_of_text: int | None = None
    seed: int = 0
    kept_hidden: list[int] | None = None
    others: Sequence[tuple[nn.Module, float]] = ()
    other_signals: Sequence[tuple[TeacherSignal, float]] = ()
    later_stream: Callable[[int], SequenceStream] | None = None
    describe: Callable[[Path], None] = lambda folder: None
    form: Form = lambda weights: weights
    curve: list[dict[str, float]] = field(default_factory=list)

    def run(self) -> TrainingResult:
        """Train to the end of the budget, going on from the newest checkpoint.

        Raises:
            Interrupted: a signal asked for a stop; a checkpoint was written.
        """
        phases = self.training.phase_table(self.sequence_length)
        num_steps = sum(phase.num_steps for phase in phases)
        engine = build_engine(self.engine, optimizer=self.training.optimizer_config(), precision=self.training.precision)
        pair, sampler = self._prepare(engine)
        batches = self._batches(phases)
        if sampler is not None:
            batches = OnPolicyBatches(batches, sampler, seed=self.seed)
        checkpointer = Checkpointer(self.folder / "checkpoints", keep=self.training.keep_checkpoints) if self.folder else None
        best = None
        if checkpointer is not None and self.training.keeps_best:
            best = BestWeights(checkpointer, lambda: self.form(student_weights(engine)), describe=self.describe)
        progress = self._resume(engine, pair, batches, checkpointer, best)
        if progress.step == 0:
            open_losses(pair, engine, batches, stop=self.stop)
        tracker = _Curve(self.open_tracker(progress.step), self.curve, phases)
        hooks = self._hooks(engine, pair, tracker, batches, checkpointer, best, num_steps, progress)
        rates = self.training.learning_rates(num_steps)
        progress = train(pair, engine, batches, learning_rate=rates.at, num_steps=num_steps, progress=progress, hooks=hooks)
        tracker.close()
        if progress.step < num_steps:
            raise Interrupted(f"{self.what} stopped at step {progress.step} of {num_steps}; the same command goes on from there")
        return TrainingResult(engine, progress.step, progress.tokens, self.curve, best, self.form)

    def _batches(self, phases: Sequence[Phase]) -> ResumableBatches:
        parts = []
        for number, phase in enumerate(phases):
            assert number == 0 or self.later_stream is not None, "phases need later_stream"
            stream = self.stream if number == 0 or self.later_stream is None else self.later_stream(number)
            micro = self.training.micro_batch(phase.sequence_length, first_length=self.sequence_length)
            parts.append(GlobalBatches(stream, batch_size=phase.batch_size, micro_batch_size=micro, rank=dist.rank(), world_size=dist.world_size()))
        return PhasedBatches(phases, parts) if len(parts) > 1 else parts[0]

    def _prepare(self, engine: Engine) -> tuple[TeacherStudent, ContinuationSampler | None]:
        signal, teacher_config = self.signal, self.signal.config if self.signal is not None else getattr(self.teacher, "config", None)
        states = build_states(
            self.loss,
            teacher=teacher_config,
            student=self.student.config,
            kept_hidden=self.kept_hidden,
            seed=self.seed,
            compute_dtype=engine.compute_dtype,
        )
        root = root_class(self.on_policy)(self.student, self.loss, compute_dtype=engine.compute_dtype, states=states)
        if self.engine.activation_checkpointing:
            self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        self.student.train()
        if self.teacher is not None and signal is None:
            taps = states.teacher_taps if states is not None else []
            signal = TeacherSignal(self.teacher, engine, blocks=self.blocks_of(self.teacher), placement=self.placement, taps=taps)
        others = [
            *self.other_signals,
            *((TeacherSignal(model, engine, blocks=self.blocks_of(model), placement=self.placement), weight) for model, weight in self.others),
        ]
        wrapped = engine.prepare(root, blocks=self.blocks_of(self.student))
        sampler = None
        if self.on_policy.fraction > 0 and signal is not None:
            sampler = ContinuationSampler(
                wrapped, signal, self.on_policy, losses=root.losses, student_config=self.student.config, end_of_text=self.end_of_text
            )
        return TeacherStudent(wrapped, signal, module=root, alpha=build_alpha(self.loss), others=others), sampler

    def _resume(
        self, engine: Engine, pair: TeacherStudent, batches: ResumableBatches, checkpointer: Checkpointer | None, best: BestWeights | None
    ) -> Progress:
        found = checkpointer.load_latest() if checkpointer is not None else None
        if best is not None:
            best.load_state_dict(found[1].get("best", {}) if found is not None else {})
        if found is None:
            return Progress()
        tensors, meta = found
        if meta["engine"] != engine.name:
            raise CheckpointError(f"{self.folder} was begun under engine={meta['engine']}; go on with it, or remove the folder")
        engine.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("random/")})
        pair.load_state_dict(tensors)
        restore_random_state(tensors)
        batches.load_state_dict(meta["data"])
        logger.info("  %s goes on from step %d", self.what, meta["step"])
        return Progress(meta["step"], meta["tokens"])

    def _hooks(
        self,
        engine: Engine,
        pair: TeacherStudent,
        tracker: Tracker,
        batches: ResumableBatches,
        checkpointer: Checkpointer | None,
        best: BestWeights | None,
        num_steps: int,
        progress: Progress,
    ) -> list[Hook]:
        settings = self.training
        held_out = validation_batches(self.validation, micro_batch_size=settings.micro_batch(self.sequence_length))
        if progress.step == 0:
            tracker.log(0, {"tokens": 0, **validate(pair, held_out)})
        bar = ProgressBar(self.what, total=num_steps, done=progress.step)
        hooks: list[Hook] = [pair.alpha.hook] if pair.alpha is not None else []  # before the metrics, which hold it, and the checkpoint
        hooks += [
            log_hook(tracker, bar, every=settings.log_every, num_steps=num_steps),
            validation_hook(pair, held_out, tracker, best, every=settings.evaluate_every, num_steps=num_steps),
        ]
        if checkpointer is not None:
            hooks.append(
                checkpoint_hook(engine, pair, batches.state_dict, checkpointer, best, self.stop, every=settings.checkpoint_every, num_steps=num_steps)
            )
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
    best: BestWeights | None = None
    form: Form = lambda weights: weights

    def student_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole float32 weights of the student, in the form asked for (by default as in memory); every rank must iterate."""
        return self.form(student_weights(self.engine))


def student_weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole float32 weights of the student inside an engine's root; every rank must iterate."""
    prefix = "student."
    for name, tensor in engine.full_weights():
        if name.startswith(prefix):
            yield name[len(prefix) :], tensor


class _Curve:
    """A tracker that also keeps the validation points, and says which phase a step belongs to where there are several."""

    def __init__(self, inner: Tracker, points: list[dict[str, float]], phases: Sequence[Phase]) -> None:
        self._inner, self._points, self._phases = inner, points, phases

    def log(self, step: int, metrics: Any) -> None:
        if "validation_loss" in metrics:
            self._points.append(
                {"step": step, "tokens": metrics["tokens"], "loss": metrics["validation_loss"], "kl": metrics.get("validation_kl", 0.0)}
                | ({"agreement": metrics["validation_agreement"]} if "validation_agreement" in metrics else {})
            )
        if len(self._phases) > 1:
            metrics = {**metrics, "phase": phase_at(self._phases, step)}
        self._inner.log(step, metrics)

    def close(self) -> None:
        self._inner.close()
