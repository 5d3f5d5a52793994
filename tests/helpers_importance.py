"""Scoring of tiny teachers in one call, and what the tests of importance share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.importance import DepthConfig, ImportanceConfig
from minitron.importance.depth import Subject
from minitron.importance.shared.score import Scored, Scoring
from minitron.models import discover, load_causal_lm

LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB = 3, 48, 64, 6, 2, 300


def samples(count: int = 10, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token sequences [count, length]."""
    return torch.randint(2, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The teacher in a folder."""
    return load_causal_lm(folder, dtype=dtype, device=torch.device("cpu"))


def scored(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    width: str = "activation",
    depth: str = "block_influence",
    seed: int = 0,
    batch: int = 4,
    counted: torch.Tensor | None = None,
    checkpoints: Path | None = None,
    checkpoint_every: int = 64,
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Scored:
    """One scoring with a width and a depth metric; ``options`` are those of the ``importance`` section."""
    config = ImportanceConfig(name=width, batch_size=batch, checkpoint_every=checkpoint_every, **options)
    subject = Subject(model, discover(model.config), tokens, batch, counted=counted)
    return Scoring(config, DepthConfig(name=depth), seed=seed, folder=checkpoints, stop=stop).run(subject)


def score(model: nn.Module, tokens: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
    """The scores alone; arguments as for :func:`scored`."""
    return scored(model, tokens, **more).tensors


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-6, layers: float = 1e-4) -> None:
    """Assert that scores agree by name; layers to a tolerance of their own."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=layers if name == "layer" else rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


__all__ = ["FFN", "GROUPS", "HEADS", "HIDDEN", "LAYERS", "VOCAB", "close", "load", "samples", "score", "scored"]
