"""Several teachers of one student: where they lie, and whether they speak the student's language."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.core.protocols import Engine
from minitron.distill.teacher import TeacherSignal
from minitron.engine import resolve_dtype
from minitron.errors import CheckpointError
from minitron.models import config_of, load_causal_lm, load_tokenizer
from minitron.models.states import Tap
from minitron.stages.context import StageContext, blocks_of


def teacher_inputs(context: StageContext) -> dict[str, Any]:
    """The folders that a distillation learns from; a further teacher's weight is part of its name, because it changes the result."""
    found: dict[str, Any] = {"teacher": context.teacher_folder()}
    for number, (folder, weight) in enumerate(context.further_teachers(), start=2):
        found[f"teacher {number} of weight {weight:g}"] = folder
    return found


def load_further_teachers(context: StageContext) -> list[tuple[nn.Module, float]]:
    """The teachers beside the first and their weights, on the CPU, in the dtype of ``teacher.dtype``."""
    teacher = context.sections.teacher
    options: dict[str, Any] = {"device": torch.device("cpu"), "trust_remote_code": teacher.trust_remote_code}
    return [(load_causal_lm(folder, dtype=resolve_dtype(teacher.dtype), **options), weight) for folder, weight in context.further_teachers()]


def place_teachers(context: StageContext, engine: Engine, *, taps: Sequence[Tap], remember_bytes: int) -> list[tuple[TeacherSignal, float]]:
    """All teachers in place, with their weights, the first one first; it alone hands over intermediate states.

    ``remember_bytes`` is shared among them.
    """
    models = [(context.load_teacher(device=torch.device("cpu")), 1.0), *load_further_teachers(context)]
    placement, room = context.sections.teacher.placement, remember_bytes // len(models)
    return [
        (TeacherSignal(model, engine, blocks=blocks_of(model), placement=placement, remember_bytes=room, taps=() if number else taps), weight)
        for number, (model, weight) in enumerate(models)
    ]


def check_vocabularies(context: StageContext, source: Path) -> None:
    """Refuse a student that reads other tokens than one of its teachers; padding rows at the end of a vocabulary may differ.

    Raises:
        CheckpointError: the tokenizers differ, or a head has fewer rows than there are tokens.
    """
    teachers = [context.teacher_folder(), *(folder for folder, _ in context.further_teachers())]
    trust = context.sections.teacher.trust_remote_code
    ours = load_tokenizer(source, trust_remote_code=trust).get_vocab()
    for teacher in teachers:
        theirs = load_tokenizer(teacher, trust_remote_code=trust).get_vocab()
        if ours != theirs:
            differing = len(ours.items() ^ theirs.items())
            raise CheckpointError(
                f"{source} and the teacher {teacher} have different tokenizers ({differing} entries differ): distillation needs one"
            )
    for folder in (source, *teachers):
        rows = int(config_of(folder, context.sections.teacher).vocab_size)
        if rows <= max(ours.values()):
            raise CheckpointError(f"{folder} has a vocabulary of {rows} rows, but its tokenizer's largest id is {max(ours.values())}")
