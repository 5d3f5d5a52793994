"""Sparsity: which weights of a matrix are zero, and the file that says so beside a model's weights.

A sparse checkpoint is an ordinary dense folder with zeros and ``sparsity.json``. There are no mask files: the mask of a listed matrix is
``weight != 0``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron.core.manifest import write_text
from minitron.errors import CheckpointError, ConfigError

#: Beside the weights of a sparse model.
FILE = "sparsity.json"


@dataclass(frozen=True)
class Pattern:
    """Which weights are zero: a share ``ratio`` of them anywhere, or all but ``n`` of every ``m`` that follow each other along the input dimension.

    ``n`` and ``m`` are None for the first kind.
    """

    ratio: float
    n: int | None = None
    m: int | None = None

    @classmethod
    def parse(cls, text: str | float, *, where: str = "the pattern") -> Pattern:
        """A pattern from ``0.5`` (a share of zeros) or ``2:4`` (2 kept of every 4).

        Args:
            where: the option that the text came from, for the error.

        Raises:
            ConfigError: it is neither, the share is not between 0 and 1, or as many are kept as there are.
        """
        given = f"{where}={text}"
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if found:
            n, m = int(found.group(1)), int(found.group(2))
            if not 0 < n < m:
                raise ConfigError(f"{given} keeps {n} of every {m} weights: N of N:M must be at least 1 and below M, as in 2:4")
            return cls(1.0 - n / m, n, m)
        try:
            ratio = float(text)
        except ValueError:
            raise ConfigError(f"{given} is no pattern: give a share of zeros such as 0.5, or N:M such as 2:4") from None
        if not 0.0 < ratio < 1.0:
            raise ConfigError(f"{given} is no share of zeros: give a number between 0 and 1, or N:M such as 2:4")
        return cls(ratio)

    def __str__(self) -> str:
        return f"{self.ratio:g}" if self.m is None else f"{self.n}:{self.m}"

    def check_width(self, name: str, width: int) -> None:
        """Refuse a matrix whose input dimension is no multiple of M.

        Raises:
            ConfigError: it is none; the sentence names the matrix.
        """
        if self.m is not None and width % self.m:
            raise ConfigError(
                f"'{name}' has {width} inputs, which {self} cannot divide into groups of {self.m}: leave it dense, or give another pattern"
            )


#: Up to this many of a group its members are compared with each other, above they are sorted: 1536 × 576 weights in groups of 4 take 3 ms on one
#: core compared and 22 ms sorted, in groups of 8 it is 7 and 23.
_COMPARED = 16


def num_kept(ratio: float, width: int) -> int:
    """How many of ``width`` weights stay where a share is zero: the zeros are rounded down."""
    return width - int(ratio * width + 1e-9)


def largest(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask, bool, of what a pattern keeps: the largest of every row, or of every group of M in a row. Of equal scores the first stay.

    Args:
        scores: [..., rows, columns]; the columns are the inputs. Without groups ``floor(ratio · columns)`` of a row go.
    """
    if pattern.m is None or pattern.n is None:
        return above(scores, row_bounds(scores, num_kept(pattern.ratio, scores.shape[-1])))
    return largest_of_groups(scores, pattern.n, pattern.m)


def largest_of_groups(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The mask of the ``n`` largest of every ``m`` scores that follow each other in the last dimension."""
    groups = scores.unflatten(-1, (-1, m))
    if m > _COMPARED:
        return above(groups, row_bounds(groups, n)).view(scores.shape)
    members = groups.unbind(-1)
    kept = []
    for i, mine in enumerate(members):
        num_larger = torch.zeros_like(mine, dtype=torch.int8)
        for j, other in enumerate(members):
            if i != j:
                num_larger += (other >= mine) if j < i else (other > mine)
        kept.append(num_larger < n)
    return torch.stack(kept, -1).view(scores.shape)


def row_bounds(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What tells the ``count`` largest of every row from the rest: their smallest, and the column before which its equals stay.

    Both are [..., rows, 1].
    """
    if count == 0:
        shape = (*scores.shape[:-1], 1)
        return scores.new_full(shape, float("inf")), torch.zeros(shape, dtype=torch.int64, device=scores.device)
    bound = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    equal = scores == bound
    missing = count - (scores > bound).sum(-1, keepdim=True)
    columns = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    return bound, (columns * (equal & (equal.cumsum(-1) <= missing))).amax(-1, keepdim=True)


def above(scores: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mask of what lies above the bounds of its row."""
    bound, before = bounds
    columns = torch.arange(scores.shape[-1], device=scores.device)
    return (scores > bound) | ((scores == bound) & (columns < before))


def share_of_zeros(weight: torch.Tensor) -> float:
    """How much of a tensor is zero, from 0 to 1."""
    return 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())


def keeps_groups(weight: torch.Tensor, pattern: Pattern) -> bool:
    """Whether no group of M has more than N weights that are not zero; true of every tensor where the pattern has no groups."""
    if pattern.m is None or pattern.n is None:
        return True
    if weight.shape[-1] % pattern.m:
        return False
    return int((weight.unflatten(-1, (-1, pattern.m)) != 0).sum(-1).max()) <= pattern.n


@dataclass(frozen=True)
class SparsityRecord:
    """The content of ``sparsity.json``.

    ``method`` made the zeros after ``pattern``; ``matrices`` has the share of zeros of every sparse matrix by its name in memory;
    ``recovered`` is the share of their weights that was put back beside the pattern.
    """

    method: str
    pattern: str
    matrices: dict[str, float] = field(default_factory=dict)
    recovered: float = 0.0

    def save(self, folder: Path) -> None:
        """Write ``sparsity.json`` into a folder, atomically."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> SparsityRecord | None:
        """The record of a folder; None where there is none, as of a dense model.

        Raises:
            CheckpointError: the file is damaged or not of this kind.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            record = cls(**json.loads(path.read_text()))
            _check(record)
        except (OSError, ValueError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{path} is damaged or of another kind: {error}") from error
        return record

    @property
    def grouped(self) -> Pattern | None:
        """The N:M pattern that every listed matrix keeps; None where there are no groups, or weights were put back beside them."""
        pattern = Pattern.parse(self.pattern)
        return pattern if pattern.m is not None and not self.recovered else None

    def of(self, weights: Mapping[str, torch.Tensor]) -> SparsityRecord:
        """The same with the shares of zeros counted anew in the given matrices."""
        return SparsityRecord(self.method, self.pattern, {name: share_of_zeros(weight) for name, weight in weights.items()}, self.recovered)


def _check(record: SparsityRecord) -> None:
    """Raise ValueError or ConfigError for values of a wrong type or out of range."""

    def share(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0

    if not isinstance(record.method, str) or not isinstance(record.pattern, str) or not isinstance(record.matrices, dict):
        raise ValueError("method and pattern must be text, matrices an object")
    Pattern.parse(record.pattern)
    wrong = next((name for name, value in record.matrices.items() if not share(value)), None)
    if wrong is not None or not share(record.recovered):
        raise ValueError(f"{f'the share of {wrong!r}' if wrong is not None else 'recovered'} is not a number from 0 to 1")
