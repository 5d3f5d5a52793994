"""From models and text to a trained student: engine, pair, data, checkpoints and loop put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.core.protocols import Engine, Tracker
from minitron.data import BatchesAhead, GlobalBatches, SequenceStream
from minitron.distill.alpha import build_alpha
from minitron.distill.best import BestWeights
from minitron.distill.guard import Diverged, Watch
from minitron.distill.hooks import checkpoint_hook, log_hook, validation_hook
from minitron.distill.loop import Hook, Progress, StepReport, Steps, train_steps
from minitron.distill.losses import LossConfig
from minitron.distill.masks import Masks
from minitron.distill.on_policy import ContinuationSampler, OnPolicyBatches, OnPolicyConfig, ResumableBatches, root_class
from minitron.distill.opening import open_losses
from minitron.distill.pace import Pace, device_peak
from minitron.distill.pair import TeacherStudent
from minitron.distill.phases import Phase, PhasedBatches, phase_at
from minitron.distill.profile import Profiler
from minitron.distill.resume import TrainingState, check_room_on_main, state_bytes
from minitron.distill.settings import TrainingConfig
from minitron.distill.signal import Signal
from minitron.distill.states import build_states
from minitron.distill.teacher import TeacherSignal
from minitron.distill.validation import validate, validation_batches
from minitron.engine import EngineConfig, build_engine
from minitron.engine.recompute import checkpoint_activations
from minitron.errors import Interrupted
from minitron.log import Progress as ProgressBar
from minitron.log import get_logger
from minitron.models.states import Tap

logger = get_logger(__name__)

#: From the names and tensors in memory to those of a checkpoint.
Form = Callable[[Iterator[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]


@dataclass
class TrainingRun:
    """One student (and perhaps a teacher) on one stream of text.

    ``blocks_of`` names the repeated layers of a model; ``open_tracker`` makes the trackers, given the step to go on from; ``folder``
    receives checkpoints, None trains without any; ``signal`` is a teacher that is already in place; ``end_of_text`` closes what the
    student writes, and ``seed`` fixes it, where ``on_policy`` asks for some; ``kept_hidden`` are the teacher's channels that the student
    was cut down to, where known. Documents that end with a ``separator`` do not see each other; None: they do. With ``read_ahead`` a thread
    draws the batches of the next steps while one is computed.
    ``others`` are further teachers and their weights beside the first, which weighs 1; ``other_signals`` are such that are already in place.
    ``later_stream`` opens the stream of a phase after the first; ``describe`` puts config and tokenizer beside weights that are kept,
    and ``form`` gives these the form of a checkpoint. A ``guided`` training neither validates nor reports: whoever advances it does.
    ``origin`` is a fingerprint of what is learned from; checkpoints of another are not taken. ``masks`` hold zeros of the student.
    ``flops_per_token`` counts what all models compute for a token of sequences of a length, for the metrics.
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
    signal: Signal | None = None
    on_policy: OnPolicyConfig = OnPolicyConfig()
    end_of_text: int | None = None
    seed: int = 0
    separator: int | None = None
    read_ahead: bool = False
    kept_hidden: list[int] | None = None
    others: Sequence[tuple[nn.Module, float]] = ()
    other_signals: Sequence[tuple[TeacherSignal, float]] = ()
    later_stream: Callable[[int], SequenceStream] | None = None
    describe: Callable[[Path], None] = lambda folder: None
    guided: bool = False
    origin: str = ""
    masks: Masks | None = None
    flops_per_token: Callable[[int], float] | None = None
    form: Form = lambda weights: weights
    curve: list[dict[str, float]] = field(default_factory=list)
    _ahead: BatchesAhead | None = field(default=None, init=False, repr=False)
    _profiler: Profiler | None = field(default=None, init=False, repr=False)

    def run(self) -> TrainingResult:
        """Train to the end of the budget, going on from the newest checkpoint.

        Raises:
            Interrupted: a signal asked for a stop; a checkpoint was written.
        """
        try:
            opened = self.open()
            opened.advance()
        finally:
            if self._ahead is not None:
                self._ahead.close()
            if self._profiler is not None:
                self._profiler.close()
        return opened.finish()

    def open(self) -> OpenTraining:
        """Everything in place, at the newest checkpoint; the steps are taken by whoever advances them."""
        phases = self.training.phase_table(self.sequence_length)
        num_steps = sum(phase.num_steps for phase in phases)
        engine = build_engine(self.engine, optimizer=self.training.optimizer_config(), precision=self.training.precision)
        pair, sampler = self._prepare(engine)
        drawn = self._batches(phases)
        self._ahead = BatchesAhead(drawn) if self.read_ahead else None
        batches: ResumableBatches = self._ahead or drawn
        if sampler is not None:
            batches = OnPolicyBatches(batches, sampler, seed=self.seed)
        state = self._state(engine, pair, batches)
        progress = state.restore()
        self.to_step(progress.step)
        if progress.step == 0:
            open_losses(pair, engine, batches, stop=self.stop)
        tracker = _Curve(self.open_tracker, self.curve, phases, step=progress.step, masks=self.masks)
        hooks, watch = self._hooks(state, tracker, num_steps, progress)
        rates = self.training.learning_rates(num_steps)

        def steps() -> Steps:
            return train_steps(pair, engine, batches, learning_rate=rates.at, num_steps=num_steps, progress=progress, hooks=hooks)

        return OpenTraining(self, engine, pair, progress, num_steps, steps(), steps, tracker, state, watch)

    def to_step(self, step: int) -> None:
        """Let what depends on the step follow a step that is put back."""
        if self.masks is not None:
            self.masks.step = step

    def _batches(self, phases: Sequence[Phase]) -> ResumableBatches:
        parts = []
        for number, phase in enumerate(phases):
            assert number == 0 or self.later_stream is not None, "phases need later_stream"
            stream = self.stream if number == 0 or self.later_stream is None else self.later_stream(number)
            micro = self.training.micro_batch(phase.sequence_length, first_length=self.sequence_length)
            parts.append(
                GlobalBatches(
                    stream,
                    batch_size=phase.batch_size,
                    micro_batch_size=micro,
                    rank=dist.rank(),
                    world_size=dist.world_size(),
                    separator=self.separator,
                )
            )
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
        root = root_class(self.on_policy)(
            self.student,
            self.loss,
            compute_dtype=engine.compute_dtype,
            states=states,
            separator=self.separator,
            sparse=signal.sparse if signal is not None else None,
        )
        if self.masks is not None:
            self.masks.install(self.student)
            self.masks.watch(root)
        checkpoint_activations(self.student, self.engine.activation_checkpointing)
        self.student.train()
        if self.teacher is not None and signal is None:
            taps = states.teacher_taps if states is not None else []
            signal = self._signal(self.teacher, engine, taps=taps)
        others = [*self.other_signals, *((self._signal(model, engine), weight) for model, weight in self.others)]
        wrapped = engine.prepare(root, blocks=self.blocks_of(self.student))
        sampler = None
        if self.on_policy.fraction > 0 and signal is not None:
            assert isinstance(signal, TeacherSignal), "a stored signal says nothing of new text"
            sampler = ContinuationSampler(
                wrapped, signal, self.on_policy, losses=root.losses, student_config=self.student.config, end_of_text=self.end_of_text
            )
        return TeacherStudent(wrapped, signal, module=root, alpha=build_alpha(self.loss), others=others), sampler

    def _signal(self, model: nn.Module, engine: Engine, *, taps: Sequence[Tap] = ()) -> TeacherSignal:
        return TeacherSignal(model, engine, blocks=self.blocks_of(model), placement=self.placement, taps=taps, separator=self.separator)

    def _state(self, engine: Engine, pair: TeacherStudent, batches: ResumableBatches) -> TrainingState:
        """What checkpoints hold, and where they lie, if there is a folder for them and the disk holds them."""
        settings, checkpointer, best = self.training, None, None
        if self.folder is not None:
            checkpointer = Checkpointer(self.folder / "checkpoints", keep=settings.keep_checkpoints, keep_every=settings.keep_every)
            if settings.keeps_best:
                best = BestWeights(checkpointer, lambda: self.form(student_weights(engine)), describe=self.describe)
            if settings.checkpoint_every > 0:
                count = sum(share.numel for name, share in engine.shares().items() if name.startswith("weight/"))
                size = state_bytes(count, optimizer=settings.optimizer)
                check_room_on_main(checkpointer.folder, num_bytes=size, keep=settings.keep_checkpoints, others=8 * count if best is not None else 0)
        return TrainingState(engine, pair, batches, checkpointer, best, what=self.what, origin=self.origin)

    def _hooks(self, state: TrainingState, tracker: Tracker, num_steps: int, progress: Progress) -> tuple[list[Hook], Watch | None]:
        settings, pair, watch = self.training, state.pair, None
        hooks: list[Hook] = [pair.alpha.hook] if pair.alpha is not None else []  # before the metrics, which hold it, and the checkpoint
        hooks += [self.masks.hook] if self.masks is not None else []  # before validation
        if not self.guided:
            watch = Watch(
                tracker,
                state.engine.blame,
                state.batches.state_dict,
                max_skipped=settings.max_skipped_steps,
                spike_deviations=settings.spike_deviations,
                back_at_spikes=settings.on_spike == "go_back",
                log_every=settings.log_every,
            )
            held_out = validation_batches(self.validation, micro_batch_size=settings.micro_batch(self.sequence_length), separator=self.separator)
            if progress.step == 0:
                tracker.log(0, {"tokens": 0, **validate(pair, held_out)})
            pace = Pace(self._flops_at(), peak=device_peak())
            bar = ProgressBar(self.what, total=num_steps, done=progress.step)
            hooks += [
                watch.count,
                log_hook(tracker, bar, pace, every=settings.log_every, num_steps=num_steps),
                watch.judge,
                validation_hook(pair, held_out, tracker, state.best, every=settings.evaluate_every, num_steps=num_steps),
            ]
            if settings.profile is not None and self.folder is not None:
                self._profiler = Profiler(self.folder, settings.profile, step=progress.step)
                hooks.append(self._profiler.hook)
        if state.checkpointer is not None:
            hooks.append(checkpoint_hook(state, self.stop, every=settings.checkpoint_every, num_steps=num_steps, wait=self.guided))
        else:
            hooks.append(self._stop_hook)
        return hooks, watch

    def _flops_at(self) -> Callable[[int], float] | None:
        """FLOPs per token at a step, whose phase says how long sequences are."""
        count, phases = self.flops_per_token, self.training.phase_table(self.sequence_length)
        if count is None:
            return None
        by_phase = [count(phase.sequence_length) for phase in phases]
        return lambda step: by_phase[phase_at(phases, step)]

    def _stop_hook(self, report: StepReport) -> bool:
        return self.stop()


@dataclass
class OpenTraining:
    """A training that is in place. ``steps`` takes the steps that are left when it is advanced; ``progress`` says how far it is."""

    run: TrainingRun
    engine: Engine
    pair: TeacherStudent
    progress: Progress
    num_steps: int
    steps: Steps
    again: Callable[[], Steps]
    tracker: _Curve
    state: TrainingState
    watch: Watch | None

    def advance(self) -> None:
        """Take all steps that are left; where the numbers go bad, go back once.

        Raises:
            DivergenceError: that did not help, or there is nothing to go back to.
        """
        while True:
            try:
                for _ in self.steps:
                    pass
                return
            except Diverged as diverged:
                assert self.watch is not None
                if diverged.mendable and not self.state.may_go_back:
                    logger.warning("  %s: there is no going back, training goes on", diverged)
                else:
                    place = self.state.go_back(str(diverged))
                    step, self.progress.step, self.progress.tokens = self.progress.step, place.step, place.tokens
                    self.run.to_step(place.step)
                    self.tracker.reopen(place.step)
                    self.tracker.log(place.step, {"went_back_from": step})
                    self.watch.forget()
                self.steps = self.again()

    def finish(self) -> TrainingResult:
        """Close the trackers and hand the student over.

        Raises:
            Interrupted: steps are left.
        """
        self.state.close()
        self.tracker.close()
        step, what = self.progress.step, self.run.what
        if step < self.num_steps:
            raise Interrupted(f"{what} stopped at step {step} of {self.num_steps}; the same command goes on from there")
        return TrainingResult(self.engine, step, self.progress.tokens, self.run.curve, self.state.best, self.run.form)

    def save(self) -> None:
        """A checkpoint of the step just taken, unless there is one."""
        self.state.close()
        assert self.state.checkpointer is not None, "this training has no folder"
        if self.progress.step not in self.state.checkpointer.steps():
            self.state.save(self.progress.step, self.progress.tokens, wait=True)


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
        del tensor  # or it would stay while the next one is gathered


class _Curve:
    """A tracker that also keeps the validation points, and says which phase a step belongs to where there are several, and the share of zeros."""

    def __init__(
        self, open_inner: Callable[[int], Tracker], points: list[dict[str, float]], phases: Sequence[Phase], *, step: int, masks: Masks | None
    ) -> None:
        self._open, self._points, self._phases, self._masks = open_inner, points, phases, masks
        self._inner = open_inner(step)

    def reopen(self, step: int) -> None:
        """Forget what was logged after a step."""
        self._inner.close()
        self._inner = self._open(step)
        self._points[:] = [point for point in self._points if point["step"] <= step]

    def log(self, step: int, metrics: Any) -> None:
        if "validation_loss" in metrics:
            self._points.append(
                {"step": step, "tokens": metrics["tokens"], "loss": metrics["validation_loss"], "kl": metrics.get("validation_kl", 0.0)}
                | ({"agreement": metrics["validation_agreement"]} if "validation_agreement" in metrics else {})
            )
        if len(self._phases) > 1:
            metrics = {**metrics, "phase": phase_at(self._phases, step)}
        if self._masks is not None:
            metrics = {**metrics, "sparsity": self._masks.share()}
        self._inner.log(step, metrics)

    def close(self) -> None:
        self._inner.close()
