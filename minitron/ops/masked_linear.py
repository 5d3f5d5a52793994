"""A linear layer whose weight is sparse while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from minitron.core.sparsity import above, largest_of_groups, row_bounds


@dataclass(frozen=True)
class Magnitudes:
    """Let the largest weights of now stand for the matrix: the ``num_kept`` of every ``group`` that follow each other, or of every row.

    ``decay`` is what SR-STE (arXiv 2102.04010, equation 9) adds to the gradient, times the weights that are not used; 0-d on the device. With it
    the gradient passes by the mask (straight through); without it weights that are not used have none, and zeros stay zero.
    """

    num_kept: int
    group: int | None = None
    decay: torch.Tensor | None = None


def masked_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, magnitudes: Magnitudes | None = None) -> torch.Tensor:
    """``linear(x, weight ⊙ mask, bias)``. Without ``magnitudes`` the mask is ``weight != 0``, and the gradient of a zero is exactly zero.

    No mask outlives the call: the backward pass makes it again from the weight, which it needs anyway. Only the weight itself is held for it, never
    a copy, so that engines that gather weights for a forward may let go of them in between.

    Args:
        x: [..., columns]; weight: [rows, columns]; bias: [rows].
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if magnitudes is None:
            return _KeepZeros.apply(x, weight, bias)  # type: ignore[no-any-return]
        return _Magnitudes.apply(x, weight, bias, magnitudes.num_kept, magnitudes.group, magnitudes.decay)  # type: ignore[no-any-return]


def mask_of(weight: torch.Tensor, magnitudes: Magnitudes) -> torch.Tensor:
    """What of a weight stands for it, bool."""
    scores = weight.detach().abs()
    if magnitudes.group is not None:
        mask = largest_of_groups(scores, magnitudes.num_kept, magnitudes.group)
    else:
        mask = above(scores, row_bounds(scores, magnitudes.num_kept))
    return mask if magnitudes.decay is not None else mask & (scores > 0)


class _KeepZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        for_x, for_weight, for_bias = _gradients(ctx, gradients[0], x, weight, weight, bias)
        return for_x, None if for_weight is None else for_weight.masked_fill_(weight == 0, 0.0), for_bias


class _Magnitudes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        num_kept: int,
        group: int | None,
        decay: torch.Tensor | None,
    ) -> torch.Tensor:
        scores = weight.abs()
        bounds = row_bounds(scores, num_kept) if group is None else ()
        ctx.save_for_backward(x, weight, bias, decay, *bounds)
        ctx.num_kept, ctx.group = num_kept, group
        used = weight.masked_fill(~_mask(scores, num_kept, group, bounds), 0.0)
        return F.linear(x, used.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, bias, decay, *bounds = ctx.saved_tensors
        scores = weight.abs()
        mask = _mask(scores, ctx.num_kept, ctx.group, tuple(bounds))
        for_x, for_weight, for_bias = _gradients(ctx, gradients[0], x, weight, weight.masked_fill(~mask, 0.0), bias)
        if for_weight is not None:
            if decay is None:
                for_weight.masked_fill_(~mask | (scores == 0), 0.0)
            else:
                for_weight += weight.masked_fill(mask, 0.0) * decay.to(weight.dtype)
        return for_x, for_weight, for_bias, None, None, None


def _mask(scores: torch.Tensor, num_kept: int, group: int | None, bounds: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The mask of what is used; rows are told by their bounds, which are found once."""
    return above(scores, (bounds[0], bounds[1])) if group is None else largest_of_groups(scores, num_kept, group)


def _gradients(
    ctx: Any, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, used: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Of the input, of the weight as if it were dense, and of the bias; each in the dtype of what it belongs to."""
    for_x = gradient @ used.to(gradient.dtype) if ctx.needs_input_grad[0] else None
    rows = gradient.reshape(-1, gradient.shape[-1])  # [tokens, rows]
    for_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if ctx.needs_input_grad[1] else None
    for_bias = rows.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
    return for_x, for_weight, for_bias
