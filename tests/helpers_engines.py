"""One training scenario that runs under any engine, on any number of ranks."""

from __future__ import annotations

import linecache
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from helpers_models import tiny_model
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.core.protocols import Engine
from minitron.distill.loop import Progress, StepReport, train
from minitron.distill.losses import LossConfig
from minitron.distill.pair import StudentLosses, TeacherStudent
from minitron.distill.teacher import TeacherSignal
from minitron.distill.validation import validate, validation_batches
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.engine.recompute import checkpoint_activations
from minitron.models.lazy import load_lazily
from minitron.ops.kd_loss import IGNORE_INDEX

VOCAB, LENGTH, BATCH = 300, 45, 8


@dataclass(frozen=True)
class Case:
    """One training run; ``stop_at`` is the step after which a fresh engine goes on."""

    folder: Path
    engine: str = "local"
    zero_stage: int = 2
    precision: str = "float32"
    placement: str = "replicate"
    tied: bool = False
    num_micro: int = 2
    num_steps: int = 6
    stop_at: int | None = None
    clipping: float = 0.1
    epsilon: float = 1e-8
    rate: float = 3e-3
    optimizer: str = "adamw"
    sharding: str = "full"
    shard_size: int | None = None
    offload: str = "none"
    checkpointing: str = "none"
    compile: bool = False
    lazy: bool = False


class FixedBatches:
    """The same global batches on any number of ranks; a sequence of each is masked wholly, others in part.

    That leaves 257 tokens, which bf16 rounds to 256: an engine that casts the denominator is found out.
    """

    def __init__(self, num_micro: int, first_step: int = 0) -> None:
        self.num_micro, self.step = num_micro, first_step

    def next(self) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(100 + self.step)
        self.step += 1
        ids = torch.randint(2, VOCAB, (BATCH, LENGTH), generator=generator)
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, :-1] = ids[:, 1:]
        labels[1, 2:] = IGNORE_INDEX
        labels[6, :9] = IGNORE_INDEX
        labels[7] = IGNORE_INDEX
        mine, my_labels = (tensor.tensor_split(dist.world_size())[dist.rank()] for tensor in (ids, labels))
        pairs = zip(mine.tensor_split(self.num_micro), my_labels.tensor_split(self.num_micro), strict=True)
        return [{"input_ids": i, "labels": label} for i, label in pairs]


def blocks_of(model: Any) -> list[torch.nn.Module]:
    return list(model.model.layers)


def start(case: Case) -> tuple[Engine, TeacherStudent]:
    kind = "tied" if case.tied else "untied"
    teacher = tiny_model(case.folder / f"teacher-{kind}")
    student = load_lazily(case.folder / f"student-{kind}", dtype=torch.float32) if case.lazy else tiny_model(case.folder / f"student-{kind}")
    checkpoint_activations(student, case.checkpointing)
    config = EngineConfig(
        name=case.engine,
        zero_stage=case.zero_stage,
        sharding=case.sharding,
        shard_size=case.shard_size,
        offload=case.offload,
        activation_checkpointing=case.checkpointing,
        compile=case.compile,
    )
    optimizer = OptimizerConfig(name=case.optimizer, weight_decay=0.1, gradient_clipping=case.clipping, epsilon=case.epsilon)
    engine = build_engine(config, optimizer=optimizer, precision=case.precision)
    losses = LossConfig(terms={"forward_kl": 1.0, "cross_entropy": 0.3}, temperature=2.0)
    root = StudentLosses(student.train(), losses, compute_dtype=engine.compute_dtype)
    signal = TeacherSignal(teacher, engine, blocks=blocks_of(teacher), placement=case.placement)
    return engine, TeacherStudent(engine.prepare(root, blocks=blocks_of(student)), signal)


def held_out() -> list[dict[str, torch.Tensor]]:
    return validation_batches(torch.randint(2, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5)), micro_batch_size=1)


def scenario(case: Case) -> dict[str, Any]:
    """Train and validate; the curve, and on rank 0 the whole weights. With ``stop_at``, go on in a fresh engine from the state there."""
    curve: list[dict[str, float]] = []
    validations: list[dict[str, float]] = []

    def leg(engine: Engine, pair: TeacherStudent, progress: Progress, num_steps: int) -> None:
        def hook(report: StepReport) -> None:
            curve.append(report.read())
            if report.step in (2, 3):  # validation in between must leave no trace in training or state
                validations.append(validate(pair, held_out()))

        batches = FixedBatches(case.num_micro, progress.step)
        train(pair, engine, batches, learning_rate=lambda step: case.rate * (1 - 0.1 * step), num_steps=num_steps, progress=progress, hooks=[hook])

    engine, pair = start(case)
    initial = {name: tensor.clone() for name, tensor in engine.full_weights()}
    progress = Progress()
    if case.stop_at is not None:
        leg(engine, pair, progress, case.stop_at)
        checkpointer = Checkpointer(
            case.folder / "checkpoints" / f"{case.engine}-{case.zero_stage}-{case.precision}-{case.optimizer}-{case.sharding}-{case.offload}"
        )
        checkpointer.save(progress.step, engine.state_dict(), {})
        engine, pair = start(case)
        found = checkpointer.load_latest()
        assert found is not None
        engine.load_state_dict(found[0])
    leg(engine, pair, progress, case.num_steps)
    weights = dict(engine.full_weights())
    return {"curve": curve, "validations": validations, "initial": initial, "weights": weights if dist.is_main() else {}}


def both_ways(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    return scenario(case), scenario(replace(case, stop_at=3))


def gradients(case: Case) -> dict[str, torch.Tensor]:
    """The gradient of the first step, read off the weights: with epsilon 1 and rate 1, AdamW moves a weight by g / (|g| + 1)."""
    engine, pair = start(replace(case, clipping=0.0, epsilon=1.0))
    before = {name: tensor.double() for name, tensor in engine.full_weights()}
    train(pair, engine, FixedBatches(case.num_micro), learning_rate=lambda _: 1.0, num_steps=1, progress=Progress(), hooks=[])
    found = {}
    for name, after in engine.full_weights():
        decayed = before[name] * 0.9 if before[name].ndim > 1 else before[name]
        moved = decayed - after.double()
        found[name] = moved / (1 - moved.abs())
    return found


def norms_around_nan(case: Case) -> list[float]:
    """Gradient norms of a step, a step whose loss is NaN, and one more."""
    engine, pair = start(case)
    (batch,) = FixedBatches(1).next()
    norms = []
    for factor in (1.0, float("nan"), 1.0):
        engine.backward(pair.losses(batch, torch.tensor(257.0))["loss"] * factor, boundary=True)
        norms.append(float(engine.step(1e-3)))
    return norms


class HostWaits(TorchDispatchMode):
    """Counts what would make the host wait for a device, by the innermost file outside torch that asked for it.

    Not counted is what is asked of CPU tensors alone: the line, or one of the four before it, says so by comparing with ``"cpu"``.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operation on its local tensor comes by again
        if func.name().split("::")[1].split(".")[0] in self.NAMES:
            frame = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename and frame.filename != __file__][-1]
            lines = [linecache.getline(frame.filename, frame.lineno - before) for before in range(5)]
            if not any('"cpu"' in line for line in lines):
                self.places["/".join(frame.filename.split("site-packages/")[-1].split("/")[-3:])] += 1
        return func(*args, **(kwargs or {}))


def column(result: dict[str, Any], name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in result["curve"]], dtype=torch.float64)


def difference(result: dict[str, Any], expected: dict[str, Any], *names: str) -> float:
    """Largest relative difference of the curves and validations."""
    gaps = [((column(result, name) - column(expected, name)) / column(expected, name)).abs().max() for name in names]
    for mine, other in zip(result["validations"], expected["validations"], strict=True):
        gaps += [torch.tensor(abs(mine[key] - other[key]) / other[key]) for key in ("validation_loss", "validation_kl")]
    return float(torch.stack([gap.double() for gap in gaps]).max())
