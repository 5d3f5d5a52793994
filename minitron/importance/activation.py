"""Activation importance of the Minitron papers (arXiv 2407.14679, section 2.2): forward passes only, all width axes at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron.importance.experts import ExpertTaps
from minitron.models.family import Family


class ActivationObserver:
    """Per unit u: sqrt( Σ_samples ( mean_sequence |a(sample, position, u)| )² ).

    That is the papers' best aggregation, L2 over samples and mean of absolute values over the sequence. What is observed:
    neurons at the input of the down projection (after activation and gate), heads by the L2 norm of their output (input of the
    output projection), hidden channels at the output of every norm, summed over the norms. A kv group's score is the sum of its
    query heads. Experts are scored by their routing weight, and their neurons like others, over the tokens routed to them.
    """

    needs_forward = True
    aggregation = "samples=l2 sequence=mean"

    def __init__(self, *, seed: int = 0) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module, family: Family) -> None:
        """Hook the taps; accumulators are float64 on the model's device."""
        shape, taps = family.architecture, family.taps
        device = next(model.parameters()).device
        self.sums = {"hidden": torch.zeros(len(taps.norms), shape.hidden_size, dtype=torch.float64, device=device)}
        for axis, modules in (("ffn", taps.ffn), ("shared_ffn", taps.shared_ffn), ("head", taps.head)):
            for layer, name in modules.items():
                self.sums[f"{axis}.{layer}"] = torch.zeros(shape.size(axis), dtype=torch.float64, device=device)
                hook = self._on_heads(layer, shape.num_heads) if axis == "head" else self._on_neurons(f"{axis}.{layer}")
                model.get_submodule(name).register_forward_pre_hook(hook)
        ExpertTaps(self.sums).attach(model, family)
        for index, name in enumerate(taps.norms):
            model.get_submodule(name).register_forward_hook(self._on_norm(index))

    def _on_neurons(self, score: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.sums[score] += _over_samples(_mean_absolute(args[0]))

        return hook

    def _on_heads(self, layer: int, num_heads: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            heads = args[0].unflatten(-1, (num_heads, -1))  # [batch, sequence, heads, head_dim]
            self.sums[f"head.{layer}"] += _over_samples(torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32).mean(dim=1))

        return hook

    def _on_norm(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.sums["hidden"][index] += _over_samples(_mean_absolute(output))

        return hook

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """Roots of the sums; hidden channels summed over norms, groups summed over their heads."""
        result = {name: sums.sqrt() for name, sums in self.sums.items() if name != "hidden"}
        result["hidden"] = self.sums["hidden"].sqrt().sum(dim=0)
        for layer in family.taps.head:
            result[f"kv_head.{layer}"] = result[f"head.{layer}"].view(family.architecture.num_kv_heads, -1).sum(dim=1)
        return result


def _mean_absolute(activation: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, units] → [batch, units]: mean of absolute values over the sequence, in float32."""
    return torch.linalg.vector_norm(activation, ord=1, dim=1, dtype=torch.float32) / activation.shape[1]


def _over_samples(per_sample: torch.Tensor) -> torch.Tensor:
    """[batch, units] → [units]: sum of squares in float64."""
    return per_sample.double().square().sum(dim=0)
