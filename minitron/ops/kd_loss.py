"""Losses on logits without logits: both heads are applied chunk by chunk and the gradient is computed on the way.

The whole ``[tokens, vocab]`` tensor never exists. Per chunk of rows: student and teacher logits in float32, every row loss and
its gradient with respect to the student's logits, then the chunk's share of the gradients of hidden states and head, the
latter accumulated in float32. Nothing is recomputed in the backward pass, which only scales by the incoming gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron.core.protocols import RowLoss

IGNORE_INDEX = -100


@dataclass(frozen=True)
class WeightedRowLoss:
    """A row loss, its name in logs and its weight in the total."""

    name: str
    weight: float
    function: RowLoss


def default_chunk_size(device: torch.device) -> int:
    """Rows per chunk: enough on a GPU that the head's gradient is not bound by memory traffic; on two CPU cores 512 rows cost no more
    time than all rows at once (256: a tenth more), and a tenth of a gigabyte a tensor."""
    return 1024 if device.type == "cuda" else 512


def float32_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden @ weight.T`` [rows, vocab] with float32 results; rounding logits to bf16 makes KD gradients wrong by percents.

    CUDA writes float32 out of a bf16 product. CPU builds of torch have no such product, so there the operands are float32.
    """
    if hidden.dtype == torch.float32 and weight.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # type: ignore[call-overload]
    return hidden.float() @ weight.float().T


def _accumulate_head_gradient(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """``total += gradient.T @ hidden`` in float32 [vocab, hidden]."""
    if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
        total += torch.mm(gradient.to(hidden.dtype).T, hidden, out_dtype=torch.float32)  # type: ignore[call-overload]
    else:
        total.addmm_(gradient.T, hidden.float())


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_weight: torch.Tensor | None,
        labels: torch.Tensor,
        losses: Sequence[WeightedRowLoss],
        denominator: torch.Tensor,
        temperature: float,
        compute_dtype: torch.dtype,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # On a CPU the weight is cast once here rather than once a chunk.
        logit_dtype = compute_dtype if student_hidden.device.type == "cuda" else torch.float32
        hidden, weight = student_hidden.to(logit_dtype), student_weight.to(logit_dtype)
        t_hidden = t_weight = None
        if teacher_hidden is not None and teacher_weight is not None:
            t_hidden, t_weight = teacher_hidden.to(logit_dtype), teacher_weight.to(logit_dtype)
        values = torch.zeros(len(losses), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(student_hidden) if needs_gradient else None
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_gradient else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_size):
                rows = slice(start, start + chunk_size)
                valid = labels[rows] != IGNORE_INDEX
                scale = valid.float() / denominator  # [rows]
                logits = float32_logits(hidden[rows], weight)
                t_logits = float32_logits(t_hidden[rows], t_weight) if t_hidden is not None and t_weight is not None else None
                total_gradient: torch.Tensor | None = None
                for index, loss in enumerate(losses):
                    value, gradient = loss.function(logits, t_logits, labels[rows], temperature=temperature, gradient=needs_gradient)
                    values[index] += torch.where(valid, value, 0.0).sum() / denominator
                    if gradient is not None:
                        if loss.weight != 1.0:
                            gradient *= loss.weight
                        total_gradient = gradient if total_gradient is None else total_gradient.add_(gradient)
                if total_gradient is not None and hidden_gradient is not None and weight_gradient is not None:
                    # filled, not multiplied by zero: a masked row may hold inf or nan, and 0 * nan is nan
                    total_gradient = total_gradient.mul_(scale[:, None]).masked_fill_(~valid[:, None], 0.0)
                    hidden_gradient[rows] = (total_gradient.to(compute_dtype) @ student_weight.to(compute_dtype)).to(student_hidden.dtype)
                    _accumulate_head_gradient(weight_gradient, total_gradient, torch.where(valid[:, None], hidden[rows], 0.0))
        if hidden_gradient is not None and weight_gradient is not None:
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(student_weight.dtype))
        weights = torch.tensor([loss.weight for loss in losses], device=hidden.device)
        ctx.mark_non_differentiable(values)
        return (values * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = grads[0]
        hidden = (hidden_gradient * scale).to(hidden_gradient.dtype) if ctx.needs_input_grad[0] else None
        weight = (weight_gradient * scale).to(weight_gradient.dtype) if ctx.needs_input_grad[1] else None
        return hidden, weight, None, None, None, None, None, None, None, None


def fused_linear_losses(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    losses: Sequence[WeightedRowLoss],
    *,
    denominator: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    compute_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of row losses over valid rows, divided by a global denominator.

    Args:
        student_hidden: [tokens, student hidden], after the final norm.
        student_weight: [vocab, student hidden], the head.
        labels: [tokens] int64, the token that each row predicts; rows with :data:`IGNORE_INDEX` are inert.
        losses: row losses with their weights.
        denominator: 0-d float tensor, the number of valid tokens of the whole optimiser step.
        teacher_hidden: [tokens, teacher hidden]; needed when a loss needs the teacher.
        teacher_weight: [vocab, teacher hidden].
        temperature: divides both logits; divergences carry its square in value and gradient.
        compute_dtype: dtype of the products with the head (bf16 or float32); statistics and losses are always float32.
        chunk_size: rows per chunk; None picks by device.

    Returns:
        The total (differentiable, 0-d float32) and the unweighted terms (detached, [losses] float32).

    Raises:
        ValueError: shapes or vocabularies do not match, or a loss needs a teacher that is not given.
    """
    if teacher_hidden is None and any(loss.function.needs_teacher for loss in losses):
        raise ValueError(f"loss '{next(x.name for x in losses if x.function.needs_teacher)}' needs the teacher's hidden states")
    if student_hidden.shape[0] != labels.shape[0] or (teacher_hidden is not None and teacher_hidden.shape[0] != labels.shape[0]):
        raise ValueError(f"{labels.shape[0]} labels for {student_hidden.shape[0]} rows of hidden states")
    if teacher_weight is not None and teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(f"the student's vocabulary has {student_weight.shape[0]} rows, the teacher's {teacher_weight.shape[0]}")
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.detach()
    return _ChunkedLoss.apply(
        student_hidden,
        student_weight,
        teacher_hidden,
        None if teacher_weight is None else teacher_weight.detach(),
        labels,
        tuple(losses),
        denominator,
        temperature,
        compute_dtype,
        chunk_size or default_chunk_size(student_hidden.device),
    )
