"""Random scores: the control that every metric must beat."""

from __future__ import annotations

import torch
from torch import nn

from minitron.models.family import Family


class RandomObserver:
    """Uniform random scores, fixed by the seed."""

    needs_forward = False
    aggregation = "none"

    def __init__(self, *, seed: int = 0) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def attach(self, model: nn.Module, family: Family) -> None:
        """Nothing to observe."""

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """One draw per unit."""
        shape = family.architecture
        result = {"hidden": torch.rand(shape.hidden_size, generator=self._generator)}
        for layer in range(shape.num_layers):
            heads = torch.rand(shape.num_heads, generator=self._generator)
            result[f"ffn.{layer}"] = torch.rand(shape.ffn_size, generator=self._generator)
            result[f"head.{layer}"] = heads
            result[f"kv_head.{layer}"] = heads.view(shape.num_kv_heads, -1).sum(dim=1)
        return result
