"""Teacher correction (arXiv 2408.11796): fine-tune the teacher on the distillation data first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron.core.options import relevant
from minitron.distill.losses import LossConfig
from minitron.stages.context import StageContext
from minitron.stages.training_stage import train_folder

FOLDER = "teacher"
SECTIONS = ("teacher", "data", "correct", "training", "engine", "tracking")
HELP = "fine-tune the teacher on the distillation data before anything else"


def inputs(context: StageContext) -> dict[str, Any]:
    """The teacher as it came, and the text."""
    return {"teacher": context.original_teacher(), "data": context.data_fingerprint()}


def effective(context: StageContext) -> dict[str, Any]:
    """The training settings that the correction really uses."""
    return {"training": relevant(context.sections.correct.training(context.sections.training))}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write the corrected teacher as a Hugging Face folder."""
    correct = context.sections.correct
    source = context.original_teacher()
    assert source is not None
    training = correct.training(context.sections.training)
    results = train_folder(context, out, source=source, training=training, loss=LossConfig(name="cross_entropy"), with_teacher=False, what="correct")
    return results | {"prune_from": correct.prune_from}
