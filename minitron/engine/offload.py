"""A frozen model that lies in CPU memory and visits the device block by block, the next block travelling while one computes.

Each block's weights are one flat piece of (pinned) CPU memory, and the device holds two slots of the largest block's size. While block i
computes in one slot, block i + 1 is copied into the other, on a stream of its own. So two blocks are on the device at any time, a block
costs one copy, and nothing is allocated and no host waits between the first forward and the last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from minitron import dist
from minitron.engine.lazy import LazyWeights

#: Parameters start at multiples of this many bytes in the flat memory, as the allocators of both sides align their tensors.
_ALIGNMENT = 256


class Copier(Protocol):
    """Moves flat memory from the host into a slot of the device, perhaps while the device computes."""

    device: torch.device

    def bring(self, home: torch.Tensor, slot: torch.Tensor, number: int) -> None:
        """Begin to copy the bytes ``home`` into ``slot``, the slot's ``number`` being 0 or 1, once its last user has finished."""

    def wait(self, number: int) -> None:
        """Let what is computed from now on wait for the copy into a slot."""

    def release(self, number: int) -> None:
        """What has been computed up to now was the last to read a slot."""


class HostCopier:
    """Copies at once, on the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def bring(self, home: torch.Tensor, slot: torch.Tensor, number: int) -> None:
        """Copy."""
        slot.copy_(home)

    def wait(self, number: int) -> None:
        """The copy is there."""

    def release(self, number: int) -> None:
        """Nothing runs behind our back."""


class StreamCopier:
    """Copies on a side stream of a GPU; events order the streams, and the host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._read = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def bring(self, home: torch.Tensor, slot: torch.Tensor, number: int) -> None:
        """Copy after the last read of the slot."""
        self._stream.wait_event(self._read[number])
        with torch.cuda.stream(self._stream):
            slot.copy_(home, non_blocking=True)
        self._copied[number].record(self._stream)

    def wait(self, number: int) -> None:
        """The current stream goes on after the copy."""
        torch.cuda.current_stream(self.device).wait_event(self._copied[number])

    def release(self, number: int) -> None:
        """The slot may be written once the current stream has come this far."""
        self._read[number].record(torch.cuda.current_stream(self.device))


class _Home:
    """The weights of one block: a flat piece of CPU memory and every parameter's place in it."""

    def __init__(self, block: nn.Module, *, pin: bool) -> None:
        self.places: list[tuple[nn.Parameter, int]] = []
        size = 0
        for parameter in block.parameters():
            self.places.append((parameter, size))
            size += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        for parameter, start in self.places:
            part = _view(self.memory, parameter, start)
            part.copy_(parameter.data)
            parameter.data = part

    def point_at(self, memory: torch.Tensor) -> None:
        """Let the parameters read from another flat memory with the same content."""
        for parameter, start in self.places:
            parameter.data = _view(memory, parameter, start)


def _view(memory: torch.Tensor, like: torch.Tensor, start: int) -> torch.Tensor:
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


class OffloadedBlocks:
    """The traffic of the blocks of one frozen model: before a block's forward it is awaited and the next one called for."""

    def __init__(self, blocks: list[nn.Module], copier: Copier, *, read: Callable[[nn.Module], None]) -> None:
        """``read`` fills a block's weights if they still lie in files; one block at a time is read and moved into its place."""
        self._homes = []
        for block in blocks:
            read(block)
            self._homes.append(_Home(block, pin=copier.device.type == "cuda"))
        largest = max(home.memory.numel() for home in self._homes)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=copier.device) for _ in range(2)]
        self._holds: list[int | None] = [None, None]  # the block in each slot
        self._copier = copier
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before(number))
            block.register_forward_hook(self._after(number))

    @property
    def num_bytes_on_device(self) -> int:
        """Bytes of the two slots."""
        return sum(slot.numel() for slot in self._slots)

    def _before(self, number: int) -> Callable[[nn.Module, Any], None]:
        owner = weakref.ref(self)  # a hook that held the owner would keep a teacher's memory until the garbage collector comes

        def hook(module: nn.Module, args: Any) -> None:
            self = owner()
            assert self is not None
            slot = self._bring(number)
            self._copier.wait(slot)
            self._homes[number].point_at(self._slots[slot][: self._homes[number].memory.numel()])
            if number + 1 < len(self._homes):
                self._bring(number + 1)

        return hook

    def _after(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        owner = weakref.ref(self)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self = owner()
            assert self is not None
            slot = self._holds.index(number)
            self._homes[number].point_at(self._homes[number].memory)
            self._copier.release(slot)
            self._holds[slot] = None

        return hook

    def _bring(self, number: int) -> int:
        """The slot that holds a block or is about to. Blocks alternate, so the other slot belongs to a neighbour."""
        slot = number % 2
        if self._holds[slot] != number:
            self._copier.bring(self._homes[number].memory, self._slots[slot][: self._homes[number].memory.numel()], slot)
            self._holds[slot] = number
        return slot


def offload_blocks(model: nn.Module, blocks: list[nn.Module], *, copier: Copier | None = None) -> nn.Module:
    """Keep the blocks' weights in CPU memory; what is outside of them (embedding, final norm, head) and all buffers lie on the device.

    Weights that still lie in files are read block by block. On a CPU there is nowhere to go and nothing moves, unless a ``copier`` is given.
    """
    device, weights = dist.device(), LazyWeights(model)
    if device.type != "cpu" or copier is not None:
        copier = copier or StreamCopier(device)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        # Kept with the model, which it lives as long as.
        model.offloaded = OffloadedBlocks(blocks, copier, read=lambda block: weights.fill(block, device=torch.device("cpu")))  # type: ignore[assignment]
        for tensor in [*(parameter for parameter in model.parameters() if id(parameter) not in inside), *model.buffers()]:
            if not tensor.is_meta:
                tensor.data = tensor.data.to(copier.device)
    weights.fill(device=device)
    weights.close()
    return model
