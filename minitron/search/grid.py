"""All points of a search space at once: sizes as arrays, counted by the same parameter map as a single shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from minitron.core.architecture import Architecture
from minitron.core.axes import AXES, Dim, ParameterSpec
from minitron.errors import ConfigError

#: [points], one value for every shape.
Values = np.ndarray[Any, np.dtype[Any]]
#: More points than this are refused: 2e7 points take 2 GB of sizes.
MAX_POINTS = 20_000_000


@dataclass(frozen=True)
class Grid:
    """Sub-shapes of a teacher, each axis a [points] int64 array.

    ``kept`` says for a number of layers which ones stay, where that is known; else the first ones count.
    """

    teacher: Architecture
    sizes: dict[str, Values]
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sizes["layer"])

    @classmethod
    def of_shapes(cls, shapes: Sequence[Architecture], teacher: Architecture) -> Grid:
        """Given shapes as a grid; their kept layers are those of the first of equal depth."""
        kept = {shape.num_layers: shape.kept_layers for shape in reversed(shapes) if shape.kept_layers is not None}
        return cls(teacher, {axis: np.array([shape.size(axis) for shape in shapes], dtype=np.int64) for axis in AXES}, kept)

    def take(self, chosen: Values) -> Grid:
        """Some of the points, by their numbers or a mask."""
        return Grid(self.teacher, {axis: values[chosen] for axis, values in self.sizes.items()}, self.kept)

    def shape(self, index: int) -> Architecture:
        """One point as a shape."""
        sizes = {self.teacher.option(axis): int(values[index]) for axis, values in self.sizes.items()}
        return self.teacher.replace(**sizes, kept_layers=self.kept.get(sizes["num_layers"]))

    def size(self, axis: str) -> Any:
        """Units of an axis, [points], or a number where no point differs from the teacher."""
        return self.sizes[axis] if axis in self.sizes else self.teacher.size(axis)

    def count(self, weigh: Callable[[ParameterSpec], Any] | None = None) -> Values:
        """Parameters of every point; ``weigh`` counts some of them partly, or not (0)."""
        layout = self.teacher.layout
        assert layout is not None, "a grid needs the teacher's parameter layout"

        def total(specs: Sequence[ParameterSpec]) -> Any:
            alike: Counter[tuple[Dim, ...]] = Counter(spec.dims for spec in specs if not spec.buffer)
            result: Any = 0
            for spec in {spec.dims: spec for spec in specs if not spec.buffer}.values():
                weight = 1 if weigh is None else weigh(spec)
                if isinstance(weight, int | float) and weight == 0:
                    continue
                count: Any = alike[spec.dims]
                for size in spec.shape(self.size):
                    count = count * size
                result = result + (count if weigh is None else count * weight)
            return result

        counted = total([spec for spec in layout.parameters if spec.layer is None]) + np.zeros(len(self), dtype=np.int64)
        for layers, number in self._layers_of_a_kind:
            counted = counted + number * total(layout.by_layer[layers])
        return counted if weigh is None else np.rint(counted)

    @cached_property
    def _layers_of_a_kind(self) -> list[tuple[int, Values]]:
        """Of every kind of layer one that shows it, and how many of it each point keeps [points]."""
        layout = self.teacher.layout
        assert layout is not None
        first: dict[Any, int] = {}
        kinds = [first.setdefault(kind, layer) for layer, kind in enumerate(layout.layer_kinds)]
        if len(first) == 1:
            return [(0, self.sizes["layer"])]
        numbers = np.zeros((len(first), self.teacher.num_layers + 1), dtype=np.int64)
        for depth in range(self.teacher.num_layers + 1):
            for layer in self.kept.get(depth, range(depth)):
                numbers[list(first.values()).index(kinds[layer]), depth] += 1
        return [(layer, numbers[row][self.sizes["layer"]]) for row, layer in enumerate(first.values())]

    @cached_property
    def num_parameters(self) -> Values:
        """Exact number of parameters; tied weights count once."""
        return self.count()

    @cached_property
    def num_non_embedding_parameters(self) -> Values:
        """All parameters but those with a vocabulary dimension."""
        return self.count(lambda spec: 0 if "vocab" in spec.axes() else 1)

    @cached_property
    def num_active_parameters(self) -> Values:
        """Parameters that one token uses."""
        return self.count(lambda spec: self._expert_share(spec, 1))

    @cached_property
    def num_attention_layers(self) -> Values:
        """Layers with attention."""
        layout = self.teacher.layout
        assert layout is not None
        if layout.uniform:
            return self.sizes["layer"]
        with_heads = set(layout.layers_with("head"))
        found = [number for layer, number in self._layers_of_a_kind if layer in with_heads]
        return np.sum(found, axis=0) if found else np.zeros(len(self), dtype=np.int64)

    def _expert_share(self, spec: ParameterSpec, num_tokens: int) -> Any:
        """The share of a parameter that some of ``num_tokens`` tokens use, when each goes to experts drawn evenly."""
        if not self.teacher.num_experts or not (spec.axes() >= {"expert"} and spec.axes() & {"expert_ffn"}):
            return 1
        one = self.teacher.num_experts_per_token / self.sizes["expert"]
        return one if num_tokens == 1 else 1.0 - (1.0 - one) ** num_tokens

    def matrix_flops(self) -> Values:
        """Forward FLOPs per token in matrix products, the head's among them: two per weight."""
        matrices = self.count(lambda spec: self._expert_share(spec, 1) if len(spec.dims) >= 2 and "vocab" not in spec.axes() else 0)
        return 2.0 * (matrices + self.sizes["hidden"] * self.teacher.vocab_size)

    def flops_per_token(self, sequence_length: int) -> Values:
        """Forward FLOPs per token, causal attention at half the square, as :meth:`Architecture.flops_per_token`."""
        return self.matrix_flops() + 2.0 * sequence_length * self.sizes["head"] * self.teacher.head_dim * self.num_attention_layers

    def attended_flops(self, context: int) -> Values:
        """FLOPs of one token that attends to ``context`` tokens: two products per position and channel."""
        return 4.0 * context * self.sizes["head"] * self.teacher.head_dim * self.num_attention_layers

    def read_bytes(self, num_tokens: int) -> Values:
        """Bytes of bf16 weights that a forward of ``num_tokens`` tokens reads: no row of an embedding to speak of, and not every expert."""
        read = self.count(lambda spec: 0 if "vocab" in spec.axes() else self._expert_share(spec, num_tokens))
        return 2.0 * (read + self.sizes["hidden"] * self.teacher.vocab_size)

    def kv_cache_bytes(self, *, batch_size: int, sequence_length: int) -> Values:
        """Bytes of bf16 keys and values for a batch of full sequences."""
        return 4 * self.num_attention_layers * self.sizes["kv_head"] * self.teacher.head_dim * batch_size * sequence_length


def grid_of(space: dict[str, list[Any]], teacher: Architecture, *, kept: Mapping[int, tuple[int, ...]] | None = None) -> Grid:
    """All sub-shapes of the teacher that a space spells out, sizes that the family ties to each other following.

    Raises:
        ConfigError: the space is too large.
    """
    ratio = "ffn_ratio" in space
    keys = [key for key in space if not (ratio and key == "ffn_size")]
    tied = _tied_keys(space, teacher)
    keys = [key for key in keys if key not in tied]
    num_points = int(np.prod([float(len(space[key])) for key in keys]))
    if num_points > MAX_POINTS:
        raise ConfigError(f"the search space has {num_points:,} points, more than {MAX_POINTS:,}: give fewer values, or a larger search.divisor")
    columns = [column.ravel() for column in np.meshgrid(*(np.array(space[key]) for key in keys), indexing="ij")]
    given = dict(zip(keys, columns, strict=True))
    if ratio and "ffn_ratio" in given:
        hidden = given.get("hidden_size", np.full(num_points, teacher.hidden_size))
        given["ffn_size"] = np.rint(given.pop("ffn_ratio") * hidden).astype(np.int64)
    _follow_couplings(given, teacher)
    full = {axis: given.get(teacher.option(axis), np.full(num_points, teacher.size(axis))).astype(np.int64) for axis in AXES}
    grid = Grid(teacher, full, kept or {})
    grid = grid.take(_is_sub_shape(grid))
    if ratio:  # two ratios may round to one size
        _, first = np.unique(np.stack(list(grid.sizes.values())), axis=1, return_index=True)
        grid = grid.take(np.sort(first))
    return grid


def _is_sub_shape(grid: Grid) -> Values:
    """Which points can be cut out of the teacher: heads in whole groups, no more of them in a group, enough experts, tied sizes as tied."""
    teacher, size = grid.teacher, grid.sizes
    fits = (size["head"] % size["kv_head"] == 0) & (size["head"] // size["kv_head"] <= teacher.num_heads // teacher.num_kv_heads)
    fits &= (size["ffn"] <= teacher.ffn_size) & (size["expert"] >= teacher.num_experts_per_token)
    for coupling in teacher.couplings:
        fits &= size[coupling.axis] == coupling.ratio * size[coupling.other]
    return fits


def _follow_couplings(given: dict[str, Values], teacher: Architecture) -> None:
    """Add the sizes that follow a given one; as :meth:`Architecture.with_coupled`, for arrays."""
    for coupling in (*teacher.couplings, *teacher.couplings):  # twice: kv heads follow heads, which follow hidden channels
        mine, other = teacher.option(coupling.axis), teacher.option(coupling.other)
        if mine in given and other not in given:
            given[other] = given[mine] // coupling.ratio
        elif other in given and mine not in given:
            given[mine] = given[other] * coupling.ratio


def _tied_keys(space: dict[str, list[Any]], teacher: Architecture) -> set[str]:
    """Sizes that follow another one because the family's config ties them, and for which the space tries nothing but the teacher's."""
    found: set[str] = set()
    pairs = [(coupling.axis, coupling.other) for coupling in teacher.couplings]
    for mine, other in (*pairs, *(pair[::-1] for pair in pairs)) * 2:  # twice: groups follow heads, which follow hidden channels
        key, other_key = teacher.option(mine), teacher.option(other)
        if space.get(key) == [teacher.size(mine)] and (other_key in found or space.get(other_key) != [teacher.size(other)]):
            found.add(key)
    return found
