"""The first stage of task-aware distillation (TED, arXiv 2210.01351, section 3.1): filters learn the task while both models stand still.

A filter is followed by the model's own frozen head, with a linear map between where their widths differ (a head of its own for every
layer, as in the paper, would be as large as the vocabulary). Its loss is the cross-entropy with the data's labels. The map between is
dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from minitron import dist
from minitron.core.protocols import Engine
from minitron.distill.loop import count_tokens
from minitron.distill.losses import LossConfig, build_losses
from minitron.distill.losses.state import only_valid
from minitron.distill.losses.task_aware_filters import TaskAwareFilters
from minitron.distill.on_policy import ResumableBatches
from minitron.distill.pair import TeacherStudent
from minitron.distill.teacher import TeacherSignal
from minitron.errors import Interrupted
from minitron.log import get_logger
from minitron.models.head import head_parameters
from minitron.ops.head import Head
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses

logger = get_logger(__name__)


@dataclass
class FilteredSide:
    """One model's filters in training, each [width, hidden], and the maps back to its hidden size where that is another."""

    head: Callable[[], AbstractContextManager[Head]]
    filters: list[torch.Tensor]
    back: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        width, hidden = self.filters[0].shape
        self.filters = [weight.to(dist.device(), copy=True).requires_grad_() for weight in self.filters]
        if width != hidden:
            maps = (weight.detach().T.contiguous() for weight in self.filters)  # of a selection: the way back
            self.back = [weight.requires_grad_() for weight in maps]

    def loss(self, states: list[torch.Tensor], labels: torch.Tensor, denominator: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Mean over filters of the cross-entropy behind them, 0-d."""
        total, losses = torch.zeros((), device=labels.device), build_losses(LossConfig("cross_entropy"))
        with self.head() as head:
            for index, state in enumerate(states):
                hidden = F.linear(only_valid(state, labels != IGNORE_INDEX).float(), self.filters[index])
                hidden = F.linear(hidden, self.back[index]) if self.back else hidden
                value, _ = fused_linear_losses(hidden.flatten(0, 1), head, labels.flatten(), losses, denominator=denominator, compute_dtype=dtype)
                total = total + value / len(states)
        return total


def train_filters(filters: TaskAwareFilters, pair: TeacherStudent, engine: Engine, batches: ResumableBatches, *, stop: Callable[[], bool]) -> None:
    """Train the filters of both models on the next batches and leave them in ``filters.start``.

    The filters are whole on every rank and are trained with AdamW beside the engine, which updates nothing here.

    Raises:
        Interrupted: a signal asked for a stop; this stage will start over.
    """
    assert isinstance(pair.teacher, TeacherSignal) and pair.module is not None and pair.module.states is not None
    config, student, transform = filters.config, pair.module.student, pair.module.head().transform

    @contextmanager
    def student_head() -> Iterator[Head]:
        held = [parameter for parameter in head_parameters(student) if parameter is not None]
        with engine.gathered(held) as (weight, *bias):
            yield Head(weight, bias[0] if bias else None, transform)

    sides = {"teacher": FilteredSide(pair.teacher.head, filters.start["teacher"]), "student": FilteredSide(student_head, filters.start["student"])}
    parameters = [weight for side in sides.values() for weight in (*side.filters, *side.back)]
    optimizer = torch.optim.AdamW(parameters, lr=config.filter_learning_rate, weight_decay=0.0)
    reads = dict(zip(("teacher", "student"), pair.module.states.reads(filters), strict=True))
    ends: list[torch.Tensor] = []
    for step in range(config.filter_steps):
        if stop():
            raise Interrupted(f"stopped while the filters were trained (step {step} of {config.filter_steps}); this starts over")
        micro_batches = batches.next()
        denominator = torch.tensor(float(max(count_tokens(micro_batches), 1)), device=dist.device())
        losses = torch.zeros(2, device=dist.device())
        for batch in micro_batches:
            labels = batch["labels"].to(dist.device())
            found = dict(zip(("teacher", "student"), pair.states(batch), strict=True))
            for number, (name, side) in enumerate(sides.items()):
                loss = side.loss([found[name][i] for i in reads[name]], labels, denominator, engine.compute_dtype)
                loss.backward()
                losses[number] += loss.detach()
        _reduce_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, config.filter_steps - 1):
            ends.append(dist.all_reduce_sum(losses))
    filters.start = {name: [weight.detach() for weight in side.filters] for name, side in sides.items()}
    if ends:
        (teacher, student), (teacher_end, student_end) = ends[0].tolist(), ends[-1].tolist()
        logger.info("  filters: loss behind the teacher's %.3f → %.3f, behind the student's %.3f → %.3f", teacher, teacher_end, student, student_end)


def _reduce_gradients(parameters: list[torch.Tensor]) -> None:
    """Sum the gradients over ranks, one collective."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = dist.all_reduce_sum(nn.utils.parameters_to_vector(gradients))
    nn.utils.vector_to_parameters(flat, gradients)
