"""What a shape is predicted to need: parameters, memory, FLOPs, and times by the roofline of a device or measured on this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.core.architecture import Architecture
from minitron.core.cost import DEVICES, decode_seconds, device, prefill_seconds
from minitron.errors import ConfigError, nearest
from minitron.search.grid import Grid, Values

#: The device word for times that are measured.
MEASURED = "measured"


@dataclass(frozen=True)
class Seconds:
    """Times of one workload: reading a batch of prompts, and one decoding step of the batch at its full length."""

    prefill: Any
    decode: Any


#: Shape → its times on this machine.
Measure = Callable[[Architecture], Seconds]


@dataclass(frozen=True)
class Workload:
    """A batch of sequences on a device; ``measure`` gives the times where the device is :data:`MEASURED`."""

    batch_size: int
    sequence_length: int
    device: str
    measure: Measure | None = None


@dataclass(frozen=True)
class Quantity:
    """``grows`` is True where a larger shape has more of it, False where less; ``timed`` where it depends on the device."""

    show: Callable[[float], str]
    grows: bool = True
    timed: bool = False


#: What ``target.limits`` may bound.
QUANTITIES = {
    "num_parameters": Quantity("{:,.0f} parameters".format),
    "num_non_embedding_parameters": Quantity("{:,.0f} parameters without the vocabulary".format),
    "num_active_parameters": Quantity("{:,.0f} parameters a token".format),
    "memory_gb": Quantity("{:.4g} GB of bf16 weights and cache".format),
    "flops_per_token": Quantity("{:.4g} FLOPs a token".format),
    "latency_ms": Quantity("{:.4g} ms a decoding step".format, timed=True),
    "prefill_ms": Quantity("{:.4g} ms until the prompts are read".format, timed=True),
    "throughput": Quantity("{:.4g} tokens a second".format, grows=False, timed=True),
}


def check_device(name: str) -> None:
    """Refuse a device that is neither in the table nor this machine.

    Raises:
        ConfigError: it is unknown.
    """
    if name != MEASURED and name not in DEVICES:
        raise ConfigError(f"target.device={name} is unknown; {nearest(name, [*DEVICES, MEASURED])}")


def predict(grid: Grid, quantity: str, workload: Workload) -> Values:
    """One of :data:`QUANTITIES` for every point, [points]."""
    if quantity == "memory_gb":
        cache = grid.kv_cache_bytes(batch_size=workload.batch_size, sequence_length=workload.sequence_length)
        return (2.0 * grid.num_parameters + cache) / 1e9
    if quantity == "flops_per_token":
        return grid.flops_per_token(workload.sequence_length)
    if QUANTITIES[quantity].timed:
        seconds = times(grid, workload)
        if quantity == "throughput":
            return workload.batch_size / seconds.decode
        return 1e3 * (seconds.decode if quantity == "latency_ms" else seconds.prefill)
    counts: Values = getattr(grid, quantity)
    return counts.astype(np.float64)


def times(grid: Grid, workload: Workload) -> Seconds:
    """Seconds of the workload for every point, [points] each."""
    if workload.device == MEASURED:
        assert workload.measure is not None, "measured times need a way to measure"
        each = [workload.measure(grid.shape(index)) for index in range(len(grid))]
        return Seconds(np.array([one.prefill for one in each]), np.array([one.decode for one in each]))
    kind, batch, length = device(workload.device), workload.batch_size, workload.sequence_length
    decode = decode_seconds(
        kind,
        matrix_flops=batch * grid.matrix_flops(),
        attention_flops=batch * grid.attended_flops(length),
        weight_bytes=grid.read_bytes(batch),
        cache_bytes=grid.kv_cache_bytes(batch_size=batch, sequence_length=length),
    )
    tokens = batch * length
    return Seconds(prefill_seconds(kind, flops=tokens * grid.flops_per_token(length), weight_bytes=grid.read_bytes(tokens)), decode)


def predicted_costs(shape: Architecture, teacher: Architecture, workload: Workload) -> dict[str, float]:
    """Everything that is predicted of one shape, for its line in ``candidates.jsonl``; without times where nothing can measure them."""
    grid = Grid.of_shapes([shape], teacher)
    timed = workload.device != MEASURED or workload.measure is not None
    costs = {
        name: float(predict(grid, name, workload)[0]) for name, kind in QUANTITIES.items() if name != "num_parameters" and (timed or not kind.timed)
    }
    cache = grid.kv_cache_bytes(batch_size=workload.batch_size, sequence_length=workload.sequence_length)
    return {**costs, "weight_bytes": 2.0 * float(grid.num_parameters[0]), "kv_cache_bytes": float(cache[0])}
