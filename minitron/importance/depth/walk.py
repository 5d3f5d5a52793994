"""Passes over batches: shared out to the ranks, one reduction a pass, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.errors import Interrupted
from minitron.log import Progress

Tensors = dict[str, torch.Tensor]
Batch = TypeVar("Batch")


class Walk:
    """One or several passes of a depth metric, each of which ends with sums over all batches of all ranks.

    A metric that needs several passes, because each depends on what the one before found, asks for them one after the other. Finished ones are
    remembered by their number: after a restart the metric asks again from the start, is answered from the checkpoint, and goes on inside the pass
    that was cut short.
    """

    def __init__(
        self,
        *,
        checkpointer: Checkpointer | None = None,
        checkpoint_every: int = 64,
        stop: Callable[[], bool] = lambda: False,
        together: bool = False,
    ) -> None:
        """``together``: a step may need all ranks at once, so a rank without a batch runs one that does not count."""
        self._checkpointer, self._every, self._stop, self._together = checkpointer, checkpoint_every, stop, together
        self._asked = self._steps = self._first = 0
        self._finished: list[Tensors] = []
        self._partial: Tensors = {}
        found = checkpointer.load_latest() if checkpointer is not None else None
        if found is not None:
            tensors, meta = found
            self._steps, self._first = int(meta["step"]), int(meta["round"])
            self._finished = [{} for _ in range(int(meta["finished"]))]
            for key, value in tensors.items():
                place, _, name = key.partition("/")
                (self._partial if place == "partial" else self._finished[int(place)])[name] = value

    def total(
        self,
        what: str,
        batches: Sequence[Batch],
        step: Callable[[Batch], None],
        sums: Tensors,
        *,
        finish: Callable[[Tensors], Tensors] = lambda sums: sums,
        forwards: int = 1,
    ) -> Tensors:
        """Run ``step`` on this rank's batches, which adds to ``sums``; then add up the ranks and return what ``finish`` makes of it, on the CPU.

        Every world size gives the ranks whole batches, so that the forwards have the same shapes. One collective; nothing in here waits for
        the device before the end. ``forwards`` is what a step costs, which checkpoints are counted in.

        Raises:
            Interrupted: a signal asked for a stop; the pass goes on from its checkpoint.
        """
        number, self._asked = self._asked, self._asked + 1
        if number < len(self._finished):
            return self._finished[number]
        world, rank = dist.world_size(), dist.rank()
        rounds, every = -(-len(batches) // world), max(1, self._every // forwards)
        for name, value in self._partial.items():
            sums[name].copy_(value)
        bar = Progress(what, total=len(batches), unit="batch", done=min(len(batches), self._first * world))
        for finished in range(self._first + 1, rounds + 1):
            index = (finished - 1) * world + rank
            if index < len(batches):
                step(batches[index])
            elif self._together:
                kept = {name: value.clone() for name, value in sums.items()}
                step(batches[0])
                for name, value in kept.items():
                    sums[name].copy_(value)
            bar.advance(min(world, len(batches) - bar.done))
            self._steps += 1
            stopping = self._stop()
            if self._checkpointer is not None and finished < rounds and (stopping or finished % every == 0):
                self._save(finished, sums)
                if stopping:
                    raise Interrupted(f"{what} stopped after {bar.done} of {len(batches)} batches; the same command goes on from there")
        self._partial, self._first = {}, 0
        _reduce(sums)
        self._finished.append({name: value.cpu() for name, value in finish(sums).items()})
        self._steps += 1
        self._save(0, {})
        return self._finished[number]

    def _save(self, finished_rounds: int, sums: Tensors) -> None:
        """Results of finished passes, and this rank's sums of the one at work."""
        if self._checkpointer is None:
            return
        tensors = {f"{number}/{name}": value for number, results in enumerate(self._finished) for name, value in results.items()}
        tensors |= {f"partial/{name}": value for name, value in sums.items()}
        self._checkpointer.save(self._steps, tensors, {"round": finished_rounds, "finished": len(self._finished)})


def _reduce(sums: Tensors) -> None:
    """Add up the ranks in one collective."""
    if dist.world_size() == 1:
        return
    if len(sums) == 1:  # nothing to join: a large buffer needs no second one
        dist.all_reduce_sum(next(iter(sums.values())))
        return
    flat = dist.all_reduce_sum(torch.cat([value.flatten().double() for value in sums.values()]))
    for value, piece in zip(sums.values(), flat.split([value.numel() for value in sums.values()]), strict=True):
        value.copy_(piece.view_as(value))
