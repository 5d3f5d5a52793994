"""One process, one device: float32 master weights, autocast for bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minitron import dist
from minitron.core.share import Share
from minitron.engine.compiling import compile_blocks
from minitron.engine.frozen import gathered, place_frozen
from minitron.engine.lazy import read_all
from minitron.engine.optimizer import Step, clipped_step, first_bad
from minitron.engine.optimizers import OptimizerConfig, build_optimizer
from minitron.engine.shares import shares_of
from minitron.engine.state import full_tensors, pack, unpack
from minitron.errors import ConfigError

if TYPE_CHECKING:
    from minitron.engine import EngineConfig


class LocalEngine:
    """Plain PyTorch; the reference that the other engines are compared with."""

    name = "local"
    _last: Step | None = None

    def __init__(self, config: EngineConfig, *, optimizer: OptimizerConfig, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype
        self._config = config
        self._optimizer_config = optimizer
        self._device = dist.device()

    def prepare(self, root: nn.Module, *, blocks: list[nn.Module]) -> Callable[..., dict[str, torch.Tensor]]:
        """Put the module on the device in float32; its forward runs under autocast when computing in bf16."""
        root.float()
        read_all(root, device=self._device)
        self._root = root.to(self._device)
        if self._config.compile:
            compile_blocks(blocks)
        self._optimizer = build_optimizer(self._root, self._optimizer_config)

        def forward(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
                return self._root(*args, **kwargs)

        return forward

    def prepare_frozen(self, teacher: nn.Module, *, blocks: list[nn.Module], placement: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The teacher on the device, or in CPU memory with one block on the device at a time."""
        if placement.startswith("shard"):
            raise ConfigError("teacher.placement=shard needs several processes: use engine=fsdp or engine=deepspeed under a launcher")
        placed = place_frozen(teacher, blocks=blocks, placement=placement)
        if self._config.compile:
            compile_blocks(blocks)
        return placed

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """Add the gradient of one micro-batch."""
        loss.backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip, update, clear."""
        self._last = clipped_step(self._optimizer, learning_rate=learning_rate, limit=self._optimizer_config.gradient_clipping)
        return self._last.norm

    def blame(self) -> str:
        """The parameter whose gradient was the first that is not finite in the last step; empty when all were finite."""
        return first_bad(self._root, self._last)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights and the optimiser's moments."""
        return pack(self._root, self._optimizer)

    def shares(self) -> dict[str, Share]:
        """Which numbers of every entry lie here."""
        return shares_of(self._root, self._optimizer)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put saved weights and moments back."""
        unpack(self._root, self._optimizer, state)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights on the CPU."""
        return full_tensors(self._root)

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[list[torch.Tensor]]:
        """Nothing is sharded here."""
        return gathered(parameters)
