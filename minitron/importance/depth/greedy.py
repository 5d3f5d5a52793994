"""Removing layers one after another, the rest scored again after each removal (SLEB, arXiv 2402.09025, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Alive layers and the candidates among them → the loss without each candidate.
Score = Callable[[Sequence[int], Sequence[int]], dict[int, float]]


@dataclass
class Removal:
    """Layers in the order of their removal, the loss after each, and how often a candidate was scored.

    ``lazy_differs_at``: an exact order says at which removal (from 0) scoring only the likeliest would have first chosen otherwise; None if never.
    """

    order: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    num_scored: int = 0
    lazy_differs_at: int | None = None


def remove_greedily(first: dict[int, float], loss: float, score: Score, *, num_layers: int, count: int, num_rescored: int, lazy: bool) -> Removal:
    """Remove ``count`` layers.

    Exact: all candidates are scored in every round. Lazy: losses without a layer are read as increases over the loss of the model they were
    measured in. A layer is taken for harder to miss the fewer there are, so that an old increase bounds the new one from below; only the
    ``num_rescored`` smallest are scored again, and more until the smallest new one is below every old one. That assumption is a heuristic.

    Args:
        first: candidate → loss without it, in the whole model.
        loss: of the whole model.
    """
    done = Removal(num_scored=len(first))
    increases = {layer: value - loss for layer, value in first.items()}
    shadow = dict(increases)  # what the lazy way would know in an exact run
    alive = list(range(num_layers))
    for number in range(count):
        candidates = [layer for layer in alive if layer in first]
        if number == 0:
            fresh = dict(first)
        elif lazy:
            fresh = _rescore(increases, loss, lambda some: score(alive, some), num_rescored)  # noqa: B023 (used at once)
            done.num_scored += len(fresh)
        else:
            fresh = score(alive, candidates)
            done.num_scored += len(fresh)
            if done.lazy_differs_at is None:
                picked = _rescore(shadow, loss, lambda some: {layer: fresh[layer] for layer in some}, num_rescored)  # noqa: B023
                if _lowest(picked) != _lowest(fresh):
                    done.lazy_differs_at = number
        best = _lowest(fresh)
        for known in (increases, shadow):
            known.pop(best, None)
        loss = fresh[best]
        alive.remove(best)
        done.order.append(best)
        done.losses.append(loss)
    return done


def _rescore(increases: dict[int, float], loss: float, score: Callable[[list[int]], dict[int, float]], num_rescored: int) -> dict[int, float]:
    """New losses of the likeliest candidates; ``increases`` takes their new values."""
    queue = sorted(increases, key=lambda layer: (increases[layer], layer))
    fresh: dict[int, float] = {}
    while queue and (not fresh or min(fresh.values()) - loss > increases[queue[0]]):
        some, queue = queue[:num_rescored], queue[num_rescored:]
        found = score(some)
        fresh |= found
        increases |= {layer: value - loss for layer, value in found.items()}
    return fresh


def _lowest(losses: dict[int, float]) -> int:
    """The candidate with the lowest loss; ties go to the lower layer."""
    return min(losses, key=lambda layer: (losses[layer], layer))
