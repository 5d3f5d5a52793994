"""Losses on logits and on intermediate states. One file a member, one row here.

A loss on logits is a row function that the chunked walk over the heads calls, or, where it has options, a frozen dataclass of them
that can be called. A loss on states is a module (``state.StateLoss``).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch

from minitron.core.options import option
from minitron.core.protocols import RowLoss
from minitron.distill.losses.state import StatesConfig
from minitron.errors import ConfigError, nearest
from minitron.ops.kd_loss import WeightedRowLoss

#: Name → module and function. The conf file ``loss/<name>.yaml`` and the metric carry the same name.
LOSSES = {
    "forward_kl": "minitron.distill.losses.forward_kl:forward_kl",
    "cross_entropy": "minitron.distill.losses.cross_entropy:cross_entropy",
    "reverse_kl": "minitron.distill.losses.reverse_kl:reverse_kl",
    "jsd": "minitron.distill.losses.jsd:GeneralisedJSD",
    "skewed_kl": "minitron.distill.losses.skewed_kl:SkewedKL",
    "tvd": "minitron.distill.losses.tvd:tvd",
    "mse": "minitron.distill.losses.mse:mse",
    "cosine": "minitron.distill.losses.cosine:cosine",
    "top_k": "minitron.distill.losses.top_k:TopK",
}
#: The same for losses on intermediate states, which stand beside one on logits.
STATE_LOSSES = {
    "hidden_states": "minitron.distill.losses.hidden_states:HiddenStates",
    "attention_relation": "minitron.distill.losses.attention_relation:AttentionRelation",
    "task_aware_filters": "minitron.distill.losses.task_aware_filters:TaskAwareFilters",
}
#: The weight of a loss on states that follows the losses on logits.
DYNAMIC = "dynamic"


@dataclass(frozen=True)
class LossConfig:
    """Section ``loss``."""

    name: str = option("forward_kl", "the loss when no mixture is given")
    terms: dict[str, float | str] | None = option(
        None, "a mixture, name → weight, e.g. {forward_kl: 1.0, cross_entropy: 0.1}; a loss on states may weigh 'dynamic'"
    )
    temperature: float = option(1.0, "softens both distributions; divergences carry its square in value and gradient")
    beta: float = option(0.5, "jsd: the teacher's share in the mixture; 0 is forward KL, 1 reverse KL")
    skew: float = option(0.1, "skewed_kl: the teacher's share in the mixture, from 0 up to but not including 1")
    k: int = option(100, "top_k: how many of the teacher's likeliest tokens stand for themselves; all others count as one")
    states: StatesConfig = option(StatesConfig(), "losses on intermediate states")


def build_losses(config: LossConfig) -> list[WeightedRowLoss]:
    """The weighted losses on logits of a section.

    Raises:
        ConfigError: an unknown name, a weight or temperature that is not positive, weights that sum to
            nothing, losses on states alone, or an option of a loss in use that is out of its range.
    """
    terms = config.terms if config.terms is not None else {config.name: 1.0}
    if config.temperature <= 0 or not math.isfinite(config.temperature):
        raise ConfigError(f"loss.temperature={config.temperature} must be positive")
    losses = []
    for name, weight in terms.items():
        if name not in LOSSES and name not in STATE_LOSSES:
            raise ConfigError(f"loss '{name}' is unknown; {nearest(name, [*LOSSES, *STATE_LOSSES])}")
        if weight == DYNAMIC and name in STATE_LOSSES:
            continue
        if not isinstance(weight, int | float) or weight < 0 or not math.isfinite(weight):
            words = f" or '{DYNAMIC}'" if name in STATE_LOSSES else ""
            raise ConfigError(f"loss.terms.{name}={weight} must be a number that is not negative{words}")
        if name in LOSSES:
            losses.append(WeightedRowLoss(name, float(weight), _row_function(LOSSES[name], config)))
    if not losses and terms:
        raise ConfigError(f"loss.terms={terms} has losses on states only: beside them one on logits is needed, e.g. forward_kl")
    if not sum(weight for weight in terms.values() if not isinstance(weight, str)) > 0:
        raise ConfigError(f"the weights in loss.terms={terms} sum to nothing")
    return losses


def state_terms(config: LossConfig) -> dict[str, float | None]:
    """The losses on states of a section and their weights, None for a dynamic one; all its words are checked.

    Raises:
        ConfigError: as :func:`build_losses`; a dynamic weight beside losses on logits that weigh nothing; an option out of range.
    """
    logits = build_losses(config)
    terms = config.terms or {}
    found = {name: None if isinstance(weight, str) else float(weight) for name, weight in terms.items() if name in STATE_LOSSES}
    if found:
        config.states.check()
    if None in found.values() and not any(loss.weight > 0 for loss in logits):
        raise ConfigError(f"loss.terms={terms}: a dynamic weight follows the losses on logits, and all of these weigh nothing")
    return found


def sparse_losses(losses: Sequence[WeightedRowLoss], signal: str) -> list[WeightedRowLoss]:
    """The losses as functions of stored targets of a kind (``top_k`` or ``samples``) in place of the teacher's logits.

    One that is not the same quantity then bears another name: ``forward_kl_top_k`` is taken over k + 1 outcomes, ``forward_kl_samples`` is
    an estimate. Losses that need no teacher stay as they are.

    Raises:
        ConfigError: a loss that cannot be told from such targets.
    """
    found = []
    for loss in losses:
        if not loss.function.needs_teacher:
            found.append(loss)
            continue
        if not told_by(loss.function, signal):
            able = [name for name in LOSSES if signal in getattr(_member(LOSSES[name]), "sparse_signals", ())]
            raise ConfigError(
                f"loss '{loss.name}' cannot be computed from cached {signal}: use {', '.join(able)} or cross_entropy, or cache.signal=hidden_states"
            )
        name = loss.name if getattr(loss.function, "sparse_is_exact", False) else f"{loss.name}_{signal}"
        found.append(replace(loss, name=name, function=cast(RowLoss, _Sparse(loss.function.from_sparse))))  # type: ignore[attr-defined]
    return found


def told_by(loss: RowLoss, signal: str) -> bool:
    """Whether a row loss can be computed from stored targets of a kind; members say so in ``sparse_signals``."""
    return not loss.needs_teacher or signal in getattr(loss, "sparse_signals", ())


@dataclass(frozen=True)
class _Sparse:
    """A function of sparse targets as a row loss that needs the teacher."""

    function: RowLoss
    needs_teacher: ClassVar[bool] = True

    def __call__(
        self, student_logits: torch.Tensor, teacher_logits: Any, labels: torch.Tensor, *, temperature: float, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.function(student_logits, teacher_logits, labels, temperature=temperature, gradient=gradient)


def _member(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _row_function(where: str, config: LossConfig) -> RowLoss:
    """A member as it is, or, where it is a dataclass, made of the options whose names its fields bear."""
    member = _member(where)
    if isinstance(member, type):
        member = member(**{field.name: getattr(config, field.name) for field in dataclasses.fields(member)})
    return cast(RowLoss, member)
