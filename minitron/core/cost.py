"""What things cost: FLOPs and bytes. Pure functions and a small table of devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.core.architecture import Architecture
from minitron.errors import ConfigError, nearest


@dataclass(frozen=True)
class Device:
    """A device's dense bf16 rate [FLOP/s], memory [bytes] and memory bandwidth [bytes/s], from data sheets.

    ``node_link`` and ``network`` are what collectives bring to each device of a node [bytes/s]: 0.78 of NVLink's one direction (0.5 of PCIe's where
    there is none), 0.9 of one network port a device: 400 Gbit/s, 200 beside A100, 100 beside cards without NVLink.
    """

    flops: float
    memory: float
    bandwidth: float
    node_link: float = 16e9
    network: float = 11e9


DEVICES = {
    "a100": Device(312e12, 80e9, 2.04e12, 234e9, 22.5e9),
    "h100": Device(989.5e12, 80e9, 3.35e12, 350e9, 45e9),
    "h200": Device(989.5e12, 141e9, 4.8e12, 350e9, 45e9),
    "b200": Device(2250e12, 180e9, 8.0e12, 700e9, 45e9),
    "l40s": Device(362e12, 48e9, 0.86e12),
    "rtx4090": Device(165e12, 24e9, 1.01e12),
}


def device(name: str) -> Device:
    """A device by name.

    Raises:
        ConfigError: the table does not have it.
    """
    if name not in DEVICES:
        raise ConfigError(f"device '{name}' is unknown; {nearest(name, DEVICES)}")
    return DEVICES[name]


def scoring_flops(teacher: Architecture, *, num_tokens: float, sequence_length: int) -> float:
    """FLOPs of an importance pass: forwards without the head."""
    return num_tokens * teacher.flops_per_token(sequence_length, head=False)


def training_flops(student: Architecture, teacher: Architecture | None, *, num_tokens: float, sequence_length: int) -> float:
    """FLOPs of training: three forwards of the student and, when distilling, one of the teacher, per token."""
    per_token = 3.0 * student.flops_per_token(sequence_length)
    if teacher is not None:
        per_token += teacher.flops_per_token(sequence_length)
    return num_tokens * per_token


def decode_seconds(device: Device, *, matrix_flops: Any, attention_flops: Any, weight_bytes: Any, cache_bytes: Any) -> Any:
    """Seconds of one decoding step by the roofline: weights and their products, then keys and values and theirs, each bound by arithmetic or memory.

    Takes numbers or arrays of them.
    """
    matrices = np.maximum(matrix_flops / device.flops, weight_bytes / device.bandwidth)
    return matrices + np.maximum(attention_flops / device.flops, cache_bytes / device.bandwidth)


def prefill_seconds(device: Device, *, flops: Any, weight_bytes: Any) -> Any:
    """Seconds until a batch of prompts is read, by the roofline. Takes numbers or arrays of them."""
    return np.maximum(flops / device.flops, weight_bytes / device.bandwidth)


def ranking_flops(
    teacher: Architecture,
    students: Sequence[tuple[Architecture, int, int]],
    *,
    tokens_per_step: float,
    held_out_tokens: float,
    sequence_length: int,
    share_head: int = 1,
) -> dict[str, float]:
    """FLOPs of training every student for a number of steps and reading the held-out tokens a number of times.

    ``students`` are shapes with their steps and held-out readings. ``shared``: all are trained side by side, so that the teacher's blocks read every
    training batch once and the held-out tokens once; its head is applied once for every ``share_head`` of them. ``independent``: each has the teacher
    to itself.
    """
    whole = teacher.flops_per_token(sequence_length)
    blocks = teacher.flops_per_token(sequence_length, head=False)
    result = {"shared": 0.0, "independent": 0.0}
    for shape, steps, readings in students:
        student, trained, read = shape.flops_per_token(sequence_length), steps * tokens_per_step, readings * held_out_tokens
        result["independent"] += trained * (3.0 * student + whole) + read * (student + whole)
        result["shared"] += trained * 3.0 * student + read * student
    if students:
        all_steps, all_readings = [steps for _, steps, _ in students], [readings for _, _, readings in students]
        result["shared"] += (max(all_steps) * tokens_per_step + held_out_tokens) * blocks
        applied = _heads(all_steps, share_head) * tokens_per_step + _heads(all_readings, share_head) * held_out_tokens
        result["shared"] += applied * (whole - blocks)
    return result


def _heads(rounds: Sequence[int], share_head: int) -> int:
    """How often the teacher's head is applied to a round's text in all, where each student takes part in the first so many rounds."""
    return sum(-(-sum(number >= at for number in rounds) // share_head) for at in range(1, max(rounds) + 1))


def family_saving(scratch: Sequence[float], derived: Sequence[float]) -> float:
    """How many times more a family costs when every member is trained from scratch than when only the first is, and the others are derived.

    ``scratch`` are costs of all members, the largest first; ``derived`` those of all but the first. (arXiv 2407.14679, section 4: 4.4e17, 2.5e17 and
    1.2e17 FLOPs a step for 15B, 8B and 4B, and a fortieth of the tokens for the derived ones, give 1.80.)
    """
    return sum(scratch) / (scratch[0] + sum(derived))
