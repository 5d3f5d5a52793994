"""The dynamic weight of the losses on states (Minitron, arXiv 2407.14679, section 3: α = L_logits / L_is)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from minitron import dist
from minitron.distill.losses import LossConfig, build_losses, state_terms

if TYPE_CHECKING:
    from minitron.distill.loop import StepReport

_KEY = "alpha"


class DynamicWeight:
    """α for an optimiser step: the ratio of the last step's losses on logits (weighted) to its losses on states.

    Both are sums over all ranks and micro-batches, so that α does not depend on how a batch is split; it carries no gradient, is
    clamped, and stays on the device. A step whose ratio is not a number, or that has no valid token, leaves α as it was.
    """

    def __init__(self, logit_weights: Mapping[str, float], states: Sequence[str], *, minimum: float, maximum: float) -> None:
        self.value: torch.Tensor | None = None
        self._logits, self._states = dict(logit_weights), list(states)
        self._minimum, self._maximum = minimum, maximum

    def update(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's sums of a whole optimiser step: one collective of two numbers, no host synchronisation."""
        logits = torch.stack([weight * terms[name].float() for name, weight in self._logits.items()]).sum()
        states = torch.stack([terms[name].float() for name in self._states]).sum()
        both = dist.all_reduce_sum(torch.stack([logits, states]))
        ratio = (both[0] / both[1]).clamp(self._minimum, self._maximum)
        usable = both.isfinite().all() & (both[1] > 0)
        before = self.value if self.value is not None else torch.ones_like(ratio).clamp(self._minimum, self._maximum)
        self.value = torch.where(usable, ratio, before)

    def hook(self, report: StepReport) -> None:
        """After a step: report the weight that it was made with, and find the next one."""
        if self.value is not None:
            report.values[_KEY] = self.value
        self.update(report.terms)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weight of the next step."""
        return {_KEY: self.value} if self.value is not None else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse."""
        if _KEY in state:
            self.value = state[_KEY].to(dist.device())


def build_alpha(config: LossConfig) -> DynamicWeight | None:
    """The dynamic weight of a section, None when no loss on states has it.

    It follows the losses that compare logits with the teacher's, as in the paper, or where there is none all losses on logits.
    """
    states = [name for name, weight in state_terms(config).items() if weight is None]
    if not states:
        return None
    weighted = [loss for loss in build_losses(config) if loss.weight > 0]
    followed = [loss for loss in weighted if loss.function.needs_teacher] or weighted
    options = config.states
    return DynamicWeight({loss.name: loss.weight for loss in followed}, states, minimum=options.alpha_min, maximum=options.alpha_max)
