"""Losses on logits without logits: both heads are applied chunk by chunk and the gradient is computed on the way.

The whole ``[tokens, vocab]`` tensor never exists. Per chunk of rows: student and teacher logits in float32 with whatever each head
does to them (its bias, scale and cap), every row loss and its gradient with respect to the student's logits, then the chunk's share of
the gradients of hidden states and head, the latter accumulated in float32. Nothing is recomputed in the backward pass, which only
scales by the incoming gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron.core.protocols import RowLoss
from minitron.ops.head import Head

IGNORE_INDEX = -100


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


def _accumulate_head_gradient(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """``total += gradient.T @ hidden`` in float32 [vocab, hidden]."""
    if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
        total += torch.mm(gradient.to(hidden.dtype).T, hidden, out_dtype=torch.float32)  # type: ignore[call-overload]
    else:
        total.addmm_(gradient.T, hidden.float())


@dataclass(frozen=True)
class _Rows:
    """What the walk knows of its rows beside the student: everything that receives no gradient."""

    labels: torch.Tensor
    losses: tuple[WeightedRowLoss, ...]
    denominator: torch.Tensor
    token_weights: torch.Tensor | None
    teacher_hidden: torch.Tensor | None
    teacher_head: Head | None
    temperature: float
    compute_dtype: torch.dtype
    chunk_size: int

    def check(self, student_hidden: torch.Tensor, student_head: Head) -> None:
        """Raise ValueError where shapes do not match or the teacher is missing."""
        tokens, vocab = self.labels.shape[0], student_head.num_tokens
        needing = [loss.name for loss in self.losses if loss.function.needs_teacher]
        if needing and (self.teacher_hidden is None or self.teacher_head is None):
            raise ValueError(f"loss '{needing[0]}' needs the teacher's hidden states and head")
        if student_hidden.shape[0] != tokens or (self.teacher_hidden is not None and self.teacher_hidden.shape[0] != tokens):
            raise ValueError(f"{tokens} labels for {student_hidden.shape[0]} rows of hidden states")
        if self.teacher_head is not None and self.teacher_head.num_tokens != vocab:
            raise ValueError(f"the student's vocabulary has {vocab} rows, the teacher's {self.teacher_head.num_tokens}")
        if self.token_weights is not None and self.token_weights.shape not in ((tokens,), (len(self.losses), tokens)):
            raise ValueError(f"weights of shape {list(self.token_weights.shape)} for {len(self.losses)} losses on {tokens} tokens")

    def scales(self, rows: slice, valid: torch.Tensor) -> list[torch.Tensor]:
        """For every loss what each row counts in it, [rows]: 0 where the row is ignored, one and the same tensor unless weights differ."""
        if self.token_weights is None:
            return [valid.float() / self.denominator] * len(self.losses)
        weights = torch.where(valid, self.token_weights[..., rows].float(), 0.0) / self.denominator
        return list(weights) if weights.ndim == 2 else [weights] * len(self.losses)

    def terms(
        self, logits: torch.Tensor, teacher_logits: torch.Tensor | None, rows: slice, values: torch.Tensor, *, gradient: bool
    ) -> torch.Tensor | None:
        """Add a chunk's terms to ``values`` [losses]; the gradient of the student's logits [rows, vocab], all but masked."""
        labels = self.labels[rows]
        valid = labels != IGNORE_INDEX
        scales = self.scales(rows, valid)
        one_scale = self.token_weights is None or self.token_weights.ndim == 1
        total: torch.Tensor | None = None
        for index, loss in enumerate(self.losses):
            wanted = gradient and loss.weight != 0.0
            value, slope = loss.function(logits, teacher_logits, labels, temperature=self.temperature, gradient=wanted)
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
        needed = any(ctx.needs_input_grad)
        values = torch.zeros(len(walk.losses), dtype=torch.float32, device=student_hidden.device)
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needed else None
        bias_gradient = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if needed and bias is not None else None
        hidden_gradient = torch.zeros_like(student_hidden) if needed else None
        head = student_head.ready(walk.compute_dtype)  # cast once here rather than once a chunk
        teacher = None if walk.teacher_head is None else walk.teacher_head.ready(walk.compute_dtype)
        with torch.autocast(student_hidden.device.type, enabled=False):
            for start in range(0, student_hidden.shape[0], walk.chunk_size):
                rows = slice(start, start + walk.chunk_size)
                hidden = student_hidden[rows].to(head.weight.dtype)
                logits = head.logits(hidden)
                teacher_logits = None
                if teacher is not None and walk.teacher_hidden is not None:
                    teacher_logits = teacher.logits(walk.teacher_hidden[rows].to(teacher.weight.dtype))
                gradient = walk.terms(logits, teacher_logits, rows, values, gradient=needed)
                if gradient is None or hidden_gradient is None or weight_gradient is None:
                    continue
                masked = (walk.labels[rows] == IGNORE_INDEX)[:, None]
                # filled, not multiplied by zero: a masked row may hold inf or nan, and 0 * nan is nan
                gradient = head.transform.backward_(gradient, logits).masked_fill_(masked, 0.0)
                hidden_gradient[rows] = (gradient.to(walk.compute_dtype) @ weight.to(walk.compute_dtype)).to(student_hidden.dtype)
                _accumulate_head_gradient(weight_gradient, gradient, hidden.masked_fill(masked, 0.0))
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(dim=0)
        if hidden_gradient is not None and weight_gradient is not None:
            last = None if bias is None or bias_gradient is None else bias_gradient.to(bias.dtype)
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype), last)
        ctx.mark_non_differentiable(values)
        weights = torch.tensor([loss.weight for loss in walk.losses], device=values.device)
        return (values * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [
            (gradient * grads[0]).to(gradient.dtype) if gradient is not None and needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
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
        temperature,
        compute_dtype,
        chunk_size or default_chunk_size(student_hidden.device),
    )
    walk.check(student_hidden, student_head)
    return _ChunkedLoss.apply(student_hidden, student_head.weight, student_head.bias, student_head.detached(), walk)
