"""Train the pruned model to follow the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.options import option
from minitron.distill.losses import build_losses
from minitron.stages.context import StageContext
from minitron.stages.training_stage import train_folder

FOLDER = "student"
SECTIONS = ("teacher", "student", "data", "training", "loss", "engine", "tracking")
HELP = "distil the pruned model back to quality"


@dataclass(frozen=True)
class StudentConfig:
    """Section ``student``."""

    path: str | None = option(None, "a pruned model made elsewhere; null: the winner in this run's pruned/", recorded=True)


def inputs(context: StageContext) -> dict[str, Any]:
    """The pruned model, the text, and the teacher when a loss needs it."""
    found: dict[str, Any] = {"pruned": context.pruned_folder(), "data": context.data_fingerprint()}
    if _needs_teacher(context):
        found["teacher"] = context.teacher_folder()
    return found


def _needs_teacher(context: StageContext) -> bool:
    return any(loss.function.needs_teacher for loss in build_losses(context.sections.loss))


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write the student as a Hugging Face folder, with ``metrics.jsonl`` beside its weights."""
    sections = context.sections
    return train_folder(
        context,
        out,
        source=context.pruned_folder(),
        training=sections.training,
        loss=sections.loss,
        with_teacher=_needs_teacher(context),
        what="distill",
    )
