"""Which layers to keep, from the depth scores and how they are to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minitron.core.plan import select_layers
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError

#: How layers to drop are chosen: the lowest scores at once; the lowest run of neighbours; one after another with the rest scored again after each
#: (SLEB), in full or only the likeliest; or merged into a neighbour while the model's output stays similar (LaCo).
SELECTIONS = ("one_shot", "contiguous", "greedy", "greedy_lazy", "laco")


@dataclass(frozen=True)
class LayerChoice:
    """Layers to keep, ascending, and the merges that the dropped ones vanish in: (the layer that stays, those it takes in), in order."""

    kept: list[int]
    merges: list[tuple[int, list[int]]] = field(default_factory=list)


def choose_layers(
    scores: ImportanceScores, keep: int, *, selection: str, protect_first: int = 0, protect_last: int = 0, protect: Sequence[int] = ()
) -> LayerChoice:
    """The layers to keep under one of :data:`SELECTIONS`.

    Reads ``layer`` [layers] and, where measured, ``layer_window.<n>`` [layers - n + 1], ``layer_order`` [removed] and ``layer_merges``
    [merges, 1 + most layers in one] (the layer that stays, those merged into it, then -1).

    Raises:
        ArchitectureError: more layers must go than protected ones allow or than were measured, or merging does not stop at ``keep`` layers.
    """
    layer = scores.of("layer")
    total, drop = len(layer), len(layer) - keep
    if selection in ("greedy", "greedy_lazy") and drop:
        order = [int(index) for index in scores.of("layer_order")]
        if drop > len(order):
            raise ArchitectureError(
                f"{drop} of {total} layers must go, but only {len(order)} removals were measured: "
                f"raise depth.max_removed to {drop}, protect fewer layers, or keep more"
            )
        return LayerChoice([index for index in range(total) if index not in order[:drop]])
    if selection == "laco" and drop:
        merges = read_merges(scores)
        for count in range(len(merges) + 1):
            gone = {index for _, merged in merges[:count] for index in merged}
            if len(gone) == drop:
                return LayerChoice([index for index in range(total) if index not in gone], merges[:count])
        reached = [total - sum(len(merged) for _, merged in merges[: count + 1]) for count in range(len(merges))]
        settings = scores.metadata.get("laco", {})
        raise ArchitectureError(
            f"LaCo with depth.laco.threshold={settings.get('threshold')} and num_merged={settings.get('num_merged')} merges {total} layers to "
            f"{', '.join(map(str, reached)) or 'no fewer'}, not to {keep}: "
            + ("lower the threshold" if not reached or keep < min(reached) else "ask for one of these numbers, or change num_merged or the threshold")
        )
    windows = scores.tensors.get(f"layer_window.{drop}") if selection == "contiguous" else None
    return LayerChoice(
        select_layers(
            layer, keep, selection=selection, protect_first=protect_first, protect_last=protect_last, protect=protect, window_scores=windows
        )
    )


def read_merges(scores: ImportanceScores) -> list[tuple[int, list[int]]]:
    """The merges in a scores file, in order: (the layer that stays, those merged into it)."""
    rows = scores.of("layer_merges").long().tolist()
    return [(row[0], [index for index in row[1:] if index >= 0]) for row in rows]


def write_merges(merges: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
    """The inverse of :func:`read_merges`: one row a merge, filled up with -1."""
    width = max((len(merged) for _, merged in merges), default=1)
    rows = [[kept, *merged, *[-1] * (width - len(merged))] for kept, merged in merges]
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), width + 1)


def merges_for(scores: ImportanceScores, kept: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The merges by which exactly these layers remain; none where the layers were dropped instead."""
    if "layer_merges" not in scores.tensors:
        return []
    gone: set[int] = set()
    merges = read_merges(scores)
    wanted = set(range(len(scores.of("layer")))) - set(kept)
    for count, (_, merged) in enumerate(merges, start=1):
        gone |= set(merged)
        if gone == wanted:
            return merges[:count]
    return []


def reachable_layers(scores: ImportanceScores, numbers: Sequence[int], **options: Any) -> dict[int, tuple[int, ...]]:
    """The layers to keep for each number of them that :func:`choose_layers` can come to with these ``options``.

    Raises:
        ArchitectureError: it can come to none of the numbers.
    """
    found: dict[int, tuple[int, ...]] = {}
    refused: ArchitectureError | None = None
    for number in numbers:
        try:
            found[number] = tuple(choose_layers(scores, number, **options).kept)
        except ArchitectureError as error:
            refused = error
    if refused is not None and not found:
        raise refused
    return found
