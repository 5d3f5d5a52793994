"""One safetensors file: its header checked against its size, its data written as it comes.

The format: eight bytes with the length of the header (little-endian), the header (JSON: name to dtype, shape and place; spaces may
follow it), then the data of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.errors import CheckpointError

#: Names of dtypes in headers.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: The longest header that the format allows.
_MAX_HEADER = 100_000_000
#: Bytes kept free for a header before its file's tensors are known, its length included: about two thousand tensors.
_ROOM = 1 << 18


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: dtype, shape, and the place of its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, none of them read.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header is not sound; the sentence names it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) < 8 or 8 + length > size or length > _MAX_HEADER:
                raise _damaged(
                    path, f"a file of {size} bytes cannot hold a header of {length}" if len(prefix) == 8 else "it ends in its first 8 bytes"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise _damaged(path, f"its header is no JSON object ({error})") from error
    _check_places(path, tensors, 8 + length, size)
    return tensors


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}")


def _entry(path: Path, name: str, entry: Any, origin: int) -> StoredTensor:
    """A tensor's line of the header, checked by itself; ``origin`` is where the data begin."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"the header does not say where '{name}' is") from error
    if dtype not in DTYPES:
        raise CheckpointError(f"{path} holds '{name}' as {dtype!r}, which cannot be read here: only {', '.join(DTYPES)} can")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise _damaged(path, f"shape {list(shape)} or offsets {[start, stop]} of '{name}' are not whole numbers from 0 on")
    stored = StoredTensor(DTYPES[dtype], shape, origin + start)
    if stop - start != stored.num_bytes:
        raise _damaged(path, f"'{name}' takes {stop - start} bytes, but {dtype} {list(shape)} needs {stored.num_bytes}")
    return stored


def _check_places(path: Path, tensors: dict[str, StoredTensor], origin: int, size: int) -> None:
    """Refuse gaps, overlaps, and a file that is shorter or longer than its tensors."""
    end = origin
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if stored.start != end:
            raise _damaged(path, f"'{name}' begins at byte {stored.start}, where {end} is due")
        end += stored.num_bytes
    if end != size:
        raise _damaged(path, f"it has {size} bytes, its header asks for {end}")


class TensorFileWriter:
    """Writes one file tensor by tensor. Room for the header is left at the front and filled at the end.

    Every method that touches the file may raise ``OSError``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.num_bytes = 0
        self._lines = ['"__metadata__":{"format":"pt"}']
        self._header_bytes = 8 + 2 + len(self._lines[0])
        self._file = path.open("wb")
        self._file.seek(_ROOM)

    def _line(self, name: str, tensor: torch.Tensor) -> str:
        place = [self.num_bytes, self.num_bytes + tensor.nbytes]
        return f"{json.dumps(name)}:{json.dumps({'dtype': _NAMES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': place})}"

    def takes(self, name: str, tensor: torch.Tensor, *, limit: int) -> bool:
        """Whether one more tensor leaves the data within ``limit`` bytes and the header within its room; the first always fits."""
        room = self._header_bytes + 1 + len(self._line(name, tensor)) <= _ROOM
        return not self.names or (room and self.num_bytes + tensor.nbytes <= limit)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a contiguous tensor on the CPU."""
        line = self._line(name, tensor)
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._lines.append(line)
        self._header_bytes += 1 + len(line)
        self.names.append(name)
        self.num_bytes += tensor.nbytes

    def close(self) -> None:
        """Fill in the header and bring the file to the disk."""
        header = ("{" + ",".join(self._lines) + "}").encode().ljust(_ROOM - 8)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", len(header)) + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def rename(self, name: str) -> None:
        """Give the closed file another name in its folder."""
        self.path = self.path.rename(self.path.with_name(name))

    def discard(self) -> None:
        """Remove the file, whatever state it is in."""
        try:
            self._file.close()
        except OSError:  # what was still buffered does not fit either
            pass
        self.path.unlink(missing_ok=True)
