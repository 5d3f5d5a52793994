"""Parameters that still lie in files are read when an engine knows where they go: whole ones in turn, sharded ones row by row."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from minitron.core.lazy import sources_of, unbind_sources
from minitron.core.protocols import WeightSource

#: Bytes that a read takes beside the memory that it fills: rows come in pieces of at most this size, or one row.
_PIECE = 16 << 20


class LazyWeights:
    """The parameters of a module that are on the meta device, and where they come from.

    Filling keeps the identity of every parameter, so ties, hooks and optimisers that know it stay as they are.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._sources = sources_of(root)

    def __bool__(self) -> bool:
        """Whether anything is still to be read."""
        return any(parameter.is_meta for parameter in self._root.parameters())

    @torch.no_grad()
    def fill(self, part: nn.Module | None = None, *, device: torch.device, dtype: torch.dtype | None = None, read: bool = True) -> None:
        """Give every parameter on the meta device memory and its content: a plain one all of it, a DTensor this rank's rows.

        Args:
            part: only the parameters of this module inside the root.
            dtype: another one than the parameters' own.
            read: False leaves the memory uninitialised, for a rank that is sent the content by another.
        """
        inside = None if part is None else {id(parameter) for parameter in part.parameters()}
        for name, parameter in self._root.named_parameters():
            if not parameter.is_meta or (inside is not None and id(parameter) not in inside):
                continue
            tensor = torch.empty_like(parameter, device=device, dtype=dtype or parameter.dtype)
            if read:
                local, start = _own_rows(tensor)
                source, own_name = self._source(name)
                copy_rows(local, source, own_name, start=start)
            torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))

    def read(self, name: str) -> torch.Tensor:
        """A parameter of the root by its name, whole, on the CPU."""
        source, own_name = self._source(name)
        return source.read(own_name)

    def read_flat(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """The elements from ``start`` to ``stop`` of a flattened parameter of ``shape``, fewer where it ends before; only the rows that hold them
        are read."""
        width = math.prod(shape[1:])
        stop = min(stop, math.prod(shape))
        if start >= stop:
            return torch.empty(0)
        source, own_name = self._source(name)
        first = start // width
        rows = source.read(own_name, first, -(-stop // width))
        return rows.flatten()[start - first * width : stop - first * width]

    def covers(self, name: str) -> bool:
        """Whether a parameter of the root has a source."""
        return any(name.startswith(prefix) for prefix in self._sources)

    def close(self) -> None:
        """Forget the sources once all is read."""
        unbind_sources(self._root)

    def _source(self, name: str) -> tuple[WeightSource, str]:
        prefix = max((prefix for prefix in self._sources if name.startswith(prefix)), key=len, default=None)
        assert prefix is not None, f"'{name}' is on the meta device and has no source"
        return self._sources[prefix], name[len(prefix) :]


def read_all(root: nn.Module, *, device: torch.device) -> None:
    """Give every parameter of a module that still lies in files its memory and content, and close the files."""
    weights = LazyWeights(root)
    weights.fill(device=device)
    weights.close()


def parts_of(root: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """The blocks, and every module outside of them that holds parameters of its own: what is worth reading at a time."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [*blocks, *(module for module in root.modules() if id(module) not in inside and any(True for _ in module.parameters(recurse=False)))]


def copy_rows(target: torch.Tensor, source: WeightSource, name: str, *, start: int = 0) -> None:
    """Fill ``target`` with as many rows of a parameter from ``start`` on, a piece at a time."""
    if not target.numel():
        return
    if target.ndim == 0:
        target.copy_(source.read(name))
        return
    step = max(1, _PIECE // max(1, target[0].nbytes))
    for first in range(0, len(target), step):
        last = min(first + step, len(target))
        target[first:last].copy_(source.read(name, start + first, start + last))


def _own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's part of a parameter, and the number of its first row."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    start = 0
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "parameters are sharded by rows"
            start = -(-tensor.shape[0] // tensor.device_mesh.size(dim)) * tensor.device_mesh.get_local_rank(dim)
    return tensor.to_local(), start
