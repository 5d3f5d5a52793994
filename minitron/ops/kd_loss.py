"""Losses on logits without logits: both heads are applied chunk by chunk and the gradient is computed on the way.

The whole ``[tokens, vocab]`` tensor never exists. Per chunk of rows: student and teacher logits in float32 with whatever each head
does to them (its bias, scale and cap), every row loss and its gradient with respect to the student's logits, then the chunk's share of
the gradients of hidden states and head, the latter accumulated in float32. Nothing is recomputed in the backward pass, which only
scales by the incoming gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from minitron.core.protocols import RowLoss
from minitron.core.sparse import SparseTargets, with_tensors
from minitron.log import get_logger
from minitron.ops.head import Head
from minitron.ops.kd_chunk import KernelChunks, choose, constant, name_bad_rows, row_term
from minitron.ops.kd_gradients import Gradients
from minitron.ops.kd_rows import IGNORE_INDEX as IGNORE_INDEX

logger = get_logger(__name__)


@dataclass(frozen=True)
class WeightedRowLoss:
    """A row loss, its name in logs and its weight in the total; one of weight 0 is only measured."""

    name: str
    weight: float
    function: RowLoss


def default_chunk_size(device: torch.device) -> int:
    """Rows per chunk: enough on a GPU that the head's gradient is not bound by memory traffic; on two CPU cores 512 rows cost no more
    time than all rows at once (256: a tenth more), and a tenth of a gigabyte a tensor."""
    return 1024 if device.type == "cuda" else 512


@dataclass(frozen=True)
class _Rows:
    """What the walk knows of its rows beside the student: everything that receives no gradient."""

    labels: torch.Tensor
    losses: tuple[WeightedRowLoss, ...]
    denominator: torch.Tensor
    token_weights: torch.Tensor | None
    teacher_hidden: torch.Tensor | None
    teacher_head: Head | None
    teacher_sparse: SparseTargets | None
    temperature: float
    compute_dtype: torch.dtype
    chunk_size: int

    def check(self, student_hidden: torch.Tensor, student_head: Head) -> None:
        """Raise ValueError where shapes do not match or the teacher is missing."""
        tokens, vocab = self.labels.shape[0], student_head.num_tokens
        needing = [loss.name for loss in self.losses if loss.function.needs_teacher]
        if needing and self.teacher_sparse is None and (self.teacher_hidden is None or self.teacher_head is None):
            raise ValueError(f"loss '{needing[0]}' needs the teacher's hidden states and head")
        if self.teacher_sparse is not None and (self.teacher_sparse.ids.shape[0] != tokens or self.teacher_sparse.num_tokens != vocab):
            found = f"{self.teacher_sparse.ids.shape[0]} rows over {self.teacher_sparse.num_tokens} tokens"
            raise ValueError(f"sparse targets of {found} for {tokens} rows over {vocab}")
        if student_hidden.shape[0] != tokens or (self.teacher_hidden is not None and self.teacher_hidden.shape[0] != tokens):
            raise ValueError(f"{tokens} labels for {student_hidden.shape[0]} rows of hidden states")
        if self.teacher_head is not None and self.teacher_head.num_tokens != vocab:
            raise ValueError(f"the student's vocabulary has {vocab} rows, the teacher's {self.teacher_head.num_tokens}")
        hard = any(getattr(row_term(loss.function), "kind", "") == "cross_entropy" for loss in self.losses)
        if hard and tokens and self.labels.device.type == "cpu" and int(self.labels.max()) >= vocab:  # a GPU would have to wait for the answer
            raise ValueError(f"label {int(self.labels.max())} is no token of a vocabulary of {vocab}")
        if self.token_weights is not None and self.token_weights.shape not in ((tokens,), (len(self.losses), tokens)):
            raise ValueError(f"weights of shape {list(self.token_weights.shape)} for {len(self.losses)} losses on {tokens} tokens")

    def kernel_chunks(self) -> KernelChunks | None:
        """The chunks as a compiled kernel takes them, or None where the row functions of the losses must."""
        device = self.labels.device
        kind = choose([(loss.name, loss.function) for loss in self.losses], device, sparse=self.teacher_sparse is not None)
        if kind == "torch":
            return None
        return KernelChunks(
            tuple(term for loss in self.losses if (term := row_term(loss.function)) is not None),
            tuple(loss.weight for loss in self.losses),
            self.labels,
            torch.stack(self.scales(slice(None), self.labels != IGNORE_INDEX)).float(),
            self.temperature,
            kind,
            self.compute_dtype,
        )

    def valid_rows(self) -> torch.Tensor | None:
        """The numbers of rows that are not masked, where some are and asking does not make a device wait."""
        if self.labels.device.type != "cpu":
            return None
        valid = self.labels != IGNORE_INDEX
        return None if bool(valid.all()) else valid.nonzero()[:, 0]

    def taking(self, rows: torch.Tensor) -> _Rows:
        """The walk over some of its rows."""
        return replace(
            self,
            labels=self.labels[rows],
            token_weights=None if self.token_weights is None else self.token_weights[..., rows],
            teacher_hidden=None if self.teacher_hidden is None else self.teacher_hidden[rows],
            teacher_sparse=None if self.teacher_sparse is None else with_tensors(self.teacher_sparse, lambda tensor: tensor[rows]),
        )

    def torch_chunk(
        self, head: Head, hidden: torch.Tensor, teacher: Head | None, rows: slice, values: torch.Tensor, *, gradient: bool
    ) -> torch.Tensor | None:
        """What :meth:`KernelChunks.terms_of` does, by the row functions of the losses."""
        logits = head.logits(hidden)
        slope = self.terms(logits, self.said(teacher, rows), rows, values, gradient=gradient)
        if slope is None:
            return None
        # filled, not multiplied by zero: a masked row may hold inf or nan, and 0 * nan is nan
        return head.transform.backward_(slope, logits).masked_fill_((self.labels[rows] == IGNORE_INDEX)[:, None], 0.0)

    def said(self, head: Head | None, rows: slice) -> torch.Tensor | SparseTargets | None:
        """What is known of the teacher in a chunk: its sparse targets, else its logits by its ``head``, else nothing."""
        if self.teacher_sparse is not None:
            return with_tensors(self.teacher_sparse, lambda tensor: tensor[rows])
        if head is None or self.teacher_hidden is None:
            return None
        return head.logits(self.teacher_hidden[rows].to(head.weight.dtype))

    def scales(self, rows: slice, valid: torch.Tensor) -> list[torch.Tensor]:
        """For every loss what each row counts in it, [rows]: 0 where the row is ignored, one and the same tensor unless weights differ."""
        if self.token_weights is None:
            return [valid.float() / self.denominator] * len(self.losses)
        weights = torch.where(valid, self.token_weights[..., rows].float(), 0.0) / self.denominator
        return list(weights) if weights.ndim == 2 else [weights] * len(self.losses)

    def terms(self, logits: torch.Tensor, teacher: Any, rows: slice, values: torch.Tensor, *, gradient: bool) -> torch.Tensor | None:
        """Add a chunk's terms to ``values`` [losses]; the gradient of the student's logits [rows, vocab], all but masked.

        ``teacher`` is what the losses are functions of beside them: logits, sparse targets or None.
        """
        labels = self.labels[rows]
        valid = labels != IGNORE_INDEX
        scales = self.scales(rows, valid)
        one_scale = self.token_weights is None or self.token_weights.ndim == 1
        total: torch.Tensor | None = None
        for index, loss in enumerate(self.losses):
            wanted = gradient and loss.weight != 0.0
            value, slope = loss.function(logits, teacher, labels, temperature=self.temperature, gradient=wanted)
            values[index] += (torch.where(valid, value, 0.0) * scales[index]).sum()
            if slope is None:
                continue
            if not one_scale:
                slope *= (scales[index] * loss.weight)[:, None]
            elif loss.weight != 1.0:
                slope *= loss.weight
            total = slope if total is None else total.add_(slope)
        return total.mul_(scales[0][:, None]) if total is not None and one_scale else total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, student_head: Head, walk: _Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.zeros(len(walk.losses), dtype=torch.float32, device=student_hidden.device)
        shape, kept = student_hidden.shape, walk.valid_rows()
        if kept is not None:
            student_hidden, walk = student_hidden[kept], walk.taking(kept)
        gradients = Gradients.of(student_hidden, weight, bias, ctx.needs_input_grad)
        head = student_head.ready(walk.compute_dtype)  # cast once here rather than once a chunk
        teacher = None if walk.teacher_head is None else walk.teacher_head.ready(walk.compute_dtype)
        matrix = head.weight.to(walk.compute_dtype)
        chunks = walk.kernel_chunks()
        with torch.autocast(student_hidden.device.type, enabled=False):
            for start in range(0, student_hidden.shape[0], walk.chunk_size):
                rows = slice(start, start + walk.chunk_size)
                hidden, needed = student_hidden[rows].to(head.weight.dtype), any(ctx.needs_input_grad)
                if chunks is None:
                    gradient = walk.torch_chunk(head, hidden, teacher, rows, values, gradient=needed)
                else:
                    theirs = None if walk.teacher_hidden is None or teacher is None else walk.teacher_hidden[rows].to(teacher.weight.dtype)
                    gradient = chunks.terms_of(head, hidden, teacher, theirs, rows, values, gradient=needed)
                if gradient is not None:
                    if walk.labels.device.type != "cpu":  # masked rows are among these: zero times inf would be nan
                        hidden = hidden.masked_fill((walk.labels[rows] == IGNORE_INDEX)[:, None], 0.0)
                    gradients.add(rows, gradient, hidden, matrix)
                    del gradient  # its memory is the next chunk's
        gradients.done(kept, shape)
        last = None if bias is None or gradients.bias is None else gradients.bias.to(bias.dtype)
        ctx.save_for_backward(gradients.hidden, None if gradients.weight is None else gradients.weight.to(weight.dtype), last)
        ctx.mark_non_differentiable(values)
        weights = constant(tuple(loss.weight for loss in walk.losses), values.device)
        return (values * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if grads[0].device.type == "cpu" and float(grads[0]) == 1.0:  # a comparison that would make a GPU wait
            return *ctx.saved_tensors, None, None
        scaled = [None if gradient is None else (gradient * grads[0]).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return *scaled, None, None


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
    walk = _Rows(
        labels,
        tuple(losses),
        denominator,
        token_weights,
        None if teacher_hidden is None else teacher_hidden.detach(),
        None if teacher_head is None else teacher_head.detached(),
        teacher_sparse,
        temperature,
        compute_dtype,
        chunk_size or default_chunk_size(student_hidden.device),
    )
    walk.check(student_hidden, student_head)
    if logger.isEnabledFor(logging.DEBUG):
        name_bad_rows({"student": student_hidden, "teacher": teacher_hidden}, labels)
    return _ChunkedLoss.apply(student_hidden, student_head.weight, student_head.bias, student_head.detached(), walk)
