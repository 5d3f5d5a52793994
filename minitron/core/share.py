"""Which part of a tensor a rank keeps: a run of its numbers in row-major order, the form that every kind of sharding has in common.

FSDP2 cuts rows, ZeRO-1 and 2 cut a flat group of parameters anywhere, ZeRO-3 cuts every flat parameter into equal pieces. Of one parameter each
leaves a rank with one run of numbers, so that what one kind has saved any other can read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """A rank holds the numbers ``start`` to ``stop`` of a tensor of ``shape``. ``num_copies`` ranks hold the same ones, this as number ``copy``."""

    shape: tuple[int, ...]
    start: int
    stop: int
    copy: int = 0
    num_copies: int = 1

    @property
    def numel(self) -> int:
        """Numbers of the whole."""
        return math.prod(self.shape)

    @property
    def written(self) -> Span:
        """The numbers that this rank puts into a checkpoint: ranks that hold copies share the work out."""
        size = self.stop - self.start
        return self.start + size * self.copy // self.num_copies, self.start + size * (self.copy + 1) // self.num_copies


def whole(shape: Iterable[int], *, copy: int = 0, num_copies: int = 1) -> Share:
    """All of a tensor."""
    shape = tuple(shape)
    return Share(shape, 0, math.prod(shape), copy, num_copies)


def missing(span: Span, found: Iterable[Span]) -> list[Span]:
    """What is left of a span without the found ones, in order."""
    left = [span] if span[1] > span[0] else []
    for start, stop in found:
        pieces = [piece for a, b in left for piece in ((a, min(b, start)), (max(a, stop), b))]
        left = [(a, b) for a, b in pieces if b > a]
    return left
