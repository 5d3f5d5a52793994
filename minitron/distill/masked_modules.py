"""Modules of a student whose weights are read through masks."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minitron.ops.masked_linear import masked_linear
from minitron.ops.masked_weight import masked_weight

if TYPE_CHECKING:
    from minitron.distill.masks import Masks


class MaskedLinear(nn.Linear):
    """A linear layer under :class:`minitron.distill.masks.Masks`; ``start`` is its share of zeros where training begins."""

    masks: Masks
    start: float

    @property
    def kept_parameters(self) -> list[torch.Tensor]:
        """Those of which what is zero is to stay zero, which optimisers that mix weights need to know."""
        return [self.weight] if self.masks.mode == "keep" else []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] → [..., outputs]."""
        return masked_linear(input, self.weight, self.bias, self.masks.magnitudes(self.start, self.in_features))


def mask_linear(module: nn.Linear, masks: Masks, start: float) -> None:
    """Put a linear layer under masks."""
    linear: Any = module
    linear.__class__ = MaskedLinear
    linear.masks, linear.start = masks, start


def mask_parameter(module: nn.Module, name: str, masks: Masks, start: float, *, transposed: bool) -> None:
    """Let a module's forward read one of its parameters [..., outputs, inputs], or ``transposed``, through masks, whatever it does with it.

    Its class becomes a subclass in which the name is a property: a masked view of the parameter inside the forward, the parameter itself
    everywhere else. Engines look names up too (FSDP2 takes what it finds there for its shard), and put gathered weights where modules keep their
    parameters: there the property looks at every read.
    """
    found: Any = module
    kind: Any = type(module)
    found.mask_starts = {**getattr(module, "mask_starts", {}), name: (start, transposed)}
    found.masks, found.in_forward = masks, False
    found.__class__ = _masked_class(getattr(kind, "unmasked", kind), tuple(found.mask_starts))


@cache
def _masked_class(kind: Any, names: tuple[str, ...]) -> Any:
    def read(name: str) -> property:
        def weight(module: Any) -> torch.Tensor:
            parameter: torch.Tensor = module._parameters[name]
            if not module.in_forward:
                return parameter
            start, transposed = module.mask_starts[name]
            magnitudes = module.masks.magnitudes(start, parameter.shape[-2 if transposed else -1])
            if transposed and magnitudes is not None:
                return masked_weight(parameter.mT, magnitudes).mT
            return masked_weight(parameter, magnitudes)

        return property(weight, doc="The weight; under its mask while the module's forward runs.")

    def kept(module: Any) -> list[torch.Tensor]:
        return [module._parameters[name] for name in names] if module.masks.mode == "keep" else []

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        module.in_forward = True
        try:
            return kind.forward(module, *args, **kwargs)
        finally:
            module.in_forward = False

    members = {name: read(name) for name in names} | {"kept_parameters": property(kept), "forward": forward}
    return type(f"Masked{kind.__name__}", (kind,), {**members, "unmasked": kind, "__doc__": kind.__doc__})
