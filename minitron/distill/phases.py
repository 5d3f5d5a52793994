"""Phases of one training: other text, sequence length or batch size from a token count on, with one optimiser and one schedule.

Phase 0 is what the sections ``data`` and ``training`` say; each entry of ``training.phases`` changes a part of the phase before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron.data import GlobalBatches
from minitron.errors import ConfigError, nearest

_KEYS = ("at_tokens", "data", "sequence_length", "batch_size")


@dataclass(frozen=True)
class Phase:
    """A stretch of optimiser steps of one shape. ``data`` names its text; None: that of the section ``data``."""

    first_step: int
    num_steps: int
    batch_size: int
    sequence_length: int
    data: dict[str, Any] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens drawn in this phase over all ranks."""
        return self.num_steps * self.batch_size * self.sequence_length


def check_phases(entries: Sequence[Any]) -> None:
    """Refuse entries that cannot work, whatever the budget.

    Raises:
        ConfigError: an unknown key, a value out of range, token counts that do not ascend, or an entry that changes nothing.
    """
    before = 0.0
    for number, entry in enumerate(entries):
        where = f"training.phases[{number}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}={entry!r} is no mapping: give {{at_tokens: …, data: …, sequence_length: …, batch_size: …}}")
        for key in entry:
            if key not in _KEYS:
                raise ConfigError(f"{where} has no key '{key}'; {nearest(str(key), _KEYS)}")
        if set(entry) <= {"at_tokens"}:
            raise ConfigError(f"{where} changes nothing: give it data, sequence_length or batch_size")
        at = entry.get("at_tokens")
        if isinstance(at, bool) or not isinstance(at, int | float) or not before < at < math.inf:
            raise ConfigError(f"{where}.at_tokens={at!r} must be a number of tokens above {before:g}, where the phase before it begins")
        before = at
        for key in ("sequence_length", "batch_size"):
            value = entry.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{where}.{key}={value!r} must be a whole number of at least 1")
        if not isinstance(entry.get("data", {}), dict):
            raise ConfigError(f"{where}.data={entry['data']!r} is no mapping: give {{path: …}}, {{name: …}} or {{sources: […]}}")


def phase_table(
    entries: Sequence[dict[str, Any]], *, batch_size: int, sequence_length: int, num_steps: int | None, num_tokens: float | None
) -> tuple[Phase, ...]:
    """The phases of a budget in steps or tokens. A phase begins with the first step at which its ``at_tokens`` have been drawn.

    Tokens are drawn ones, sequences × length; the last token of a sequence predicts nothing and counts all the same.

    Raises:
        ConfigError: as ``check_phases``, or a phase that is over before it has begun.
    """
    check_phases(entries)
    shapes: list[dict[str, Any]] = [{"batch_size": batch_size, "sequence_length": sequence_length, "data": None}]
    for entry in entries:
        shapes.append(shapes[-1] | {key: value for key, value in entry.items() if key != "at_tokens"})
    phases: list[Phase] = []
    first, drawn = 0, 0
    for number, shape in enumerate(shapes):
        each = shape["batch_size"] * shape["sequence_length"]
        if number < len(entries):
            steps = math.ceil((entries[number]["at_tokens"] - drawn) / each)
        else:
            steps = num_steps - first if num_steps is not None else math.ceil(((num_tokens or 0) - drawn) / each)
            steps = steps if entries else max(1, steps)
        if steps < 1:
            budget = f"the budget of {num_steps} steps" if num_steps is not None else f"the budget of {num_tokens or 0:g} tokens"
            end = budget if number == len(entries) else f"the next phase at {entries[number]['at_tokens']:g} tokens"
            raise ConfigError(
                f"training.phases[{number - 1}] would begin at step {first} with {drawn} tokens drawn, which leaves no step before {end}"
            )
        phases.append(Phase(first, steps, **shape))
        first, drawn = first + steps, drawn + steps * each
    return tuple(phases)


class PhasedBatches:
    """The batches of one phase after another; where one ends the next goes on at the same place in the text."""

    def __init__(self, phases: Sequence[Phase], parts: Sequence[GlobalBatches]) -> None:
        """``parts`` are each phase's batches, over streams of the same sources."""
        self._phases, self._parts = phases, parts
        self._step = self._current = 0

    def next(self) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the next step."""
        phase = self._phases[self._current]
        if self._step == phase.first_step + phase.num_steps and self._current + 1 < len(self._parts):
            self._current += 1
            self._parts[self._current].load_state_dict(self._parts[self._current - 1].state_dict())
        self._step += 1
        return self._parts[self._current].next()

    def state_dict(self) -> dict[str, Any]:
        """Steps drawn, the phase, and where its stream stands; plain JSON and equal on every rank."""
        return {"step": self._step, "phase": self._current, **self._parts[self._current].state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch after the one the state was taken at."""
        self._step, self._current = int(state["step"]), int(state["phase"])
        self._parts[self._current].load_state_dict(state)


def phase_at(phases: Sequence[Phase], step: int) -> int:
    """The number of the phase that finished step ``step`` (counted from 1) belongs to; 0 before the first."""
    return max(number for number, phase in enumerate(phases) if number == 0 or phase.first_step < step)
