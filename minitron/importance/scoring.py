"""The pass over the calibration samples: sharded over ranks, one reduction at the end, resumable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.errors import DataError, Interrupted
from minitron.log import Progress
from minitron.models.family import Family
from minitron.models.head import decoder_of


class Observer(Protocol):
    """One metric. ``sums`` are additive over samples and ranks; ``scores`` turns the global sums into scores."""

    sums: dict[str, torch.Tensor]
    needs_forward: bool
    aggregation: str

    def attach(self, model: nn.Module, family: Family) -> None:
        """Register hooks on the model, or read its weights."""

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """Score tensors by name (``ffn.<i>``, ``hidden``, …), high = important."""


def run_pass(
    model: nn.Module,
    family: Family,
    samples: torch.Tensor,
    observers: list[Observer],
    *,
    batch_size: int,
    checkpointer: Checkpointer | None = None,
    checkpoint_every: int = 64,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, torch.Tensor]:
    """Scores of all observers from one pass over ``samples`` [num, sequence].

    Batches go to the ranks in turn, so every forward has the same shape on any number of them. Accumulators stay on the device.

    Raises:
        DataError: an activation is NaN or infinite.
        Interrupted: a signal asked for a stop; the pass goes on from its checkpoint.
    """
    for observer in observers:
        observer.attach(model, family)
    if any(observer.needs_forward for observer in observers):
        _forward_all(model, samples, observers, batch_size, checkpointer, checkpoint_every, stop)
        _reduce([observer for observer in observers if observer.needs_forward])  # what is read off the weights is whole on every rank
    scores: dict[str, torch.Tensor] = {}
    for observer in observers:
        scores.update(observer.scores(family, num_samples=len(samples)))
    for name, tensor in scores.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"the scores of '{name}' are not finite: the teacher's activations overflow in this dtype (try teacher.dtype=float32)")
    return {name: tensor.float().cpu() for name, tensor in scores.items()}


def _forward_all(
    model: nn.Module,
    samples: torch.Tensor,
    observers: list[Observer],
    batch_size: int,
    checkpointer: Checkpointer | None,
    checkpoint_every: int,
    stop: Callable[[], bool],
) -> None:
    batches = samples.split(batch_size)
    rounds = -(-len(batches) // dist.world_size())
    first = _restore(observers, checkpointer)
    bar = Progress("importance", total=len(samples), unit="sample", done=min(len(samples), first * batch_size * dist.world_size()))
    decoder, device = decoder_of(model), dist.device()
    for number in range(first, rounds):
        index = number * dist.world_size() + dist.rank()
        if index < len(batches):
            with torch.no_grad():
                decoder(input_ids=batches[index].to(device), use_cache=False)
        bar.advance(min(batch_size * dist.world_size(), len(samples) - bar.done))
        finished = number + 1
        stopping = stop()
        if checkpointer is not None and finished < rounds and (stopping or finished % checkpoint_every == 0):
            checkpointer.save(finished, {f"{i}/{k}": v for i, o in enumerate(observers) for k, v in o.sums.items()}, {})
            if stopping:
                raise Interrupted(f"importance stopped after {bar.done} of {len(samples)} samples; the same command goes on from there")


def _restore(observers: list[Observer], checkpointer: Checkpointer | None) -> int:
    """Put checkpointed sums back; returns the number of rounds that are done."""
    found = checkpointer.load_latest() if checkpointer is not None else None
    if found is None:
        return 0
    tensors, meta = found
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        observers[int(number)].sums[name].copy_(value)
    return int(meta["step"])


def _reduce(observers: list[Observer]) -> None:
    """Sum all accumulators over the ranks in one collective."""
    parts = [tensor for observer in observers for tensor in observer.sums.values()]
    if dist.world_size() == 1 or not parts:
        return
    flat = dist.all_reduce_sum(torch.cat([part.flatten() for part in parts]))
    for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(piece.view_as(part))
