"""Statistics of the inputs of experts that share one parameter a layer: each expert's are the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.models.experts import neurons_of, reads_neurons, routed, see_output
from minitron.sparsify.shared.method import Inputs
from minitron.sparsify.shared.statistics import Sums, scale_of

#: Bytes of float64 Hessians that a pass over the samples may fill; where experts have more, there are several passes. A Hessian of Mixtral 8x7B's
#: down projections has 1.6 GB, so that two experts share a pass.
HESSIAN_BYTES = 4 << 30


def in_a_pass(widths: Sequence[int]) -> int:
    """Experts whose Hessians stand in memory together, one at least; ``widths``: the inputs of each of an expert's matrices."""
    return max(1, HESSIAN_BYTES // (8 * sum(width * width for width in widths)))


def expert_name(name: str, expert: int) -> str:
    """One expert's matrix, as errors and statistics name it."""
    return f"{name}[{expert}]"


@dataclass(frozen=True)
class Experts:
    """Some experts of a layer: their module and the parameters [experts, out, in] of it that are asked about."""

    module: str
    names: tuple[str, ...]
    numbers: range

    def split(self, widths: Sequence[int]) -> list[Experts]:
        """Groups of experts whose Hessians take no more than :data:`HESSIAN_BYTES`, or one expert each; ``widths``: the inputs of each parameter."""
        count = in_a_pass(widths)
        return [Experts(self.module, self.names, self.numbers[first : first + count]) for first in range(0, len(self.numbers), count)]


class ExpertStatistics:
    """Of some experts of one block. A first matrix reads the tokens that come to its expert, the last one the neurons at them.

    Every token counts once, whatever weight the router gives it. The squares take slots as those of other matrices do: experts · inputs · 8 bytes
    for each.
    """

    def __init__(self, module: nn.Module, experts: Experts, *, num_experts: int, num_slots: int, hessian: bool, first: Callable[[], Any]) -> None:
        """``first`` runs the block, its experts as grouped products, on the first micro-batch: it shows the scale of the inputs.

        One scale serves all ``num_experts`` of the layer, since some may have no token there; an even router sends each its share of them.
        """
        self._module, self._experts = module, experts
        seen: dict[str, torch.Tensor] = {}
        share = 1.0 / num_experts
        with self._watched(lambda name, rows, chosen, tokens: seen.update({name: scale_of(rows, share=share)})):
            first()
        scales = [seen[name] for name in experts.names for _ in experts.numbers]
        self._sums = Sums(scales, num_slots=num_slots, hessian=hessian)
        self._slot = 0
        self._counted: torch.Tensor | None = None

    @contextmanager
    def observing(self, slot: int, counted: torch.Tensor | None) -> Iterator[None]:
        """A context whose forward is a micro-batch; ``counted`` [batch, sequence] is False at tokens that do not count."""
        self._slot, self._counted = slot, counted
        with self._watched(self._add):
            yield

    def _add(self, name: str, rows: torch.Tensor, experts: torch.Tensor, tokens: torch.Tensor) -> None:
        if self._counted is not None:
            counts = self._counted.reshape(-1)[tokens]
            rows, experts = rows[counts], experts[counts]
        numbers = self._experts.numbers
        bounds = torch.searchsorted(experts, torch.arange(numbers.start, numbers.stop + 1, device=experts.device)).tolist()
        base = self._experts.names.index(name) * len(numbers)
        for place, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if start < stop:
                self._sums.add(base + place, self._slot, rows[start:stop])

    @contextmanager
    def _watched(self, see: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
        """Show every parameter's inputs [pairs, in] float32 with the pairs' experts, ascending, and tokens."""
        pairs: list[torch.Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, experts, tokens, _ = routed(args, kwargs)
            pairs[:] = experts, tokens
            for name in self._experts.names:
                if not reads_neurons(name):
                    see(name, hidden[tokens].float(), experts, tokens)

        def neurons(rows: torch.Tensor) -> None:
            for name in self._experts.names:
                if reads_neurons(name):
                    see(name, rows.float(), pairs[0], pairs[1])

        handles = [
            self._module.register_forward_pre_hook(before, with_kwargs=True),
            see_output(self._module, neurons_of(self._module), neurons),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def reduce(self) -> dict[str, Inputs]:
        """Add up the ranks; the statistics of every expert's matrix by its :func:`expert_name`, without those that no token came to.

        Raises:
            DataError: an input is not finite; its matrix is named.
        """
        names = [expert_name(name, number) for name in self._experts.names for number in self._experts.numbers]
        return {name: inputs for name, inputs in zip(names, self._sums.reduce(names), strict=True) if inputs is not None}
