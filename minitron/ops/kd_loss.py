"""Losses on logits without logits: both heads are applied chunk by chunk and the gradient is computed on the way.

The whole ``[tokens, vocab]`` tensor never exists. Per chunk of rows: the teacher's logits, once for all students that read these rows; then for
every student its logits in float32 with whatever its head does to them (bias, scale and cap), every row loss and its gradient with respect to
these logits, and the chunk's share of the gradients of hidden states and head, the latter accumulated in float32. Nothing is recomputed in the
backward pass, which only scales by the incoming gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron.core.sparse import SparseTargets
from minitron.log import get_logger
from minitron.ops.head import Head
from minitron.ops.kd_chunk import KernelChunks, constant, name_bad_rows
from minitron.ops.kd_gradients import Gradients
from minitron.ops.kd_rows import IGNORE_INDEX as IGNORE_INDEX
from minitron.ops.kd_walk import Walk
from minitron.ops.kd_walk import WeightedRowLoss as WeightedRowLoss
from minitron.ops.kd_walk import default_chunk_size as default_chunk_size

logger = get_logger(__name__)


@dataclass(frozen=True)
class StudentRows:
    """A student's side: hidden states [tokens, hidden] after the final norm, and a head [vocab, hidden]; both receive gradients."""

    hidden: torch.Tensor
    head: Head


@dataclass(frozen=True)
class SweptLosses:
    """What a walk has found for one student: the total, the terms [losses], and gradients of hidden states, head's weight and bias."""

    total: torch.Tensor
    values: torch.Tensor
    gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

    def attached(self, student: StudentRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Total and terms, the total as a function of the student that was swept; to be called once, where that student's weights are whole."""
        found: tuple[torch.Tensor, torch.Tensor] = _Attached.apply(student.hidden, student.head.weight, student.head.bias, self)
        return found


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, swept: SweptLosses
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(*swept.gradients)
        ctx.mark_non_differentiable(swept.values)
        return swept.total, swept.values

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if grads[0].device.type == "cpu" and float(grads[0]) == 1.0:  # a comparison that would make a GPU wait
            return *ctx.saved_tensors, None
        scaled = [None if gradient is None else (gradient * grads[0]).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return *scaled, None


class _Side:
    """One student during the walk: ``kept`` are the rows that are not masked, where that is known."""

    def __init__(self, student: StudentRows, walk: Walk, kept: torch.Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        hidden, weight, self._bias = student.hidden.detach(), student.head.weight.detach(), student.head.bias
        self._shape, self._kept, self._walk, self._needed = hidden.shape, kept, walk, any(needed)
        self._hidden = hidden if kept is None else hidden[kept]
        self._dtype = weight.dtype
        self._gradients = Gradients.of(self._hidden, weight, self._bias, needed)
        self._head = student.head.detached().ready(walk.compute_dtype)  # cast once here rather than once a chunk
        self.values = torch.zeros(len(walk.losses), dtype=torch.float32, device=hidden.device)

    def take(self, rows: slice, chunks: KernelChunks | None, teacher: Head | None, theirs: Any) -> None:
        """A chunk; ``theirs`` is what the ``teacher`` says of it."""
        walk, hidden = self._walk, self._hidden[rows].to(self._head.weight.dtype)
        if chunks is None:
            gradient = walk.torch_chunk(self._head, hidden, theirs, rows, self.values, gradient=self._needed)
        else:
            gradient = chunks.terms_of(self._head, hidden, teacher, theirs, rows, self.values, gradient=self._needed)
        if gradient is not None:
            if walk.labels.device.type != "cpu":  # masked rows are among these: zero times inf would be nan
                hidden = hidden.masked_fill((walk.labels[rows] == IGNORE_INDEX)[:, None], 0.0)
            self._gradients.add(rows, gradient, hidden, self._head.weight)

    def done(self) -> SweptLosses:
        """The sums of all chunks."""
        self._gradients.done(self._kept, self._shape)
        found, weights = self._gradients, constant(tuple(loss.weight for loss in self._walk.losses), self.values.device)
        bias = None if self._bias is None or found.bias is None else found.bias.to(self._bias.dtype)
        gradients = (found.hidden, found.weight_as(self._dtype), bias)
        return SweptLosses((self.values * weights).sum(), self.values, gradients)


def _needed(student: StudentRows) -> tuple[bool, bool, bool]:
    """Whether gradients are wanted of hidden states, weight and bias."""
    wanted = [
        tensor is not None and torch.is_grad_enabled() and tensor.requires_grad for tensor in (student.hidden, student.head.weight, student.head.bias)
    ]
    return wanted[0], wanted[1], wanted[2]


def sweep_heads(
    students: Sequence[StudentRows],
    labels: torch.Tensor,
    losses: Sequence[WeightedRowLoss],
    *,
    denominator: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: Head | None = None,
    teacher_sparse: SparseTargets | None = None,
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    compute_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
) -> list[SweptLosses]:
    """The losses of several students that read the same rows, against one teacher whose head is applied once to every chunk of them.

    Chunks are the outer loop, so that memory is flat in the rows: beside it there are a cast head and its gradient for each student. Values and
    gradients are those of :func:`fused_linear_losses` for each student alone, whose arguments these are; :meth:`SweptLosses.attached` makes them
    differentiable.

    Raises:
        ValueError: shapes or vocabularies do not match, or a loss needs a teacher that is not given.
    """
    device = labels.device
    walk = Walk(
        labels,
        tuple(losses),
        denominator,
        token_weights,
        None if teacher_hidden is None else teacher_hidden.detach(),
        None if teacher_head is None else teacher_head.detached(),
        teacher_sparse,
        temperature,
        compute_dtype,
        chunk_size or default_chunk_size(device),
    )
    for student in students:
        walk.check(student.hidden, student.head)
        if logger.isEnabledFor(logging.DEBUG):
            name_bad_rows({"student": student.hidden, "teacher": teacher_hidden}, labels)
    needed = [_needed(student) for student in students]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        kept = walk.valid_rows()
        walk = walk if kept is None else walk.taking(kept)
        sides = [_Side(student, walk, kept, wanted) for student, wanted in zip(students, needed, strict=True)]
        teacher = None if walk.teacher_head is None else walk.teacher_head.ready(compute_dtype)
        chunks = walk.kernel_chunks()
        for start in range(0, len(walk.labels), walk.chunk_size):
            rows = slice(start, start + walk.chunk_size)
            theirs = walk.said(teacher, rows) if chunks is None else chunks.said(teacher, walk.teacher_hidden, rows)
            for side in sides:
                side.take(rows, chunks, teacher, theirs)
            del theirs  # its memory is the next chunk's
        del chunks, teacher  # and theirs that of the gradients in the weights' dtype
        return [side.done() for side in sides]


def fused_linear_losses(
    student_hidden: torch.Tensor,
    student_head: Head,
    labels: torch.Tensor,
    losses: Sequence[WeightedRowLoss],
    *,
    denominator: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: Head | None = None,
    teacher_sparse: SparseTargets | None = None,
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    compute_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of row losses over valid rows, divided by a global denominator.

    Args:
        student_hidden: [tokens, student hidden], after the final norm.
        student_head: weight [vocab, student hidden] and bias, which receive gradients, and their transform.
        labels: [tokens] int64, the token that each row predicts; rows with :data:`IGNORE_INDEX` are inert.
        losses: row losses with their weights.
        denominator: 0-d float tensor, the number of valid tokens of the whole optimiser step.
        teacher_hidden: [tokens, teacher hidden]; needed when a loss needs the teacher.
        teacher_head: of the same vocabulary as the student's.
        teacher_sparse: [tokens, …], of that vocabulary, in place of hidden states and head; ``losses`` are then functions of it.
        token_weights: [tokens], or [losses, tokens] with a row for each loss; multiplies every row's loss, value and gradient. The
            denominator stays what it is: a token of weight 0 still counts in it, and weights of mean 1 keep the scale of the loss.
        temperature: divides both logits; divergences carry its square in value and gradient.
        compute_dtype: dtype of the products with the head (bf16 or float32); statistics and losses are always float32.
        chunk_size: rows per chunk; None picks by device.

    Returns:
        The total (differentiable, 0-d float32) and the terms before their weights in the mixture (detached, [losses] float32).

    Raises:
        ValueError: shapes or vocabularies do not match, or a loss needs a teacher that is not given.
    """
    student = StudentRows(student_hidden, student_head)
    swept = sweep_heads(
        [student],
        labels,
        losses,
        denominator=denominator,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        teacher_sparse=teacher_sparse,
        token_weights=token_weights,
        temperature=temperature,
        compute_dtype=compute_dtype,
        chunk_size=chunk_size,
    )
    return swept[0].attached(student)
