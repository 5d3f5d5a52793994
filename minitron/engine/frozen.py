"""Where a frozen model lies, whatever engine trains beside it: whole on every rank, sharded, or in CPU memory.

A sharded one is FSDP2's, also beside ZeRO: with a mesh and a dtype of its own, gathered block by block and never whole. The embedding and
the head are groups too, so the embedding is gathered for its lookup alone, and the head, whose forward nobody calls, for the loss alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from minitron import dist
from minitron.engine.lazy import LazyWeights
from minitron.engine.offload import offload_blocks

#: What engines are asked for. ``shard_node`` is ``shard`` among the ranks of each node, so that no weight travels between nodes.
PLACES = ("replicate", "shard", "shard_node", "offload")


def place_frozen(model: nn.Module, *, blocks: list[nn.Module], placement: str) -> nn.Module:
    """The model where one of :data:`PLACES` says; its forward is called as before. ``blocks`` are the repeated layers inside it.

    Weights that still lie in files are read here: of a sharded model each rank reads its own rows and nothing else.
    """
    assert placement in PLACES, placement
    if placement == "offload":
        return offload_blocks(model, blocks)
    if placement in ("shard", "shard_node"):
        shard_blocks(model, blocks, mesh=_mesh(node=placement == "shard_node"))
    weights = LazyWeights(model)
    weights.fill(device=dist.device())
    weights.close()
    return model.to(dist.device())


def _mesh(*, node: bool) -> DeviceMesh:
    """All ranks, or those of this node; a launcher numbers the ranks of a node in a row."""
    kind, world = dist.device().type, dist.world_size()
    if not node:
        return init_device_mesh(kind, (world,))
    local = dist.local_world_size()
    return init_device_mesh(kind, (world // local, local), mesh_dim_names=("node", "rank"))["rank"]


def shard_blocks(model: nn.Module, blocks: list[nn.Module], *, mesh: DeviceMesh) -> None:
    """Shard each block, each matrix outside of them that no two modules share, and what is left in the root."""
    for part in [*blocks, *_own_groups(model, blocks)]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    # A root keeps what it gathered, in expectation of a backward, unless told otherwise.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _own_groups(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Modules outside the blocks that hold a matrix of their own: the embedding and the head, unless these are tied.

    A tied matrix stays with the root and is whole during a forward: two modules that share a weight must lie in one group.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        leaf = next(module.children(), None) is None
        if leaf and id(module) not in inside and any(p.ndim > 1 for p in own) and all(uses[id(p)] == 1 for p in own):
            found.append(module)
    return found


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Parameters of a placed model as whole tensors for the length of the context; every rank of their group must enter it."""
    whole = [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in parameters]
    yield whole
    whole.clear()
