"""Models whose parameters still lie in files: on the meta device, each model bound to the source of its weights."""

from __future__ import annotations

from torch import nn

from minitron.core.protocols import WeightSource

_ATTRIBUTE = "_weight_source"


def bind_source(model: nn.Module, source: WeightSource) -> None:
    """Say where the parameters of a model on the meta device are to be read from."""
    setattr(model, _ATTRIBUTE, source)


def sources_of(root: nn.Module) -> dict[str, WeightSource]:
    """The sources bound to a module and to those inside it, by the prefix that stands before their names in ``root``."""
    found = {}
    for name, module in root.named_modules():
        source = vars(module).get(_ATTRIBUTE)
        if source is not None:
            found[f"{name}." if name else ""] = source
    return found


def unbind_sources(root: nn.Module) -> None:
    """Close the sources of a module whose parameters have all been read."""
    for module in root.modules():
        source = vars(module).pop(_ATTRIBUTE, None)
        if source is not None:
            source.close()
