"""Weights in the form of a checkpoint, which other tools load: the names of the family's published checkpoints, one matrix per expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from minitron.core.axes import ParameterSpec
from minitron.models.family import Family, discover
from minitron.models.fields import meta_model
from minitron.models.stored import to_stored
from minitron.models.weights import WeightReader

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def folder_weights(reader: WeightReader, family: Family, *, buffers_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder under their names in a checkpoint, whichever of its two namings the folder uses.

    What the family does not know (a second copy of a tied head, say) is left out.

    Args:
        buffers_only: only what is saved beside the parameters and never trained.

    Raises:
        CheckpointError: a tensor is missing.
    """

    def wanted(spec: ParameterSpec) -> bool:
        return spec.buffer or not buffers_only

    in_memory = all(spec.name in reader.files for spec in family.layout.parameters)
    if in_memory:
        parameters = ((spec.name, reader.get(spec.name)) for spec in family.layout.parameters if wanted(spec))
        yield from to_stored(family.stored, parameters, family.architecture.size)
    else:
        yield from reader.items(item.spec.name for item in family.stored if wanted(item.spec))


def checkpoint_form(source: Path, config: Any) -> Callable[[NamedTensors], Iterator[tuple[str, torch.Tensor]]]:
    """A function from parameters by their names in memory to the tensors of a checkpoint.

    Saved buffers (a router's correction bias) are no parameters: nothing trains them, and they are carried over from ``source``,
    the folder of a model with this config.
    """
    family = discover(config)

    def form(weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        yield from to_stored(family.stored, weights, family.architecture.size)
        if any(spec.buffer for spec in family.layout.parameters):
            with WeightReader(source) as reader:
                yield from folder_weights(reader, family, buffers_only=True)

    return form


def kept_in_float32(config: Any, family: Family, dtype: torch.dtype) -> set[str]:
    """Tensors of a checkpoint that stay as they are when the others take a narrower dtype.

    These are the saved buffers, and what transformers loads in float32 whatever dtype is asked for.
    """
    model: Any = meta_model(config)
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns))) if patterns else None
    return {item.spec.name for item in family.stored if item.spec.buffer or (kept is not None and kept.search(item.source.name))}
