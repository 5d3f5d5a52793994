"""FSDP2: weights, gradients and optimiser state sharded over all ranks, gathered block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minitron import dist
from minitron.engine.offload import offload_blocks
from minitron.engine.optimizer import clipped_step
from minitron.engine.optimizers import OptimizerConfig, build_optimizer
from minitron.engine.state import full_tensors, pack, unpack

if TYPE_CHECKING:
    from minitron.engine import EngineConfig


class FsdpEngine:
    """Fully sharded data parallelism with float32 shards and, in bf16, float32 gradient reduction."""

    name = "fsdp"

    def __init__(self, config: EngineConfig, *, optimizer: OptimizerConfig, compute_dtype: torch.dtype) -> None:
        dist.init_single()
        self.compute_dtype = compute_dtype
        self._optimizer_config = optimizer
        self._mesh = init_device_mesh(dist.device().type, (dist.world_size(),))
        bf16 = compute_dtype == torch.bfloat16
        self._policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()

    def prepare(self, root: nn.Module, *, blocks: list[nn.Module]) -> Callable[..., dict[str, torch.Tensor]]:
        """Shard each block, then what is left in the root; the head stays whole from the root's forward to its backward."""
        root.float()
        for block in blocks:
            fully_shard(block, mesh=self._mesh, mp_policy=self._policy)
        # Casting the root's inputs would round the number of tokens that the loss is divided by.
        fully_shard(root, mesh=self._mesh, mp_policy=dataclasses.replace(self._policy, cast_forward_inputs=False))
        root.to(dist.device())
        self._root = root
        self._optimizer = build_optimizer(root, self._optimizer_config)
        return root

    def prepare_frozen(self, teacher: nn.Module, *, blocks: list[nn.Module], placement: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        """``shard``: the teacher gets groups of its own, in its own dtype, gathered one block at a time and never whole."""
        if placement == "offload":
            return offload_blocks(teacher, blocks)
        if placement == "shard":
            for block in blocks:
                fully_shard(block, mesh=self._mesh)
            fully_shard(teacher, mesh=self._mesh, reshard_after_forward=True)
        return teacher.to(dist.device())

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """Reduce gradients at the boundary only. FSDP averages over ranks, so the loss is multiplied by their number."""
        assert isinstance(self._root, FSDPModule)
        self._root.set_requires_gradient_sync(boundary)
        (loss * dist.world_size()).backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip by the global norm, update, clear."""
        norm = clipped_step(self._optimizer, learning_rate=learning_rate, limit=self._optimizer_config.gradient_clipping)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's shards."""
        self._reshard()
        return pack(self._root, self._optimizer)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put this rank's shards back."""
        self._reshard()
        unpack(self._root, self._optimizer, state)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole weights, one gathered at a time."""
        self._reshard()
        return full_tensors(self._root)

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        """Whole copies of sharded parameters."""
        yield [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in parameters]

    def _reshard(self) -> None:
        """The root stays gathered, in the compute dtype, after a forward without a backward such as validation."""
        assert isinstance(self._root, FSDPModule)
        self._root.reshard()
