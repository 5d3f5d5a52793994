"""Random scores: the control that every metric must beat."""

from __future__ import annotations

import torch
from torch import nn

from minitron.core.axes import LAYER_AXES
from minitron.importance.shared.forward import Forward
from minitron.importance.width.config import ImportanceConfig
from minitron.models.family import Family


class RandomObserver:
    """Uniform random scores, fixed by the seed."""

    needs_forward = False
    aggregation = "none"

    def __init__(self, config: ImportanceConfig | None = None, *, seed: int = 0) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Nothing to observe."""

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """One draw per unit; a kv group's score is the sum of its query heads'."""
        shape, layout = family.architecture, family.layout
        result = {"hidden": self._draw(shape.hidden_size)}
        for axis in LAYER_AXES:
            for layer in layout.layers_with(axis) if axis != "kv_head" else []:
                sizes = (shape.num_experts, shape.expert_ffn_size) if axis == "expert_ffn" else (shape.size(axis),)
                result[f"{axis}.{layer}"] = self._draw(*sizes)
        for layer in layout.layers_with("head"):
            result[f"kv_head.{layer}"] = result[f"head.{layer}"].view(shape.num_kv_heads, -1).sum(dim=1)
        return result

    def _draw(self, *sizes: int) -> torch.Tensor:
        return torch.rand(*sizes, generator=self._generator)
