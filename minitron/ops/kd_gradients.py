"""The gradients that a walk over chunks of rows adds up: of hidden states, of a head's weight and of its bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from minitron.host import on_huge_pages
from minitron.ops.products import bf16_product


@dataclass
class Gradients:
    """What the chunks add to; None where nobody asks. ``weight`` and ``bias`` are float32."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    empty: bool = True

    @classmethod
    def of(cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needed: Sequence[bool]) -> Gradients:
        """Room for those that are needed, uninitialised."""
        return cls(
            torch.empty_like(hidden) if needed[0] else None,
            on_huge_pages(torch.empty(weight.shape, dtype=torch.float32, device=weight.device)) if needed[1] else None,
            torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if bias is not None and needed[2] else None,
        )

    def add(self, rows: slice, gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """A chunk's share, from the gradient of its products [rows, vocab]."""
        if self.hidden is not None:
            self.hidden[rows] = _hidden_gradient(gradient.to(weight.dtype), weight).to(self.hidden.dtype)
        if self.weight is not None:
            _accumulate_head_gradient(self.weight, gradient, hidden, first=self.empty)
        if self.bias is not None:
            self.bias += gradient.sum(dim=0, dtype=torch.float32)
        self.empty = False

    def weight_as(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The weight's gradient [vocab, hidden] in the weight's ``dtype``."""
        if self.weight is None or self.weight.dtype == dtype:
            return self.weight
        return on_huge_pages(torch.empty_like(self.weight, dtype=dtype)).copy_(self.weight)

    def done(self, rows: torch.Tensor | None, shape: torch.Size) -> None:
        """Zeros where no chunk has come; hidden states of ``rows`` alone go back to where they stood in ``shape``."""
        if self.empty:
            for tensor in (self.hidden, self.weight):
                if tensor is not None:
                    tensor.zero_()
        if rows is not None and self.hidden is not None:
            self.hidden = self.hidden.new_zeros(shape).index_copy_(0, rows, self.hidden)


def _hidden_gradient(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``gradient @ weight`` [rows, hidden], both of one dtype."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return gradient @ weight
    out = torch.empty(len(gradient), weight.shape[1], dtype=torch.float32)
    bf16_product(out, gradient, weight, "input")
    return out


@cache
def _adds_in_place(dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of ``dtype`` to a float32 matrix in place on a GPU; tried once."""
    ones = torch.ones(16, 16, device="cuda", dtype=dtype)
    total = torch.ones(16, 16, device="cuda")
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17.0).all())


def _accumulate_head_gradient(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, *, first: bool) -> None:
    """``total += gradient.T @ hidden`` in float32 [vocab, hidden]; ``first`` is into memory that holds nothing yet."""
    beta = 0.0 if first else 1.0
    if hidden.device.type == "cuda" and hidden.dtype != torch.float32 and not _adds_in_place(hidden.dtype):
        product = torch.mm(gradient.to(hidden.dtype).T, hidden, out_dtype=torch.float32)  # type: ignore[call-overload]
        total.copy_(product) if first else total.add_(product)
    elif hidden.device.type == "cuda" and hidden.dtype != torch.float32:
        # a product of its own would be a second [vocab, hidden] in float32, written, read and added once a chunk
        torch.addmm(total, gradient.to(hidden.dtype).T, hidden, out_dtype=torch.float32, beta=beta, out=total)  # type: ignore[call-overload]
    elif hidden.dtype == torch.bfloat16:
        bf16_product(total, gradient.to(hidden.dtype), hidden, "weight", add=not first)
    else:
        total.addmm_(gradient.T, hidden.float(), beta=beta)
