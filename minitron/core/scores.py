"""Importance scores as a file: one tensor per axis (and layer), with where they come from in the header."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minitron.core.axes import LAYER_AXES
from minitron.errors import ArchitectureError, CheckpointError


@dataclass
class ImportanceScores:
    """Scores of every unit, high = important.

    ``tensors`` holds ``hidden`` [hidden], ``layer`` [layers] and, per layer i that has the axis, ``ffn.<i>``, ``head.<i>``,
    ``kv_head.<i>``, ``expert.<i>`` [experts], ``expert_ffn.<i>`` [experts, neurons] and ``shared_ffn.<i>``; all float32. ``metadata``
    names metric, aggregation, calibration fingerprint and token count.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def of(self, axis: str, layer: int | None = None) -> torch.Tensor:
        """Scores on one axis; layer axes need the layer's index.

        Raises:
            ArchitectureError: the metric did not measure that axis.
        """
        name = f"{axis}.{layer}" if axis in LAYER_AXES else axis
        if name not in self.tensors:
            metric = self.metadata.get("metric", "this metric")
            raise ArchitectureError(f"the scores have no '{name}': {metric} does not measure axis '{axis}', so nothing can be cut on it")
        return self.tensors[name]

    def save(self, path: Path) -> None:
        """Write a safetensors file; metadata values are stored as JSON strings."""
        header = {key: json.dumps(value) for key, value in self.metadata.items()}
        save_file({k: v.to(torch.float32).contiguous().cpu() for k, v in self.tensors.items()}, str(path), metadata=header)

    @classmethod
    def load(cls, path: Path) -> ImportanceScores:
        """Read a file written by :meth:`save`.

        Raises:
            CheckpointError: the file is missing or is no safetensors file.
        """
        if not path.is_file():
            raise CheckpointError(f"there are no scores at {path}: run 'minitron importance' first")
        return cls(*_read(path, "scores"))


#: What two parts of one scoring must have in common, and what adds up.
_SAME, _ADDED = ("metric", "depth_metric", "settings", "teacher", "tokenizer"), ("num_samples", "num_tokens")


@dataclass
class ScoreSums:
    """What scores are made from, and what adds up over parts of the calibration samples, which the scores themselves do not.

    ``tensors`` are float64, by ``<number of the metric>/<place>``; ``metadata`` that of the scores.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        header = {key: json.dumps(value) for key, value in self.metadata.items()}
        save_file({name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}, str(path), metadata=header)

    @classmethod
    def load(cls, path: Path) -> ScoreSums:
        """Read a file written by :meth:`save`.

        Raises:
            CheckpointError: the file is missing or damaged. Scores in rounds, and those of metrics that do not only watch the forward, have none.
        """
        if not path.is_file():
            raise CheckpointError(f"there are no sums at {path}: scores in rounds, and those of metrics with a pass of their own, cannot be merged")
        return cls(*_read(path, "sums"))

    def plus(self, other: ScoreSums) -> ScoreSums:
        """The sums of both parts' samples.

        Raises:
            CheckpointError: they are of other metrics, settings, models or tokenizers.
        """
        for key in _SAME:
            if self.metadata.get(key) != other.metadata.get(key):
                raise CheckpointError(f"scores of different {key} cannot be merged: {self.metadata.get(key)} and {other.metadata.get(key)}")
        if self.tensors.keys() != other.tensors.keys():
            raise CheckpointError(f"sums of different places cannot be merged: {', '.join(sorted(self.tensors.keys() ^ other.tensors.keys()))}")
        metadata = {**self.metadata, **{key: self.metadata[key] + other.metadata[key] for key in _ADDED}}
        metadata["calibration"] = sorted({*_listed(self.metadata.get("calibration")), *_listed(other.metadata.get("calibration"))})
        return ScoreSums({name: tensor + other.tensors[name] for name, tensor in self.tensors.items()}, metadata)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read(path: Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dictionary
            return tensors, {key: json.loads(value) for key, value in (handle.metadata() or {}).items()}
    except Exception as error:  # safetensors raises its own untyped error for a damaged file
        raise CheckpointError(f"{path} is not a {what} file: {error}") from error
