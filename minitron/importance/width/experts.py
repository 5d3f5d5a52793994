"""Activations inside mixtures of experts, which have no linear modules that could be hooked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.importance.shared.forward import Forward
from minitron.models.experts import Undo, neurons_of, routed, run_grouped, see_output
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

    Neurons are seen behind the activation function; outputs at a norm that some families have after the second product, and that is put there for
    the others.
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
        forward.on_removal(run_grouped(model, family.model_type))
        for layer, name in family.taps.experts.items():
            _Watch(model.get_submodule(name), layer, family.architecture.num_experts, forward, self._on_neurons, self._on_outputs)


class _Watch:
    """Sees one experts module: what is routed where, what comes out of its activation function, and what comes out of it."""

    def __init__(self, module: nn.Module, layer: int, num_experts: int, forward: Forward, on_neurons: OnPairs, on_outputs: OnPairs | None) -> None:
        self._layer, self._num_experts, self._forward = layer, num_experts, forward
        self._pairs: Pairs | None = None
        experts: Any = module
        forward.before(experts, self._before, with_kwargs=True)
        self._see(experts, neurons_of(experts), on_neurons)
        if on_outputs is not None:
            if not experts.has_post_expert_norm:
                experts.has_post_expert_norm, experts.post_expert_norm = True, nn.Identity()
                forward.on_removal(Undo(lambda: _without_norm(experts)))
            self._see(experts, "post_expert_norm", on_outputs)

    def _see(self, experts: Any, name: str, report: OnPairs) -> None:
        def see(output: torch.Tensor) -> None:
            if self._pairs is not None and not self._forward.idle:
                report(self._layer, self._pairs, output)

        self._forward.on_removal(see_output(experts, name, see))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The order in which the grouped product will run."""
        batch, sequence = self._forward.batch, self._forward.sequence
        _, experts, tokens, weights = routed(args, kwargs)
        rows = tokens // sequence * self._num_experts + experts
        if self._forward.counted is not None:
            rows = torch.where(self._forward.counted.reshape(-1)[tokens], rows, batch * self._num_experts)
        self._pairs = Pairs(rows, weights, self._num_experts, batch)


def _without_norm(experts: Any) -> None:
    experts.has_post_expert_norm = False
    del experts.post_expert_norm
