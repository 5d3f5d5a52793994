"""What losses on intermediate states share: their section, what they are built from, and how masked tokens are kept out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from minitron.core.architecture import Architecture
from minitron.core.options import option
from minitron.errors import ConfigError, nearest
from minitron.models.states import Tap

DISTANCES = ("cosine", "mse", "smooth_l1")


@dataclass(frozen=True)
class StatesConfig:
    """Options ``loss.states``: of the losses on intermediate states and of the dynamic weight."""

    layers: list[list[int]] | None = option(None, "pairs [teacher layer, student layer], from 0; null: the last but two of both")
    embedding: bool = option(False, "hidden_states: also the embedding's output")
    post_norm: bool = option(True, "take a state after the norm that follows it")
    distance: str = option("cosine", "hidden_states: cosine, mse or smooth_l1")
    relation_heads: int = option(16, "attention_relation: parts into which queries, keys and values of both models are split")
    filter_width: int | None = option(None, "task_aware_filters: outputs of a filter; null: the teacher's hidden size")
    filter_steps: int = option(100, "task_aware_filters: optimiser steps that train the filters before the student")
    filter_learning_rate: float = option(1e-3, "task_aware_filters: learning rate of these steps")
    alpha_min: float = option(0.0, "least dynamic weight")
    alpha_max: float = option(1000.0, "largest dynamic weight, for when the states agree better than the logits")

    def check(self) -> None:
        """Refuse what no model can meet.

        Raises:
            ConfigError: an unknown distance, a size or limit out of range, a layer map that is none.
        """
        if self.distance not in DISTANCES:
            raise ConfigError(f"loss.states.distance={self.distance} is unknown; {nearest(self.distance, DISTANCES)}")
        for name in ("relation_heads", "filter_width", "filter_learning_rate", "alpha_max"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"loss.states.{name}={value} must be positive")
        if self.filter_steps < 0:
            raise ConfigError(f"loss.states.filter_steps={self.filter_steps} must not be negative")
        if not 0 <= self.alpha_min <= self.alpha_max:
            raise ConfigError(f"loss.states.alpha_min={self.alpha_min} must lie between 0 and loss.states.alpha_max={self.alpha_max}")
        if self.layers is not None:
            wrong = next((pair for pair in self.layers if len(pair) != 2 or min(pair) < 0), None)
            if not self.layers or wrong is not None:
                raise ConfigError(f"loss.states.layers={wrong or self.layers} must hold pairs [teacher layer, student layer], counted from 0")

    def layers_of(self, side: str, num_layers: int) -> list[int]:
        """The mapped layers of the ``teacher`` or the ``student``.

        Without a map, the last but two of both: block 29 of 32 to block 13 of 16, the best single pair after cutting depth
        (Minitron, arXiv 2407.14679, Table 17).

        Raises:
            ConfigError: the map names a layer that the model does not have.
        """
        if self.layers is None:
            return [max(0, num_layers - 3)]
        found = [pair[side == "student"] for pair in self.layers]
        if max(found) >= num_layers:
            raise ConfigError(f"loss.states.layers names layer {max(found)} of the {side}, which has the layers 0 to {num_layers - 1}")
        return found


@dataclass(frozen=True)
class StateSetup:
    """What a state loss is built from. ``kept_hidden`` are the teacher's channels that the student has kept, in order, where known."""

    config: StatesConfig
    teacher: Architecture
    student: Architecture
    kept_hidden: Sequence[int] | None = None
    seed: int = 0
    compute_dtype: torch.dtype = torch.float32


class StateLoss(Protocol):
    """A loss on states, a module whose parameters are trained with the student.

    ``taps(config, layers)`` says what it reads at the mapped layers of a side, in an order that pairs teacher and student;
    ``check(setup)`` refuses shapes that it cannot work on.
    """

    @staticmethod
    def taps(config: StatesConfig, layers: Sequence[int]) -> list[Tap]:
        """The states it reads."""

    @staticmethod
    def check(setup: StateSetup) -> None:
        """Raises ConfigError for shapes that it cannot work on."""

    def __init__(self, setup: StateSetup) -> None: ...

    def __call__(self, teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor], valid: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Σ over valid tokens of ``scale`` times the token's loss, 0-d float32.

        States are [batch, sequence, width], ``valid`` and ``scale`` [batch, sequence]. A token that is not valid counts for nothing,
        whatever its states and its scale.
        """


def only_valid(states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """States with zeros for masked tokens, which may hold inf or NaN; zeros also in the gradient."""
    return torch.where(valid[..., None], states, 0.0)


def weighted_sum(values: torch.Tensor, valid: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Σ over valid tokens of ``scale`` · ``values``, all three [batch, sequence]."""
    return torch.where(valid, values * scale, 0.0).sum()


def lift(states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``states @ weight.T`` in a compute dtype, as float32."""
    return nn.functional.linear(states.to(dtype), weight.to(dtype)).float()


def lifting_matrix(rows: int, columns: int, kept: Sequence[int] | None, *, seed: int) -> torch.Tensor:
    """A first map from student to teacher width [rows, columns].

    Every student channel goes to the teacher's channel that it was cut from; without a plan the identity, or between different
    widths a random matrix with orthonormal columns (or rows).
    """
    if kept is not None and len(kept) == columns and max(kept) < rows:
        weight = torch.zeros(rows, columns)
        weight[torch.tensor(kept), torch.arange(columns)] = 1.0
        return weight
    if rows == columns:
        return torch.eye(rows)
    generator = torch.Generator().manual_seed(seed)
    return nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)
