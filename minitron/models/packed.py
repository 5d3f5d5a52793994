"""Packed model folders: sparse matrices as bitmap and values, everything else as it is. Bit-exact both ways.

A packed folder holds ``packed.safetensors`` (or shards with an index), ``packed.json``, and the config and companions of the model. A packed matrix
``name`` is three tensors: ``name.bitmap``, ``name.values`` and ``name.row_starts`` (:class:`minitron.ops.bitmap.BitmapWeight`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.manifest import write_text
from minitron.core.sparsity import FILE
from minitron.errors import ArchitectureError, CheckpointError
from minitron.models.family import discover
from minitron.models.lazy import FolderWeights, build_lazily, mismatch
from minitron.models.load import PACKED_FILE, config_of
from minitron.models.publish import copy_licence
from minitron.models.weights import Kept, WeightReader, copy_companions, write_weights
from minitron.ops.bitmap import BitmapWeight, check_bitmap, pack_bitmap, unpack_bitmap

_FORMAT, _VERSION, _STEM = "minitron packed weights", 1, "packed"
#: Files beside the weights that follow them, besides those that follow every model.
_BESIDE = ("config.json", FILE, "minitron.json", "README.md")
_PARTS = ("bitmap", "values", "row_starts")


@dataclass(frozen=True)
class Packing:
    """What packing has come to: matrices that are packed, and bytes of all tensors before and after."""

    num_matrices: int
    dense_bytes: int
    packed_bytes: int


def pack_folder(folder: Path, out: Path, *, shard_bytes: int = 5 * 10**9) -> Packing:
    """Write a packed copy of a model folder; every matrix is packed that gets smaller by it. Holds one tensor at a time.

    Raises:
        CheckpointError: the folder is none, no matrix has enough zeros, or ``out`` is in use or not writable.
    """
    shapes: dict[str, list[int]] = {}
    sizes = {"dense": 0, "packed": 0}

    def tensors(reader: WeightReader) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in reader.items(reader.files):
            sizes["dense"] += tensor.nbytes
            packed = _smaller(tensor)
            if packed is None:
                sizes["packed"] += tensor.nbytes
                yield name, tensor
                continue
            shapes[name] = list(tensor.shape)
            sizes["packed"] += packed.num_bytes
            for part in _PARTS:
                yield f"{name}.{part}", getattr(packed, part)

    with WeightReader(folder) as reader, _new_folder(out) as partial:
        write_weights(partial, tensors(reader), stem=_STEM, shard_bytes=shard_bytes)
        if not shapes:
            raise CheckpointError(f"no matrix in {folder} would be smaller packed: 16-bit weights are from one zero in sixteen on")
        write_text(partial / PACKED_FILE, json.dumps({"format": _FORMAT, "version": _VERSION, "matrices": shapes}, indent=1) + "\n")
        _copy_beside(folder, partial)
    return Packing(len(shapes), sizes["dense"], sizes["packed"])


def unpack_folder(folder: Path, out: Path, *, shard_bytes: int = 5 * 10**9) -> Packing:
    """Write the model of a packed folder as an ordinary one again; its tensors are those that were packed, bit for bit.

    Raises:
        CheckpointError: the folder is not packed or damaged, or ``out`` is in use or not writable.
    """
    dense = 0

    def tensors(reader: PackedReader) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal dense
        for name in reader.files:
            tensor = reader.get(name)
            dense += tensor.nbytes
            yield name, tensor

    with PackedReader(folder) as reader, _new_folder(out) as partial:
        write_weights(partial, tensors(reader), shard_bytes=shard_bytes)
        _copy_beside(folder, partial)
        return Packing(len(reader.matrices), dense, reader.num_bytes)


class PackedReader:
    """Tensors of a packed folder by the names they had, one at a time. ``matrices`` has the shapes of those that are packed.

    Opening it checks the headers of all files, reading a matrix checks that it agrees with itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.matrices = folder, _read_matrices(folder)
        self._inner = WeightReader(folder, stem=_STEM)
        owners = {f"{name}.{part}": name for name in self.matrices for part in _PARTS}
        missing = next((part for part in owners if part not in self._inner.files), None)
        if missing is not None:
            raise CheckpointError(f"{folder} lacks '{missing}' that its {PACKED_FILE} asks for")
        #: The file that holds each tensor.
        self.files = {owners.get(name, name): file for name, file in self._inner.files.items()}

    def __enter__(self) -> PackedReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        self._inner.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        sizes = ((self._inner.shape_of(name), self._inner.dtype_of(name)) for name in self._inner.files)
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """A tensor's shape when it is unpacked."""
        return tuple(self.matrices[name]) if name in self.matrices else self._inner.shape_of(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._inner.dtype_of(f"{name}.values" if name in self.matrices else name)

    def packed(self, name: str) -> BitmapWeight:
        """A packed matrix, its leading dimensions as one.

        Raises:
            CheckpointError: it does not agree with itself or with the shape that it is to have.
        """
        shape = self.matrices[name]
        bitmap, values, row_starts = (self._inner.get(f"{name}.{part}") for part in _PARTS)
        weight = BitmapWeight(bitmap, values, row_starts, (torch.Size(shape[:-1]).numel(), shape[-1]))
        check_bitmap(weight, name=f"'{name}' in {self.folder}")
        return weight

    def get(self, name: str, kept: Kept = ()) -> torch.Tensor:
        """One tensor, unpacked, or the part of it that ``kept`` names, as :meth:`WeightReader.get`.

        Raises:
            CheckpointError: as :meth:`packed`.
        """
        if name not in self.matrices:
            return self._inner.get(name, kept)
        tensor = unpack_bitmap(self.packed(name)).view(self.matrices[name])
        for dim, indices in enumerate(kept):
            tensor = tensor if indices is None else tensor.index_select(dim, indices)
        return tensor


def load_packed(
    folder: Path, *, dtype: torch.dtype, device: torch.device | str | None = None, sparse: bool = False, attention: str = "auto"
) -> nn.Module:
    """The model of a packed folder, in eval mode.

    Args:
        sparse: leave packed matrices of linear layers packed, each in a ``SparseLinear``; otherwise the model is dense.

    Raises:
        CheckpointError: the folder is not packed, damaged, or its tensors are not those of its config.
    """
    place = torch.device(device) if device is not None else dist.device()
    with PackedReader(folder) as reader:
        config = config_of(folder)
        config.dtype = dtype
        try:
            family = discover(config)
        except ArchitectureError as error:
            raise CheckpointError(f"{folder} is not read packed ({error}): run 'minitron unpack {folder} OUT', and load OUT") from error
        wrong = mismatch(reader, family)
        if wrong:
            raise CheckpointError(f"the packed weights in {folder} do not match its config: {wrong}")
        source = FolderWeights(reader, family)
        model = build_lazily(config, family, source, dtype=dtype, attention=attention)
        if sparse:
            _put_sparse(model, reader, source, dtype=dtype, device=place)
        for name, parameter in list(model.named_parameters()):
            torch.utils.swap_tensors(parameter, nn.Parameter(source.read(name).to(place), requires_grad=parameter.requires_grad))
    return model.to(place)


def _put_sparse(model: nn.Module, reader: PackedReader, source: FolderWeights, *, dtype: torch.dtype, device: torch.device) -> None:
    """Sparse layers in place of the linear ones whose weight is packed."""
    from minitron.ops.sparse_matmul import SparseLinear

    for name, module in list(model.named_modules()):
        stored = source.whole(f"{name}.weight") if type(module) is nn.Linear else None
        if stored is None or stored not in reader.matrices:
            continue
        bias = source.read(f"{name}.bias").to(device) if module.bias is not None else None
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, SparseLinear.from_bitmap(reader.packed(stored).to(device, dtype), bias))


def _smaller(tensor: torch.Tensor) -> BitmapWeight | None:
    """A tensor packed, its leading dimensions as one; None where that is not smaller.

    A negative zero has bits too: it is kept as a value, so that unpacking gives back every bit.
    """
    if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return None
    matrix = tensor.flatten(0, -2)
    negative = (matrix == 0) & matrix.signbit()
    num_kept = int(torch.count_nonzero(matrix)) + int(negative.sum())
    if len(matrix) * (-(-matrix.shape[1] // 8) + 8) + 8 + num_kept * matrix.itemsize >= matrix.nbytes:
        return None
    packed = pack_bitmap(matrix.masked_fill(negative, 1.0))
    return replace(packed, values=matrix[(matrix != 0) | negative])


def _read_matrices(folder: Path) -> dict[str, list[int]]:
    """Name → shape of what is packed in a folder.

    Raises:
        CheckpointError: it is not packed, or the file that says so is damaged or of a later version.
    """
    path = folder / PACKED_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no packed model: it has no {PACKED_FILE}, which 'minitron pack' writes")
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        told, version, matrices = document["format"], document["version"], document["matrices"]
        sound = all(len(shape) >= 2 and all(type(size) is int and size >= 0 for size in shape) for shape in matrices.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: it does not say what is packed") from error
    if told != _FORMAT or version != _VERSION or not sound:
        raise CheckpointError(f"{path} is of another kind: format {told!r}, version {version!r}, where {_FORMAT!r}, version {_VERSION} is read here")
    return matrices  # type: ignore[no-any-return]


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when all in it is whole, and is removed when anything fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty: give the name of a new folder")
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_beside(source: Path, target: Path) -> None:
    """Config, companions, licence and records."""
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    copy_companions(source, target)
    copy_licence(source, target)
