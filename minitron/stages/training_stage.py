"""What ``correct`` and ``distill`` share: train a model and write it as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.distill.losses import LossConfig
from minitron.distill.settings import TrainingConfig
from minitron.distill.training import TrainingRun
from minitron.errors import CheckpointError
from minitron.models import config_of, load_causal_lm, load_tokenizer
from minitron.models.weights import copy_companions, write_weights
from minitron.stages.context import StageContext, blocks_of


def train_folder(
    context: StageContext, out: Path, *, source: Path, training: TrainingConfig, loss: LossConfig, with_teacher: bool, what: str
) -> dict[str, Any]:
    """Train the model of ``source`` and write weights, config and tokenizer to ``out``.

    Returns:
        Step and token counts and the last validation.
    """
    sections = context.sections
    training.check()
    if with_teacher:
        _check_vocabularies(context, source)
    trust = sections.teacher.trust_remote_code
    student = load_causal_lm(source, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trust)
    teacher = context.load_teacher(device=torch.device("cpu")) if with_teacher else None
    result = TrainingRun(
        student=student,
        teacher=teacher,
        stream=context.text().stream(),
        validation=context.held_out(training.num_validation_sequences),
        sequence_length=sections.data.sequence_length,
        training=training,
        loss=loss,
        engine=sections.engine,
        blocks_of=blocks_of,
        open_tracker=context.open_tracker(out, what),
        what=what,
        placement=sections.teacher.placement,
        folder=out,
        stop=context.stop,
    ).run()
    weights = result.student_weights()
    if dist.is_main():
        write_weights(out, weights)
        config = config_of(source, sections.teacher)
        config.dtype = "float32"
        config.save_pretrained(out)
        copy_companions(source, out)
    else:
        for _ in weights:  # gathering a sharded weight takes every rank
            pass
    dist.barrier()
    last = result.curve[-1] if result.curve else {}
    return {"steps": result.steps, "tokens": result.tokens, "validation_loss": last.get("loss"), "precision": str(result.engine.compute_dtype)}


def _check_vocabularies(context: StageContext, source: Path) -> None:
    """Refuse a student that reads other tokens than its teacher; padding rows at the end of a vocabulary may differ.

    Raises:
        CheckpointError: the tokenizers differ, or a head has fewer rows than there are tokens.
    """
    teacher = context.teacher_folder()
    ours, theirs = (load_tokenizer(folder).get_vocab() for folder in (source, teacher))
    if ours != theirs:
        differing = len(ours.items() ^ theirs.items())
        raise CheckpointError(f"{source} and the teacher {teacher} have different tokenizers ({differing} entries differ): distillation needs one")
    for folder in (source, teacher):
        rows = int(config_of(folder, context.sections.teacher).vocab_size)
        if rows <= max(ours.values()):
            raise CheckpointError(f"{folder} has a vocabulary of {rows} rows, but its tokenizer's largest id is {max(ours.values())}")
