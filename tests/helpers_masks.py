"""Sparse tiny students, and one training under masks that runs under any engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers_engines import FixedBatches, blocks_of
from helpers_models import tiny_llama, tiny_model
from safetensors.torch import load_file, save_file

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.core.protocols import Engine
from minitron.core.sparsity import Pattern, SparsityRecord, share_of_zeros
from minitron.distill.loop import Progress, StepReport, train
from minitron.distill.losses import LossConfig
from minitron.distill.masks import Masks
from minitron.distill.pair import StudentLosses, TeacherStudent
from minitron.distill.teacher import TeacherSignal
from minitron.distill.training import student_weights
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.engine.recompute import checkpoint_activations
from minitron.models.lazy import load_lazily


def zero_smallest(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """A weight with what a pattern lets go set to zero, by a plain loop over its groups."""
    out = weight.clone()
    width = pattern.m or out.shape[-1]
    num_zero = width - pattern.n if pattern.n is not None else int(pattern.ratio * width)
    for group in out.view(-1, width):
        group[group.abs().argsort()[:num_zero]] = 0.0
    return out


def sparsify(folder: Path, pattern: str) -> SparsityRecord:
    """Set the smallest weights of every linear matrix of a tiny llama's layers to zero, and write the record."""
    weights = load_file(str(folder / "model.safetensors"))
    wanted = Pattern.parse(pattern)
    names = [name for name in weights if ".layers." in name and "proj" in name]
    for name in names:
        weights[name] = zero_smallest(weights[name], wanted)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    record = SparsityRecord("magnitude", pattern, {name: share_of_zeros(weights[name]) for name in names})
    record.save(folder)
    return record


def sparse_student(folder: Path, pattern: str = "2:4", *, seed: int = 2) -> Path:
    """A tiny student with zeros."""
    tiny_llama(folder, layers=2, hidden=32, ffn=40, heads=4, seed=seed)
    sparsify(folder, pattern)
    return folder


@dataclass(frozen=True)
class SparseCase:
    """One training under masks."""

    folder: Path
    engine: str = "local"
    zero_stage: int = 2
    precision: str = "float32"
    optimizer: str = "adamw"
    mode: str = "keep"
    pattern: str = "2:4"
    num_steps: int = 12
    num_micro: int = 2
    ramp: int = 8
    decay: float = 0.1
    rate: float = 3e-3
    weight_decay: float = 0.1
    checkpointing: str = "none"
    compile: bool = False
    lazy: bool = False
    masked: bool = True
    resume: bool = False
    last: int = 4


def start(case: SparseCase) -> tuple[Engine, TeacherStudent, Masks]:
    """Engine, pair and masks of a case, nothing trained."""
    teacher = tiny_model(case.folder / "teacher")
    path = case.folder / "student"
    student = load_lazily(path, dtype=torch.float32) if case.lazy else tiny_model(path)
    checkpoint_activations(student, case.checkpointing)
    config = EngineConfig(name=case.engine, zero_stage=case.zero_stage, activation_checkpointing=case.checkpointing, compile=case.compile)
    optimizer = OptimizerConfig(name=case.optimizer, weight_decay=case.weight_decay, gradient_clipping=0.1)
    engine = build_engine(config, optimizer=optimizer, precision=case.precision)
    root = StudentLosses(student.train(), LossConfig(terms={"forward_kl": 1.0, "cross_entropy": 0.3}), compute_dtype=engine.compute_dtype)
    record = SparsityRecord.load(path)
    assert record is not None
    masks = Masks(case.mode, Pattern.parse(case.pattern), dict(record.matrices), num_steps=case.ramp, decay=case.decay)
    if case.masked:
        masks.install(student)
        masks.watch(root)
    signal = TeacherSignal(teacher, engine, blocks=blocks_of(teacher), placement="replicate")
    return engine, TeacherStudent(engine.prepare(root, blocks=blocks_of(student)), signal), masks


def train_sparse(case: SparseCase) -> dict[str, Any]:
    """Train; the curve, this rank's state and on rank 0 the finished weights.

    With ``resume`` the ``last`` steps are made twice, by the same engine (``straight``) and from a checkpoint by a fresh one (``curve``).
    """
    curve: list[dict[str, float]] = []
    shares: list[float] = []

    def leg(engine: Engine, pair: TeacherStudent, masks: Masks, progress: Progress, num_steps: int) -> None:
        def hook(report: StepReport) -> None:
            curve.append(report.read())
            shares.append(masks.share())

        batches = FixedBatches(case.num_micro, progress.step)
        train(pair, engine, batches, learning_rate=lambda _: case.rate, num_steps=num_steps, progress=progress, hooks=[masks.hook, hook])

    engine, pair, masks = start(case)
    progress = Progress()
    again: list[dict[str, float]] = []
    if case.resume:
        leg(engine, pair, masks, progress, case.num_steps - case.last)
        checkpointer = Checkpointer(case.folder / "checkpoints" / f"{case.engine}-{case.zero_stage}-{case.optimizer}-{case.mode}-{case.num_steps}")
        checkpointer.save(progress.step, engine.state_dict(), {})
        place = replace(progress)
        leg(engine, pair, masks, progress, case.num_steps)
        progress, again = place, curve[-case.last :]
        del curve[-case.last :], shares[-case.last :]
        engine, pair, masks = start(case)
        found = checkpointer.load_latest()
        assert found is not None
        engine.load_state_dict(found[0])
        masks.step = progress.step
    leg(engine, pair, masks, progress, case.num_steps)
    state = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    weights = dict(masks.finished(student_weights(engine)))
    return {"curve": curve, "straight": again, "shares": shares, "state": state, "weights": weights if dist.is_main() else {}}


def train_compiled(case: SparseCase) -> tuple[dict[str, Any], int]:
    """A training with compiled blocks, and into how many graphs; without the C++ of the real backend, which takes half a minute to compile."""
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend="aot_eager")
    result = train_sparse(case)
    return result, int(counters["stats"]["unique_graphs"])
