"""Section ``training`` and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from minitron.core.options import option
from minitron.data.config import DataConfig, SourceConfig, changed_sources, source_configs
from minitron.distill.masks import check_mask_options
from minitron.distill.phases import Phase, check_phases, phase_table
from minitron.distill.profile import check_profile
from minitron.distill.schedules import DECAYS, SCHEDULES, Schedule
from minitron.engine import OptimizerConfig
from minitron.errors import ConfigError, nearest

RESULTS = ("last", "best")
ON_SPIKE = ("warn", "go_back")


@dataclass(frozen=True)
class TrainingConfig:
    """Section ``training``."""

    num_steps: int | None = option(None, "optimiser steps; or give num_tokens")
    num_tokens: float | None = option(None, "token budget, e.g. 94e9; used when num_steps is not given")
    batch_size: int = option(64, "sequences per optimiser step over all ranks")
    micro_batch_size: int | None = option(None, "sequences per forward on a rank; null: as many as make 4096 tokens", recorded=True)
    learning_rate: float = option(1e-4, "peak learning rate")
    min_learning_rate: float = option(0.0, "learning rate at the end")
    num_warmup_steps: int = option(0, "steps of linear warm-up")
    schedule: str = option("cosine", "cosine, linear, constant, or wsd: warm-up, stable, decay")
    decay_fraction: float = option(0.2, "wsd: share of all steps that decay, at the end")
    decay_shape: str = option("sqrt", "wsd: linear, cosine or sqrt (1 - sqrt of the decay's progress)")
    optimizer: str = option("adamw", "adamw, lion, muon or sgd")
    weight_decay: float = option(0.0, "decay of matrices")
    beta1: float = option(0.9, "decay of the first moment; sgd and muon: momentum")
    beta2: float = option(0.95, "decay of the second moment; lion: of its only one")
    gradient_clipping: float = option(1.0, "largest gradient norm; 0 turns clipping off")
    precision: str = option("auto", "auto (bf16 where it is fast), float32 or bf16")
    log_every: int = option(1, "steps between metric lines", recorded=True)
    evaluate_every: int = option(0, "steps between validations; 0: only at the end", recorded=True)
    num_validation_sequences: int = option(16, "held-out sequences of each validation", recorded=True)
    checkpoint_every: int = option(100, "steps between checkpoints; 0: none", recorded=True)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", recorded=True)
    keep_every: int = option(0, "steps between checkpoints that are kept for good; 0: none are", recorded=True)
    max_skipped_steps: int = option(
        10, "steps in a row whose gradients are not finite, and which change nothing, before training goes back to a checkpoint once", recorded=True
    )
    spike_deviations: float = option(
        10.0, "robust standard deviations above the last 64 losses that make a loss a spike; 0: nobody looks", recorded=True
    )
    on_spike: str = option("warn", "warn, or go_back: to the last checkpoint, and on behind the data at fault, once")
    keep_best: bool = option(
        False, "keep the weights of the best validation (by the divergence from a teacher, else by loss) in best/", recorded=True
    )
    profile: list[int] | None = option(None, "[first, last] steps to trace on rank 0 (profile/ in the stage's folder)", recorded=True)
    result: str = option("last", "the weights that training hands on: last, or best")
    sparse: str | None = option(
        None, "zeros of a sparse student: keep, refresh (SR-STE), gradual (their share grows) or free; null: keep where there is a sparsity.json"
    )
    sparse_pattern: str | None = option(None, "refresh, gradual: 0.5 or 2:4, say; null: that of the student's sparsity.json")
    sparse_steps: int | None = option(None, "gradual: steps after which the pattern is reached; null: three quarters of all")
    sparse_decay: float | None = option(None, "refresh: decay of weights that are not used; null: 2e-4")
    phases: list[dict[str, Any]] | None = option(
        None, "changes at token counts, in order: list of {at_tokens, data, sequence_length, batch_size}; data as in the section data"
    )

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: no budget, a size or rate out of range, an unknown schedule or precision.
        """
        if self.num_steps is None and self.num_tokens is None:
            raise ConfigError("training has no budget: give training.num_steps or training.num_tokens")
        positive = {
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
        }
        positive |= {"learning_rate": self.learning_rate, "log_every": self.log_every, "keep_checkpoints": self.keep_checkpoints}
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise ConfigError(f"training.{name}={value} must be positive")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"training.schedule={self.schedule} is unknown; {nearest(self.schedule, SCHEDULES)}")
        if self.decay_shape not in DECAYS:
            raise ConfigError(f"training.decay_shape={self.decay_shape} is unknown; {nearest(self.decay_shape, DECAYS)}")
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise ConfigError(f"training.decay_fraction={self.decay_fraction} is not a share: give a number from 0 to 1")
        if self.result not in RESULTS:
            raise ConfigError(f"training.result={self.result} is not one of {', '.join(RESULTS)}")
        if self.on_spike not in ON_SPIKE:
            raise ConfigError(f"training.on_spike={self.on_spike} is not one of {', '.join(ON_SPIKE)}")
        for name in ("keep_every", "max_skipped_steps", "spike_deviations"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name}={getattr(self, name)} must be 0 or more")
        if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
            raise ConfigError(f"training.keep_every={self.keep_every} is no multiple of training.checkpoint_every={self.checkpoint_every}")
        check_mask_options(
            self.sparse,
            pattern=self.sparse_pattern,
            steps=self.sparse_steps,
            decay=self.sparse_decay,
            optimizer=self.optimizer,
            keeps_best=self.keeps_best,
            num_steps=self.num_steps,
        )
        check_profile(self.profile)
        check_phases(self.phases or ())
        if self.precision not in ("auto", "float32", "bf16"):
            raise ConfigError(f"training.precision={self.precision} is not one of auto, float32, bf16")

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best validation are kept at all."""
        return self.keep_best or self.result == "best"

    def phase_table(self, sequence_length: int) -> tuple[Phase, ...]:
        """The stretches of steps of one shape; a single one without ``phases``. ``sequence_length`` is that of the first.

        Raises:
            ConfigError: a phase that is over before it has begun.
        """
        return phase_table(
            self.phases or (), batch_size=self.batch_size, sequence_length=sequence_length, num_steps=self.num_steps, num_tokens=self.num_tokens
        )

    def steps(self, sequence_length: int) -> int:
        """Optimiser steps, given or from the token budget."""
        return sum(phase.num_steps for phase in self.phase_table(sequence_length))

    def tokens(self, sequence_length: int) -> int:
        """Tokens drawn in all steps over all ranks."""
        return sum(phase.num_tokens for phase in self.phase_table(sequence_length))

    def micro_batch(self, sequence_length: int, *, first_length: int | None = None) -> int:
        """Sequences per forward; in a phase of another length than the first as many as make equally many tokens."""
        given = self.micro_batch_size
        if given and first_length:
            return max(1, given * first_length // sequence_length)
        return given or max(1, 4096 // sequence_length)

    def optimizer_config(self) -> OptimizerConfig:
        """The optimiser's share of the settings."""
        return OptimizerConfig(self.optimizer, self.beta1, self.beta2, 1e-8, self.weight_decay, self.gradient_clipping)

    def learning_rates(self, num_steps: int) -> Schedule:
        """The schedule over a number of steps."""
        warmup = min(self.num_warmup_steps, num_steps)
        return Schedule(self.learning_rate, self.min_learning_rate, warmup, num_steps, self.schedule, self.decay_fraction, self.decay_shape)


@dataclass(frozen=True)
class CorrectConfig:
    """Section ``correct``: teacher correction, fine-tuning on the distillation data first. What is not given follows ``training``, but its phases."""

    num_steps: int | None = option(None, "optimiser steps; or give num_tokens")
    num_tokens: float | None = option(None, "token budget")
    learning_rate: float = option(2e-5, "peak learning rate")
    min_learning_rate: float = option(0.0, "learning rate at the end")
    num_warmup_steps: int = option(0, "steps of linear warm-up")
    prune_from: str = option("corrected", "what is scored and cut: corrected or original; distillation uses the corrected teacher either way")

    def training(self, base: TrainingConfig) -> TrainingConfig:
        """The training settings of the correction.

        Raises:
            ConfigError: an unknown ``prune_from``.
        """
        if self.prune_from not in ("corrected", "original"):
            raise ConfigError(f"correct.prune_from={self.prune_from} is not one of corrected, original")
        return replace(
            base,
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            learning_rate=self.learning_rate,
            min_learning_rate=self.min_learning_rate,
            num_warmup_steps=self.num_warmup_steps,
            phases=None,
        )


def later_blends(training: TrainingConfig, data: DataConfig) -> tuple[tuple[SourceConfig, ...], ...]:
    """The sources of every phase after the first; a phase without ``data`` keeps those of the one before.

    Raises:
        ConfigError: a phase names no text, or a wrong one.
    """
    blends: list[tuple[SourceConfig, ...]] = []
    for number, entry in enumerate(training.phases or ()):
        before = blends[-1] if blends else source_configs(data)
        changed = changed_sources(data, entry["data"], where=f"training.phases[{number}].data") if "data" in entry else before
        blends.append(changed)
    return tuple(blends)
