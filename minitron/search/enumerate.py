"""Every shape of a space within a band around the budget, and a diverse choice among them."""

from __future__ import annotations

import itertools
import math
from typing import Any

from minitron.core.architecture import Architecture
from minitron.core.axes import AXES
from minitron.errors import ArchitectureError


def shapes_of(space: dict[str, list[Any]], teacher: Architecture) -> list[Architecture]:
    """All sub-shapes of the teacher that a space spells out, without building a model."""
    ffn_key = "ffn_ratio" if "ffn_ratio" in space else "ffn_size"
    keys = [key for key in space if key not in ("ffn_ratio", "ffn_size")]
    tied = _tied_keys(space, teacher)
    shapes = []
    most_per_group = teacher.num_heads // teacher.num_kv_heads
    for ffn, *values in itertools.product(space[ffn_key], *(space[key] for key in keys)):
        sizes = dict(zip(keys, values, strict=True))
        if ffn_key == "ffn_ratio":
            ffn = round(ffn * sizes["hidden_size"])
        shape = teacher.with_coupled(**{key: size for key, size in {**sizes, "ffn_size": ffn}.items() if key not in tied})
        if shape.num_heads % shape.num_kv_heads or shape.num_heads // shape.num_kv_heads > most_per_group or shape.ffn_size > teacher.ffn_size:
            continue
        if shape.num_experts >= teacher.num_experts_per_token and all(coupling.holds(shape.size) for coupling in shape.couplings):
            shapes.append(shape)
    return shapes


def _tied_keys(space: dict[str, list[Any]], teacher: Architecture) -> set[str]:
    """Sizes that follow another one because the family's config ties them, and for which the space tries nothing but the teacher's."""
    found: set[str] = set()
    pairs = [(coupling.axis, coupling.other) for coupling in teacher.couplings]
    for mine, other in (*pairs, *(pair[::-1] for pair in pairs)) * 2:  # twice: groups follow heads, which follow hidden channels
        key, other_key = teacher.option(mine), teacher.option(other)
        if space.get(key) == [teacher.size(mine)] and (other_key in found or space.get(other_key) != [teacher.size(other)]):
            found.add(key)
    return found


def enumerate_shapes(space: dict[str, list[Any]], teacher: Architecture, *, num_parameters: float, tolerance: float) -> list[Architecture]:
    """Shapes whose exact parameter count is within ``tolerance`` of the budget, nearest first.

    Raises:
        ArchitectureError: there is none; the nearest one is named.
    """
    shapes = shapes_of(space, teacher)
    if not shapes:
        raise ArchitectureError("the search space holds no shape: heads must divide into groups, and no size may exceed the teacher's")
    ranked = sorted(shapes, key=lambda shape: (abs(shape.num_parameters - num_parameters), shape.name))
    within = [shape for shape in ranked if abs(shape.num_parameters - num_parameters) <= tolerance * num_parameters]
    if not within:
        best = ranked[0]
        raise ArchitectureError(
            f"no shape of the search space has {num_parameters:,.0f} parameters within {tolerance:.1%}; the nearest is {best.name} with "
            f"{best.num_parameters:,} ({(best.num_parameters - num_parameters) / num_parameters:+.1%}): widen target.tolerance or the space"
        )
    return within


def _position(shape: Architecture) -> tuple[float, ...]:
    return tuple(math.log(max(1, shape.size(axis))) for axis in AXES)


def pick_diverse(shapes: list[Architecture], count: int) -> list[Architecture]:
    """``count`` shapes far apart from each other in log sizes, starting from the first; in the order given.

    Greedy farthest-point choice: a budget's neighbourhood is full of near copies, and ranking near copies teaches nothing.
    """
    if len(shapes) <= count:
        return list(shapes)
    positions = [_position(shape) for shape in shapes]
    chosen = [0]
    distance = [math.dist(p, positions[0]) for p in positions]
    while len(chosen) < count:
        index = max(range(len(shapes)), key=lambda i: (distance[i], -i))
        chosen.append(index)
        distance = [min(d, math.dist(p, positions[index])) for d, p in zip(distance, positions, strict=True)]
    return [shapes[i] for i in sorted(chosen)]
