"""Train the pruned model to follow the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.options import option
from minitron.distill.losses import build_losses, state_terms
from minitron.distill.settings import later_blends
from minitron.stages.cached import cache_inputs
from minitron.stages.context import StageContext
from minitron.stages.teachers import teacher_inputs
from minitron.stages.training_stage import train_folder

FOLDER = "student"
SECTIONS = ("teacher", "student", "cache", "data", "training", "loss", "on_policy", "engine", "tracking")
HELP = "distil the pruned model back to quality"


@dataclass(frozen=True)
class StudentConfig:
    """Section ``student``."""

    path: str | None = option(None, "a pruned model made elsewhere; null: the winner in this run's pruned/", recorded=True)


def inputs(context: StageContext) -> dict[str, Any]:
    """The sparse or pruned model, the text, and the teachers (or what is stored of them) when a loss needs them."""
    later = later_blends(context.sections.training, context.sections.data)
    sparse = context.sparse_folder()
    start = {"sparse": sparse} if sparse else {"pruned": context.pruned_folder()}
    found: dict[str, Any] = {**start, "data": context.data_fingerprint(later)}
    if _needs_teacher(context):
        found |= cache_inputs(context) if context.sections.teacher.placement == "cached" else teacher_inputs(context)
    return found


def effective(context: StageContext) -> dict[str, Any]:
    """Nothing of ``cache``: what a cache holds is an input, and only where it is read."""
    return {"cache": {}}


def _needs_teacher(context: StageContext) -> bool:
    loss = context.sections.loss
    return bool(state_terms(loss)) or any(term.function.needs_teacher for term in build_losses(loss))


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write the student as a Hugging Face folder, with ``metrics.jsonl`` beside its weights."""
    sections = context.sections
    return train_folder(
        context,
        out,
        source=context.student_folder(),
        training=sections.training,
        loss=sections.loss,
        with_teacher=_needs_teacher(context),
        what="distill",
        on_policy=sections.on_policy,
    )
