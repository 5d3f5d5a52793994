"""Weights and optimiser state as one flat dictionary of local tensors, plain or sharded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from minitron.errors import CheckpointError


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pack(root: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """``weight/<name>`` and ``optimizer/<name>/<key>`` of this rank, detached, not copied."""
    state = {}
    for name, parameter in root.named_parameters():
        state[f"weight/{name}"] = _local(parameter.detach())
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{name}/{key}"] = _local(value.detach()) if torch.is_tensor(value) else torch.tensor(value)
    return state


def unpack(root: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """The inverse of :func:`pack` into freshly made objects.

    Raises:
        CheckpointError: a weight is missing or has another shape, as after a change of the number of ranks.
    """
    # A fused update reads its step counters where the weights are, any other one on the CPU.
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for name, parameter in root.named_parameters():
        saved = state.get(f"weight/{name}")
        local = _local(parameter.detach())
        if saved is None or saved.shape != local.shape:
            found = None if saved is None else tuple(saved.shape)
            raise CheckpointError(
                f"the checkpoint holds {found} for '{name}', this run needs {tuple(local.shape)}: was it made on another number of ranks?"
            )
        local.copy_(saved)
        prefix = f"optimizer/{name}/"
        entries = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if entries:
            optimizer.state[parameter] = {key: _restore(value, parameter, fused=id(parameter) in fused) for key, value in entries.items()}


def _restore(value: torch.Tensor, parameter: nn.Parameter, *, fused: bool) -> torch.Tensor:
    """A saved entry in the form the optimiser keeps it: moments like the parameter, counters as they are."""
    if value.ndim == 0:
        return value.to(parameter.device, copy=True) if fused else value.clone()
    if isinstance(parameter, DTensor):
        return DTensor.from_local(
            value.to(parameter.to_local().device), parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    return value.to(parameter.device).clone()


def full_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole float32 weights on the CPU, one at a time; every rank must iterate.

    Nothing here holds a tensor while the next one is made, so a caller that lets go of each has one in memory.
    """
    for name, parameter in root.named_parameters():
        yield name, whole(parameter.detach()).float().cpu()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is sharded by rows, gathered; memory for the result alone, where ``DTensor.full_tensor`` takes three times as much."""
    if not isinstance(tensor, DTensor):
        return tensor
    shards = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]
    local = tensor.to_local()
    if not shards:
        return local
    (dim,) = shards
    size = tensor.device_mesh.size(dim)
    num_rows = -(-tensor.shape[0] // size)  # of the largest shard, to which the others are padded
    if len(local) < num_rows:
        local = torch.cat([local, local.new_zeros((num_rows - len(local), *tensor.shape[1:]))])
    out = local.new_empty((num_rows * size, *tensor.shape[1:]))
    torch.distributed.all_gather_into_tensor(out, local.contiguous(), group=tensor.device_mesh.get_group(dim))
    return out[: tensor.shape[0]]
