"""What scoring runs on: calibration samples with the tokens that count, and the teacher where its engine puts it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from minitron.engine import OptimizerConfig, build_engine
from minitron.importance import reads_weights
from minitron.importance.depth import Subject
from minitron.importance.scoring import Prepare
from minitron.models import load_tokenizer
from minitron.stages.context import StageContext, blocks_of


@dataclass(frozen=True)
class Calibration:
    """``samples`` [num, sequence]; ``counted`` of the same shape is False at special tokens, None when there are none."""

    samples: torch.Tensor
    counted: torch.Tensor | None
    tokenizer: Any

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """A hash of the vocabulary and of which of its tokens are special."""
        return fingerprint_tokenizer(self.tokenizer)


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """A hash of the vocabulary and of which of its tokens are special."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def calibration_of(context: StageContext, num_samples: int | None = None) -> Calibration:
    """The first samples of the training text, ``importance.num_samples`` of them where no other number is given.

    Raises:
        DataError: there is less text than asked for.
    """
    samples = context.text().take(num_samples or context.sections.importance.num_samples, split="train")
    tokenizer = load_tokenizer(context.teacher_folder(to_cut=True), trust_remote_code=context.sections.teacher.trust_remote_code)
    counted = ~torch.isin(samples, torch.tensor(tokenizer.all_special_ids, dtype=samples.dtype))
    return Calibration(samples, None if bool(counted.all()) else counted, tokenizer)


def place_teacher(context: StageContext) -> tuple[nn.Module, Prepare | None]:
    """The teacher to score, and what puts its decoder where ``teacher.placement`` says, once hooks are on; None: it is there.

    One that is placed later is whole in CPU memory only where a metric reads its weights; else its weights are read where they will lie.
    """
    placement = context.sections.teacher.place
    if placement == "replicate":
        return context.load_teacher(to_cut=True), None
    if reads_weights(context.sections.importance, context.sections.depth):
        model = context.load_teacher(to_cut=True, device=torch.device("cpu"))
    else:
        model = context.load_teacher(to_cut=True, lazily=True)
    whole = replace(context.sections.engine, compile=False)  # scores are read off hooks inside the blocks
    engine = build_engine(whole, optimizer=OptimizerConfig(), precision="float32")
    blocks = blocks_of(model)
    return model, lambda decoder: engine.prepare_frozen(decoder, blocks=blocks, placement=placement)


def subject_of(context: StageContext, model: nn.Module, calibration: Calibration) -> Subject:
    """What metrics with a pass of their own are given."""
    batch_size = context.sections.importance.batch_size
    return Subject(
        model,
        context.family(),
        calibration.samples,
        batch_size,
        counted=calibration.counted,
        tokenizer=calibration.tokenizer,
        separator=context.separator(),
    )
