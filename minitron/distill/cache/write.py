"""Running a teacher over sequences and storing what it says: every rank its shards, whole ones kept when a stage goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.checkpoint.files import file_digest
from minitron.core.manifest import write_text
from minitron.distill.cache.belongs import Wanted
from minitron.distill.cache.compress import compress, uniform_draws
from minitron.distill.cache.settings import CacheConfig, bytes_per_token
from minitron.distill.cache.store import HEAD, HEADER, INDEX, KEY_BYTES, KEYS, CacheHeader, digests, sequence_key
from minitron.distill.teacher import TeacherSignal
from minitron.errors import CheckpointError, DataError, Interrupted
from minitron.log import Progress, get_logger
from minitron.models.tensor_file import TensorFileWriter
from minitron.ops.kd_loss import default_chunk_size

logger = get_logger(__name__)


@dataclass(frozen=True)
class Shard:
    """Sequences of one length that go into one file; the same on every rank. ``input_ids`` [sequences, length]."""

    number: int
    keys: tuple[bytes, ...]
    input_ids: torch.Tensor

    @property
    def file(self) -> str:
        """Its name."""
        return f"shard-{self.number:05d}.safetensors"

    @property
    def record(self) -> str:
        """The file that says it is whole; hidden, so that no fingerprint counts it."""
        return f".shard-{self.number:05d}.json"

    @property
    def digest(self) -> str:
        """A hash of its keys."""
        return hashlib.blake2b(b"".join(self.keys), digest_size=16).hexdigest()


def shards_of(sequences: Iterable[torch.Tensor], capacity: Callable[[int], int]) -> Iterator[Shard]:
    """Different sequences in the order drawn, gathered into shards; ``capacity`` says how many of a length make one."""
    seen: set[bytes] = set()
    waiting: dict[int, list[tuple[bytes, torch.Tensor]]] = {}
    number = 0

    def shard(rows: list[tuple[bytes, torch.Tensor]]) -> Shard:
        return Shard(number, tuple(key for key, _ in rows), torch.stack([ids for _, ids in rows]))

    for ids in sequences:
        if (key := sequence_key(ids)) in seen:
            continue
        seen.add(key)
        rows = waiting.setdefault(len(ids), [])
        rows.append((key, ids))
        if len(rows) == capacity(len(ids)):
            yield shard(waiting.pop(len(ids)))
            number += 1
    for rows in waiting.values():
        yield shard(rows)
        number += 1


def header_of(config: CacheConfig, wanted: Wanted, source: TeacherSignal) -> CacheHeader:
    """The header of a cache of a teacher that is in place, before anything is stored; every rank calls this.

    Raises:
        ConfigError: more tokens are asked for than the vocabulary has.
    """
    with source.head() as head:
        vocab, hidden, dtype = head.num_tokens, head.weight.shape[1], head.weight.dtype
    config.check_vocabulary(vocab)
    settings = {name: getattr(config, name) for name in ("signal", "k", "num_samples", "proposal")}
    made_of = {name: getattr(wanted, name) for name in ("teacher", "tokenizer", "data", "text", "seed", "drawn", "num_validation")}
    return CacheHeader(
        **settings,
        **made_of,
        vocab_size=vocab,
        hidden_size=hidden,
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_token=bytes_per_token(config, hidden_size=hidden, num_tokens=vocab, dtype_bytes=dtype.itemsize),
    )


class CacheWriter:
    """Fills a cache folder. What it writes does not depend on the number of ranks."""

    def __init__(
        self, folder: Path, source: TeacherSignal, header: CacheHeader, *, micro_batch: Callable[[int], int], shard_bytes: float, together: bool
    ) -> None:
        """``micro_batch`` gives the sequences of a forward by their length; ``together`` asks every rank for equally many forwards, because a
        teacher that is sharded over the ranks takes all of them."""
        self._folder, self._source, self._header, self._config = folder, source, header, header.config
        self._micro_batch, self._shard_bytes, self._together = micro_batch, shard_bytes, together
        self._keys: list[bytes] = []  # of all shards met so far, in order
        self._num_tokens = 0

    def write(self, sequences: Iterable[torch.Tensor], *, num_draws: int, stop: Callable[[], bool]) -> CacheHeader:
        """Store the signal of all ``sequences`` (of which ``num_draws`` come, some perhaps more than once); the header of what was written.

        Raises:
            Interrupted: a signal asked for a stop; whole shards stay.
            CheckpointError: a shard cannot be written.
            DataError: the teacher says NaN or infinity.
        """
        records: dict[str, str] = dist.broadcast_object(self._records() if dist.is_main() else {})
        bar = Progress("cache", total=num_draws, unit="sequence")
        for mine, num_forwards in self._rounds(shards_of(self._counted(sequences, bar), self._capacity), records):
            self._settle(self._write_shard(mine, num_forwards))
            if dist.any_rank(stop()):
                raise Interrupted("cache stopped; the same command goes on after the last whole file")
        header = replace(self._header, num_sequences=len(self._keys), num_tokens=self._num_tokens)
        whole = {KEYS: {"keys": torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(-1, KEY_BYTES)}}
        if header.signal == "hidden_states":
            with self._source.head() as head:
                header = replace(header, scale=head.transform.scale, cap=head.transform.cap)
                tensors = {"weight": head.weight, **({"bias": head.bias} if head.bias is not None else {})}
                whole[HEAD] = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()} if dist.is_main() else {}
        dist.barrier()
        self._settle(self._finish(header, whole) if dist.is_main() else "")
        return header

    def _counted(self, sequences: Iterable[torch.Tensor], bar: Progress) -> Iterator[torch.Tensor]:
        for ids in sequences:
            yield ids
            bar.advance()

    def _capacity(self, length: int) -> int:
        return max(1, int(self._shard_bytes // (self._header.bytes_per_token * length)))

    def _records(self) -> dict[str, str]:
        """Whole shards by their record's name, with the hash of their keys."""
        found = {}
        for path in self._folder.glob(".shard-*.json"):
            try:
                document = json.loads(path.read_text())
                if (self._folder / document["file"]).is_file():
                    found[path.name] = str(document["keys"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        if found:
            logger.info("  cache goes on: %d files are whole", len(found))
        return found

    def _rounds(self, shards: Iterator[Shard], records: dict[str, str]) -> Iterator[tuple[Shard | None, int]]:
        """This rank's shard, if any, and the forwards of the longest one, round after round; counts all shards on the way."""
        mine: Shard | None = None
        count = most = 0
        for shard in shards:
            self._keys += shard.keys
            self._num_tokens += shard.input_ids.numel()
            if records.get(shard.record) == shard.digest:
                continue
            if count == dist.rank():
                mine = shard
            count, most = count + 1, max(most, -(-len(shard.keys) // self._micro_batch(shard.input_ids.shape[1])))
            if count == dist.world_size():
                yield mine, most
                mine, count, most = None, 0, 0
        if count:
            yield mine, most

    def _write_shard(self, shard: Shard | None, num_forwards: int) -> str:
        """Store a shard; what went wrong, else nothing. An error is held back until all forwards of the round are done, which others wait for."""
        filler = torch.zeros(1, 2, dtype=torch.int64)
        batches = list(shard.input_ids.split(self._micro_batch(shard.input_ids.shape[1]))) if shard is not None else []
        parts: list[dict[str, torch.Tensor]] = []
        for number in range(num_forwards if self._together else len(batches)):
            if number >= len(batches):
                self._said(filler, [b"\0" * KEY_BYTES])
            elif shard is not None:
                parts.append(self._said(batches[number], shard.keys[sum(len(part) for part in batches[:number]) :]))
        if shard is None:
            return ""
        tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
        if not all(bool(tensor.isfinite().all()) for name, tensor in tensors.items() if name != "log_tail"):  # of which nothing may be left
            return "!the teacher's signal is NaN or infinite: its weights are damaged, or overflow in this dtype (try teacher.dtype=float32)"
        try:
            (self._folder / shard.record).unlink(missing_ok=True)  # of another division: it must not outlive its file
            save_whole(tensors, self._folder / shard.file)
            record = {
                "file": shard.file,
                "sha256": file_digest(self._folder / shard.file),
                "num_sequences": len(shard.keys),
                "length": shard.input_ids.shape[1],
                "keys": shard.digest,
            }
            write_text(self._folder / shard.record, json.dumps(record))
        except OSError as error:
            return str(error)
        return ""

    @torch.no_grad()
    def _said(self, input_ids: torch.Tensor, keys: Iterable[bytes]) -> dict[str, torch.Tensor]:
        """What is stored of [batch, length] ids, each [batch, length, …] on the CPU."""
        hidden = self._source.hidden(input_ids)
        if self._header.signal == "hidden_states":
            return {"hidden": hidden.cpu()}
        batch, length = input_ids.shape
        uniform = None
        if self._header.signal == "samples":
            draws = [uniform_draws(key, length, self._config.num_samples, seed=self._header.seed) for key, _ in zip(keys, range(batch), strict=False)]
            uniform = torch.cat(draws).to(hidden.device)
        chunk, parts = default_chunk_size(hidden.device), []
        with self._source.head() as head:
            head = head.ready(head.weight.dtype)
            for start in range(0, batch * length, chunk):
                rows = slice(start, start + chunk)
                logits = head.logits(hidden.flatten(0, 1)[rows].to(head.weight.dtype))
                parts.append(compress(logits, self._config, uniform=None if uniform is None else uniform[rows]))
        return {name: torch.cat([part[name] for part in parts]).unflatten(0, (batch, length)) for name in parts[0]}

    def _settle(self, failure: str) -> None:
        """Raise on every rank where one has failed."""
        if not dist.any_rank(bool(failure)):
            return
        if failure.startswith("!"):
            raise DataError(failure[1:])
        raise CheckpointError(f"the cache cannot be written to {self._folder}: {failure or 'another rank failed'}")

    def _finish(self, header: CacheHeader, whole: dict[str, dict[str, torch.Tensor]]) -> str:
        """Index, header and the files beside shards; shards of an earlier division are removed. What went wrong, else nothing."""
        try:
            records: list[dict[str, Any]] = []
            total = 0
            while total < header.num_sequences:
                records.append(json.loads((self._folder / f".shard-{len(records):05d}.json").read_text()))
                total += records[-1]["num_sequences"]
            kept = {record["file"] for record in records}
            for path in self._folder.glob("shard-*.safetensors*"):
                if path.name not in kept:
                    path.unlink()
            for name, tensors in whole.items():
                save_whole(tensors, self._folder / name)
            write_text(self._folder / HEADER, header.to_json())
            write_text(self._folder / INDEX, json.dumps({"shards": records, "files": digests(self._folder, whole)}, indent=1))
        except OSError as error:
            return str(error)
        return ""


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file beside its name, bring it to the disk and rename it into place.

    Raises:
        OSError: the disk is full, or not writable; nothing is left behind.
    """
    writer = TensorFileWriter(path.with_name(f"{path.name}.partial"))
    try:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
        writer.rename(path.name)
    except OSError:
        writer.discard()
        raise
