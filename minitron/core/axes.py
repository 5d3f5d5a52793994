"""Named axes and the map from every parameter's dimensions to them.

A dimension of a parameter is a sequence of :class:`Segment`; a plain dimension has one. ``q_proj.weight`` of a Llama is
``[head x head_dim, hidden]``, a fused ``qkv_proj.weight`` is ``[head x d | kv_head x d | kv_head x d, hidden]``. Counting,
slicing and masking all read this one map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

#: Axes that may be pruned, in the order in which tools list them.
AXES = ("layer", "hidden", "ffn", "head", "kv_head", "expert", "expert_ffn")
#: Axes whose kept units may differ from layer to layer.
LAYER_AXES = ("ffn", "head", "kv_head", "expert", "expert_ffn")

SizeOf = Callable[[str], int]


@dataclass(frozen=True)
class Segment:
    """``width`` contiguous elements for every unit of ``axis``; with no axis, ``width`` elements that are never cut."""

    axis: str | None
    width: int = 1

    def size(self, size_of: SizeOf) -> int:
        """Number of elements, given the number of units of every axis."""
        return self.width if self.axis is None else self.width * size_of(self.axis)


Dim = tuple[Segment, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: its name, the axes of each dimension, and the layer that owns it (None: outside the layers)."""

    name: str
    dims: tuple[Dim, ...]
    layer: int | None = None

    def shape(self, size_of: SizeOf) -> tuple[int, ...]:
        """The tensor shape for the given axis sizes."""
        return tuple(sum(segment.size(size_of) for segment in dim) for dim in self.dims)

    def axes(self) -> set[str]:
        """Every axis that any dimension carries."""
        return {segment.axis for dim in self.dims for segment in dim if segment.axis is not None}


@dataclass(frozen=True)
class Layout:
    """Every parameter of a model family, and how layers are named (``model.layers.`` + index + ``.``)."""

    parameters: tuple[ParameterSpec, ...]
    layer_prefix: str

    @cached_property
    def num_layers(self) -> int:
        """Number of layers the layout was made for."""
        return 1 + max((spec.layer for spec in self.parameters if spec.layer is not None), default=-1)

    @cached_property
    def _by_layer(self) -> list[list[ParameterSpec]]:
        layers: list[list[ParameterSpec]] = [[] for _ in range(self.num_layers)]
        for spec in self.parameters:
            if spec.layer is not None:
                layers[spec.layer].append(spec)
        return layers

    @cached_property
    def uniform(self) -> bool:
        """Whether all layers hold the same parameters, so that counts do not depend on which layers are kept."""
        signatures = {tuple(sorted((self.suffix(s), s.dims) for s in layer)) for layer in self._by_layer}
        return len(signatures) <= 1

    def suffix(self, spec: ParameterSpec) -> str:
        """A parameter's name within its layer."""
        return spec.name if spec.layer is None else spec.name[len(f"{self.layer_prefix}{spec.layer}.") :]

    def renamed(self, spec: ParameterSpec, layer: int) -> str:
        """The same parameter's name when its layer becomes layer ``layer``."""
        return f"{self.layer_prefix}{layer}.{self.suffix(spec)}"

    def select(self, num_layers: int, kept_layers: Iterable[int] | None) -> list[ParameterSpec]:
        """The specs outside the layers and those of the kept layers (the first ones when only a number is known)."""
        kept = list(kept_layers) if kept_layers is not None else list(range(num_layers))
        outside = [spec for spec in self.parameters if spec.layer is None]
        return outside + [spec for layer in kept for spec in self._by_layer[layer]]

    def count(
        self, size_of: SizeOf, num_layers: int, kept_layers: Iterable[int] | None = None, where: Callable[[ParameterSpec], bool] | None = None
    ) -> int:
        """Exact number of parameters for the given sizes; ``where`` restricts the count to some of them."""
        chosen = (lambda spec: True) if where is None else where

        def total(specs: Iterable[ParameterSpec]) -> int:
            return sum(math.prod(spec.shape(size_of)) for spec in specs if chosen(spec))

        if self.uniform and self.num_layers > 0:
            outside = total(spec for spec in self.parameters if spec.layer is None)
            return outside + num_layers * total(self._by_layer[0])
        return total(self.select(num_layers, kept_layers))
