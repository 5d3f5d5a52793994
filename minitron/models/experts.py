"""Experts that transformers holds in one parameter a layer: which dimension is what, and what goes through each of them.

transformers runs them as one grouped product over (token, expert) pairs sorted by expert; the activation function between the two products is
the one place inside where something can be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from minitron.core.axes import ParameterSpec
from minitron.errors import ArchitectureError
from minitron.models.family import Family


class Removable(Protocol):
    """Something that was put on a model and can be taken off."""

    def remove(self) -> None:
        """Put things back."""


class Undo:
    """A function to be called once, as a handle."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def remove(self) -> None:
        """Put things back."""
        self._function()


def expert_matrices(family: Family) -> list[list[ParameterSpec]]:
    """Per layer the parameters that hold a matrix of every expert: [experts, outputs, inputs], or transposed."""
    return [[spec for spec in layer if _neuron_dim(spec) is not None] for layer in family.layout.by_layer]


def transposed_matrices(family: Family) -> set[str]:
    """The names of those that are [experts, inputs, outputs], as gpt_oss has them."""
    return {spec.name for layer in expert_matrices(family) for spec in layer if (_neuron_dim(spec) == 1) == reads_neurons(spec.name)}


def outputs_first(name: str, weight: torch.Tensor, transposed: set[str]) -> torch.Tensor:
    """A view of a parameter whose last dimension is the inputs; ``transposed`` is :func:`transposed_matrices`."""
    return weight.mT if name in transposed else weight


def reads_neurons(name: str) -> bool:
    """Whether an expert's matrix, by its parameter's name, reads what the activation function gives rather than the expert's input."""
    return name.endswith("down_proj")


def _neuron_dim(spec: ParameterSpec) -> int | None:
    """The dimension of the neurons of a parameter that holds experts' matrices; None of any other parameter."""
    if spec.buffer or len(spec.dims) != 3 or [segment.axis for segment in spec.dims[0]] != ["expert"]:
        return None
    if not spec.name.endswith(("up_proj", "down_proj")):
        return None
    return next((dim for dim in (1, 2) if {segment.axis for segment in spec.dims[dim]} == {"expert_ffn"}), None)


def run_grouped(model: nn.Module, model_type: str) -> Removable:
    """Let a model run its experts as grouped products, until that is undone.

    Raises:
        ArchitectureError: its experts cannot be run so.
    """
    before = getattr(model.config, "_experts_implementation", None)
    try:
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise ArchitectureError(f"experts of '{model_type}' cannot be observed: {error}") from error
    return Undo(lambda: model.set_experts_implementation(before) if before is not None else None)  # type: ignore[operator]


def routed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an experts module is called with, in the order of the grouped product.

    Returns:
        its input [tokens, hidden]; of each pair [tokens * top-k] its expert, its token, and the router's weight. Experts ascend.
    """
    hidden, chosen, weights = [*args, *kwargs.values()][:3]  # chosen and weights: [tokens, top-k]
    experts, order = torch.sort(chosen.reshape(-1))
    return hidden, experts, order // chosen.shape[1], weights.reshape(-1)[order]


def can_be_seen(experts: nn.Module) -> bool:
    """Whether a module is one that transformers runs as grouped products."""
    return all(hasattr(experts, name) for name in ("has_gate", "num_experts", "is_transposed"))


def neurons_of(experts: Any) -> str:
    """The attribute of an experts module that gives its neurons [tokens * top-k, neurons]."""
    return "_apply_gate" if experts.has_gate else "act_fn"


def see_output(experts: Any, name: str, see: Callable[[torch.Tensor], None]) -> Removable:
    """Show every output of a module or method of an experts module, which the grouped product looks up on the instance."""
    inner = getattr(experts, name)
    if isinstance(inner, nn.Module):
        return inner.register_forward_hook(lambda module, args, output: see(output))

    def seen(*args: Any) -> torch.Tensor:
        output: torch.Tensor = inner(*args)
        see(output)
        return output

    setattr(experts, name, seen)
    return Undo(lambda: delattr(experts, name))
