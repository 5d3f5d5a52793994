"""The save at work: a copy of the state in host memory, and the thread that brings it to the disk while training goes on.

Training stands still for the copy alone. The thread neither talks to other ranks nor touches a device; ranks agree at the boundaries of steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron.checkpoint.files import write_share
from minitron.core.share import Share


class HostCopies:
    """Copies of tensors in CPU memory that is kept from one save to the next, pinned where a GPU is the source."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: dict[str, torch.Tensor], shares: dict[str, Share]) -> dict[str, torch.Tensor]:
        """Copy what this rank writes, wider numbers first, as a file wants them aligned; returns when all copies are there."""
        found: dict[str, torch.Tensor] = {}
        on_gpu = False
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            source = _written(tensor.detach(), shares[name]) if name in shares else tensor.detach()
            if source is None:
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = self._buffers[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            buffer.copy_(source, non_blocking=True)
            on_gpu |= source.is_cuda
            found[name] = buffer
        if on_gpu:
            torch.cuda.synchronize()
        return found


def _written(tensor: torch.Tensor, share: Share) -> torch.Tensor | None:
    """The numbers that this rank writes, in the tensor's shape where it writes all of them; None when there are none."""
    start, stop = share.written
    if stop <= start:
        return None
    return tensor if stop - start == tensor.numel() else tensor.reshape(-1)[start - share.start : stop - share.start]


@dataclass
class Save:
    """One checkpoint on its way. The thread writes this rank's file, waits until every rank has, and lets ``commit`` (rank 0) put it in place."""

    step: int
    meta: dict[str, Any]
    partial: Path
    commit: Callable[[Save], None] | None
    kept: bool = False
    tensors: dict[str, list[Any]] = field(default_factory=dict)
    error: Exception | None = None
    wrote: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    #: Every rank has written its file.
    agreed: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)

    def start(self, path: Path, copies: dict[str, torch.Tensor], shares: dict[str, Share]) -> None:
        """Write ``copies``, which stay as they are until the save is over, into a file."""
        self._thread = threading.Thread(target=self._work, args=(path, copies, shares), name=f"checkpoint-{self.step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until this rank has nothing to do before the others have agreed, or at all."""
        self.wrote.wait()
        if self.agreed.is_set():
            self._thread.join()

    def abandon(self) -> None:
        """Stop as soon as possible."""
        self.abandoned.set()
        self.agreed.set()
        self._thread.join()

    def _work(self, path: Path, copies: dict[str, torch.Tensor], shares: dict[str, Share]) -> None:
        try:
            write_share(path, copies, shares, given_up=self.abandoned.is_set)
            self.wrote.set()
            if self.commit is not None:
                self.agreed.wait()
                if not self.abandoned.is_set():
                    self.commit(self)
            self.done.set()
        except Exception as error:  # raised where the ranks meet
            self.error = error
        finally:
            self.wrote.set()
