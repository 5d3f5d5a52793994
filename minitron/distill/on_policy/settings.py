"""Section ``on_policy``: how much of training is on text that the student writes."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.core.options import option
from minitron.distill.losses import LossConfig, build_losses
from minitron.errors import ConfigError, nearest

METHODS = ("gkd", "minillm")


@dataclass(frozen=True)
class OnPolicyConfig:
    """Section ``on_policy``."""

    fraction: float = option(0.0, "share of the optimiser steps whose sequences the student continues itself; 0: none")
    method: str = option("gkd", "gkd (the loss of section loss on sampled text) or minillm (reverse KL of whole sequences)")
    prompt_tokens: int = option(64, "tokens of each data sequence that are kept as the prompt")
    max_new_tokens: int = option(64, "tokens sampled after the prompt; what follows an end of text is ignored")
    temperature: float = option(1.0, "softens the distribution that is sampled from, not the loss")
    teacher_mix: float = option(0.2, "minillm: share of the teacher in the distribution that is sampled from")

    def check(self, *, loss: LossConfig, sequence_length: int, placement: str, num_teachers: int = 1) -> None:
        """Refuse what cannot work together, before any model is loaded; ``sequence_length`` is the shortest of all phases.

        Raises:
            ConfigError: a value out of range, sequences that do not fit, or a loss or placement that contradicts the method.
        """
        if not 0.0 <= self.fraction <= 1.0:
            raise ConfigError(f"on_policy.fraction={self.fraction} is not a share: give a number from 0 to 1")
        if self.fraction == 0.0:
            return
        if self.method not in METHODS:
            raise ConfigError(f"on_policy.method={self.method} is unknown; {nearest(self.method, METHODS)}")
        for name in ("prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"on_policy.{name}={getattr(self, name)} must be at least 1")
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"on_policy.temperature={self.temperature} must be positive")
        if not 0.0 <= self.teacher_mix < 1.0:
            raise ConfigError(
                f"on_policy.teacher_mix={self.teacher_mix} must be from 0 to below 1: "
                "the student's share keeps the importance weights at most 1 / (1 - teacher_mix)"
            )
        if self.prompt_tokens + self.max_new_tokens > sequence_length:
            raise ConfigError(
                f"on_policy.prompt_tokens={self.prompt_tokens} and on_policy.max_new_tokens={self.max_new_tokens} make "
                f"{self.prompt_tokens + self.max_new_tokens} tokens, more than the {sequence_length} of the shortest sequences: "
                "lower them or raise data.sequence_length"
            )
        if placement == "cached":
            raise ConfigError(
                "on_policy.fraction above 0 needs the teacher itself, because nothing is stored for text that does not exist yet: "
                "use teacher.placement=replicate, shard or offload instead of cached"
            )
        if self.method == "minillm" and num_teachers > 1:
            raise ConfigError(f"on_policy.method=minillm follows one teacher, and {num_teachers} are given: use on_policy.method=gkd or one teacher")
        self._check_loss(loss)

    def _check_loss(self, loss: LossConfig) -> None:
        on_logits = {term.name: term for term in build_losses(loss) if term.weight > 0}
        names = {name for name, weight in (loss.terms or {loss.name: 1.0}).items() if weight != 0}
        if not any(term.function.needs_teacher for term in on_logits.values()):
            raise ConfigError(
                f"on_policy.fraction={self.fraction} without a loss on logits that compares with the teacher, only {' and '.join(sorted(names))}, "
                "would teach the student to repeat itself: add one, e.g. loss=reverse_kl"
            )
        if self.method != "minillm":
            return
        if "reverse_kl" not in names or names - {"reverse_kl", "cross_entropy"}:
            raise ConfigError(
                f"on_policy.method=minillm is the reverse KL divergence of whole sequences, and the losses are {' and '.join(sorted(names))}: "
                "use loss=reverse_kl, perhaps with cross_entropy, which then applies to the data's own text"
            )
        if loss.temperature != 1.0:
            raise ConfigError(f"on_policy.method=minillm weighs samples at temperature 1, and loss.temperature={loss.temperature}: set it to 1")


#: No text of the student's own.
OFF = OnPolicyConfig()
