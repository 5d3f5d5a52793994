"""Ranking candidates by a short distillation each: every one sees the same tokens in the same order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.core.candidate import Candidate
from minitron.core.manifest import write_text
from minitron.core.options import option
from minitron.distill.settings import TrainingConfig
from minitron.distill.training import TrainingResult
from minitron.errors import Interrupted
from minitron.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class RankingConfig:
    """Section ``ranking``. What is not given here follows ``training``."""

    num_steps: int = option(400, "optimiser steps per candidate")
    learning_rate: float | None = option(None, "peak learning rate; null: as in training")
    batch_size: int | None = option(None, "sequences per step; null: as in training")
    num_warmup_steps: int | None = option(None, "warm-up steps; null: as in training")
    evaluate_every: int = option(50, "steps between validations", recorded=True)
    num_validation_sequences: int = option(32, "held-out sequences of each validation")
    remember_teacher_bytes: float = option(
        2e9, "teacher states of the shared batches kept in memory, so that candidates share its forwards", recorded=True
    )

    def training(self, base: TrainingConfig) -> TrainingConfig:
        """The training settings of one candidate."""
        given = {"learning_rate": self.learning_rate, "batch_size": self.batch_size, "num_warmup_steps": self.num_warmup_steps}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return replace(
            base,
            num_steps=self.num_steps,
            num_tokens=None,
            evaluate_every=self.evaluate_every,
            num_validation_sequences=self.num_validation_sequences,
            checkpoint_every=0,
            result="last",
            keep_best=False,
            phases=None,
            **changes,
        )


def rank_candidates(candidates: list[Candidate], train: Callable[[Candidate], TrainingResult], *, folder: Path) -> list[dict[str, Any]]:
    """Train every candidate and list the results best first, failed ones last.

    A result is written to ``folder`` as soon as it is there; results found there are taken over, so a killed search goes on.
    Running out of memory or diverging fails a candidate, with its reason, and not the rest.
    """
    results = []
    for number, candidate in enumerate(candidates, start=1):
        path = folder / f"{candidate.name}.json"
        known = dist.broadcast_object(json.loads(path.read_text()) if dist.is_main() and path.is_file() else None)
        if known is None:
            logger.info("  candidate %d of %d: %s (%s parameters)", number, len(candidates), candidate.name, f"{candidate.num_parameters:,}")
            known = _result(candidate, train)
            if dist.is_main():
                write_text(path, json.dumps(known))
        results.append(known)
    return sorted(results, key=lambda row: (row["status"] != "ok", row["loss"] if row["loss"] is not None else math.inf))


def _result(candidate: Candidate, train: Callable[[Candidate], TrainingResult]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": candidate.name, "num_parameters": candidate.num_parameters, "status": "ok", "reason": None}
    try:
        result = train(candidate)
    except Interrupted:
        raise
    except (RuntimeError, MemoryError) as error:  # torch reports exhausted memory as a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        return row | {
            "status": "failed",
            "reason": str(error).splitlines()[0],
            "zero_shot_loss": None,
            "loss": None,
            "kl": None,
            "tokens": 0,
            "curve": [],
        }
    first, last = result.curve[0], result.curve[-1]
    row |= {"zero_shot_loss": first["loss"], "loss": last["loss"], "kl": last["kl"], "tokens": result.tokens, "curve": result.curve}
    if not math.isfinite(last["loss"]):
        row |= {"status": "failed", "reason": "the loss is not finite", "loss": None, "kl": None}
    return row
