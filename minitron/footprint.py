"""What distilling takes on every rank: memory by part and traffic by link, whether it fits, and the nearest setting that does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.config import Config
from minitron.core.architecture import Architecture
from minitron.core.cost import device
from minitron.core.memory import Memory, Setup, StateSizes, training_memory
from minitron.core.traffic import Traffic, training_traffic
from minitron.distill.losses import LossConfig, build_losses, state_terms
from minitron.distill.state_memory import state_sizes
from minitron.engine import CHECKPOINTING, OptimizerConfig, resolve_dtype
from minitron.engine.optimizers import build_optimizer
from minitron.errors import ConfigError
from minitron.models import config_of, discover, resolve_teacher
from minitron.models.load import check_further_teachers, shard_group_size
from minitron.ops.kd_chunk import row_term
from minitron.ops.kd_loss import default_chunk_size
from minitron.ops.products import native

#: Ranks of a node where no launcher says: the usual GPU server.
_NODE = 8
#: Share of a GPU's memory that tensors can have; the rest is the driver's context, the libraries' workspaces and fragmentation.
_USABLE = 0.94


@dataclass(frozen=True)
class Footprint:
    """Memory and traffic of a distillation on each of its ranks, and the memory [bytes] that a rank's device has."""

    setup: Setup
    memory: Memory
    traffic: dict[str, Traffic]
    capacity: float

    @property
    def fits(self) -> bool:
        """Whether the peak stays below what a device can give."""
        return self.memory.peak <= _USABLE * self.capacity


class Planner:
    """Footprints of one distillation under settings that may be varied."""

    def __init__(self, config: Config, student: Architecture, teacher: Architecture, *, device_name: str | None, num_devices: int | None) -> None:
        self._loss: LossConfig = config.sections["loss"]
        self._compiled: bool = config.sections["engine"].compile
        self._student = student
        self._teachers = [teacher, *further_shapes(config)] if self._with_teacher() else []
        self.setup = self._setup(config, device_name, num_devices)
        self.limited = bool(device_name) or torch.cuda.is_available()
        self.device = f"a {device_name}" if device_name else "a GPU of this machine" if self.limited else "this machine"
        self.capacity = device(device_name).memory if device_name else _own_memory() / (1 if self.limited else self.setup.node_size)
        self._states: dict[tuple[int, int, int, int], StateSizes] = {}

    def _with_teacher(self) -> bool:
        return bool(state_terms(self._loss)) or any(loss.function.needs_teacher for loss in build_losses(self._loss))

    def _setup(self, config: Config, device_name: str | None, num_devices: int | None) -> Setup:
        training, data, engine, teacher = (config.sections[name] for name in ("training", "data", "engine", "teacher"))
        world = num_devices or dist.world_size()
        node = min(_NODE, world) if num_devices else dist.local_world_size()
        on_gpu = bool(device_name) or torch.cuda.is_available()
        width, teacher_width = (2 if _is_bf16(name, device_name) else 4 for name in (training.precision, teacher.dtype))
        first = data.sequence_length
        shapes = [(training.micro_batch(first), first, training.batch_size)]
        if training.num_steps or training.num_tokens:
            phases = training.phase_table(first)
            shapes = [(training.micro_batch(p.sequence_length, first_length=first), p.sequence_length, p.batch_size) for p in phases]
        sequences, length, batch = max(shapes, key=lambda row: row[0] * row[1])
        hybrid = engine.name == "fsdp" and engine.sharding == "hybrid"
        sharded = teacher.placement == "shard"
        losses = build_losses(self._loss)
        return Setup(
            engine=engine.name,
            zero_stage=engine.zero_stage,
            world_size=world,
            node_size=node,
            shard_size=(engine.shard_size or node) if hybrid else world,
            teacher_size=shard_group_size(teacher.shard_group, world_size=world, local_world_size=node) if sharded else 1,
            placement=teacher.placement,
            offload=engine.offload,
            width=width,
            teacher_width=teacher_width,
            checkpointing=engine.activation_checkpointing,
            num_sequences=sequences,
            sequence_length=length,
            num_micro_batches=max(1, -(-batch // (world * sequences))),
            chunk_rows=default_chunk_size(torch.device("cuda" if on_gpu else "cpu")),
            num_moments=num_moments(training.optimizer_config()),
            num_losses=len(losses),
            wide_heads=not on_gpu and not (width == 2 and native()),
            fused=all(row_term(loss.function) is not None for loss in losses),
        )

    def footprint(self, setup: Setup | None = None) -> Footprint:
        """Of the configured settings, or of others."""
        setup = setup or self.setup
        key = (setup.num_sequences, setup.sequence_length, setup.width, setup.teacher_width)
        if key not in self._states:
            self._states[key] = state_sizes(self._loss, self._teachers[0], self._student, setup) if self._teachers else StateSizes()
        states = self._states[key]
        memory = training_memory(self._student, self._teachers, setup, states)
        traffic = training_traffic(self._student, self._teachers, setup, extra=states.num_parameters)
        return Footprint(setup, memory, traffic, self.capacity)

    def remedy(self) -> str:
        """The nearest setting that fits: the fewest changes, and of those the one that costs least; where none does, more devices."""
        changes = self._changes()
        for count in range(1, len(changes) + 1):
            for chosen in itertools.combinations(changes, count):
                setup = self.setup
                for _, fields in chosen:
                    setup = replace(setup, **fields)
                if len({name for _, fields in chosen for name in fields}) == sum(len(fields) for _, fields in chosen) and self.footprint(setup).fits:
                    return " ".join(words for words, _ in chosen) + " would fit"
        world = self.setup.world_size
        while (world := 2 * world) <= 65536:
            most = replace(self.setup, engine="fsdp", offload="none", world_size=world, node_size=min(world, _NODE), shard_size=world)
            most = replace(most, placement="shard", teacher_size=world, checkpointing="full", num_sequences=1)
            if self.footprint(most).fits:
                words = "engine=fsdp teacher.placement=shard teacher.shard_group=all engine.activation_checkpointing=full"
                return f"{world} devices with {words} training.micro_batch_size=1 would fit"
        return "no number of these devices would do with the sequence length as it is"

    def _changes(self) -> Sequence[tuple[str, dict[str, Any]]]:
        """Single settings that save memory, the cheapest first: the words to give, and what becomes different."""
        setup, found = self.setup, []  # type: Setup, list[tuple[str, dict[str, Any]]]
        if setup.num_sequences > 1:
            smaller = 1 << (setup.num_sequences - 1).bit_length() - 1
            for size in dict.fromkeys((smaller, 1)):
                micro = setup.num_micro_batches * -(-setup.num_sequences // size)
                found.append((f"training.micro_batch_size={size}", {"num_sequences": size, "num_micro_batches": micro}))
        for mode in CHECKPOINTING[CHECKPOINTING.index(setup.checkpointing) + 1 :]:
            if mode == "selective" and (self._compiled or (setup.engine == "deepspeed" and setup.zero_stage == 3)):
                continue
            found.append((f"engine.activation_checkpointing={mode}", {"checkpointing": mode}))
        spread = setup.engine != "local" and setup.world_size > 1
        if self._teachers and setup.placement == "replicate" and spread:
            size = shard_group_size("auto", world_size=setup.world_size, local_world_size=setup.node_size)
            found.append(("teacher.placement=shard", {"placement": "shard", "teacher_size": size}))
        if setup.world_size > 1 and not setup.sharded:
            found.append(("engine=fsdp", {"engine": "fsdp", "offload": "none", "shard_size": setup.world_size}))
        if setup.engine == "fsdp" and setup.shard_size < setup.world_size:
            found.append(("engine.sharding=full", {"shard_size": setup.world_size}))
        if setup.placement == "shard" and setup.teacher_size < setup.world_size:
            found.append(("teacher.shard_group=all", {"teacher_size": setup.world_size}))
        if self._teachers and setup.placement in ("replicate", "shard"):
            found.append(("teacher.placement=offload", {"placement": "offload", "teacher_size": 1}))
        if setup.engine == "fsdp" and setup.offload == "none":
            found.append(("engine.offload=parameters", {"offload": "parameters"}))
        return found


def check_fits(planner: Planner) -> str | None:
    """A warning where the peak is more than the memory of a machine without a GPU, which may swap.

    Raises:
        ConfigError: the peak is more than the device has, with the nearest setting that fits.
    """
    found = planner.footprint()
    if found.fits:
        return None
    sentence = (
        f"distilling takes {found.memory.peak / 1e9:.1f} GB on every rank, and {planner.device} has {found.capacity / 1e9:.1f} GB for it, "
        f"of which {_USABLE:.0%} are usable: {planner.remedy()}"
    )
    if planner.limited:
        raise ConfigError(sentence)
    return sentence


def num_moments(config: OptimizerConfig) -> int:
    """Numbers that an optimiser keeps for every weight of a matrix, seen by letting it take a step."""
    root = nn.Module()
    root.add_module("layer", nn.Linear(8, 8, bias=False))
    for parameter in root.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(root, config)
    optimizer.step()
    kept = [value.numel() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(kept) // 64


def further_shapes(config: Config) -> list[Architecture]:
    """The shapes of ``teacher.more``, from their configs."""
    teacher = config.sections["teacher"]
    sections = [replace(teacher, path=path, revision=None, more=None) for path, _ in check_further_teachers(teacher)]
    folders = [resolve_teacher(section, only_config=True) for section in sections]
    return [discover(config_of(folder, teacher)).architecture for folder in folders]


def _is_bf16(name: str, device_name: str | None) -> bool:
    """A precision word on a named device, all of which are fast in bf16, or here."""
    return name != "float32" if device_name else resolve_dtype(name) == torch.bfloat16


def _own_memory() -> float:
    """Bytes of this machine's GPU, else of its main memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(dist.device()).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
