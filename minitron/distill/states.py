"""The losses on intermediate states of one training: what they read of both models, and their weighted sum."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minitron.core.architecture import Architecture
from minitron.distill.losses import STATE_LOSSES, LossConfig, state_terms
from minitron.distill.losses.state import StateLoss, StateSetup
from minitron.models.family import discover
from minitron.models.states import Tap


def _member(name: str) -> type[StateLoss]:
    module, _, attribute = STATE_LOSSES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def state_taps(config: LossConfig, side: str, num_layers: int) -> list[Tap]:
    """The states that the losses of a section read of the ``teacher`` or the ``student``, each once; none without such losses.

    Raises:
        ConfigError: the layer map names a layer that the model does not have.
    """
    names = state_terms(config)
    if not names:
        return []
    layers = config.states.layers_of(side, num_layers)
    return list(dict.fromkeys(tap for name in names for tap in _member(name).taps(config.states, layers)))


def check_states(config: LossConfig, teacher: Architecture, student: Architecture) -> None:
    """Refuse losses on states that two shapes cannot have.

    Raises:
        ConfigError: a layer out of range, or a size that does not divide.
    """
    for side, shape in (("teacher", teacher), ("student", student)):
        state_taps(config, side, shape.num_layers)
    for name in state_terms(config):
        _member(name).check(StateSetup(config.states, teacher, student))


class StateLosses(nn.Module):
    """The losses on states of a section, with their trainable maps.

    Its parameters are trained and checkpointed with the student and are no part of it.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        teacher: Architecture,
        student: Architecture,
        kept_hidden: Sequence[int] | None = None,
        seed: int = 0,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_states(config, teacher, student)
        setup = StateSetup(config.states, teacher, student, kept_hidden, seed, compute_dtype)
        self.weights = state_terms(config)
        self.teacher_taps = state_taps(config, "teacher", teacher.num_layers)
        self.student_taps = state_taps(config, "student", student.num_layers)
        self._reads = {}
        for name in self.weights:
            sides = (("teacher", teacher, self.teacher_taps), ("student", student, self.student_taps))
            taps = [(_member(name).taps(config.states, config.states.layers_of(side, shape.num_layers)), known) for side, shape, known in sides]
            self._reads[name] = [[known.index(tap) for tap in wanted] for wanted, known in taps]
        self.members = nn.ModuleDict({name: _member(name)(setup) for name in self.weights})  # type: ignore[misc]

    def forward(
        self,
        teacher: Sequence[torch.Tensor],
        student: Sequence[torch.Tensor],
        valid: torch.Tensor,
        scale: torch.Tensor,
        alpha: torch.Tensor | None,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum (differentiable, 0-d float32) and the terms themselves (detached).

        Args:
            teacher, student: states in the order of ``teacher_taps`` and ``student_taps``, each [batch, sequence, width].
            valid: [batch, sequence], False for masked tokens.
            scale: [batch, sequence], what a token's loss counts: 1 / valid tokens of the whole optimiser step.
            alpha: 0-d, the dynamic weight.
            documents: [batch, sequence], equal within a document, where several share a row.
        """
        total = torch.zeros((), device=valid.device)
        terms: dict[str, torch.Tensor] = {}
        with torch.autocast(valid.device.type, enabled=False):
            for name, weight in self.weights.items():
                theirs, ours = self._reads[name]
                member: Any = self.members[name]
                more = {"documents": documents} if getattr(member, "relates_tokens", False) else {}
                value = member([teacher[i].detach() for i in theirs], [student[i] for i in ours], valid, scale, **more)
                terms[name] = value.detach()
                if weight is None:
                    assert alpha is not None
                    total = total + alpha * value
                else:
                    total = total + weight * value
        return total, terms

    def reads(self, member: nn.Module) -> list[list[int]]:
        """Which of the teacher's and of the student's taps a member reads."""
        return next(self._reads[name] for name, known in self.members.items() if known is member)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What the losses keep besides parameters, by name; equal on all ranks."""
        found: dict[str, torch.Tensor] = {}
        for name, member in self.members.items():
            state = member.extra_state() if hasattr(member, "extra_state") else {}  # type: ignore[operator]
            found |= {f"{name}/{key}": value for key, value in state.items()}
        return found

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of :meth:`extra_state`."""
        for name, member in self.members.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            if own:
                member.load_extra_state(own)  # type: ignore[operator]


def build_states(
    config: LossConfig, *, teacher: Any, student: Any, kept_hidden: Sequence[int] | None, seed: int, compute_dtype: torch.dtype
) -> StateLosses | None:
    """The losses on states of a section for two Hugging Face configs; None when it has none."""
    if not state_terms(config):
        return None
    shapes = {"teacher": discover(teacher).architecture, "student": discover(student).architecture}
    return StateLosses(config, **shapes, kept_hidden=kept_hidden, seed=seed, compute_dtype=compute_dtype)
