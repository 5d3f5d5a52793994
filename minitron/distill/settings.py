"""Section ``training`` and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from minitron.core.options import option
from minitron.engine import OptimizerConfig
from minitron.engine.optimizer import Schedule
from minitron.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant")


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
    schedule: str = option("cosine", "cosine, linear or constant")
    weight_decay: float = option(0.0, "AdamW's decay of matrices")
    beta1: float = option(0.9, "AdamW's first moment decay")
    beta2: float = option(0.95, "AdamW's second moment decay")
    gradient_clipping: float = option(1.0, "largest gradient norm; 0 turns clipping off")
    precision: str = option("auto", "auto (bf16 where it is fast), float32 or bf16")
    log_every: int = option(1, "steps between metric lines", recorded=True)
    evaluate_every: int = option(0, "steps between validations; 0: only at the end", recorded=True)
    num_validation_sequences: int = option(16, "held-out sequences of each validation", recorded=True)
    checkpoint_every: int = option(100, "steps between checkpoints; 0: none", recorded=True)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", recorded=True)

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
            raise ConfigError(f"training.schedule={self.schedule} is not one of {', '.join(SCHEDULES)}")
        if self.precision not in ("auto", "float32", "bf16"):
            raise ConfigError(f"training.precision={self.precision} is not one of auto, float32, bf16")

    def steps(self, sequence_length: int) -> int:
        """Optimiser steps, given or from the token budget."""
        if self.num_steps is not None:
            return self.num_steps
        return max(1, math.ceil((self.num_tokens or 0) / (self.batch_size * sequence_length)))

    def micro_batch(self, sequence_length: int) -> int:
        """Sequences per forward."""
        return self.micro_batch_size or max(1, 4096 // sequence_length)

    def optimizer(self) -> OptimizerConfig:
        """AdamW's share of the settings."""
        return OptimizerConfig(self.beta1, self.beta2, 1e-8, self.weight_decay, self.gradient_clipping)

    def learning_rates(self, num_steps: int) -> Schedule:
        """The schedule over a number of steps."""
        return Schedule(self.learning_rate, self.min_learning_rate, min(self.num_warmup_steps, num_steps), num_steps, self.schedule)


@dataclass(frozen=True)
class CorrectConfig:
    """Section ``correct``: teacher correction, fine-tuning on the distillation data first. What is not given follows ``training``."""

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
        )
