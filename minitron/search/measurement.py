"""Times of a shape on this machine: a random model of that shape reads a batch of prompts and decodes a token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.architecture import Architecture
from minitron.core.plan import make_plan
from minitron.engine import resolve_dtype
from minitron.log import get_logger
from minitron.models.family import Family
from minitron.models.fields import meta_model
from minitron.prune import target_config
from minitron.prune.proof import random_scores
from minitron.search.prediction import Measure, Seconds

#: Layers of the two models between which the time is taken to grow evenly with the depth.
_FEW, _MORE = 1, 3
_WARM, _TIMED = 2, 5

logger = get_logger(__name__)


def measurer(config: Any, family: Family, *, batch_size: int, sequence_length: int) -> Measure:
    """A way to measure shapes of a family, each width once.

    Where all layers are alike, models of one and of three layers are timed and the rest follows in a straight line; else the whole model is.
    """
    known: dict[Architecture, tuple[Seconds, Seconds]] = {}
    options = {"batch_size": batch_size, "sequence_length": sequence_length}

    def measure(shape: Architecture) -> Seconds:
        if not family.layout.uniform or shape.num_layers <= _MORE:
            return _seconds(_random_model(config, family, shape), **options)
        width = shape.replace(num_layers=_MORE)
        if width not in known:
            logger.info("  measuring %s", width.name)
            few, more = (_seconds(_random_model(config, family, shape.replace(num_layers=layers)), **options) for layers in (_FEW, _MORE))
            known[width] = (few, more)
        few, more = known[width]
        further = (shape.num_layers - _FEW) / (_MORE - _FEW)
        return Seconds(*(max(a + further * (b - a), b) for a, b in ((few.prefill, more.prefill), (few.decode, more.decode))))

    return measure


def _random_model(config: Any, family: Family, shape: Architecture) -> nn.Module:
    """A model of the shape on this process's device, with random weights."""
    teacher = family.architecture
    kept = list(shape.kept_layers) if shape.kept_layers is not None else list(range(shape.num_layers))
    model = meta_model(target_config(config, make_plan(random_scores(teacher), teacher, shape, kept_layers=kept), family))
    dtype = resolve_dtype("auto")
    model = model.to(dtype).to_empty(device=dist.device()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for buffer in model.buffers():  # what to_empty leaves may be slow to compute with
            buffer.fill_(1)
    return model


@torch.no_grad()
def _seconds(model: Any, *, batch_size: int, sequence_length: int) -> Seconds:
    """Median seconds of reading [batch, sequence] ids, and of one token more for each sequence."""
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=dist.device())
    prefill = _median(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    decode = _median(lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True))
    return Seconds(prefill, decode)


def _median(work: Callable[[], Any]) -> float:
    """Median seconds of a few runs, after some that warm up."""
    found = []
    for _ in range(_WARM + _TIMED):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[_WARM:])
