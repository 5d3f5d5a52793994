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
AXES = ("layer", "hidden", "ffn", "head", "kv_head", "expert", "expert_ffn", "shared_ffn")
#: Axes whose kept units may differ from layer to layer.
LAYER_AXES = ("ffn", "head", "kv_head", "expert", "expert_ffn", "shared_ffn")

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


def describe_dim(dim: Dim) -> str:
    """A dimension in words: ``head*64``, ``ffn|ffn``, ``128``."""
    parts = []
    for segment in dim:
        if segment.axis is None:
            parts.append(str(segment.width))
        else:
            parts.append(segment.axis if segment.width == 1 else f"{segment.axis}*{segment.width}")
    return "|".join(parts)


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: its name, the axes of each dimension, and the layer (and expert) that owns it; None: outside of them.

    ``buffer`` marks what is saved with the weights without being one of them (a router's correction bias): cut, not counted. ``source`` is
    the parameter in memory that a checkpoint's tensor belongs to, where their names differ.
    """

    name: str
    dims: tuple[Dim, ...]
    layer: int | None = None
    expert: int | None = None
    buffer: bool = False
    source: str | None = None

    @property
    def module(self) -> str:
        """The module in memory that owns the parameter."""
        return (self.source or self.name).rpartition(".")[0]

    def shape(self, size_of: SizeOf) -> tuple[int, ...]:
        """The tensor shape for the given axis sizes."""
        return tuple(sum(segment.size(size_of) for segment in dim) for dim in self.dims)

    def axes(self) -> set[str]:
        """Every axis that any dimension carries."""
        return {segment.axis for dim in self.dims for segment in dim if segment.axis is not None}


@dataclass(frozen=True)
class Coupling:
    """A config that has one field for two sizes: ``size(axis) == ratio * size(other)``. The two are cut together."""

    axis: str
    other: str
    ratio: int

    def holds(self, size_of: SizeOf) -> bool:
        """Whether sizes obey the coupling."""
        return size_of(self.axis) == self.ratio * size_of(self.other)


@dataclass(frozen=True)
class Layout:
    """Every parameter of a model family, how layers are named (``model.layers.`` + index + ``.``), and which sizes are tied."""

    parameters: tuple[ParameterSpec, ...]
    layer_prefix: str
    couplings: tuple[Coupling, ...] = ()

    @cached_property
    def num_layers(self) -> int:
        """Number of layers the layout was made for."""
        return 1 + max((spec.layer for spec in self.parameters if spec.layer is not None), default=-1)

    @cached_property
    def by_layer(self) -> list[list[ParameterSpec]]:
        """The specs of every layer."""
        layers: list[list[ParameterSpec]] = [[] for _ in range(self.num_layers)]
        for spec in self.parameters:
            if spec.layer is not None:
                layers[spec.layer].append(spec)
        return layers

    @cached_property
    def layer_kinds(self) -> list[frozenset[tuple[str, tuple[Dim, ...]]]]:
        """What every layer holds; layers of one kind compare equal."""
        return [frozenset((self.suffix(spec), spec.dims) for spec in layer) for layer in self.by_layer]

    @cached_property
    def uniform(self) -> bool:
        """Whether all layers hold the same parameters, so that counts do not depend on which layers are kept."""
        return len(set(self.layer_kinds)) <= 1

    @cached_property
    def axes(self) -> set[str]:
        """Every axis that some parameter carries."""
        return {axis for spec in self.parameters for axis in spec.axes()}

    def layers_with(self, axis: str) -> list[int]:
        """Layers in which some parameter carries an axis."""
        return [index for index, specs in enumerate(self.by_layer) if any(axis in spec.axes() for spec in specs)]

    def suffix(self, spec: ParameterSpec) -> str:
        """A parameter's name within its layer."""
        return spec.name if spec.layer is None else spec.name[len(f"{self.layer_prefix}{spec.layer}.") :]

    def renamed(self, spec: ParameterSpec, layer: int | None, expert: int | None) -> str:
        """The same parameter's name when its layer becomes ``layer`` and its expert ``expert``."""
        name = spec.name if layer is None else f"{self.layer_prefix}{layer}.{self.suffix(spec)}"
        if spec.expert is None or expert is None:
            return name
        before, number, after = name.rpartition(f".{spec.expert}.")
        assert number, f"{name} does not name expert {spec.expert}"
        return f"{before}.{expert}.{after}"

    def select(self, num_layers: int, kept_layers: Iterable[int] | None) -> list[ParameterSpec]:
        """The specs outside the layers and those of the kept layers (the first ones when only a number is known)."""
        kept = list(kept_layers) if kept_layers is not None else list(range(num_layers))
        outside = [spec for spec in self.parameters if spec.layer is None]
        return outside + [spec for layer in kept for spec in self.by_layer[layer]]

    def count(
        self, size_of: SizeOf, num_layers: int, kept_layers: Iterable[int] | None = None, weigh: Callable[[ParameterSpec], float] | None = None
    ) -> int:
        """Exact number of parameters for the given sizes; ``weigh`` counts some of them partly, or not (0)."""

        def total(specs: Iterable[ParameterSpec]) -> float:
            counts = ((math.prod(spec.shape(size_of)), spec) for spec in specs if not spec.buffer)
            return sum(count if weigh is None else count * weigh(spec) for count, spec in counts)

        if self.uniform and self.num_layers > 0:
            outside = total(spec for spec in self.parameters if spec.layer is None)
            return round(outside + num_layers * total(self.by_layer[0]))
        return round(total(self.select(num_layers, kept_layers)))
