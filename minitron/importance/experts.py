"""Activations inside mixtures of experts, which have no linear modules that could be hooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minitron.errors import ArchitectureError
from minitron.models.family import Family


class ExpertTaps:
    """Feeds sums over routed tokens: how strongly each expert is used, and how strongly each of its neurons.

    transformers runs experts as one grouped product over (token, expert) pairs sorted by expert; the activation function in between is
    where the neurons are seen. Per sample: an expert's mean routing weight over the sequence, and a neuron's mean absolute activation
    over the sequence, tokens routed elsewhere counting as zero; squares are summed over samples like those of other units.
    """

    def __init__(self, sums: dict[str, torch.Tensor]) -> None:
        self._sums = sums
        self._sequence = 1

    def attach(self, model: nn.Module, family: Family) -> None:
        """Hook every layer that has experts.

        Raises:
            ArchitectureError: the family's experts cannot be run as grouped products.
        """
        shape, device = family.architecture, next(model.parameters()).device
        if family.taps.experts:
            try:
                model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
            except (AttributeError, ValueError) as error:
                raise ArchitectureError(f"experts of '{family.model_type}' cannot be observed: {error}") from error
        for layer, name in family.taps.experts.items():
            self._sums[f"expert.{layer}"] = torch.zeros(shape.num_experts, dtype=torch.float64, device=device)
            self._sums[f"expert_ffn.{layer}"] = torch.zeros(shape.num_experts, shape.expert_ffn_size, dtype=torch.float64, device=device)
            model.get_submodule(family.taps.blocks[layer]).register_forward_pre_hook(self._on_block, with_kwargs=True)
            _Watch(model.get_submodule(name), layer, self._on_experts)

    def _on_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._sequence = (args[0] if args else kwargs["hidden_states"]).shape[1]

    def _on_experts(self, layer: int, experts: torch.Tensor, weights: torch.Tensor, activations: torch.Tensor) -> None:
        """``experts`` and ``weights`` [tokens, top-k]; ``activations`` [tokens * top-k, neurons] in order of the sorted experts."""
        tokens, top_k = experts.shape
        num_experts, neurons = self._sums[f"expert_ffn.{layer}"].shape
        batch = tokens // self._sequence
        chosen, order = torch.sort(experts.reshape(-1))
        pairs = chosen * batch + order // (top_k * self._sequence)  # [tokens * top-k] expert and sample as one number
        used = torch.zeros(num_experts * batch, dtype=torch.float32, device=experts.device)
        used.index_add_(0, pairs, weights.reshape(-1)[order].float())
        active = torch.zeros(num_experts * batch, neurons, dtype=torch.float32, device=experts.device)
        active.index_add_(0, pairs, activations.float().abs())
        self._sums[f"expert.{layer}"] += (used / self._sequence).double().square().view(num_experts, batch).sum(dim=1)
        self._sums[f"expert_ffn.{layer}"] += (active / self._sequence).double().square().view(num_experts, batch, neurons).sum(dim=1)


class _Watch:
    """Sees one experts module: what is routed where, and what comes out of its activation function."""

    def __init__(self, module: nn.Module, layer: int, report: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
        self._layer, self._report = layer, report
        self._routing: tuple[torch.Tensor, torch.Tensor] | None = None
        experts: Any = module
        experts.register_forward_pre_hook(self._before, with_kwargs=True)
        # The grouped product looks these up on the module, so that an instance can stand in for them.
        name = "_apply_gate" if experts.has_gate else "act_fn"
        inner = getattr(experts, name)
        if isinstance(inner, nn.Module):
            inner.register_forward_hook(lambda module, args, output: self._after(output))
        else:
            setattr(experts, name, lambda *args: self._after(inner(*args)))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routed = [*args, *kwargs.values()][1:3]
        self._routing = (routed[0], routed[1])

    def _after(self, output: torch.Tensor) -> torch.Tensor:
        if self._routing is not None:
            self._report(self._layer, *self._routing, output)
            self._routing = None
        return output
