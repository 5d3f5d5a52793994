"""One process, one device: float32 master weights, autocast for bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minitron import dist
from minitron.engine.offload import offload_blocks
from minitron.engine.optimizer import clipped_step
from minitron.engine.optimizers import OptimizerConfig, build_optimizer
from minitron.engine.state import full_tensors, pack, unpack
from minitron.errors import ConfigError

if TYPE_CHECKING:
    from minitron.engine import EngineConfig


class LocalEngine:
    """Plain PyTorch; the reference that the other engines are compared with."""

    name = "local"

    def __init__(self, config: EngineConfig, *, optimizer: OptimizerConfig, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype
        self._optimizer_config = optimizer
        self._device = dist.device()

    def prepare(self, root: nn.Module, *, blocks: list[nn.Module]) -> Callable[..., dict[str, torch.Tensor]]:
        """Put the module on the device in float32; its forward runs under autocast when computing in bf16."""
        self._root = root.float().to(self._device)
        self._optimizer = build_optimizer(self._root, self._optimizer_config)

        def forward(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
                return self._root(*args, **kwargs)

        return forward

    def prepare_frozen(self, teacher: nn.Module, *, blocks: list[nn.Module], placement: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The teacher on the device, or in CPU memory with one block on the device at a time."""
        if placement == "shard":
            raise ConfigError("teacher.placement=shard needs several processes: use engine=fsdp or engine=deepspeed under a launcher")
        return offload_blocks(teacher, blocks) if placement == "offload" else teacher.to(self._device)

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """Add the gradient of one micro-batch."""
        loss.backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip, update, clear."""
        return clipped_step(self._optimizer, learning_rate=learning_rate, limit=self._optimizer_config.gradient_clipping)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights and the optimiser's moments."""
        return pack(self._root, self._optimizer)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put saved weights and moments back."""
        unpack(self._root, self._optimizer, state)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights on the CPU."""
        return full_tensors(self._root)

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        """Nothing is sharded here."""
        yield [p.detach() for p in parameters]
