"""Every shape of a space within a band around the budget, and a diverse choice among them."""

from __future__ import annotations

import itertools
import math
from typing import Any

from minitron.core.architecture import Architecture
from minitron.errors import ArchitectureError


def shapes_of(space: dict[str, list[Any]], teacher: Architecture) -> list[Architecture]:
    """All sub-shapes of the teacher that a space spells out, without building a model."""
    ffn_key = "ffn_ratio" if "ffn_ratio" in space else "ffn_size"
    keys = ["num_layers", "hidden_size", ffn_key, "num_heads", "num_kv_heads"]
    shapes = []
    most_per_group = teacher.num_heads // teacher.num_kv_heads
    for layers, hidden, ffn, heads, groups in itertools.product(*(space[key] for key in keys)):
        ffn_size = round(ffn * hidden) if ffn_key == "ffn_ratio" else ffn
        if heads % groups or heads // groups > most_per_group or ffn_size > teacher.ffn_size:
            continue
        shapes.append(teacher.replace(num_layers=layers, hidden_size=hidden, ffn_size=ffn_size, num_heads=heads, num_kv_heads=groups))
    return shapes


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
    return tuple(math.log(shape.size(axis)) for axis in ("layer", "hidden", "ffn", "head", "kv_head"))


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
