"""Weights and optimiser state as one flat dictionary of local tensors, plain or sharded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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
    """Whole float32 weights on the CPU, one at a time; every rank must iterate."""
    for name, parameter in root.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield name, whole.detach().float().cpu()
