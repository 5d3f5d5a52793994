"""Which units to keep on every axis: the only input of the weight surgery."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron.core.architecture import Architecture
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError, CheckpointError

#: How layers to drop are chosen from layer scores.
SELECTIONS = ("one_shot", "contiguous")


@dataclass(frozen=True)
class PrunePlan:
    """Kept indices per axis, ascending, in the teacher's numbering.

    ``layer`` and ``hidden`` are lists; ``ffn``, ``head`` and ``kv_head`` map each *kept* teacher layer to a list. Kept heads lie
    only in kept groups, equally many in each.
    """

    architecture: Architecture
    layer: list[int]
    hidden: list[int]
    by_layer: dict[str, dict[int, list[int]]]
    norm_rescale: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)

    def kept(self, axis: str, layer: int | None) -> list[int] | None:
        """Kept units of an axis in a teacher layer; None when nothing of that axis is ever cut."""
        if axis == "layer":
            return self.layer
        if axis == "hidden":
            return self.hidden
        per_layer = self.by_layer.get(axis)
        if per_layer is None or layer is None:
            return None
        return per_layer[layer]

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        document = {
            "architecture": self.architecture.to_dict(),
            "layer": self.layer,
            "hidden": self.hidden,
            **{axis: {str(k): v for k, v in rows.items()} for axis, rows in self.by_layer.items()},
            "norm_rescale": self.norm_rescale,
            "provenance": self.provenance,
        }
        path.write_text(json.dumps(document))

    @classmethod
    def load(cls, path: Path, teacher: Architecture) -> PrunePlan:
        """Read a plan for a given teacher.

        Raises:
            CheckpointError: the file is missing, damaged, or has an index beyond the teacher's units.
        """
        try:
            document = json.loads(path.read_text())
            layer, hidden = document.pop("layer"), document.pop("hidden")
            shape = document.pop("architecture")
            rescale, provenance = document.pop("norm_rescale"), document.pop("provenance")
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is not a prune plan: {error}") from error
        plan = cls(
            Architecture.from_dict(shape, teacher.layout, tuple(layer)),
            layer,
            hidden,
            {axis: {int(k): v for k, v in rows.items()} for axis, rows in document.items()},
            rescale,
            provenance,
        )
        plan.check(teacher)
        return plan

    def check(self, teacher: Architecture) -> None:
        """Refuse indices that the teacher does not have."""
        rows = [("layer", self.layer), ("hidden", self.hidden)]
        rows += [(axis, kept) for axis, layers in self.by_layer.items() for kept in layers.values()]
        for axis, kept in rows:
            if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < teacher.size(axis)):
                raise CheckpointError(f"the prune plan keeps units on axis '{axis}' that a teacher with {teacher.size(axis)} of them does not have")


def top(scores: torch.Tensor, count: int) -> list[int]:
    """Indices of the ``count`` highest scores, ascending; ties go to the lower index."""
    order = torch.sort(scores.double(), descending=True, stable=True).indices[:count]
    return sorted(order.tolist())


def select_layers(scores: torch.Tensor, keep: int, *, selection: str = "one_shot", protect_first: int = 0, protect_last: int = 0) -> list[int]:
    """Layers to keep, ascending.

    ``one_shot`` drops the lowest scores (ShortGPT); ``contiguous`` drops the window with the lowest sum (Gromov et al.; Minitron).

    Raises:
        ArchitectureError: more layers must go than the protected ones allow.
    """
    total = len(scores)
    candidates = range(protect_first, total - protect_last)
    drop = total - keep
    if drop > len(candidates):
        raise ArchitectureError(
            f"{drop} of {total} layers must go, but depth.protect_first={protect_first} and depth.protect_last={protect_last} leave {len(candidates)}"
        )
    values = scores.double()
    if selection == "contiguous":
        start = min(range(protect_first, total - protect_last - drop + 1), key=lambda s: float(values[s : s + drop].sum()))
        dropped = set(range(start, start + drop))
    else:
        dropped = set(sorted(candidates, key=lambda i: float(values[i]))[:drop])
    return [layer for layer in range(total) if layer not in dropped]


def _kept_heads(scores: ImportanceScores, teacher: Architecture, target: Architecture, layer: int) -> tuple[list[int], list[int]]:
    """Kept groups and kept query heads of a layer: the best groups, then equally many of the best heads inside each."""
    per_group = teacher.num_heads // teacher.num_kv_heads
    keep_in_group = target.num_heads // target.num_kv_heads
    groups = list(range(teacher.num_kv_heads))
    if target.num_kv_heads < teacher.num_kv_heads:
        groups = top(scores.of("kv_head", layer), target.num_kv_heads)
    heads: list[int] = []
    for group in groups:
        first = group * per_group
        inside = list(range(per_group))
        if keep_in_group < per_group:
            inside = top(scores.of("head", layer)[first : first + per_group], keep_in_group)
        heads += [first + i for i in inside]
    return groups, heads


def make_plan(
    scores: ImportanceScores, teacher: Architecture, target: Architecture, *, kept_layers: list[int], norm_rescale: bool = True
) -> PrunePlan:
    """The plan that keeps the highest-scored units of every axis.

    Args:
        kept_layers: ascending teacher layers to keep, ``target.num_layers`` of them.

    Raises:
        ArchitectureError: the target is not a sub-shape of the teacher.
    """
    target.check_within(teacher)
    if len(kept_layers) != target.num_layers:
        raise ArchitectureError(f"{len(kept_layers)} layers are kept, but the target has num_layers={target.num_layers}")
    hidden = list(range(teacher.hidden_size))
    if target.hidden_size < teacher.hidden_size:
        hidden = top(scores.of("hidden"), target.hidden_size)
    by_layer: dict[str, dict[int, list[int]]] = {"ffn": {}, "head": {}, "kv_head": {}}
    for layer in kept_layers:
        ffn = list(range(teacher.ffn_size))
        by_layer["ffn"][layer] = top(scores.of("ffn", layer), target.ffn_size) if target.ffn_size < teacher.ffn_size else ffn
        by_layer["kv_head"][layer], by_layer["head"][layer] = _kept_heads(scores, teacher, target, layer)
    return PrunePlan(target.replace(kept_layers=tuple(kept_layers)), list(kept_layers), hidden, by_layer, norm_rescale, dict(scores.metadata))
