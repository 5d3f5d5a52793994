"""A teacher's distribution at a few tokens: what a cache stores of it and what losses read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TopKTargets:
    """The likeliest tokens of every row, likeliest first, and the mass of all others; at temperature 1.

    ``ids`` [rows, k] int64, ``log_p`` [rows, k] and ``log_tail`` [rows] float32; ``num_tokens`` is the size of the vocabulary.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    log_tail: torch.Tensor
    num_tokens: int


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from the teacher: for any function f of a token, Σ ``weights`` · f(``ids``) is an unbiased estimate of Σ_v P_v f(v).

    ``ids`` [rows, slots] int64, ``weights`` and ``log_p`` (the teacher's log-probabilities, at temperature 1) [rows, slots] float32; a slot
    of weight 0 is not in use. ``num_tokens`` is the size of the vocabulary.
    """

    ids: torch.Tensor
    log_p: torch.Tensor
    weights: torch.Tensor
    num_tokens: int


SparseTargets = TopKTargets | SampledTargets


def with_tensors(targets: SparseTargets, change: Callable[[torch.Tensor], torch.Tensor]) -> SparseTargets:
    """The targets with every tensor changed alike: sliced, reshaped or moved."""
    values: dict[str, Any] = {field.name: getattr(targets, field.name) for field in dataclasses.fields(targets)}
    changed: Any = {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    return type(targets)(**changed)
