"""What a run will take, before it starts: parameters, FLOPs, time per stage, memory per rank and the way to many devices, from configs alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.config import Config
from minitron.core.architecture import Architecture
from minitron.core.cost import Device, decode_seconds, device, scoring_flops, training_flops
from minitron.engine import resolve_dtype
from minitron.errors import ArchitectureError
from minitron.footprint import Footprint, Planner, further_shapes
from minitron.models import config_of, discover, resolve_teacher
from minitron.models.family import resized_config
from minitron.scaling import Scaling, scaling_story
from minitron.search import explicit_shape, find_shapes
from minitron.search.ranking import planned_cost
from minitron.sparsify.shared.sparsifier import sample_passes

#: Share of a plain matrix product's rate that whole stages reach: measured on two CPU cores; on GPUs a modest MFU.
_EFFICIENCY = {"cpu": 0.6, "gpu": 0.4}
#: Seconds of a stage that are not arithmetic: reading and writing models, tokenising, starting.
_OVERHEAD = {
    "importance": 12.0,
    "rank": 12.0,
    "prune": 5.0,
    "sparsify": 12.0,
    "cache": 10.0,
    "distill": 10.0,
    "correct": 10.0,
    "export": 4.0,
    "evaluate": 6.0,
}
#: Tokens per parameter of a model that is trained from scratch with the least arithmetic (Hoffmann et al. 2022, arXiv 2203.15556).
_SCRATCH = 20.0


@dataclass
class Estimate:
    """Predicted shape and cost of a run. Times are seconds; ``planner`` answers what other settings would take."""

    teacher: Architecture
    student: Architecture
    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    planner: Planner | None = None
    footprint: Footprint | None = None
    num_devices: int = 1
    scratch_tokens: float = 0.0
    scratch_flops: float = 0.0
    decode: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    scaling: Scaling | None = None

    @property
    def device_hours(self) -> float:
        """Hours of all stages times devices."""
        return sum(self.seconds.values()) * self.num_devices / 3600

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain JSON."""
        return {
            "teacher": {**self.teacher.to_dict(), "num_parameters": self.teacher.num_parameters},
            "student": {**self.student.to_dict(), "num_parameters": self.student.num_parameters},
            "flops": self.flops,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "num_steps": self.num_steps,
            "device_hours": self.device_hours,
            "from_scratch": {"tokens": self.scratch_tokens, "flops": self.scratch_flops},
            "decode_seconds": self.decode,
            **({"measured": self.measured} if self.measured else {}),
            **({"scaling": self.scaling.to_dict()} if self.scaling is not None else {}),
            **self._footprint(),
        }

    def _footprint(self) -> dict[str, Any]:
        if self.footprint is None:
            return {}
        memory, traffic = self.footprint.memory, self.footprint.traffic
        return {
            "memory_bytes_per_rank": memory.parts,
            "memory_bytes_per_moment": memory.moments,
            "host_bytes_per_rank": memory.host,
            "traffic_bytes_per_step": {name: {"node": row.node, "network": row.network} for name, row in traffic.items()},
        }


def teacher_shape(config: Config) -> Architecture:
    """The teacher's shape, from its config alone when the section holds one."""
    return discover(config_of(_teacher_folder(config), config.sections["teacher"])).architecture


def student_shape(config: Config, teacher: Architecture) -> tuple[Architecture, int]:
    """The shape nearest to the budget, or the explicit one, and how many candidates there will be."""
    target, search = config.sections["target"], config.sections["search"]
    if "search" not in config.recipe.stages and config.sections["student"].path:
        return discover(config_of(Path(config.sections["student"].path).expanduser())).architecture, 1
    if "sparsify" in config.recipe.stages and "prune" not in config.recipe.stages:
        return teacher, 1
    if target.name == "explicit":
        return explicit_shape(target, teacher), 1
    found = find_shapes(search, target, teacher, workload=target.workload(config.sections["data"].sequence_length))
    model_config = config_of(_teacher_folder(config), config.sections["teacher"])
    family = discover(model_config)

    def allowed(shape: Architecture) -> bool:
        try:
            return resized_config(model_config, family, shape) is not None
        except ArchitectureError:  # sizes that the family's config class refuses, as search finds out too
            return False

    shapes = found.diverse(search.num_candidates, allowed=allowed) or [found.grid.shape(0)]
    return shapes[0], len(shapes)


def _teacher_folder(config: Config) -> Path | None:
    """Where the teacher's config lies; None where the section holds it."""
    teacher = config.sections["teacher"]
    stands_here = bool(teacher.path) and Path(teacher.path).expanduser().is_dir()
    return resolve_teacher(teacher, only_config=True) if stands_here or not teacher.config else None


def estimate(config: Config, *, device_name: str | None = None, num_devices: int | None = None, measure: bool = False) -> Estimate:
    """Predict the configured recipe on this machine, or on a number of devices of a named kind.

    Without a name a matrix product is timed here; ``measure`` also times its memory, and says what it found.

    Raises:
        MinitronError: the teacher, target or device cannot be used.
    """
    teacher = teacher_shape(config)
    student, num_candidates = student_shape(config, teacher)
    result = Estimate(teacher, student)
    training, length = config.sections["training"], config.sections["data"].sequence_length
    world = result.num_devices = num_devices or dist.world_size()
    kind = device(device_name) if device_name else None
    if kind is not None:
        rate, efficiency = kind.flops, _EFFICIENCY["gpu"]
    else:
        bf16 = resolve_dtype(training.precision) == torch.bfloat16
        rate, efficiency = measured_rate(torch.bfloat16 if bf16 else torch.float32), _EFFICIENCY["gpu" if torch.cuda.is_available() else "cpu"]
        kind = Device(rate, 0.0, measured_bandwidth()) if measure else None
        result.measured = {"flops": rate, "bandwidth": kind.bandwidth} if kind is not None else {}
    for stage in config.recipe.stages:
        tokens, flops = stage_cost(stage, config, teacher, student, num_candidates)
        result.tokens[stage], result.flops[stage] = tokens, flops
        result.seconds[stage] = flops / (rate * efficiency * world) + _OVERHEAD.get(stage, 1.0)
    result.scratch_tokens = config.sections["cascade"].scratch_tokens or _SCRATCH * student.num_parameters
    result.scratch_flops = training_flops(student, None, num_tokens=result.scratch_tokens, sequence_length=length)
    if kind is not None:
        result.decode = {"teacher": _decode(kind, teacher), "student": _decode(kind, student)}
    if training.num_steps or training.num_tokens:
        result.num_steps = training.steps(length)
    result.planner = Planner(config, student, teacher, device_name=device_name, num_devices=num_devices)
    result.footprint = result.planner.footprint()
    if device_name and kind is not None and result.num_steps and world > result.planner.setup.node_size:
        result.scaling = scaling_story(config, student, [teacher, *further_shapes(config)], result.planner, kind, device_name, rate * efficiency)
    return result


def _decode(kind: Device, shape: Architecture) -> float:
    """Seconds of a token of one sequence, by the roofline, with bf16 weights."""
    cost = {"matrix_flops": shape.flops_per_token(1), "attention_flops": 0.0, "weight_bytes": 2.0 * shape.num_parameters, "cache_bytes": 0.0}
    return float(decode_seconds(kind, **cost))


def stage_cost(stage: str, config: Config, teacher: Architecture, student: Architecture, num_candidates: int) -> tuple[float, float]:
    """Tokens and FLOPs of one stage."""
    sections, length = config.sections, config.sections["data"].sequence_length
    training = sections["training"]
    if stage == "importance":
        tokens = float(sections["importance"].num_samples * length)
        return tokens, scoring_flops(teacher, num_tokens=tokens, sequence_length=length)
    if stage == "sparsify":
        shape = student if "prune" in config.recipe.stages else teacher
        tokens, passes = float(sections["sparsify"].num_samples * length), sample_passes(sections["sparsify"], shape)
        return tokens if passes else 0.0, passes * scoring_flops(shape, num_tokens=tokens, sequence_length=length)
    if stage == "cache" and (training.num_steps or training.num_tokens):
        head, held_out = sections["cache"].signal != "hidden_states", float(training.num_validation_sequences * length)
        flops = held_out * teacher.flops_per_token(length, head=head)
        flops += sum(p.num_tokens * teacher.flops_per_token(p.sequence_length, head=head) for p in training.phase_table(length))
        return training.tokens(length) + held_out, flops
    if stage == "correct":
        settings = sections["correct"].training(training)
        tokens = float(settings.tokens(length)) if settings.num_steps or settings.num_tokens else 0.0
        return tokens, training_flops(teacher, None, num_tokens=tokens, sequence_length=length)
    if stage == "distill" and (training.num_steps or training.num_tokens):
        points = 2 + (training.steps(length) - 1) // training.evaluate_every if training.evaluate_every > 0 else 2
        flops = points * training.num_validation_sequences * length * (student.flops_per_token(length) + _signal_flops(config, teacher, length))
        for phase in training.phase_table(length):
            flops += training_flops(student, None, num_tokens=phase.num_tokens, sequence_length=phase.sequence_length)
            flops += phase.num_tokens * _signal_flops(config, teacher, phase.sequence_length)
        return float(training.tokens(length)), flops
    if stage == "rank" and num_candidates > 1:
        cost = planned_cost(sections["ranking"], training, [student] * num_candidates, teacher, sequence_length=length)
        return cost["tokens"], cost["shared"]
    if stage == "evaluate":
        tokens, speed = float(sections["evaluate"].num_sequences * length), sections["evaluate"].speed
        timed = float(sum(speed.batch_sizes) * (min(speed.prompt_tokens, length) + speed.new_tokens) * (speed.num_rounds + 1))
        each = [shape.flops_per_token(length) for shape in (teacher, student)]
        return 3 * tokens, tokens * (each[0] + 2 * each[1]) + timed * sum(each)
    return 0.0, 0.0


def _signal_flops(config: Config, teacher: Architecture, length: int) -> float:
    """FLOPs per token of what all teachers say; of a cached one the head alone, where its states are what was kept."""
    if config.sections["teacher"].placement == "cached":
        head = teacher.flops_per_token(length) - teacher.flops_per_token(length, head=False)
        return head if config.sections["cache"].signal == "hidden_states" else 0.0
    return sum(shape.flops_per_token(length) for shape in (teacher, *further_shapes(config)))


def measured_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a plain matrix product on this process's device, the best of a few tries."""
    size = 4096 if torch.cuda.is_available() else 1024
    a, b = (torch.randn(size, size, device=dist.device()).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        c = a @ b
        if c.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def measured_bandwidth() -> float:
    """Bytes a second that this process reads and writes in its device's memory, the best of a few copies of a block larger than caches."""
    size = 2**30 if torch.cuda.is_available() else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=dist.device())
    target, best = torch.empty_like(source), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size / best
