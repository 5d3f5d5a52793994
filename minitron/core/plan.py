"""Which units to keep on every axis: the only input of the weight surgery."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron.core.architecture import Architecture
from minitron.core.axes import AXES
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError, CheckpointError

#: What becomes of pruned query heads: dropped, or their residual folded into kept ones, with the sign of the paper or of LaCo.
HEAD_MERGES = ("off", "paper", "laco")


@dataclass(frozen=True)
class PrunePlan:
    """Kept indices per axis, ascending, in the teacher's numbering.

    ``layer`` and ``hidden`` are lists; ``by_layer`` maps an axis (``ffn``, ``head``, ``kv_head``, ``expert``, ``shared_ffn``) and each
    *kept* teacher layer that has it to a list. ``by_expert`` maps each kept layer with experts to one list of neurons per kept expert.
    Kept heads lie only in kept groups, equally many in each. ``head_pairs`` lists, per kept layer, (kept head, dropped head whose
    residual it takes over) when heads are merged. ``layer_merges`` lists, in order, a layer that stays and the dropped ones merged into it, by
    the variant ``layer_merge`` (LaCo). ``teacher`` is the content hash of the model that the plan is for.
    """

    architecture: Architecture
    layer: list[int]
    hidden: list[int]
    by_layer: dict[str, dict[int, list[int]]]
    by_expert: dict[int, list[list[int]]] = field(default_factory=dict)
    norm_rescale: bool = True
    head_merge: str = "off"
    head_pairs: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    teacher: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    layer_merge: str = "off"
    layer_merges: list[tuple[int, list[int]]] = field(default_factory=list)

    def kept(self, axis: str, layer: int | None, expert: int | None = None) -> list[int] | None:
        """Kept units of an axis in a teacher layer (and expert); None when nothing of that axis is ever cut."""
        if axis == "layer":
            return self.layer
        if axis == "hidden":
            return self.hidden
        if layer is None:
            return None
        if axis == "expert_ffn":
            if expert is None or layer not in self.by_expert:
                return None
            return self.by_expert[layer][self.by_layer["expert"][layer].index(expert)]
        return self.by_layer.get(axis, {}).get(layer)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        return {
            "architecture": self.architecture.to_dict(),
            "layer": self.layer,
            "hidden": self.hidden,
            "by_layer": self.by_layer,
            "by_expert": self.by_expert,
            "norm_rescale": self.norm_rescale,
            "head_merge": self.head_merge,
            "head_pairs": self.head_pairs,
            "teacher": self.teacher,
            "provenance": self.provenance,
            "layer_merge": self.layer_merge,
            "layer_merges": self.layer_merges,
        }

    @property
    def fingerprint(self) -> str:
        """A hash of what is kept and how, whatever the file looks like."""
        document = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: Path, teacher: Architecture) -> PrunePlan:
        """Read a plan for a given teacher: ``plan.json``, or the ``minitron.json`` of an export, which holds one.

        Raises:
            CheckpointError: the file is missing, damaged, or has an index beyond the teacher's units.
        """
        try:
            document = json.loads(path.read_text())
            document = document.get("plan", document)
            layer = document["layer"]
            plan = cls(
                Architecture.from_dict(document["architecture"], teacher.layout, tuple(layer)),
                layer,
                document["hidden"],
                {axis: {int(k): v for k, v in rows.items()} for axis, rows in document["by_layer"].items()},
                {int(k): v for k, v in document["by_expert"].items()},
                document["norm_rescale"],
                document["head_merge"],
                {int(k): [(kept, dropped) for kept, dropped in v] for k, v in document["head_pairs"].items()},
                document["teacher"],
                document["provenance"],
                document["layer_merge"],
                [(stays, list(merged)) for stays, merged in document["layer_merges"]],
            )
            plan.check(teacher)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} is not a prune plan: {error!r}") from error
        return plan

    def check(self, teacher: Architecture) -> None:
        """Refuse indices that the teacher does not have, and layers of unequal width, which no Hugging Face config can express.

        Raises:
            CheckpointError: an index is out of range or doubled, a kept layer is left out, or kept heads do not lie in kept groups.
            ArchitectureError: a layer keeps another number of units than the plan's architecture says.
        """
        rows: list[tuple[str, int | None, list[int]]] = [("layer", None, self.layer), ("hidden", None, self.hidden)]
        rows += [(axis, layer, kept) for axis, layers in self.by_layer.items() for layer, kept in layers.items()]
        rows += [("expert_ffn", layer, kept) for layer, experts in self.by_expert.items() for kept in experts]
        for axis, layer, kept in rows:
            if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < teacher.size(axis)):
                raise CheckpointError(f"the prune plan keeps units on axis '{axis}' that a teacher with {teacher.size(axis)} of them does not have")
            if len(kept) != self.architecture.size(axis):
                where = f"of layer {layer} " if layer is not None else ""
                raise ArchitectureError(
                    f"the prune plan keeps {len(kept)} units {where}on axis '{axis}', its architecture says {self.architecture.size(axis)}: "
                    "widths that differ from layer to layer cannot be expressed by a Hugging Face config"
                )
        self._check_layers(teacher)

    def _check_layers(self, teacher: Architecture) -> None:
        """Every kept layer is spoken of on every axis that it has, every kept expert has its neurons, and heads lie in their groups."""
        for axis in ("ffn", "shared_ffn", "expert", "head", "kv_head", "expert_ffn"):
            wanted = _layers_with(teacher, "head" if axis == "kv_head" else axis, self.layer)
            found = self.by_expert if axis == "expert_ffn" else self.by_layer.get(axis, {})
            if sorted(found) != wanted:
                raise CheckpointError(f"the prune plan tells what to keep on axis '{axis}' in layers {sorted(found)}, not in {wanted}")
        for layer, experts in self.by_expert.items():
            if len(experts) != len(self.by_layer["expert"][layer]):
                raise CheckpointError(f"the prune plan lists neurons of {len(experts)} experts of layer {layer}, and keeps others")
        per_group, keep = teacher.num_heads // teacher.num_kv_heads, self.architecture.num_heads // self.architecture.num_kv_heads
        for layer, heads in self.by_layer.get("head", {}).items():
            if [head // per_group for head in heads] != [group for group in self.by_layer["kv_head"][layer] for _ in range(keep)]:
                raise CheckpointError(f"the prune plan keeps heads of layer {layer} that do not lie equally many in each kept group")


def cut_axes(plan: PrunePlan, teacher: Architecture) -> set[str]:
    """The axes on which a plan drops units; several count together as ``all``, too."""
    cut = {axis for axis in AXES if plan.architecture.size(axis) < teacher.size(axis)}
    return cut | {"all"} if len(cut) > 1 else cut


def top(scores: torch.Tensor, count: int) -> list[int]:
    """Indices of the ``count`` highest scores, ascending; ties go to the lower index."""
    order = torch.sort(scores.double(), descending=True, stable=True).indices[:count]
    return sorted(order.tolist())


def select_layers(
    scores: torch.Tensor,
    keep: int,
    *,
    selection: str = "one_shot",
    protect_first: int = 0,
    protect_last: int = 0,
    protect: Sequence[int] = (),
    window_scores: torch.Tensor | None = None,
) -> list[int]:
    """Layers to keep, ascending.

    ``one_shot`` drops the lowest scores (ShortGPT); ``contiguous`` drops the run of layers with the lowest score (Gromov et al.; Minitron):
    that of ``window_scores`` [layers - dropped + 1] where runs were measured as such, else the sum of its layers'.

    Raises:
        ArchitectureError: more layers must go than the protected ones allow.
    """
    total = len(scores)
    drop = total - keep
    values = scores.double()
    candidates = [layer for layer in range(protect_first, total - protect_last) if layer not in protect]
    sentence = f"{drop} of {total} layers must go, but depth.protect_first={protect_first} and depth.protect_last={protect_last}"
    sentence += f" and depth.protect={list(protect)}" if protect else ""
    if drop > len(candidates):
        raise ArchitectureError(f"{sentence} leave {len(candidates)}")
    if selection == "contiguous" and drop:
        runs = [start for start in range(total - drop + 1) if set(range(start, start + drop)) <= set(candidates)]
        if not runs:
            raise ArchitectureError(f"{sentence} leave no run of so many neighbours")
        sums = window_scores.double() if window_scores is not None else values.unfold(0, drop, 1).sum(1)
        start = min(runs, key=lambda index: float(sums[index]))
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


def _head_pairs(scores: ImportanceScores, teacher: Architecture, target: Architecture, layer: int, groups: list[int]) -> list[tuple[int, int]]:
    """Kept heads with the dropped heads whose residual they take over (Minitron, arXiv 2407.14679, section 2.3).

    Of L heads ranked by score K stay, and rank i takes over from rank 2K - i + 1, for i in [max(1, 2K - L + 1), K]: the weakest kept head
    from the strongest dropped one. Ranks run within a group, or over all heads where every head has its own key and value.
    """
    per_group, keep = teacher.num_heads // teacher.num_kv_heads, target.num_heads // target.num_kv_heads
    if per_group > 1:
        tables = [(group * per_group, scores.of("head", layer)[group * per_group : (group + 1) * per_group], keep) for group in groups]
    else:
        tables = [(0, scores.of("kv_head", layer), target.num_heads)]
    pairs = []
    for first, values, kept in tables:
        order = torch.sort(values.double(), descending=True, stable=True).indices.tolist()
        pairs += [(first + order[i - 1], first + order[2 * kept - i]) for i in range(max(1, 2 * kept - len(order) + 1), kept + 1)]
    return pairs


def _layers_with(teacher: Architecture, axis: str, kept_layers: list[int]) -> list[int]:
    if teacher.layout is None:
        return kept_layers if teacher.size(axis) else []
    present = set(teacher.layout.layers_with(axis))
    return [layer for layer in kept_layers if layer in present]


def make_plan(
    scores: ImportanceScores,
    teacher: Architecture,
    target: Architecture,
    *,
    kept_layers: list[int],
    norm_rescale: bool = True,
    head_merge: str = "off",
    teacher_fingerprint: str | None = None,
) -> PrunePlan:
    """The plan that keeps the highest-scored units of every axis.

    Args:
        kept_layers: ascending teacher layers to keep, ``target.num_layers`` of them.
        head_merge: one of :data:`HEAD_MERGES`.
        teacher_fingerprint: content hash of the teacher that the plan is for.

    Raises:
        ArchitectureError: the target is not a sub-shape of the teacher, or a score that it needs was not measured.
    """
    target.check_within(teacher)
    if len(kept_layers) != target.num_layers:
        raise ArchitectureError(f"{len(kept_layers)} layers are kept, but the target has num_layers={target.num_layers}")
    if head_merge not in HEAD_MERGES:
        raise ArchitectureError(f"head_merge={head_merge} is not one of {', '.join(HEAD_MERGES)}")

    def keep(axis: str, layer: int | None) -> list[int]:
        cut = target.size(axis) < teacher.size(axis)
        return top(scores.of(axis, layer), target.size(axis)) if cut else list(range(teacher.size(axis)))

    by_layer: dict[str, dict[int, list[int]]] = {}
    for axis in ("ffn", "shared_ffn", "expert"):
        by_layer[axis] = {layer: keep(axis, layer) for layer in _layers_with(teacher, axis, kept_layers)}
    by_layer["kv_head"], by_layer["head"] = {}, {}
    head_pairs: dict[int, list[tuple[int, int]]] = {}
    for layer in _layers_with(teacher, "head", kept_layers):
        by_layer["kv_head"][layer], by_layer["head"][layer] = _kept_heads(scores, teacher, target, layer)
        if head_merge != "off" and target.num_heads < teacher.num_heads:
            head_pairs[layer] = _head_pairs(scores, teacher, target, layer, by_layer["kv_head"][layer])
    by_expert: dict[int, list[list[int]]] = {}
    for layer in _layers_with(teacher, "expert_ffn", kept_layers):
        neurons = list(range(teacher.expert_ffn_size))
        cut = target.expert_ffn_size < teacher.expert_ffn_size
        table = scores.of("expert_ffn", layer) if cut else None  # [experts, expert_ffn]
        by_expert[layer] = [top(table[expert], target.expert_ffn_size) if table is not None else neurons for expert in by_layer["expert"][layer]]
    return PrunePlan(
        target.replace(kept_layers=tuple(kept_layers)),
        list(kept_layers),
        keep("hidden", None),
        by_layer,
        by_expert,
        norm_rescale,
        head_merge,
        head_pairs,
        teacher_fingerprint,
        dict(scores.metadata),
    )
