"""The training loop. It knows rhythm, and neither engines, nor families, nor losses, nor trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from minitron import dist
from minitron.core.protocols import Engine
from minitron.distill.pair import TeacherStudent
from minitron.log import get_logger
from minitron.ops.kd_loss import IGNORE_INDEX

logger = get_logger(__name__)


class Batches(Protocol):
    """Where the loop draws from: all micro-batches of this rank for one optimiser step."""

    def next(self) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of CPU tensors ``input_ids`` and ``labels``, [micro-batch, sequence]."""


@dataclass
class Progress:
    """How far training is. ``tokens`` counts valid tokens over all ranks."""

    step: int = 0
    tokens: int = 0


@dataclass
class StepReport:
    """One finished optimiser step; ``data_seconds`` went by before its batch was there. Tensors stay on the device until someone reads them."""

    step: int
    tokens: int
    learning_rate: float
    gradient_norm: torch.Tensor
    seconds: float
    step_tokens: int
    data_seconds: float = 0.0
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # what hooks add, 0-d and equal on every rank
    _metrics: dict[str, float] | None = field(default=None, repr=False)

    def read(self) -> dict[str, float]:
        """The metrics as numbers, terms summed over ranks: one collective and one host synchronisation, at the first call."""
        if self._metrics is None:
            self._metrics = self._read()
        return self._metrics

    def _read(self) -> dict[str, float]:
        names = list(self.terms)
        own = [self.data_seconds if rank == dist.rank() else 0.0 for rank in range(dist.world_size())]
        terms = torch.stack([self.terms[name].detach().float() for name in names])
        told = dist.all_reduce_sum(torch.cat([terms, torch.tensor(own, device=terms.device)])).tolist()
        values: dict[str, Any] = dict(zip(names, told, strict=False))
        waits = told[len(names) :]
        _name_slow_rank(self.step, waits)
        values |= {name: float(value) for name, value in self.values.items()}
        values |= {"learning_rate": self.learning_rate, "gradient_norm": float(self.gradient_norm)}
        return {"tokens": self.tokens, **values, "data_seconds": max(waits)}


@dataclass(frozen=True)
class Asked:
    """A micro-batch whose losses are wanted next."""

    batch: dict[str, torch.Tensor]
    denominator: torch.Tensor


#: The steps of a training for someone else to advance; see :func:`train_steps`.
Steps = Generator[Asked | StepReport, dict[str, torch.Tensor] | None, None]
#: Seconds by which a rank's text may come later than that of most ranks before it is named.
_LATE = 2.0


def _name_slow_rank(step: int, waits: list[float]) -> None:
    """Say which rank all others wait for, where one's text comes late. ``waits``: seconds of every rank."""
    usual = sorted(waits)[(len(waits) - 1) // 2]
    if dist.is_main() and max(waits) > usual + _LATE:
        logger.warning("  step %d: rank %d waited %.1f s for its text, most ranks %.1f s", step, waits.index(max(waits)), max(waits), usual)


#: Called after every optimiser step on every rank; a true answer stops training.
Hook = Callable[[StepReport], bool | None]


def count_tokens(micro_batches: Iterable[dict[str, torch.Tensor]]) -> int:
    """Valid tokens of an optimiser step over all ranks, counted on the CPU so that no device waits."""
    count = torch.tensor(sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches))
    return int(dist.all_reduce_sum(count))


def train(
    pair: TeacherStudent,
    engine: Engine,
    batches: Batches,
    *,
    learning_rate: Callable[[int], float],
    num_steps: int,
    progress: Progress,
    hooks: list[Hook],
) -> Progress:
    """Train from ``progress`` to ``num_steps`` optimiser steps, or until a hook says stop."""
    for _ in train_steps(pair, engine, batches, learning_rate=learning_rate, num_steps=num_steps, progress=progress, hooks=hooks):
        pass
    return progress


def train_steps(
    pair: TeacherStudent,
    engine: Engine,
    batches: Batches,
    *,
    learning_rate: Callable[[int], float],
    num_steps: int,
    progress: Progress,
    hooks: list[Hook],
) -> Steps:
    """The same for someone else to advance: halts before every micro-batch and asks for its losses, and with its report after a step's hooks.

    Who advances several students sends each its losses, computed for all at once; to who sends nothing the pair answers.
    """
    while progress.step < num_steps:
        started = time.perf_counter()
        micro_batches = batches.next()
        data_seconds = time.perf_counter() - started
        step_tokens = count_tokens(micro_batches)
        denominator = torch.tensor(float(max(step_tokens, 1)), device=dist.device())

        sums: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(micro_batches):
            terms = (yield Asked(batch, denominator)) or pair.losses(batch, denominator)
            engine.backward(terms["loss"], boundary=index == len(micro_batches) - 1)
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
            del terms

        rate = learning_rate(progress.step)
        gradient_norm = engine.step(rate)
        progress.step += 1
        progress.tokens += step_tokens
        seconds = time.perf_counter() - started
        report = StepReport(progress.step, progress.tokens, rate, gradient_norm, seconds, step_tokens, data_seconds, sums)
        stopped = any([hook(report) for hook in hooks])  # every hook runs, then one may stop
        yield report
        if stopped:
            break
