"""Rank the candidates by a short distillation each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.core.candidate import Candidate
from minitron.core.manifest import write_text
from minitron.core.options import relevant
from minitron.distill.training import TrainingResult, TrainingRun
from minitron.engine import build_engine
from minitron.log import get_logger
from minitron.prune.proof import require_proof
from minitron.search.ranking import rank_candidates
from minitron.stages.context import StageContext, blocks_of
from minitron.stages.cut import cut_in_memory, plan_for
from minitron.stages.states import teacher_taps
from minitron.stages.teachers import place_teachers, teacher_inputs
from minitron.tracking import CompositeTracker

FOLDER = "ranking"
SECTIONS = ("teacher", "data", "depth", "prune", "ranking", "training", "loss", "engine", "tracking")
HELP = "train every candidate for a few steps on the same batches and rank them by held-out loss"

logger = get_logger(__name__)


def inputs(context: StageContext) -> dict[str, Any]:
    """Teachers, scores, candidates and text."""
    return {
        **teacher_inputs(context),
        "scores": context.run_dir / "scores",
        "candidates": context.run_dir / "candidates",
        "data": context.data_fingerprint(),
    }


def effective(context: StageContext) -> dict[str, Any]:
    """The training settings that ranking really uses: a longer distillation does not undo a ranking."""
    ranking = context.sections.ranking
    return {
        "training": relevant(ranking.training(context.sections.training)),
        "ranking": {"num_validation_sequences": ranking.num_validation_sequences},
    }


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write ``ranking.json``, best first."""
    candidates = context.candidates()
    if len(candidates) == 1:
        only = {"name": candidates[0].name, "num_parameters": candidates[0].num_parameters, "status": "ok", "reason": "the only candidate"}
        rows: list[dict[str, Any]] = [only | {"zero_shot_loss": None, "loss": None, "kl": None, "tokens": 0, "curve": []}]
    else:
        require_proof(context.teacher_config())
        rows = _train_all(context, candidates, out)
    if dist.is_main():
        write_text(out / "ranking.json", json.dumps({"candidates": rows}, indent=1))
    best = rows[0]
    if best["loss"] is not None:
        logger.info("  best: %s, held-out loss %.3f → %.3f", best["name"], best["zero_shot_loss"], best["loss"])
    return {"winner": best["name"], "tokens": sum(row["tokens"] for row in rows)}


def _train_all(context: StageContext, candidates: list[Candidate], out: Path) -> list[dict[str, Any]]:
    sections = context.sections
    training = sections.ranking.training(sections.training)
    taps = teacher_taps(context, [candidate.architecture for candidate in candidates])
    engine = build_engine(sections.engine, optimizer=training.optimizer_config(), precision=training.precision)
    (signal, _), *others = place_teachers(context, engine, taps=taps, remember_bytes=int(sections.ranking.remember_teacher_bytes))
    validation = context.held_out(training.num_validation_sequences)

    def train(candidate: Candidate) -> TrainingResult:
        plan = plan_for(context, candidate)
        student = cut_in_memory(context, plan, dtype=torch.float32)
        return TrainingRun(
            student=student,
            teacher=None,
            signal=signal,
            other_signals=others,
            stream=context.text().stream(),
            validation=validation,
            sequence_length=sections.data.sequence_length,
            training=training,
            loss=sections.loss,
            engine=sections.engine,
            blocks_of=blocks_of,
            open_tracker=lambda step: CompositeTracker([]),
            what=f"rank {candidate.name}",
            stop=context.stop,
            seed=context.seed,
            kept_hidden=plan.hidden,
        ).run()

    return rank_candidates(candidates, train, folder=out)
