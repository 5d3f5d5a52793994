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
        try:
            with safe_open(str(path), framework="pt") as handle:
                names = list(handle.keys())
                metadata = {key: json.loads(value) for key, value in (handle.metadata() or {}).items()}
                return cls({name: handle.get_tensor(name) for name in names}, metadata)
        except Exception as error:  # safetensors raises its own untyped error for a damaged file
            raise CheckpointError(f"{path} is not a scores file: {error}") from error
