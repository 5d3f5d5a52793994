"""FSDP2: weights, gradients and optimiser state sharded over all ranks or over groups of them, gathered block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from minitron import dist
from minitron.core.share import Share
from minitron.engine.compiling import compile_blocks
from minitron.engine.frozen import gathered, place_frozen
from minitron.engine.lazy import read_all
from minitron.engine.optimizer import Step, clipped_step, first_bad
from minitron.engine.optimizers import OptimizerConfig, build_optimizer
from minitron.engine.shares import shares_of
from minitron.engine.state import full_tensors, pack, unpack

if TYPE_CHECKING:
    from minitron.engine import EngineConfig


class FsdpEngine:
    """Fully sharded data parallelism with float32 shards and, in bf16, float32 gradient reduction."""

    name = "fsdp"
    _last: Step | None = None

    def __init__(self, config: EngineConfig, *, optimizer: OptimizerConfig, compute_dtype: torch.dtype) -> None:
        dist.init_single()
        self.compute_dtype = compute_dtype
        self._config, self._optimizer_config = config, optimizer
        self._mesh = _mesh(config)
        self._home = torch.device("cpu") if config.offload == "parameters" else dist.device()
        bf16 = compute_dtype == torch.bfloat16
        self._policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()

    def prepare(self, root: nn.Module, *, blocks: list[nn.Module]) -> Callable[..., dict[str, torch.Tensor]]:
        """Shard each block, then what is left in the root; the head stays whole from the root's forward to its backward."""
        root.float()
        offloading = CPUOffloadPolicy(pin_memory=dist.device().type == "cuda") if self._config.offload == "parameters" else OffloadPolicy()
        for block in blocks:
            fully_shard(block, mesh=self._mesh, mp_policy=self._policy, offload_policy=offloading)
        # Casting the root's inputs would round the number of tokens that the loss is divided by.
        policy = dataclasses.replace(self._policy, cast_forward_inputs=False)
        fully_shard(root, mesh=self._mesh, mp_policy=policy, offload_policy=offloading)
        read_all(root, device=self._home)
        root.to(self._home)  # also lets FSDP know the memory of what was read
        for buffer in root.buffers():
            buffer.data = buffer.data.to(dist.device())
        if self._config.compile:
            compile_blocks(blocks)
        self._root = root
        self._optimizer = build_optimizer(root, self._optimizer_config)
        return root

    def prepare_frozen(self, teacher: nn.Module, *, blocks: list[nn.Module], placement: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The teacher by its own placement, in its own dtype."""
        placed = place_frozen(teacher, blocks=blocks, placement=placement)
        if self._config.compile:
            compile_blocks(blocks)
        return placed

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """Add a micro-batch's gradient to this rank's shard. FSDP averages over ranks, so the loss is multiplied by their number.

        Reducing every micro-batch costs traffic that waiting for the boundary would save, but what waits is the whole model's gradient on every
        rank. Copies of a shard (hybrid) are summed at the boundary alone.
        """
        assert isinstance(self._root, FSDPModule)
        self._root.set_requires_all_reduce(boundary)
        (loss * dist.world_size()).backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip by the global norm, update, clear."""
        self._last = clipped_step(self._optimizer, learning_rate=learning_rate, limit=self._optimizer_config.gradient_clipping)
        return self._last.norm.to(dist.device())

    def blame(self) -> str:
        """The parameter whose gradient was the first that is not finite in the last step; empty when all were finite."""
        return first_bad(self._root, self._last)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's shards."""
        self._reshard()
        return pack(self._root, self._optimizer)

    def shares(self) -> dict[str, Share]:
        """Which numbers of every entry lie here."""
        return shares_of(self._root, self._optimizer)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put this rank's shards back."""
        self._reshard()
        unpack(self._root, self._optimizer, state)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole weights, one gathered at a time."""
        self._reshard()
        return full_tensors(self._root)

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[list[torch.Tensor]]:
        """Whole copies of sharded parameters."""
        return gathered(parameters)

    def _reshard(self) -> None:
        """The root stays gathered, in the compute dtype, after a forward without a backward such as validation."""
        assert isinstance(self._root, FSDPModule)
        self._root.reshard()


def _mesh(config: EngineConfig) -> DeviceMesh:
    """All ranks in a row, or rows of ``shard_size`` ranks that hold copies of each other's shards; neighbours share a copy."""
    kind, world = dist.device().type, dist.world_size()
    if config.sharding == "full":
        return init_device_mesh(kind, (world,))
    size = config.shard_size or dist.local_world_size()
    return init_device_mesh(kind, (world // size, size), mesh_dim_names=("copy", "shard"))
