"""How many bytes of tensors are alive while a training step runs: every storage that an operation touches or makes, until it is freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class AliveBytes(TorchDispatchMode):
    """Tracks live storages, those of ``held`` tensors from the beginning. ``now()`` and ``peak`` are bytes; ``mark()`` starts a new peak.

    Sizes are read anew at each operation, because FSDP empties and refills storages in place. What an operation needs for itself while it
    runs is not seen.
    """

    def __init__(self, *held: torch.Tensor) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0
        self._note(held)

    def _note(self, value: Any) -> None:
        for tensor in tree_iter(value):
            if isinstance(tensor, DTensor):
                tensor = tensor._local_tensor
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                known = self._alive.get(storage._cdata)
                if known is None or known() is None:
                    self._alive[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        """Bytes of all storages that are alive."""
        total = 0
        for key, reference in list(self._alive.items()):
            storage = reference()
            if storage is None:
                del self._alive[key]
            else:
                total += storage.nbytes()
        return total

    def mark(self) -> int:
        """Bytes alive now, from which on the peak is counted anew."""
        self.peak = self.now()
        return self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operation on its local tensor comes by again
        result = func(*args, **(kwargs or {}))
        self._note((args, kwargs, result))
        self.peak = max(self.peak, self.now())
        return result
