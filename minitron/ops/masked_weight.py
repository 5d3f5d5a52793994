"""A weight as a module's forward sees it while zeros of it are kept, where that forward multiplies by it in a way of its own."""

from __future__ import annotations

from typing import Any

import torch

from minitron.ops.masked_linear import Magnitudes, mask_of


def masked_weight(weight: torch.Tensor, magnitudes: Magnitudes | None = None) -> torch.Tensor:
    """``weight ⊙ mask``, with the gradients of :func:`minitron.ops.masked_linear.masked_linear`.

    Without ``magnitudes`` the mask is ``weight != 0`` and what comes back is a view of the weight: it costs no memory. With them it is a copy,
    which whoever multiplies by it holds for its backward pass. No mask outlives the call.

    Args:
        weight: [..., rows, columns].
    """
    if magnitudes is None:
        return _KeepZeros.apply(weight)  # type: ignore[no-any-return]
    return _Magnitudes.apply(weight, magnitudes.num_kept, magnitudes.group, magnitudes.decay)  # type: ignore[no-any-return]


class _KeepZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return gradients[0].masked_fill(weight == 0, 0.0)


class _Magnitudes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, num_kept: int, group: int | None, decay: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight, decay)
        ctx.num_kept, ctx.group = num_kept, group
        return weight.masked_fill(~mask_of(weight, Magnitudes(num_kept, group, decay)), 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, decay = ctx.saved_tensors
        mask = mask_of(weight, Magnitudes(ctx.num_kept, ctx.group, decay))
        if decay is None:
            return gradients[0].masked_fill(~mask, 0.0), None, None, None
        return gradients[0] + weight.masked_fill(mask, 0.0) * decay.to(weight.dtype), None, None, None
