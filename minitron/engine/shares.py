"""Which numbers of which tensor this rank keeps, for checkpoints that any engine loads on any number of ranks.

Entries are named ``weight/<parameter>`` and ``optimizer/<parameter>/<key>`` by every engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from minitron import dist
from minitron.core.share import Share, Span, whole
from minitron.errors import CheckpointError


def share_of(tensor: torch.Tensor) -> Share:
    """What of a parameter lies here: rows of a sharded one, all of one that every rank has."""
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape, copy=dist.rank(), num_copies=dist.world_size())
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    local, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    assert not any(offset[1:]), "only rows are sharded"
    copy, num_copies = 0, 1
    for number, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            copy, num_copies = copy * mesh.size(number) + coordinate[number], num_copies * mesh.size(number)
    row = math.prod(tensor.shape[1:])
    return Share(tuple(tensor.shape), offset[0] * row, offset[0] * row + math.prod(local), copy, num_copies)


def shares_of(root: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Share]:
    """Of every entry of :func:`minitron.engine.state.pack`."""
    found = {}
    for name, parameter in root.named_parameters():
        found[f"weight/{name}"] = share_of(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{name}/{key}"] = share_of(value) if torch.is_tensor(value) else share_of(torch.tensor(value))
    return found


def spans_from(shares: Mapping[str, Share]) -> Callable[[str, tuple[int, ...]], Span]:
    """From the name and shape of any saved entry to the numbers of it that belong here: an optimiser's moments lie with their parameter."""

    def span(key: str, shape: tuple[int, ...]) -> Span:
        kind, _, rest = key.partition("/")
        share = shares.get(f"weight/{rest.rpartition('/')[0] if kind == 'optimizer' else rest}")
        return (share.start, share.stop) if share is not None and share.shape == shape else (0, math.prod(shape))

    return span


def differing_weights(shares: Mapping[str, Share], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The first weight that a checkpoint and a model do not have in common; empty when there is none."""
    here = {name: share.shape for name, share in shares.items() if name.startswith("weight/")}
    there = {name: shape for name, shape in shapes.items() if name.startswith("weight/")}
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            return f"'{name.removeprefix('weight/')}' is {_shape(there.get(name))} in it and {_shape(here.get(name))} in this model"
    return ""


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(list(shape))


@dataclass(frozen=True)
class Piece:
    """The run of a parameter's numbers that lies in flat tensor number ``flat``, from ``place`` on."""

    share: Share
    flat: int
    place: int


def zero_pieces(root: nn.Module, zero: Any, *, stage: int) -> dict[str, Piece]:
    """Where ZeRO keeps this rank's numbers of each parameter in its flat masters. ``zero`` is DeepSpeed's optimiser.

    Stages 1 and 2 cut the flat group of parameters into equal parts; stage 3 cuts each parameter, padded, and lays this rank's parts in a row.
    """
    if stage == 3:
        return _sharded_pieces(root, zero)
    found = {}
    for name, parameter in root.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            found[name] = Piece(Share(tuple(parameter.shape), 0, 0), 0, 0)
            continue
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        found[name] = Piece(Share(tuple(parameter.shape), start, start + size), mapping.param_group_index, mapping.hp_fragment_address.start)
    return found


def _sharded_pieces(root: nn.Module, zero: Any) -> dict[str, Piece]:
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    found = {}
    for flat, group in enumerate(zero.fp16_groups):
        place = 0
        for parameter in group:
            size, total = parameter.ds_tensor.ds_numel, math.prod(parameter.ds_shape)
            start, stop = (min(rank * size, total) for rank in (dist.rank(), dist.rank() + 1))
            found[names[id(parameter)]] = Piece(Share(tuple(parameter.ds_shape), start, stop), flat, place)
            place += size
    return found


def pack_flat(pieces: Mapping[str, Piece], masters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flat masters and moments as entries by parameter; views, not copies."""
    state = {}
    for name, piece in pieces.items():
        master, last = masters[piece.flat], piece.place + piece.share.stop - piece.share.start
        state[f"weight/{name}"] = master.detach()[piece.place : last]
        for key, value in optimizer.state.get(master, {}).items():
            flat = torch.is_tensor(value) and value.shape == master.shape
            state[f"optimizer/{name}/{key}"] = value.detach()[piece.place : last] if flat else torch.as_tensor(value)
    return state


def flat_shares(pieces: Mapping[str, Piece], masters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Share]:
    """Of every entry of :func:`pack_flat`."""
    found = {}
    for name, piece in pieces.items():
        master = masters[piece.flat]
        found[f"weight/{name}"] = piece.share
        for key, value in optimizer.state.get(master, {}).items():
            flat = torch.is_tensor(value) and value.shape == master.shape
            found[f"optimizer/{name}/{key}"] = piece.share if flat else share_of(torch.as_tensor(value))
    return found


def unpack_flat(
    pieces: Mapping[str, Piece], masters: list[torch.Tensor], optimizer: torch.optim.Optimizer, state: Mapping[str, torch.Tensor]
) -> None:
    """The inverse of :func:`pack_flat`, from entries that hold this rank's runs of numbers.

    Raises:
        CheckpointError: they hold others.
    """
    moments: list[dict[str, torch.Tensor]] = [{} for _ in masters]
    for name, piece in pieces.items():
        master, size = masters[piece.flat], piece.share.stop - piece.share.start
        saved = state.get(f"weight/{name}")
        if saved is None or saved.numel() != size:
            found = "nothing" if saved is None else f"{saved.numel()} numbers"
            raise CheckpointError(f"the state holds {found} of '{name}', this rank needs {size}: it is that of another number of ranks or engine")
        master.data[piece.place : piece.place + size].copy_(saved.reshape(-1))
        prefix = f"optimizer/{name}/"
        for key, value in ((key[len(prefix) :], value) for key, value in state.items() if key.startswith(prefix)):
            if value.ndim == 0:
                moments[piece.flat].setdefault(key, value.to(master.device, copy=True))
                continue
            into = moments[piece.flat].setdefault(key, torch.zeros_like(master))
            into[piece.place : piece.place + size].copy_(value.reshape(-1))
    for master, entries in zip(masters, moments, strict=True):
        if entries:
            optimizer.state[master] = entries
