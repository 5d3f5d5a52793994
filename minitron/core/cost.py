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
    """A device's dense bf16 rate [FLOP/s], memory [bytes] and memory bandwidth [bytes/s], from data sheets."""

    flops: float
    memory: float
    bandwidth: float


DEVICES = {
    "a100": Device(312e12, 80e9, 2.04e12),
    "h100": Device(989.5e12, 80e9, 3.35e12),
    "h200": Device(989.5e12, 141e9, 4.8e12),
    "b200": Device(2250e12, 180e9, 8.0e12),
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
) -> dict[str, float]:
    """FLOPs of training every student for a number of steps and reading the held-out tokens a number of times.

    ``students`` are shapes with their steps and held-out readings. ``shared``: all are trained side by side, so that the teacher's blocks read every
    training batch once and the held-out tokens once; its head is applied for every student. ``independent``: each has the teacher to itself.
    """
    whole = teacher.flops_per_token(sequence_length)
    blocks = teacher.flops_per_token(sequence_length, head=False)
    result = {"shared": 0.0, "independent": 0.0}
    for shape, steps, readings in students:
        student, trained, read = shape.flops_per_token(sequence_length), steps * tokens_per_step, readings * held_out_tokens
        result["independent"] += trained * (3.0 * student + whole) + read * (student + whole)
        result["shared"] += trained * (3.0 * student + whole - blocks) + read * (student + whole - blocks)
    if students:
        result["shared"] += (max(steps for _, steps, _ in students) * tokens_per_step + held_out_tokens) * blocks
    return result
