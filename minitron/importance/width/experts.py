"""Activations inside mixtures of experts, which have no linear modules that could be hooked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.errors import ArchitectureError
from minitron.importance.shared.forward import Forward
from minitron.models.family import Family

#: Takes the layer's number and the (token, expert) pairs with their values [tokens * top-k, …].
OnPairs = Callable[[int, "Pairs", torch.Tensor], None]


@dataclass(frozen=True)
class Pairs:
    """The (token, expert) pairs of one forward of one layer, sorted by expert.

    ``rows`` [tokens * top-k] is the number of the pair's sample times the number of experts, plus its expert; pairs of tokens that do not count
    have the number after the last. ``weights`` [tokens * top-k] are the router's.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    batch: int

    def over_sequence(self, values: torch.Tensor, aggregation: str, lengths: torch.Tensor | int) -> torch.Tensor:
        """[tokens * top-k, units] → [batch, experts * units]; at tokens that are routed elsewhere the value is 0."""
        lengths = lengths.unsqueeze(1) if torch.is_tensor(lengths) else lengths
        if aggregation == "mean":
            return self._sum(values.float().abs()) / lengths
        if aggregation == "l2":
            return self._sum(values.float().square()).sqrt()
        wide = values.double()
        return self._sum(wide.square()) / lengths - (self._sum(wide) / lengths).square()

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.new_zeros(self.batch * self.num_experts + 1, values.shape[1])
        return total.index_add_(0, self.rows, values)[:-1].reshape(self.batch, -1)


class ExpertTaps:
    """Shows neurons and outputs of experts, pair by pair.

    transformers runs experts as one grouped product over (token, expert) pairs sorted by expert. The activation function in between is where
    the neurons are seen; a norm that some families have after the second product is where outputs are seen, and is put there for the others.
    """

    def __init__(self, on_neurons: OnPairs, on_outputs: OnPairs | None) -> None:
        """``on_outputs`` gets the outputs [tokens * top-k, hidden] before they are weighed."""
        self._on_neurons, self._on_outputs = on_neurons, on_outputs

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Watch every layer that has experts.

        Raises:
            ArchitectureError: the family's experts cannot be run as grouped products.
        """
        if not family.taps.experts:
            return
        before = getattr(model.config, "_experts_implementation", None)
        try:
            model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
        except (AttributeError, ValueError) as error:
            raise ArchitectureError(f"experts of '{family.model_type}' cannot be observed: {error}") from error
        if before is not None:
            forward.on_removal(_Undo(lambda: model.set_experts_implementation(before)))  # type: ignore[operator]
        for layer, name in family.taps.experts.items():
            _Watch(model.get_submodule(name), layer, family.architecture.num_experts, forward, self._on_neurons, self._on_outputs)


class _Undo:
    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def remove(self) -> None:
        """Put things back."""
        self._function()


class _Watch:
    """Sees one experts module: what is routed where, what comes out of its activation function, and what comes out of it."""

    def __init__(self, module: nn.Module, layer: int, num_experts: int, forward: Forward, on_neurons: OnPairs, on_outputs: OnPairs | None) -> None:
        self._layer, self._num_experts, self._forward = layer, num_experts, forward
        self._pairs: Pairs | None = None
        experts: Any = module
        forward.before(experts, self._before, with_kwargs=True)
        # The grouped product looks these up on the module, so that an instance can stand in for them.
        self._stand_in(experts, "_apply_gate" if experts.has_gate else "act_fn", on_neurons)
        if on_outputs is not None:
            if not experts.has_post_expert_norm:
                experts.has_post_expert_norm, experts.post_expert_norm = True, nn.Identity()
                forward.on_removal(_Undo(lambda: _without_norm(experts)))
            self._stand_in(experts, "post_expert_norm", on_outputs)

    def _stand_in(self, experts: Any, name: str, report: OnPairs) -> None:
        def after(output: torch.Tensor) -> torch.Tensor:
            if self._pairs is not None and not self._forward.idle:
                report(self._layer, self._pairs, output)
            return output

        inner = getattr(experts, name)
        if isinstance(inner, nn.Module):
            self._forward.after(inner, lambda module, args, output: after(output))
        else:
            setattr(experts, name, lambda *args: after(inner(*args)))
            self._forward.on_removal(_Undo(lambda: delattr(experts, name)))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The order in which the grouped product will run: ``chosen`` and ``weights`` [tokens, top-k]."""
        chosen, weights = [*args, *kwargs.values()][1:3]
        batch, sequence, top_k = self._forward.batch, self._forward.sequence, chosen.shape[1]
        experts, order = torch.sort(chosen.reshape(-1))
        tokens = order // top_k
        rows = tokens // sequence * self._num_experts + experts
        if self._forward.counted is not None:
            rows = torch.where(self._forward.counted.reshape(-1)[tokens], rows, batch * self._num_experts)
        self._pairs = Pairs(rows, weights.reshape(-1)[order], self._num_experts, batch)


def _without_norm(experts: Any) -> None:
    experts.has_post_expert_norm = False
    del experts.post_expert_norm
