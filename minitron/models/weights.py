"""Safetensors folders: read and written tensor by tensor."""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.core.manifest import write_text
from minitron.errors import CheckpointError
from minitron.models.load import check_has_weights
from minitron.models.tensor_file import StoredTensor, TensorFileWriter, read_header

Array = np.ndarray[Any, np.dtype[Any]]
#: Indices that stay, ascending, per dimension; None keeps a dimension whole.
Kept = Sequence[torch.Tensor | None]
#: Integers of the same width, as which any dtype is copied bit for bit.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Bytes read at once of a tensor that is cut: they stay in the processor's cache until they are copied out.
_BLOCK = 4 << 20
#: Bytes that the system is asked to read while the block before them is worked on.
_AHEAD = 32 << 20
#: From this size on a tensor gets pages of its own.
_OWN_PAGES = 256 << 20

#: Files of a model folder that follow the weights unchanged.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "*.model",
)


class WeightReader:
    """Tensors of a model folder by name, one at a time, never the whole model.

    Opening it checks the headers of all files. Data are read by ``pread``, not mapped, so that what is resident is what is held.
    Files stay open from their first use until ``close`` or the end of a ``with``. ``stem`` is what the files' names begin with.
    """

    def __init__(self, folder: Path, *, stem: str = "model") -> None:
        check_has_weights(folder, stem=stem)
        self.folder = folder
        self._open: dict[str, FileIO] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        index = folder / f"{stem}.safetensors.index.json"
        headers: dict[str, dict[str, StoredTensor]] = {}
        #: The file that holds each tensor.
        self.files: dict[str, str] = {}
        if index.is_file():
            self.files = json.loads(index.read_text())["weight_map"]
            headers = {file: read_header(folder / file) for file in sorted(set(self.files.values()))}
        else:
            single = f"{stem}.safetensors"
            headers = {single: read_header(folder / single)}
            self.files = dict.fromkeys(headers[single], single)
        for name, file in self.files.items():
            if name not in headers[file]:
                raise CheckpointError(f"{folder / file} has no weight '{name}', although {index.name} says so")
        self._stored = {name: headers[file][name] for name, file in self.files.items()}

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} has no weight '{name}'")
        return self._stored[name]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return self._tensor(name).shape

    def dtype_of(self, name: str) -> torch.dtype:
        """A tensor's dtype, from the header."""
        return self._tensor(name).dtype

    def get(self, name: str, kept: Kept = ()) -> torch.Tensor:
        """One tensor, or the part of it that ``kept`` names: memory for that part and a block of 4 MB, whatever its full size.

        Args:
            kept: ascending indices that stay, one entry per dimension; None, or no entry, keeps a dimension whole.

        Raises:
            CheckpointError: it is not there, or its file has changed or become unreadable since it was opened.
        """
        stored = self._tensor(name)
        rows = [None if i is None else i.numpy() for i in (*kept, *[None] * (len(stored.shape) - len(kept)))]
        assert all(i is None or not len(i) or (0 <= i[0] and i[-1] < size) for i, size in zip(rows, stored.shape, strict=True)), name
        shape = [size if i is None else len(i) for i, size in zip(rows, stored.shape, strict=True)]
        tensor = _new_tensor(shape, stored.dtype)
        bits = tensor.view(_BITS[stored.dtype.itemsize]).numpy()
        self._fill(bits, self.files[name], stored.start, stored.shape, rows)
        return tensor

    def items(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors, one after another."""
        for name in names:
            yield name, self.get(name)

    def _fill(self, out: Array, file: str, start: int, shape: tuple[int, ...], kept: Sequence[Array | None]) -> None:
        """Fill ``out`` with the kept part of an array of ``shape`` that begins at byte ``start``, a block of rows at a time."""
        if all(indices is None for indices in kept):
            return self._read(out, file, start)
        row_bytes = math.prod(shape[1:]) * out.itemsize
        rows = np.arange(shape[0]) if kept[0] is None else kept[0]
        if row_bytes > _BLOCK and len(shape) > 1:
            for place, row in enumerate(rows.tolist()):
                self._fill(out[place], file, start + row * row_bytes, shape[1:], kept[1:])
            return None
        step = max(1, _BLOCK // max(row_bytes, 1))
        bounds = np.searchsorted(rows, np.arange(0, shape[0] + step, step)).tolist()
        for low, high in pairwise(bounds):
            if low == high:
                continue
            first, last = int(rows[low]), int(rows[high - 1])
            block = self._block((last - first + 1, *shape[1:]), out.dtype)
            self._read(block, file, start + first * row_bytes)
            whole = high - low == len(block)
            _take(block, [None if whole else rows[low:high] - first, *kept[1:]], out[low:high])
        return None

    def _block(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The reader's one buffer, in the wanted form."""
        count = math.prod(shape) * dtype.itemsize
        if len(self._buffer) < count:
            self._buffer = torch.empty(count, dtype=torch.uint8)
        return self._buffer.numpy()[:count].view(dtype).reshape(shape)

    def _read(self, out: Array, file: str, start: int) -> None:
        """Fill a contiguous array from a place in a file."""
        view = out.reshape(-1).view(np.uint8).data
        try:
            if file not in self._open:
                self._open[file] = (self.folder / file).open("rb", buffering=0)
            handle = self._open[file].fileno()
            while len(view):
                count = os.preadv(handle, [view], start)
                if not count:
                    raise CheckpointError(f"{self.folder / file} is damaged: it became shorter while it was read")
                view, start = view[count:], start + count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, start, _AHEAD, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error.strerror}") from error


def _new_tensor(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor; a huge one in pages of its own, which go back to the system with it.

    On the heap of a process that keeps freed memory the place of an embedding is not reused by the head once a norm was put there.
    Smaller ones are better off on the heap: fresh pages for all of them took 3 s where cutting the same 3 GB took 1.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _OWN_PAGES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)


def _take(block: Array, kept: Sequence[Array | None], out: Array) -> None:
    """Copy the kept part of a block. numpy's take: 3.0 GB/s for columns of 16 bits on one core, torch's index_select 0.4 to 0.7."""
    cuts = [(dim, indices) for dim, indices in enumerate(kept) if indices is not None]
    if not cuts:
        out[...] = block
    for number, (dim, indices) in enumerate(cuts, 1):
        # mode="clip" writes into out directly; the indices are known to be in range
        block = np.take(block, indices, axis=dim, out=out if number == len(cuts) else None, mode="clip")


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = 5 * 10**9, stem: str = "model") -> int:
    """Write tensors as ``<stem>.safetensors``, or as shards with an index when they exceed ``shard_bytes``; holds one tensor at a time.

    Files get their names when all are whole; when anything fails none is left.

    Returns:
        The number of values.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    shards: list[TensorFileWriter] = []
    count = 0
    try:
        for name, tensor in tensors:
            flat = tensor.detach().cpu().contiguous()
            if not shards or not shards[-1].takes(name, flat, limit=shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(TensorFileWriter(folder / f"shard-{len(shards)}.safetensors"))
            shards[-1].add(name, flat)
            count += flat.numel()
            del tensor, flat  # or they would stay while the next one is made
        if not shards:
            raise CheckpointError(f"there are no weights to write to {folder}")
        shards[-1].close()
        _name_shards(folder, shards, stem)
    except BaseException as error:
        for shard in shards:
            shard.discard()
        if isinstance(error, OSError):
            raise CheckpointError(f"weights cannot be written to {folder}: {error.strerror}") from error
        raise
    return count


def _name_shards(folder: Path, shards: list[TensorFileWriter], stem: str) -> None:
    """Final names, and the index where there are several files."""
    if len(shards) == 1:
        shards[0].rename(f"{stem}.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        shard.rename(f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors")
        weight_map.update(dict.fromkeys(shard.names, shard.path.name))
    index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1))


def copy_companions(source: Path, target: Path) -> None:
    """Carry tokenizer, chat template and generation config over."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
