"""What losses on intermediate states need to know of two models before their weights are loaded."""

from __future__ import annotations

from pathlib import Path

from minitron.core.architecture import Architecture
from minitron.core.plan import PrunePlan
from minitron.distill.losses import LossConfig, state_terms
from minitron.distill.states import check_states, state_taps
from minitron.errors import CheckpointError
from minitron.models import config_of, discover
from minitron.models.states import Tap
from minitron.stages.context import StageContext


def check_student_states(context: StageContext, loss: LossConfig, source: Path) -> None:
    """Refuse losses on states that the teacher and the student in a folder cannot have, from their configs.

    Raises:
        ConfigError: a layer out of range, or a size that does not divide.
    """
    if state_terms(loss):
        check_states(loss, context.family().architecture, discover(config_of(source, context.sections.teacher)).architecture)


def teacher_taps(context: StageContext, students: list[Architecture]) -> list[Tap]:
    """What the losses on states read of the teacher, once no student of several is found that they cannot work on.

    Raises:
        ConfigError: a layer out of range, or a size that does not divide.
    """
    loss, teacher = context.sections.loss, context.family().architecture
    for student in students:
        check_states(loss, teacher, student)
    return state_taps(loss, "teacher", teacher.num_layers)


def kept_channels(context: StageContext, source: Path) -> list[int] | None:
    """The teacher's hidden channels that the student in a folder was cut down to; None when its plan is missing or of another teacher."""
    path = source / "plan.json"
    try:
        return PrunePlan.load(path, context.family().architecture).hidden if path.is_file() else None
    except CheckpointError:
        return None
