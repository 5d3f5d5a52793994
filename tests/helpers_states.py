"""One training with losses on intermediate states, under any engine, on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from helpers_engines import VOCAB, FixedBatches, blocks_of
from helpers_models import tiny_llama, tiny_model

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.core.protocols import Engine
from minitron.distill.alpha import build_alpha
from minitron.distill.loop import Progress, StepReport, train
from minitron.distill.losses import LossConfig
from minitron.distill.losses.state import StatesConfig
from minitron.distill.opening import open_losses
from minitron.distill.pair import StudentLosses, TeacherStudent
from minitron.distill.states import build_states
from minitron.distill.teacher import TeacherSignal
from minitron.distill.validation import validate, validation_batches
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.engine.recompute import checkpoint_activations

#: The student has kept these channels of the teacher.
KEPT = list(range(0, 48, 3)) + list(range(1, 48, 3))
ALL_TERMS: dict[str, float | str] = {
    "forward_kl": 0.7,
    "cross_entropy": 0.3,
    "hidden_states": "dynamic",
    "attention_relation": 0.5,
    "task_aware_filters": "dynamic",
}


@dataclass(frozen=True)
class Case:
    """One training run; ``stop_at`` is the step after which a fresh engine goes on."""

    folder: Path
    engine: str = "local"
    zero_stage: int = 2
    precision: str = "float32"
    placement: str = "replicate"
    terms: dict[str, float | str] = field(default_factory=lambda: dict(ALL_TERMS))
    states: StatesConfig = StatesConfig(layers=[[1, 0], [3, 2]], embedding=True, relation_heads=4, filter_steps=3)
    checkpointing: str = "none"
    num_micro: int = 2
    num_steps: int = 4
    stop_at: int | None = None
    clipping: float = 1.0
    epsilon: float = 1e-8
    rate: float = 3e-3

    @property
    def loss(self) -> LossConfig:
        """The section."""
        return LossConfig(terms=self.terms, states=self.states, temperature=2.0)


def models(folder: Path) -> None:
    """A teacher of four layers, a student of three, narrower, with fewer heads."""
    tiny_llama(folder / "teacher", layers=4, seed=1)
    tiny_llama(folder / "student", layers=3, hidden=32, ffn=40, heads=4, seed=2)


class RewindableBatches(FixedBatches):
    """The fixed batches, whose place can be set."""

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there."""
        self.step = state["step"]


def start(case: Case) -> tuple[Engine, TeacherStudent]:
    """Engine and pair of a case."""
    student, teacher = (tiny_model(case.folder / role) for role in ("student", "teacher"))
    optimizer = OptimizerConfig(weight_decay=0.1, gradient_clipping=case.clipping, epsilon=case.epsilon)
    engine = build_engine(EngineConfig(name=case.engine, zero_stage=case.zero_stage), optimizer=optimizer, precision=case.precision)
    states = build_states(
        case.loss, teacher=teacher.config, student=student.config, kept_hidden=sorted(KEPT), seed=0, compute_dtype=engine.compute_dtype
    )
    assert states is not None
    root = StudentLosses(student.train(), case.loss, compute_dtype=engine.compute_dtype, states=states)
    checkpoint_activations(student, case.checkpointing)
    signal = TeacherSignal(teacher, engine, blocks=blocks_of(teacher), placement=case.placement, taps=states.teacher_taps)
    return engine, TeacherStudent(engine.prepare(root, blocks=blocks_of(student)), signal, module=root, alpha=build_alpha(case.loss))


def scenario(case: Case) -> dict[str, Any]:
    """Train; the curve, and the whole weights. With ``stop_at``, go on in a fresh engine from the state there."""
    curve: list[dict[str, float]] = []

    def leg(engine: Engine, pair: TeacherStudent, progress: Progress, num_steps: int) -> None:
        held_out = validation_batches(torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5)), micro_batch_size=1)

        def hook(report: StepReport) -> None:
            curve.append(report.read())
            if report.step == 2:  # validation in between reads no states and leaves no trace
                validate(pair, held_out)

        batches = RewindableBatches(case.num_micro, progress.step)
        if progress.step == 0:
            open_losses(pair, engine, batches, stop=lambda: False)
        hooks = [pair.alpha.hook, hook] if pair.alpha is not None else [hook]
        train(pair, engine, batches, learning_rate=lambda step: case.rate * (1 - 0.1 * step), num_steps=num_steps, progress=progress, hooks=hooks)

    engine, pair = start(case)
    progress = Progress()
    if case.stop_at is not None:
        leg(engine, pair, progress, case.stop_at)
        checkpointer = Checkpointer(case.folder / "checkpoints" / f"{case.engine}-{case.zero_stage}")
        checkpointer.save(progress.step, {**engine.state_dict(), **pair.state_dict()}, {})
        engine, pair = start(case)
        found = checkpointer.load_latest()
        assert found is not None
        engine.load_state_dict(found[0])
        pair.load_state_dict(found[0])
    leg(engine, pair, progress, case.num_steps)
    return {"curve": curve, "weights": dict(engine.full_weights()), "extra": pair.state_dict()}


def both_ways(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without and with a stop."""
    return scenario(case), scenario(replace(case, stop_at=2))


def gradients(case: Case) -> dict[str, torch.Tensor]:
    """The gradient of the first step, read off the weights: with epsilon 1 and rate 1, AdamW moves a weight by g / (|g| + 1)."""
    engine, pair = start(replace(case, clipping=0.0, epsilon=1.0))
    before = {name: tensor.double() for name, tensor in engine.full_weights()}
    batches = RewindableBatches(case.num_micro)
    open_losses(pair, engine, batches, stop=lambda: False)
    train(pair, engine, batches, learning_rate=lambda _: 1.0, num_steps=1, progress=Progress(), hooks=[])
    found = {}
    for name, after in engine.full_weights():
        decayed = before[name] * 0.9 if before[name].ndim > 1 else before[name]
        moved = decayed - after.double()
        found[name] = moved / (1 - moved.abs())
    return found if dist.is_main() else {}
