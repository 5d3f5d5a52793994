"""Several teachers of one student: where they lie, and whether they speak the student's language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from minitron.core.protocols import Engine
from minitron.distill.teacher import TeacherSignal
from minitron.engine import resolve_dtype
from minitron.errors import CheckpointError
from minitron.models import config_of, discover, load_tokenizer
from minitron.models.lazy import load_lazily
from minitron.models.states import Tap
from minitron.stages.cached import open_cached
from minitron.stages.context import StageContext, blocks_of


def teacher_inputs(context: StageContext) -> dict[str, Any]:
    """The folders that a distillation learns from; a further teacher's weight is part of its name, because it changes the result."""
    found: dict[str, Any] = {"teacher": context.teacher_folder()}
    for number, (folder, weight) in enumerate(context.further_teachers(), start=2):
        found[f"teacher {number} of weight {weight:g}"] = folder
    return found


def load_further_teachers(context: StageContext) -> list[tuple[nn.Module, float]]:
    """The teachers beside the first and their weights, in the dtype of ``teacher.dtype``, read by the engine that places them."""
    teacher = context.sections.teacher
    options: dict[str, Any] = {"attention": teacher.attention, "trust_remote_code": teacher.trust_remote_code}
    return [(load_lazily(folder, dtype=resolve_dtype(teacher.dtype), **options), weight) for folder, weight in context.further_teachers()]


def teaching(context: StageContext, source: Path) -> dict[str, Any]:
    """What a training of the student in a folder learns from: a ``teacher`` and ``others`` to be placed, or the ``signal`` of a stored one."""
    if context.sections.teacher.placement == "cached":
        return {"teacher": None, "signal": open_cached(context, source)}
    return {"teacher": context.load_teacher(lazily=True), "others": load_further_teachers(context)}


def flops_per_token(context: StageContext, source: Path, *, with_teacher: bool) -> Callable[[int], float]:
    """A count of what a training computes for a token of sequences of a length: forward and backward of the student, and a forward of each teacher.

    A cached teacher does not run. Text that the student writes itself, and losses on states, are not counted.
    """
    options = context.sections.teacher
    shapes = [discover(config_of(source, options)).architecture]
    if with_teacher and options.placement != "cached":
        shapes += [context.family().architecture, *(discover(config_of(folder, options)).architecture for folder, _ in context.further_teachers())]

    def count(sequence_length: int) -> float:
        student, *teachers = (shape.flops_per_token(sequence_length) for shape in shapes)
        return 3.0 * student + sum(teachers)

    return count


def place_teachers(context: StageContext, engine: Engine, *, taps: Sequence[Tap], remember_bytes: int) -> list[tuple[TeacherSignal, float]]:
    """All teachers in place, with their weights, the first one first; it alone hands over intermediate states.

    ``remember_bytes`` is shared among them; all keep the newest batch for students that are trained side by side.
    """
    models = [(context.load_teacher(lazily=True), 1.0), *load_further_teachers(context)]
    options: dict[str, Any] = {"placement": context.sections.teacher.place, "separator": context.separator()}
    options |= {"remember_bytes": remember_bytes // len(models), "shared": True}
    return [
        (TeacherSignal(model, engine, blocks=blocks_of(model), taps=() if number else taps, **options), weight)
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
