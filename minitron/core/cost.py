"""What things cost: FLOPs and bytes. Pure functions and a small table of devices."""

from __future__ import annotations

from dataclasses import dataclass

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


def activation_bytes(shape: Architecture, *, tokens: int, bytes_per_value: int, checkpointing: bool) -> float:
    """Rough bytes of stored activations for a backward pass over ``tokens`` tokens.

    Per token and layer, without recomputation: 10 hidden-sized values, 3 of the ffn, 4 of the attention width; with it, the block's input.
    """
    attention = shape.num_heads * shape.head_dim
    per_layer = shape.hidden_size if checkpointing else 10 * shape.hidden_size + 3 * shape.ffn_size + 4 * attention
    return float(tokens * shape.num_layers * per_layer * bytes_per_value)


def training_bytes(
    student: Architecture,
    teacher: Architecture | None,
    *,
    world_size: int,
    sharded_student: bool,
    sharded_teacher: bool,
    micro_batch_tokens: int,
    bf16: bool,
    checkpointing: bool,
    chunk_rows: int = 1024,
) -> dict[str, float]:
    """Bytes per rank by part: float32 weights, gradients and two moments of the student, the teacher, activations, the loss's chunk."""
    width = 2 if bf16 else 4
    shards = world_size if sharded_student else 1
    parts = {
        "student weights": 4.0 * student.num_parameters / shards,
        "gradients": 4.0 * student.num_parameters / shards,
        "optimizer": 8.0 * student.num_parameters / shards,
        "activations": activation_bytes(student, tokens=micro_batch_tokens, bytes_per_value=width, checkpointing=checkpointing),
        "loss": 6.0 * 4.0 * chunk_rows * student.vocab_size + 4.0 * student.vocab_size * student.hidden_size,
    }
    if teacher is not None:
        parts["teacher"] = width * teacher.num_parameters / (world_size if sharded_teacher else 1)
    return parts
