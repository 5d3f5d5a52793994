"""What collectives carry: bytes per rank, within a node and between nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as distributed
from torch.utils._python_dispatch import TorchDispatchMode

from minitron import dist


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


#: Operator → its kind, and which argument holds the whole tensors (the group's inputs or results put together).
_KINDS = {
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
}
#: A rank's payload as a multiple of (n - 1) / n of the whole tensors, in a ring.
_WEIGHT = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1, "reduce": 1}
_SILENT = ("c10d::barrier", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


class TrafficCounter(TorchDispatchMode):
    """Counts, by (kind, link), the bytes that a rank receives when a ring of the group carries a collective.

    A whole tensor of W bytes over n ranks costs each of them W · (n − 1) / n in an all-gather or reduce-scatter and twice that in an
    all-reduce. The link is ``node`` when all ranks of the group are on one node, else ``network``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[tuple[str, str]] = Counter()
        self.num_calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name
        if name in _KINDS:
            self._count(name, args, kwargs or {})
        else:
            assert not name.startswith(("c10d::", "_c10d_functional::")) or name in _SILENT, f"{name} is not counted"
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind, whole = _KINDS[name]
        if name.startswith("c10d::"):
            group = distributed.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        else:
            group = args[-1]
            if isinstance(group, str):
                group = distributed.distributed_c10d._resolve_process_group(group)
        ranks = distributed.get_process_group_ranks(group)
        size = sum(tensor.nbytes for tensor in _tensors(args[whole]))
        if name == "_c10d_functional::all_gather_into_tensor":
            size *= len(ranks)
        local = dist.local_world_size()
        link = "node" if len({rank // local for rank in ranks}) == 1 else "network"
        self.num_bytes[kind, link] += size * _WEIGHT[kind] * (len(ranks) - 1) // len(ranks)
        self.num_calls[kind, link] += 1

    def total(self, link: str) -> int:
        """All bytes over a link."""
        return sum(count for (_, where), count in self.num_bytes.items() if where == link)
