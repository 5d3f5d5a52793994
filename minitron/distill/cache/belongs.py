"""Whether a cache is of a run's teacher, tokenizer, text and training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.distill.cache.store import CacheHeader
from minitron.errors import CheckpointError

_AGAIN = "run 'minitron cache' with this run's settings, or give another cache.path"


@dataclass(frozen=True)
class Wanted:
    """What a run would store: see :class:`CacheHeader`. ``teacher_name`` and ``tokenizer_name`` say where they lie;
    ``dtype`` is what the teacher computes in, None where any will do."""

    teacher: str
    tokenizer: str
    data: str
    text: dict[str, Any]
    seed: int
    drawn: list[list[int]]
    num_validation: int
    teacher_name: str
    tokenizer_name: str
    dtype: str | None = None


def check_belongs(header: CacheHeader, wanted: Wanted, folder: Path) -> None:
    """Refuse a cache in a folder that is of something else, or holds too little.

    Raises:
        CheckpointError: the first thing that differs.
    """
    if header.tokenizer != wanted.tokenizer:
        raise CheckpointError(f"the cache {folder} was made with another tokenizer than that of {wanted.tokenizer_name}: {_AGAIN}")
    if header.teacher != wanted.teacher:
        raise CheckpointError(f"the cache {folder} was made by another teacher than {wanted.teacher_name}: {_AGAIN}")
    if wanted.dtype is not None and header.dtype != wanted.dtype:
        raise CheckpointError(f"the cache {folder} was made by a teacher in {header.dtype}, this run's is in {wanted.dtype}: {_AGAIN}")
    if header.data != wanted.data:
        raise CheckpointError(f"the cache {folder} was made of other text than this run's: {_AGAIN}")
    ours, theirs = {**wanted.text, "seed": wanted.seed}, {**header.text, "seed": header.seed}
    differing = [f"{name}: {theirs.get(name)} → {ours.get(name)}" for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if differing:
        raise CheckpointError(f"the cache {folder} cuts text in another way ({'; '.join(differing)}): {_AGAIN}")
    if not _covers(header.drawn, wanted.drawn):
        raise CheckpointError(f"the cache {folder} holds {_said(header.drawn)}, but training draws {_said(wanted.drawn)}: {_AGAIN}")
    if wanted.num_validation > header.num_validation:
        raise CheckpointError(
            f"the cache {folder} holds {header.num_validation} held-out sequences, but validation draws {wanted.num_validation}: {_AGAIN}"
        )


def _covers(cached: list[list[int]], drawn: list[list[int]]) -> bool:
    """Whether all that is drawn was stored: the same phases, of which the last one drawn may be shorter."""
    *before, (length, count) = drawn
    same = len(cached) >= len(drawn) and cached[: len(before)] == before
    return same and cached[len(before)][0] == length and cached[len(before)][1] >= count


def _said(drawn: list[list[int]]) -> str:
    return ", then ".join(f"{count} sequences of {length} tokens" for length, count in drawn)
