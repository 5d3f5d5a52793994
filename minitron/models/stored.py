"""How parameters lie in a checkpoint, where transformers renames or fuses them while loading.

Experts are one 3-D tensor in memory and one small matrix each on disk; some families have other name prefixes there. Instead of
reading transformers' conversion rules, they are observed: a state dict whose every number is unique is converted to the form of a
checkpoint, and each number tells where it came from.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from minitron.core.axes import Dim, Layout, ParameterSpec, SizeOf
from minitron.errors import ArchitectureError
from minitron.models.fields import meta_model, small_config


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: its own spec, the parameter it is part of, and which segments of each dimension it holds.

    ``parts`` has one (first, last + 1) pair of segment numbers per dimension of the source; None where the stored tensor is one expert.
    """

    spec: ParameterSpec
    source: ParameterSpec
    parts: tuple[tuple[int, int] | None, ...]
    transposed: bool

    def cut(self, parameter: torch.Tensor, size_of: SizeOf, expert: int | None) -> torch.Tensor:
        """This tensor out of the whole parameter."""
        position = 0
        for dim, part in zip(self.source.dims, self.parts, strict=True):
            if part is None:
                assert expert is not None
                parameter = parameter.select(position, expert)
                continue
            sizes = [segment.size(size_of) for segment in dim]
            if part != (0, len(dim)):
                parameter = parameter.narrow(position, sum(sizes[: part[0]]), sum(sizes[part[0] : part[1]]))
            position += 1
        return parameter.transpose(-1, -2) if self.transposed else parameter


def find_stored(config: Any, fields: dict[str, str], layout: Layout, head_dim: int) -> tuple[StoredTensor, ...]:
    """The checkpoint form of a family, observed on one layer of every kind: names of other layers differ in the layer's number alone.

    Raises:
        ArchitectureError: a stored tensor is not a plain part of one parameter (named).
    """
    from transformers.core_model_loading import revert_weight_conversion

    sizes = {"hidden": 4 * head_dim, "head": 4, "kv_head": 2 if "kv_head" in fields else 4, "ffn": 6, "expert_ffn": 6, "shared_ffn": 10, "vocab": 8}
    if "shared_ffn" not in fields or fields["shared_ffn"] == fields.get("expert_ffn"):
        sizes["shared_ffn"] = sizes["expert_ffn"]
    if "expert" in fields:
        sizes["expert"] = int(getattr(config, fields["expert"]))
    like = _first_alike(layout)
    observed = [spec for spec in layout.parameters if spec.layer is None or like[spec.layer] == spec.layer]
    numbers, starts, total = {}, [], 0
    for spec in observed:
        shape = spec.shape(sizes.__getitem__)
        numbers[spec.name] = torch.arange(total, total + math.prod(shape), dtype=torch.float64).view(shape)
        starts.append(total)
        total += math.prod(shape)
    model: Any = meta_model(small_config(config, fields, {}, kept_layers=[0], head_dim=head_dim))
    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(numbers))
    stored = []
    for name, tensor in found.items():
        source = observed[bisect.bisect_right(starts, float(tensor.flatten()[0])) - 1]
        stored.append(_locate(name, tensor, source, numbers[source.name], sizes.__getitem__, config.model_type))
    stored += _repeated(stored, layout, like)
    order = {spec.name: index for index, spec in enumerate(layout.parameters)}
    return tuple(sorted(stored, key=lambda item: (order[item.source.name], item.spec.expert or 0)))


def _first_alike(layout: Layout) -> list[int]:
    """For every layer the first one of its kind."""
    first: dict[object, int] = {}
    return [first.setdefault(kind, layer) for layer, kind in enumerate(layout.layer_kinds)]


def _repeated(stored: list[StoredTensor], layout: Layout, like: list[int]) -> list[StoredTensor]:
    """The observed layers' tensors again, for every other layer of the same kind."""
    by_layer: dict[int | None, list[StoredTensor]] = {}
    for item in stored:
        by_layer.setdefault(item.source.layer, []).append(item)
    sources = {spec.name: spec for spec in layout.parameters}
    found = []
    for layer, first in enumerate(like):
        for item in by_layer.get(first, ()) if first != layer else ():
            source = sources[layout.renamed(item.source, layer, None)]
            name, replaced = re.subn(rf"^(.*?\.){first}\.", rf"\g<1>{layer}.", item.spec.name, count=1)
            assert replaced, f"'{item.spec.name}' does not name layer {first}"
            spec = source if item.spec is item.source else replace(item.spec, name=name, layer=layer, source=source.name)
            found.append(replace(item, spec=spec, source=source))
    return found


def _locate(name: str, tensor: torch.Tensor, source: ParameterSpec, whole: torch.Tensor, size_of: SizeOf, model_type: str) -> StoredTensor:
    if name == source.name and torch.equal(tensor, whole):
        return StoredTensor(source, source, tuple((0, len(dim)) for dim in source.dims), False)
    offset = int(whole.flatten()[0])
    first, last = (_place(int(tensor.flatten()[i]) - offset, tuple(whole.shape)) for i in (0, -1))
    parts: list[tuple[int, int] | None] = []
    dims: list[Dim] = []
    expert: int | None = None
    for dim, low, high in zip(source.dims, first, last, strict=True):
        if tensor.ndim < whole.ndim and expert is None and low == high and [segment.axis for segment in dim] == ["expert"]:
            expert = low
            parts.append(None)
            continue
        edges = [0]
        for segment in dim:
            edges.append(edges[-1] + segment.size(size_of))
        if low not in edges or high + 1 not in edges:
            raise ArchitectureError(f"'{name}' in a checkpoint of '{model_type}' holds a part of '{source.name}' that is no whole axis")
        part = (edges.index(low), edges.index(high + 1))
        parts.append(part)
        dims.append(dim[part[0] : part[1]])
    for transposed in (False, True):
        spec = ParameterSpec(name, tuple(reversed(dims)) if transposed else tuple(dims), source.layer, expert, source.buffer, source.name)
        stored = StoredTensor(spec, source, tuple(parts), transposed)
        piece = stored.cut(whole, size_of, expert)
        if piece.shape == tensor.shape and torch.equal(piece, tensor):
            return stored
    raise ArchitectureError(f"'{name}' in a checkpoint of '{model_type}' is no plain part of parameter '{source.name}'")


def _place(number: int, shape: tuple[int, ...]) -> list[int]:
    """The index of an element by its number; torch.unravel_index takes 0.1 ms for it, half of the time for a hundred experts a layer."""
    place = []
    for size in reversed(shape):
        number, rest = divmod(number, size)
        place.append(rest)
    return place[::-1]


def stored_layout(stored: tuple[StoredTensor, ...], layout: Layout) -> Layout:
    """The layout of a checkpoint's tensors."""
    if all(item.spec is item.source for item in stored):
        return layout
    prefixes = set()
    for item in stored:
        if item.spec.layer is not None:
            suffix = re.search(rf"^(.*?\.){item.spec.layer}\.", item.spec.name)
            assert suffix is not None, f"'{item.spec.name}' does not name layer {item.spec.layer}"
            prefixes.add(suffix.group(1))
    assert len(prefixes) == 1, f"layers have several names in a checkpoint: {sorted(prefixes)}"
    return Layout(tuple(item.spec for item in stored), prefixes.pop(), layout.couplings)


def to_stored(stored: tuple[StoredTensor, ...], weights: Iterable[tuple[str, torch.Tensor]], size_of: SizeOf) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters as the tensors of a checkpoint, one parameter at a time."""
    by_source: dict[str, list[StoredTensor]] = {}
    for item in stored:
        by_source.setdefault(item.source.name, []).append(item)
    for name, parameter in weights:
        for item in by_source[name]:
            yield item.spec.name, item.cut(parameter, size_of, item.spec.expert)
        del parameter  # or it would stay while the next one is gathered
