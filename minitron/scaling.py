"""A distillation on many devices, on paper: links beside arithmetic, what failures cost, how often to save. Modelled, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from minitron.config import Config
from minitron.core.architecture import Architecture
from minitron.core.cost import Device, training_flops
from minitron.core.goodput import Goodput, predict, steps_between
from minitron.core.memory import Setup
from minitron.footprint import Planner
from minitron.log import duration

#: Bytes a second from device into host memory (pinned, PCIe 4 and newer by data sheet, half of it), and into storage with a checksum.
_TO_HOST, _TO_STORAGE = 25e9, 0.9e9
#: Bytes of a weight in a checkpoint: float32 master and two moments.
_STATE = 12.0


@dataclass(frozen=True)
class Step:
    """One optimiser step under one sharding, in seconds: arithmetic, and what each link takes; they go on at the same time."""

    sharding: str
    compute: float
    node: float
    network: float
    fits: bool

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.node, self.network)

    @property
    def efficiency(self) -> float:
        """Share of a step that is arithmetic."""
        return self.compute / self.seconds


@dataclass(frozen=True)
class Scaling:
    """A distillation on a number of devices: steps under full and hybrid sharding, and failures."""

    num_devices: int
    device: str
    node_size: int
    batch_size: int
    steps: list[Step]
    goodput: Goodput
    checkpoint_every: int
    days: float

    @property
    def best(self) -> Step:
        """The fastest that fits, or the fastest where none does."""
        return min(self.steps, key=lambda step: (not step.fits, step.seconds))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        steps = {step.sharding: {**asdict(step), "seconds": step.seconds, "efficiency": step.efficiency} for step in self.steps}
        rest = {"checkpoint_every": self.checkpoint_every, "days": self.days, "goodput": asdict(self.goodput)}
        return {"devices": self.num_devices, "steps": steps, **rest}


def scaling_story(
    config: Config, student: Architecture, teachers: Sequence[Architecture], planner: Planner, device: Device, name: str, rate: float
) -> Scaling:
    """The configured distillation on the planner's devices, each of which does ``rate`` FLOP/s in training.

    Links are loaded by what FSDP2 sends (``core/traffic.py``) at the rate that collectives reach there; arithmetic hides them where it takes longer.
    """
    base = planner.setup
    training, length = config.sections["training"], config.sections["data"].sequence_length
    phases = training.phase_table(length)
    longest = max(phases, key=lambda phase: phase.num_tokens)
    tokens = longest.batch_size * longest.sequence_length
    flops = training_flops(student, None, num_tokens=tokens, sequence_length=longest.sequence_length)
    flops += tokens * sum(teacher.flops_per_token(longest.sequence_length) for teacher in teachers)
    # Devices without a sequence of their own idle: those that work take as long as with a batch that reaches all.
    busy = min(base.world_size, longest.batch_size)
    compute = flops / (busy * rate)
    steps = [_step(planner, device, setup, sharding, compute) for sharding, setup in _shardings(base).items()]
    best = min(steps, key=lambda step: (not step.fits, step.seconds))
    state = _STATE * student.num_parameters / (base.world_size if best.sharding == "full" else base.node_size)
    written = _STATE * student.num_parameters / base.world_size  # copies of a shard write a part each
    goodput = predict(base.world_size, stall=state / _TO_HOST, write=written / _TO_STORAGE)
    return Scaling(
        num_devices=base.world_size,
        device=name,
        node_size=base.node_size,
        batch_size=longest.batch_size,
        steps=steps,
        goodput=goodput,
        checkpoint_every=steps_between(goodput.interval, best.seconds),
        days=training.steps(length) * best.seconds / max(goodput.share, 1e-9) / 86400,
    )


def _shardings(base: Setup) -> dict[str, Setup]:
    """The same training under FSDP2, whole and in copies of a node."""
    fsdp = replace(base, engine="fsdp", offload="none")
    return {"full": replace(fsdp, shard_size=base.world_size), "hybrid": replace(fsdp, shard_size=base.node_size)}


def _step(planner: Planner, device: Device, setup: Setup, sharding: str, compute: float) -> Step:
    footprint = planner.footprint(setup)
    rows = footprint.traffic.values()
    node, network = sum(row.node for row in rows) / device.node_link, sum(row.network for row in rows) / device.network
    return Step(sharding, compute, node, network, footprint.fits)


def scaling_table(story: Scaling) -> list[str]:
    """The story for people."""
    goodput, best = story.goodput, story.best
    lines = [
        f"  on paper, {story.num_devices:,} {story.device} in nodes of {story.node_size}: seconds of an optimiser step, links beside arithmetic",
        f"    {'sharding':<12}{'arithmetic':>12}{'in the node':>14}{'between nodes':>16}{'step':>9}{'arithmetic':>13}",
    ]
    for step in story.steps:
        remark = "" if step.fits else "  does not fit"
        times = f"{step.compute:>11.2f}s{step.node:>13.2f}s{step.network:>15.2f}s{step.seconds:>8.2f}s"
        lines.append(f"    {step.sharding:<12}{times}{step.efficiency:>13.0%}{remark}")
    if story.num_devices > story.batch_size:
        lines.append(
            f"    a batch of {story.batch_size} sequences feeds {story.batch_size} devices, the others idle: training.batch_size={story.num_devices}"
        )
    lines += [
        f"    a failure every {goodput.mtbf / 3600:.1f} h; a checkpoint every {goodput.interval / 60:.1f} min (training.checkpoint_every="
        f"{story.checkpoint_every}) leaves {goodput.share:.1%} of the time to training",
        f"    distillation with engine.sharding={best.sharding}: {duration(86400 * story.days)}",
    ]
    return lines
