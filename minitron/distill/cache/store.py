"""A cache on disk: which sequence lies where, what it was made of, and reading it.

``cache.json`` says what the cache is, ``index.json`` lists its shards with their SHA-256, ``keys.safetensors`` the keys of their sequences in
order, ``head.safetensors`` the teacher's head where hidden states are stored. A shard is a safetensors file whose tensors are
[sequences, length, …], all of one length.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.checkpoint.files import file_digest
from minitron.distill.cache.settings import CacheConfig
from minitron.errors import CheckpointError
from minitron.models.tensor_file import StoredTensor, read_header

HEADER, INDEX, KEYS, HEAD = "cache.json", "index.json", "keys.safetensors", "head.safetensors"
KEY_BYTES = 16
#: Open files of a reader. Sequences come in the order in which they were stored, unless the seed has changed.
_OPEN_FILES = 64


def sequence_key(input_ids: torch.Tensor) -> bytes:
    """The content of a sequence [length] as 128 bits: the same for any order, batch and number of ranks."""
    return hashlib.blake2b(input_ids.numpy().astype("<u4").tobytes(), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class CacheHeader:
    """What a cache is. ``teacher``, ``tokenizer`` and ``data`` are fingerprints; ``text`` holds the settings that cut text into sequences.

    ``drawn`` lists for every phase of the training its sequence length and number of sequences, ``num_validation`` the held-out ones.
    ``bytes_per_token`` is the signal's share alone; ``scale`` and ``cap`` belong to the head.
    """

    signal: str
    k: int
    num_samples: int
    proposal: float
    teacher: str
    tokenizer: str
    data: str
    text: dict[str, Any]
    seed: int
    drawn: list[list[int]]
    num_validation: int
    vocab_size: int
    hidden_size: int
    dtype: str
    bytes_per_token: int
    num_sequences: int = 0
    num_tokens: int = 0
    scale: float = 1.0
    cap: float | None = None
    version: int = 1

    @property
    def config(self) -> CacheConfig:
        """The settings that the signal was stored by."""
        return CacheConfig(signal=self.signal, k=self.k, num_samples=self.num_samples, proposal=self.proposal)

    def to_json(self) -> str:
        """For ``cache.json``."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> CacheHeader:
        """The header of a finished cache.

        Raises:
            CheckpointError: the folder is none, or not a whole one.
        """
        path = folder / HEADER
        if not path.is_file() or not (folder / INDEX).is_file():
            state = "is no finished cache" if folder.is_dir() else "does not exist"
            raise CheckpointError(f"{folder} {state} of a teacher's signal: run 'minitron cache' with this run's settings, or give cache.path")
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


@dataclass
class _Shard:
    """An open file of a reader."""

    file: int
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


class CacheStore:
    """Reads sequences by their content. A shard's SHA-256 is compared when it is first opened; after that only rows that are asked for are read."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError: the folder is no finished cache, or its index is damaged."""
        self.folder, self.header = folder, CacheHeader.read(folder)
        try:
            index = json.loads((folder / INDEX).read_text())
            self._shards: list[dict[str, Any]] = index["shards"]
            counts = [int(shard["num_sequences"]) for shard in self._shards]
            digests = {name: str(index["files"][name]) for name in index["files"]}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from error
        self._digests = digests
        keys = self.whole_file(KEYS)["keys"].numpy()
        self._ends = np.cumsum(counts)
        if len(keys) != sum(counts):
            raise CheckpointError(f"{folder / KEYS} is damaged: it has {len(keys)} keys for {sum(counts)} sequences")
        self._keys = np.ascontiguousarray(keys)
        halves = self._keys.view("<u8")[:, 0]
        self._order = np.argsort(halves, kind="stable")
        self._halves = halves[self._order]
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._sound: set[int] = set()

    def whole_file(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file that is not a shard, its digest compared.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        from safetensors.torch import load_file

        path = self.folder / name
        self._compare(path, self._digests.get(name))
        return load_file(str(path))

    def read(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored of [batch, length] ids, each [batch, length, …] on the CPU, pinned where a GPU is.

        Raises:
            CheckpointError: a sequence is not in the cache, or its shard is damaged.
        """
        places = [self._place(row) for row in input_ids]
        found: dict[str, torch.Tensor] = {}
        for number, (shard, row) in enumerate(places):
            opened = self._opened(shard)
            for name, stored in opened.tensors.items():
                if name not in found:
                    shape = (len(places), *stored.shape[1:])
                    found[name] = torch.empty(shape, dtype=stored.dtype, pin_memory=torch.cuda.is_available())
                size = stored.num_bytes // stored.shape[0]
                self._fill(shard, opened.file, found[name][number], stored.start + row * size)
        return found

    def _place(self, input_ids: torch.Tensor) -> tuple[int, int]:
        """Shard and row of a sequence."""
        key = np.frombuffer(sequence_key(input_ids), dtype=np.uint8)
        start = int(np.searchsorted(self._halves, key.view("<u8")[0]))
        for position in self._order[start:]:
            if self._keys[position].view("<u8")[0] != key.view("<u8")[0]:
                break
            if np.array_equal(self._keys[position], key):
                shard = int(np.searchsorted(self._ends, position, side="right"))
                return shard, int(position - (self._ends[shard - 1] if shard else 0))
        raise CheckpointError(
            f"training draws a sequence that {self.folder} does not hold: run 'minitron cache' with the data, training and seed of this run"
        )

    def _opened(self, number: int) -> _Shard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder / self._shards[number]["file"]
        if number not in self._sound:
            self._compare(path, self._shards[number]["sha256"])
            self._sound.add(number)
        opened = _Shard(os.open(path, os.O_RDONLY), read_header(path))
        self._open[number] = opened
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1].file)
        return opened

    def _compare(self, path: Path, digest: str | None) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} of the cache is missing: remove {self.folder} and run 'minitron cache' again")
        if file_digest(path) != digest:
            raise CheckpointError(f"{path} of the cache is damaged (its SHA-256 has changed): remove {self.folder} and run 'minitron cache' again")

    def _fill(self, number: int, file: int, row: torch.Tensor, offset: int) -> None:
        """Read a row of a tensor in place; a read may come in pieces."""
        target = memoryview(row.view(-1).view(torch.uint8).numpy().data)
        while len(target):
            count = os.preadv(file, [target], offset)
            if count == 0:
                raise CheckpointError(f"{self.folder / self._shards[number]['file']} of the cache has become shorter while it was read")
            target, offset = target[count:], offset + count


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files in a folder, for the index."""
    return {name: file_digest(folder / name) for name in names}
