"""The files of a checkpoint: a safetensors file for each rank, written from host memory and read in parts, and the checksum beside each file.

Only the header (JSON) and plain numbers are ever read, so that nothing in a checkpoint can execute.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.core.share import Share, Span

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: Bytes written or hashed at a time; large enough that Python's share of the work is nothing.
_CHUNK = 1 << 24
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Part:
    """One tensor of a rank's file: the numbers ``start`` to ``stop`` of a whole of ``shape``, at byte ``place`` of the file.

    ``private`` ones are a rank's own and no part of anything.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    place: int
    private: bool


def sum_file(path: Path) -> Path:
    """Where a file's checksum stands, in the form of the ``sha256sum`` tool."""
    return path.with_name(f"{path.name}.sha256")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_CHUNK):
            sha.update(block)
    return sha.hexdigest()


def write_sum(path: Path, digest: str) -> None:
    """Put a digest beside its file and both on the disk; the name appears last, so that it says that the file is whole."""
    partial = path.with_name(f"{path.name}.sum.partial")
    with partial.open("w") as handle:
        handle.write(f"{digest}  {path.name}\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, sum_file(path))


def is_sound(path: Path) -> bool:
    """Whether a file is what its checksum says.

    Raises:
        OSError: one of them cannot be read.
    """
    return sum_file(path).read_text(errors="replace").split() == [file_digest(path), path.name]


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # not every file system can
        pass
    finally:
        os.close(descriptor)


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write JSON with its checksum."""
    text = json.dumps(document).encode()
    with path.open("wb") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    write_sum(path, hashlib.sha256(text).hexdigest())


def read_document(path: Path) -> dict[str, Any]:
    """Read such JSON.

    Raises:
        OSError, ValueError: it is missing, damaged, or no JSON object.
    """
    if not is_sound(path):
        raise ValueError(f"{path.name} does not match its checksum")
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def write_share(path: Path, tensors: dict[str, torch.Tensor], shares: dict[str, Share], *, given_up: Callable[[], bool] = lambda: False) -> None:
    """One rank's file and its checksum. Tensors are contiguous and on the CPU; those in ``shares`` hold what the share calls ``written``.

    Raises:
        OSError: the disk is full or not writable.
    """
    header: dict[str, Any] = {}
    parts: dict[str, list[Any]] = {}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
        if name in shares:
            parts[name] = [list(shares[name].shape), shares[name].written[0]]
    text = json.dumps({"__metadata__": {"format": "pt", "shares": json.dumps(parts)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for view in (memoryview(struct.pack("<Q", len(text)) + text), *(_bytes_of(tensor) for tensor in tensors.values())):
            for begin in range(0, len(view), _CHUNK):
                if given_up():
                    return
                block = view[begin : begin + _CHUNK]
                sha.update(block)
                while block:
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    write_sum(path, sha.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def read_parts(path: Path) -> dict[str, Part]:
    """What a rank's file holds.

    Raises:
        OSError, ValueError: it cannot be read, or its header is not sound.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path.name} has no safetensors header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict) or "shares" not in header.get("__metadata__", {}):
        raise ValueError(f"{path.name} is no share of a checkpoint")
    shares = json.loads(header.pop("__metadata__")["shares"])
    found = {}
    for name, entry in header.items():
        dtype, local, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        shape, start = shares.get(name, (local, 0))
        found[name] = Part(dtype, tuple(shape), start, start + (end - begin) // dtype.itemsize, 8 + length + begin, name not in shares)
        if 8 + length + end > size:
            raise ValueError(f"{path.name} ends before '{name}'")
    return found


def read_span(path: Path, part: Part, span: Span, out: torch.Tensor) -> None:
    """Read the numbers of a span, in terms of the whole, into the flat ``out`` of their dtype.

    Raises:
        OSError, ValueError: it cannot be read, or ends early.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(part.place + (span[0] - part.start) * part.dtype.itemsize)
        view = _bytes_of(out)
        while view:
            count = file.readinto(view)
            if not count:
                raise ValueError(f"{path.name} ends early")
            view = view[count:]
