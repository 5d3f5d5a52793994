"""The passes that depth scoring needs beside the shared one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minitron.checkpoint import Checkpointer
from minitron.errors import DataError
from minitron.importance.depth.config import DepthConfig, DepthPass, Subject
from minitron.importance.depth.laco import LacoPass
from minitron.importance.depth.walk import Tensors, Walk


def run_depth_passes(
    config: DepthConfig, metric: Any, subject: Subject, *, folder: Path | None, checkpoint_every: int, stop: Callable[[], bool]
) -> tuple[Tensors, dict[str, Any]]:
    """Score tensors and header entries of the metric's own pass, if it has one, and of layer collapse, if that is the selection.

    They run when no hook of the shared pass is on, which would see their blocks. Checkpoints lie in ``folder``; None: none are kept.

    Raises:
        ConfigError: a layer that the model does not have.
        DataError: what is scored on is unusable, or the model's states are not finite.
        Interrupted: a signal asked for a stop.
    """
    config.check_layers(subject.family.architecture.num_layers)
    passes: dict[str, DepthPass | LacoPass] = {"depth": metric} if hasattr(metric, "run") else {}
    if config.selection == "laco":
        passes["laco"] = LacoPass(config)
    tensors: Tensors = {}
    details: dict[str, Any] = {}
    for name, one in passes.items():
        checkpointer = Checkpointer(folder / name) if folder is not None else None
        walk = Walk(checkpointer=checkpointer, checkpoint_every=checkpoint_every, stop=stop, together=subject.placed is not None)
        tensors |= one.run(subject, walk)
        details[name] = one.details
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"the depth scores '{name}' are not finite: the teacher's states overflow in this dtype (try teacher.dtype=float32)")
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}, details


def needs_own_pass(config: DepthConfig, metric: Any) -> bool:
    """Whether depth scoring runs the layers by itself."""
    return hasattr(metric, "run") or config.selection == "laco"
