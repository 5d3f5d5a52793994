"""What minitron understands of a model, from its config alone: axes, parameters, couplings, costs, and the verdict of the proof."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minitron.config import Config
from minitron.core.axes import AXES, Coupling, describe_dim
from minitron.errors import ConfigError
from minitron.models import Family, config_of, discover, resolve_teacher
from minitron.prune.proof import TOLERANCE, Proof, examine


@dataclass(frozen=True)
class Inspection:
    """A family with its proof; FLOPs are told at ``sequence_length`` tokens."""

    family: Family
    proof: Proof
    sequence_length: int

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """Axes that are cut together: tied by the config, or because every query head has keys and values of its own."""
        shape = self.family.architecture
        tied = shape.couplings
        if shape.num_kv_heads == shape.num_heads and not any(coupling.axis == "kv_head" for coupling in tied):
            tied = (*tied, Coupling("kv_head", "head", 1))
        return tied

    @property
    def axes(self) -> dict[str, dict[str, Any]]:
        """Every axis: elements (``size``), prunable ``units``, and the config ``field`` that holds their number."""
        shape = self.family.architecture
        found: dict[str, dict[str, Any]] = {}
        for axis in AXES:
            if axis in self.family.fields:
                units = shape.size(axis)
                width = shape.head_dim if axis in ("head", "kv_head") else 1
                found[axis] = {"size": units * width, "units": units, "field": self.family.fields[axis]}
        return found

    @property
    def observed(self) -> dict[str, list[str]]:
        """The modules at which each axis is observed."""
        taps = self.family.taps
        places = {
            "layer": taps.blocks,
            "hidden": taps.norms,
            "ffn": list(taps.ffn.values()),
            "head": list(taps.head.values()),
            "kv_head": list(taps.head.values()),
            "expert": list(taps.router.values()),
            "expert_ffn": list(taps.experts.values()),
            "shared_ffn": list(taps.shared_ffn.values()),
        }
        return {axis: places[axis] for axis in self.axes}

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes of keys and values per token, two bytes a value."""
        return self.family.architecture.kv_cache_bytes(batch_size=1, sequence_length=1)

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs per token at ``sequence_length``."""
        return self.family.architecture.flops_per_token(self.sequence_length)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON; ``stored`` lists the tensors of a checkpoint whose names are not those of parameters in memory."""
        family, shape = self.family, self.family.architecture
        stored = {
            item.spec.name: {"axes": [describe_dim(dim) for dim in item.spec.dims], "parameter": item.source.name}
            for item in family.stored
            if item.spec is not item.source
        }
        return {
            "model_type": family.model_type,
            "num_parameters": shape.num_parameters,
            "num_non_embedding_parameters": shape.num_non_embedding_parameters,
            "num_active_parameters": shape.num_active_parameters,
            "architecture": shape.to_dict(),
            "axes": self.axes,
            "observed": self.observed,
            "parameters": {spec.name: [describe_dim(dim) for dim in spec.dims] for spec in family.layout.parameters},
            **({"stored": stored} if stored else {}),
            "coupled": [dataclasses.asdict(coupling) for coupling in self.couplings],
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
            "flops_per_token": self.flops_per_token,
            "sequence_length": self.sequence_length,
            "proof": {
                "passed": self.proof.passed,
                "tolerance": TOLERANCE,
                "max_abs_diff": self.proof.differences,
                "refused": self.proof.refused,
            },
        }


def inspect_model(config: Config, model: str | None) -> Inspection:
    """Inspect a folder, config file, GGUF file or hub id, or without one the configured teacher; no weights are read.

    Raises:
        ConfigError: no model is named.
        CheckpointError: it cannot be read, or is no decoder-only language model with plain weights.
        ArchitectureError: its parameters are not understood (the first such parameter is named).
    """
    teacher = config.sections["teacher"]
    if model is not None:
        teacher = dataclasses.replace(teacher, path=model, config=None)
    elif not teacher.path and not teacher.config:
        raise ConfigError("inspect needs a model: minitron inspect FOLDER, config.json, FILE.gguf or HUB_ID")
    source = None if teacher.config and not teacher.path else resolve_teacher(teacher, only_config=True)
    document = config_of(source, teacher)
    return Inspection(discover(document), examine(document), config.sections["data"].sequence_length)
