"""Optimisers. One file a member, one row here; every one moves matrices with weight decay and vectors (norms, biases) without."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from minitron.errors import ConfigError, nearest

#: Name → module and maker. ``training.optimizer`` carries the same name.
OPTIMIZERS = {
    "adamw": "minitron.engine.optimizers.adamw:build",
    "lion": "minitron.engine.optimizers.lion:build",
    "muon": "minitron.engine.optimizers.muon:build",
    "sgd": "minitron.engine.optimizers.sgd:build",
}
#: Members that update each number by itself, so that a weight may be cut or flattened anyhow.
ELEMENTWISE = ("adamw", "lion", "sgd")


@dataclass(frozen=True)
class OptimizerConfig:
    """What an engine is told of the optimiser; the learning rate is given anew at every step."""

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0


def check_optimizer(name: str, *, engine: str, zero_stage: int) -> None:
    """Refuse an optimiser that does not exist or that the engine's shards cannot feed.

    Raises:
        ConfigError: an unknown name, or one that needs whole matrices under ZeRO, which keeps weights as flat pieces.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"training.optimizer={name} is unknown; {nearest(name, OPTIMIZERS)}")
    if name not in ELEMENTWISE and engine == "deepspeed" and zero_stage > 0:
        raise ConfigError(
            f"training.optimizer={name} works on whole matrices, which engine=deepspeed with engine.zero_stage={zero_stage} cuts into flat pieces: "
            f"use engine=fsdp, or one of {', '.join(ELEMENTWISE)}"
        )


def build_optimizer(root: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that a configuration names, over the trainable parameters of a module."""
    module, _, function = OPTIMIZERS[config.name].partition(":")
    return cast(torch.optim.Optimizer, getattr(importlib.import_module(module), function)(root, config))


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable matrices with weight decay, vectors (norms, biases) without."""
    trainable = [p for p in parameters if p.requires_grad]
    dims = {id(p): len(getattr(p, "ds_shape", p.shape)) for p in trainable}  # ZeRO-3 empties what it has sharded, and notes the shape
    groups = [
        {"params": [p for p in trainable if dims[id(p)] >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if dims[id(p)] < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def going_on(optimizer: torch.optim.Optimizer, device: torch.device) -> torch.Tensor:
    """Whether a step is to be made, 0-d and on the device: not where the flag ``found_inf`` of torch's gradient scaler is set."""
    found: torch.Tensor | None = getattr(optimizer, "found_inf", None)
    return torch.ones((), dtype=torch.bool, device=device) if found is None else (found == 0).to(device)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
