"""What a training sends: bytes per rank and optimiser step, within a node and between nodes. Pure functions.

A collective over n ranks that make up a whole tensor of W bytes costs each rank W · (n − 1) / n in an all-gather or reduce-scatter and twice that
in an all-reduce: what a ring delivers to it. All of it counts for the network when the group has ranks on several nodes. Sums of a few numbers
(token counts, gradient norms) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron.core.architecture import Architecture
from minitron.core.memory import Setup


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in an optimiser step for one purpose, over links within its node and over the network."""

    node: float = 0.0
    network: float = 0.0


def _over(size: float, group: int, setup: Setup) -> Traffic:
    """A ring over ``group`` neighbouring ranks."""
    size = size * (group - 1) / group
    return Traffic(node=size) if setup.node_size % group == 0 else Traffic(network=size)


def training_traffic(student: Architecture, teachers: Sequence[Architecture], setup: Setup, *, extra: int = 0) -> dict[str, Traffic]:
    """Traffic by purpose; ``extra`` are trained numbers beside the student (maps of losses on states).

    FSDP gathers everything for the forward and the blocks once more for the backward, because embedding and head stay whole in between, and
    reduces gradients in float32 in every micro-step; copies of a shard are summed once a step. ZeRO 1 and 2 sum whole gradients (2 in every
    micro-step) and gather the new weights; ZeRO-3 gathers for forward and backward (less where its cache of gathered weights holds them).
    """
    count, micro, world = student.num_parameters + extra, setup.num_micro_batches, setup.world_size
    found: dict[str, Traffic] = {}
    if setup.engine == "fsdp":
        shards = setup.shard_size
        gathered = setup.width * (2.0 * count - student.num_embedding_parameters - extra)
        found["student weights"] = _over(micro * gathered, shards, setup)
        found["gradients"] = _over(micro * 4.0 * count, shards, setup)
        copies = world // shards
        summed = 2.0 * 4.0 * count / shards * (copies - 1) / copies
        found["gradients between copies"] = Traffic(node=summed) if world == setup.node_size else Traffic(network=summed)
    elif setup.engine == "deepspeed":
        stage = setup.zero_stage
        found["gradients"] = _over(4.0 * count * (micro if stage >= 2 else 1) * (1 if stage == 3 else 2), world, setup)
        found["student weights"] = _over(setup.width * count * {0: 0, 1: 1, 2: 1, 3: 2 * micro}[stage], world, setup)
    if setup.placement == "shard":
        # A head that is the embedding is gathered with the forward and again for the loss.
        size = sum(t.num_parameters + (t.num_embedding_parameters if t.tied_embeddings else 0) for t in teachers)
        found["teacher"] = _over(micro * float(setup.teacher_width * size), setup.teacher_size, setup)
    return {name: row for name, row in found.items() if row.node or row.network}
