"""Block influence (ShortGPT, arXiv 2403.03853): how far a layer turns the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron.models.family import Family


class BlockInfluenceObserver:
    """Per layer: 1 − mean over tokens of cos(block input, block output). Dot products are summed in float64."""

    needs_forward = True
    aggregation = "1 - mean cosine over tokens"

    def __init__(self, *, seed: int = 0) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module, family: Family) -> None:
        """Hook every block."""
        layers = family.architecture.num_layers
        device = next(model.parameters()).device
        self.sums = {name: torch.zeros(layers, dtype=torch.float64, device=device) for name in ("cosine", "tokens")}
        for layer, name in enumerate(family.taps.blocks):
            model.get_submodule(name).register_forward_hook(self._on_block(layer), with_kwargs=True)

    def _on_block(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]  # [batch, sequence, hidden]
            after = output[0] if isinstance(output, tuple) else output
            dot = (before * after).sum(dim=-1, dtype=torch.float64)
            norms = torch.linalg.vector_norm(before, dim=-1, dtype=torch.float64) * torch.linalg.vector_norm(after, dim=-1, dtype=torch.float64)
            self.sums["cosine"][layer] += (dot / norms.clamp_min(1e-30)).sum()
            self.sums["tokens"][layer] += dot.numel()

        return hook

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """One score per layer."""
        return {"layer": 1.0 - self.sums["cosine"] / self.sums["tokens"]}
