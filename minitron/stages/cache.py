"""Run the teacher over what training will draw, and store what it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.core.manifest import fingerprint_folder
from minitron.distill.cache import CacheWriter, header_of
from minitron.distill.settings import later_blends
from minitron.distill.teacher import TeacherSignal
from minitron.engine import OptimizerConfig, build_engine
from minitron.log import get_logger
from minitron.stages.cached import drawn_by, wanted_by
from minitron.stages.context import StageContext, blocks_of

FOLDER = "cache"
SECTIONS = ("teacher", "student", "cache", "data", "training", "engine")
HELP = "store what the teacher says of the training text, so that distilling needs no teacher (teacher.placement=cached)"

logger = get_logger(__name__)


def inputs(context: StageContext) -> dict[str, Any]:
    """The teacher and the text."""
    return {"teacher": context.teacher_folder(), "data": context.data_fingerprint(later_blends(context.sections.training, context.sections.data))}


def effective(context: StageContext) -> dict[str, Any]:
    """Of the training what decides the sequences."""
    return {"training": {"sequences": drawn_by(context), "num_validation_sequences": context.sections.training.num_validation_sequences}}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write shards, index and ``cache.json``."""
    sections = context.sections
    cache, training, length = sections.cache, sections.training, sections.data.sequence_length
    place = replace(sections.teacher, placement=cache.placement or sections.teacher.placement).place
    wanted = wanted_by(context, teacher=dist.broadcast_object(fingerprint_folder(context.teacher_folder()) if dist.is_main() else ""))
    engine = build_engine(sections.engine, optimizer=OptimizerConfig(), precision="float32")
    model = context.load_teacher(lazily=True)
    source = TeacherSignal(model, engine, blocks=blocks_of(model), placement=place, separator=context.separator())
    header = header_of(cache, wanted, source)
    num_draws = sum(count for _, count in wanted.drawn) + wanted.num_validation
    num_tokens = sum(size * count for size, count in wanted.drawn) + wanted.num_validation * length
    logger.info("  %s: %d bytes per token, at most %.3f GB", header.signal, header.bytes_per_token, header.bytes_per_token * num_tokens / 1e9)
    writer = CacheWriter(
        out,
        source,
        header,
        micro_batch=lambda other: training.micro_batch(other, first_length=length),
        shard_bytes=cache.shard_mb * 1e6,
        together=place.startswith("shard"),
    )
    header = writer.write(_sequences(context), num_draws=num_draws, stop=context.stop)
    counts = {"sequences": header.num_sequences, "tokens": header.num_tokens, "bytes": header.num_tokens * header.bytes_per_token}
    return {"signal": header.signal, "bytes_per_token": header.bytes_per_token, **counts}


def _sequences(context: StageContext) -> Iterator[torch.Tensor]:
    """Those that distilling draws, phase after phase, each at the place in the text where the one before has stopped; then the held-out ones."""
    training, data = context.sections.training, context.sections.data
    text, state = context.text(later := later_blends(training, data)), None
    for number, (length, count) in enumerate(drawn_by(context)):
        stream = text.stream(blend=number, sequence_length=length)
        if state is not None:
            stream.load_state_dict(state)
        for _ in range(count):
            yield stream.next()
        state = stream.state_dict()
    yield from context.held_out(training.num_validation_sequences, later)
