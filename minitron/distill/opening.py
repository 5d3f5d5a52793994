"""What losses on states need before the first step, on batches that are drawn and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from minitron import dist
from minitron.core.protocols import Engine
from minitron.distill.filters import train_filters
from minitron.distill.loop import count_tokens
from minitron.distill.losses.task_aware_filters import TaskAwareFilters
from minitron.distill.on_policy import ResumableBatches
from minitron.distill.pair import TeacherStudent


def open_losses(pair: TeacherStudent, engine: Engine, batches: ResumableBatches, *, stop: Callable[[], bool]) -> None:
    """Train filters, then find the first dynamic weight, whatever of them the losses have.

    Raises:
        Interrupted: a signal asked for a stop; all of this will start over.
    """
    states = pair.module.states if pair.module is not None else None
    for member in states.members.values() if states is not None else ():
        if isinstance(member, TaskAwareFilters):
            with looking_ahead(batches):
                train_filters(member, pair, engine, batches, stop=stop)
    if pair.alpha is not None:
        with looking_ahead(batches):
            pair.alpha.update(first_terms(pair, batches.next()))


@torch.no_grad()
def first_terms(pair: TeacherStudent, micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """This rank's terms of an optimiser step without a gradient."""
    denominator = torch.tensor(float(max(count_tokens(micro_batches), 1)), device=dist.device())
    sums: dict[str, torch.Tensor] = {}
    for batch in micro_batches:
        for name, value in pair.losses(batch, denominator).items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


@contextmanager
def looking_ahead(batches: ResumableBatches) -> Iterator[None]:
    """What is drawn inside comes again afterwards."""
    place = batches.state_dict()
    try:
        yield
    finally:
        batches.load_state_dict(place)
