"""Sparse weights with odd corners, and products in float64 with the error that rounding allows."""

from __future__ import annotations

import torch

#: Half a unit in the last place of what is stored, and of the sums before.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def sparse_weight(rows: int, cols: int, density: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random [rows, cols]; where there are several rows the second is empty and the last full."""
    generator = torch.Generator().manual_seed(seed + 1000 * rows + cols)
    weight = torch.randn(rows, cols, generator=generator)
    kept = torch.rand(rows, cols, generator=generator) < density
    if 0.0 < density < 1.0 and rows > 2:
        kept[1], kept[-1] = False, True
    return (weight * kept).to(dtype)


def inputs(num: int, cols: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [num, cols] and a bias [rows]."""
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, cols, generator=generator).to(dtype), torch.randn(rows, generator=generator).to(dtype)


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """y is x · Wᵀ + bias but for rounding: of sums in float32, in any order, and of the result."""
    x, weight = x.double(), weight.double()
    exact, size = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = ROUNDING[y.dtype] * exact.abs() + 2.0**-22 * (1 + x.shape[-1] ** 0.5) * size + 1e-7
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= allowed).all()), float(((y.double() - exact).abs() / allowed).max())
