"""What a trained student's folder says beside its weights, and the zeros that it starts with."""

from __future__ import annotations

from pathlib import Path

from minitron.core.sparsity import SparsityRecord
from minitron.distill.masks import Masks, open_masks
from minitron.distill.settings import TrainingConfig
from minitron.errors import ConfigError
from minitron.models import TeacherConfig, config_of, discover
from minitron.models.sparse_folder import carry_sparsity
from minitron.models.weights import copy_companions
from minitron.stages.context import StageContext


def student_masks(context: StageContext, source: Path, training: TrainingConfig) -> Masks | None:
    """The masks that the student of a folder is trained under, by ``training.sparse`` and its ``sparsity.json``; None for a dense one.

    Raises:
        ConfigError, CheckpointError: as :func:`minitron.distill.masks.open_masks`; or a share that grows under a compiler, which would compile
            every step anew.
    """
    if training.sparse == "free" or (training.sparse is None and SparsityRecord.load(source) is None):
        return None
    if training.sparse == "gradual" and context.sections.engine.compile:
        raise ConfigError("training.sparse=gradual does not go with engine.compile=true, which would compile anew at every step: leave one out")
    family = discover(config_of(source, context.sections.teacher))
    return open_masks(source, training, family=family, num_steps=training.steps(context.sections.data.sequence_length))


def describe_student(folder: Path, *, source: Path, teacher: TeacherConfig, masks: Masks | None = None) -> None:
    """Put the config and tokenizer of ``source`` beside float32 weights, and ``sparsity.json`` with the zeros counted in them."""
    config = config_of(source, teacher)
    config.dtype = "float32"
    config.save_pretrained(folder)
    copy_companions(source, folder)
    if masks is not None:
        carry_sparsity(masks.record(), folder, discover(config))
