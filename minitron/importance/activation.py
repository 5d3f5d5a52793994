"""Activation importance of the Minitron papers (arXiv 2407.14679, section 2.2): forward passes only, all width axes at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron.models.family import Family


class ActivationObserver:
    """Per unit u: sqrt( Σ_samples ( mean_sequence |a(sample, position, u)| )² ).

    That is the papers' best aggregation, L2 over samples and mean of absolute values over the sequence. What is observed:
    neurons at the input of the down projection (after activation and gate), heads by the L2 norm of their output (input of the
    output projection), hidden channels at the output of every norm, summed over the norms. A kv group's score is the sum of its
    query heads.
    """

    needs_forward = True
    aggregation = "samples=l2 sequence=mean"

    def __init__(self, *, seed: int = 0) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module, family: Family) -> None:
        """Hook the taps; accumulators are float64 on the model's device."""
        shape, taps = family.architecture, family.taps
        device = next(model.parameters()).device
        self.sums = {
            "ffn": torch.zeros(shape.num_layers, shape.ffn_size, dtype=torch.float64, device=device),
            "head": torch.zeros(shape.num_layers, shape.num_heads, dtype=torch.float64, device=device),
            "hidden": torch.zeros(len(taps.norms), shape.hidden_size, dtype=torch.float64, device=device),
        }
        for layer in range(shape.num_layers):
            model.get_submodule(taps.ffn[layer]).register_forward_pre_hook(self._on_ffn(layer))
            model.get_submodule(taps.head[layer]).register_forward_pre_hook(self._on_head(layer, shape.num_heads))
        for index, name in enumerate(taps.norms):
            model.get_submodule(name).register_forward_hook(self._on_norm(index))

    def _on_ffn(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.sums["ffn"][layer] += _over_samples(_mean_absolute(args[0]))

        return hook

    def _on_head(self, layer: int, num_heads: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            heads = args[0].unflatten(-1, (num_heads, -1))  # [batch, sequence, heads, head_dim]
            self.sums["head"][layer] += _over_samples(torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32).mean(dim=1))

        return hook

    def _on_norm(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.sums["hidden"][index] += _over_samples(_mean_absolute(output))

        return hook

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """Roots of the sums; hidden channels summed over norms, groups summed over their heads."""
        result = {"hidden": self.sums["hidden"].sqrt().sum(dim=0)}
        groups = family.architecture.num_kv_heads
        for layer in range(family.architecture.num_layers):
            heads = self.sums["head"][layer].sqrt()
            result[f"ffn.{layer}"] = self.sums["ffn"][layer].sqrt()
            result[f"head.{layer}"] = heads
            result[f"kv_head.{layer}"] = heads.view(groups, -1).sum(dim=1)
        return result


def _mean_absolute(activation: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, units] → [batch, units]: mean of absolute values over the sequence, in float32."""
    return torch.linalg.vector_norm(activation, ord=1, dim=1, dtype=torch.float32) / activation.shape[1]


def _over_samples(per_sample: torch.Tensor) -> torch.Tensor:
    """[batch, units] → [units]: sum of squares in float64."""
    return per_sample.double().square().sum(dim=0)
