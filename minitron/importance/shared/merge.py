"""Scores of several parts of the calibration samples, put together as if they had been one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from minitron.core.scores import ImportanceScores, ScoreSums
from minitron.importance import build_observers
from minitron.importance.depth import DepthConfig, LacoConfig
from minitron.importance.width.config import ImportanceConfig
from minitron.models.family import Family


def merge_scores(parts: Sequence[ScoreSums], family: Family) -> tuple[ImportanceScores, ScoreSums]:
    """The scores of all parts' samples together, and their sums, which can be merged further.

    ``parts`` are the ``sums.safetensors`` of runs that differ in their samples only: two halves of the data give the scores of the whole, to
    rounding. Metrics that are read off the weights are the same in every part.

    Raises:
        CheckpointError: the parts are of different metrics, settings, models or tokenizers.
    """
    total = reduce(ScoreSums.plus, parts)
    settings = total.metadata["settings"]
    depth = {**settings["depth"], "laco": LacoConfig(**settings["depth"]["laco"])}
    observers = build_observers(ImportanceConfig(**settings["importance"]), DepthConfig(**depth), seed=total.metadata["seed"])
    scores = {}
    for number, observer in enumerate(observers):
        source = total if observer.needs_forward else parts[0]
        own = {name.partition("/")[2]: tensor for name, tensor in source.tensors.items() if name.startswith(f"{number}/")}
        observer.sums.update(own)
        scores.update(observer.scores(family, num_samples=total.metadata["num_samples"]))
    return ImportanceScores({name: tensor.float() for name, tensor in scores.items()}, total.metadata), total
