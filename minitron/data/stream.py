"""An endless, resumable stream of packed token sequences out of one source or a blend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from minitron.data.ahead import Workers
from minitron.data.sources import Documents, RowStream, split_of
from minitron.errors import CheckpointError, DataError, MinitronError

Tokenize = Callable[[list[str]], list[np.ndarray]]
Result = TypeVar("Result")

_BATCH_DOCUMENTS = 32
_CACHED_TOKENS = 64 << 20  # 256 MiB a feed; beyond it documents are tokenised again each epoch


def mix(values: np.ndarray, *, seed: int, salt: int = 0) -> np.ndarray:
    """Uniform 64-bit hashes of counters (splitmix64): a random draw that depends on nothing but its number, on any platform or numpy version."""
    with np.errstate(over="ignore"):  # wrapping is the point
        x = values.astype(np.uint64)
        for key in (seed, salt, 0):
            x = x + np.uint64((key * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return x


class Feed(Protocol):
    """One split of one source as tokenised documents."""

    label: str

    def read(self, *, epoch: int, start: int, seed: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """Positions and tokens of an epoch's documents from position ``start`` on; no seed means document order."""


class MapFeed:
    """Documents by number, permuted anew in each epoch, tokenised once while they fit in the cache."""

    def __init__(self, documents: Documents, numbers: np.ndarray, *, tokenize: Tokenize, label: str, workers: Workers | None = None) -> None:
        self.label = label
        self._documents, self._numbers, self._tokenize, self._workers = documents, numbers, tokenize, workers or Workers(0)
        self._cache: dict[int, np.ndarray] = {}
        self._cached_tokens = 0

    def read(self, *, epoch: int, start: int, seed: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """See Feed."""
        order = self._numbers
        if seed is not None:
            order = order[np.argsort(mix(np.arange(len(order)), seed=seed, salt=epoch), kind="stable")]
        batches = (order[first : first + _BATCH_DOCUMENTS].tolist() for first in range(start, len(order), _BATCH_DOCUMENTS))
        position = start
        for known in self._workers.map(self._tokens, batches):
            for number, tokens in known:
                if number not in self._cache and self._cached_tokens + len(tokens) <= _CACHED_TOKENS:
                    self._cache[number] = tokens
                    self._cached_tokens += len(tokens)
                yield position, tokens
                position += 1

    def num_tokens(self) -> int:
        """Tokens of one epoch."""
        return sum(len(tokens) for _, tokens in self.read(epoch=0, start=0, seed=None))

    def _tokens(self, numbers: list[int]) -> list[tuple[int, np.ndarray]]:
        """Some documents' tokens; it only reads the cache, so threads may call it."""
        known = {number: self._cache[number] for number in numbers if number in self._cache}
        missing = [number for number in numbers if number not in known]
        if missing:
            texts = _named(lambda: [self._documents[number] for number in missing], f"{self.label} cannot be read")
            known |= dict(zip(missing, _named(lambda: self._tokenize(texts), f"{self.label} cannot be tokenised"), strict=True))
        return [(number, known[number]) for number in numbers]


def _named(work: Callable[[], Result], what: str) -> Result:
    """What the work gives; its failure as one sentence that names the source.

    Raises:
        DataError: it failed.
    """
    try:
        return work()
    except MinitronError:
        raise
    except Exception as error:  # readers and tokenisers raise whatever they like
        told = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise DataError(f"{what}: {type(error).__name__}: {told}") from error


class RowFeed:
    """Rows of a streaming source that fall into one split by the hash of their text."""

    def __init__(
        self, rows: RowStream, *, split: str, validation_fraction: float, tokenize: Tokenize, label: str, workers: Workers | None = None
    ) -> None:
        self.label, self._workers = label, workers or Workers(0)
        self._rows, self._split, self._fraction, self._tokenize = rows, split, validation_fraction, tokenize

    def read(self, *, epoch: int, start: int, seed: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """See Feed; positions count the rows of both splits."""
        shuffle_seed = None if seed is None else int(mix(np.array([epoch]), seed=seed)[0] >> np.uint64(33))
        rows = (
            (position, text)
            for position, text in self._rows.rows(start=start, shuffle_seed=shuffle_seed)
            if text and not text.isspace() and split_of(text, self._fraction) == self._split
        )
        batches = iter(lambda: list(islice(rows, _BATCH_DOCUMENTS)), [])
        for positions, tokens in self._workers.map(self._tokens, batches):
            yield from zip(positions, tokens, strict=True)

    def _tokens(self, batch: list[tuple[int, str]]) -> tuple[list[int], list[np.ndarray]]:
        tokens = _named(lambda: self._tokenize([text for _, text in batch]), f"{self.label} cannot be tokenised")
        return [position for position, _ in batch], tokens


class _Packer:
    """Cuts one feed's documents, epoch after epoch, into sequences. Its whole state is where the next unused token stands."""

    def __init__(self, feed: Feed, *, sequence_length: int, seed: int | None) -> None:
        self.feed, self._length, self._seed = feed, sequence_length, seed
        self.seek(0, 0, 0)

    def seek(self, epoch: int, position: int, offset: int) -> None:
        """Go to a token of a document of an epoch."""
        self.epoch, self.position, self.offset = epoch, position, offset
        self.epoch_tokens = 0
        self._whole_epoch = position == 0 and offset == 0
        self._reader: Iterator[tuple[int, np.ndarray]] | None = None
        self._tokens = np.empty(0, dtype=np.uint32)  # of the document at `position`

    def next(self, *, one_epoch: bool = False) -> np.ndarray | None:
        """The next sequence [sequence_length]; None when the first epoch is all that is wanted and it is used up."""
        pieces: list[np.ndarray] = []
        needed = self._length
        while needed:
            if self.offset >= len(self._tokens) and not self._next_document():
                if one_epoch:
                    return None
                self._next_epoch()
                continue
            piece = self._tokens[self.offset : self.offset + needed]
            pieces.append(piece)
            needed -= len(piece)
            self.offset += len(piece)
        return np.concatenate(pieces)

    def _next_document(self) -> bool:
        if self._reader is None:
            self._reader = self.feed.read(epoch=self.epoch, start=self.position, seed=self._seed)
        elif len(self._tokens):
            self.position, self.offset = self.position + 1, 0
        found = next(self._reader, None)
        if found is None:
            self._tokens = np.empty(0, dtype=np.uint32)
            return False
        if found[0] != self.position:  # rows of the other split lie between
            self.position, self.offset = found[0], 0
        self._tokens = found[1]
        self.epoch_tokens += len(self._tokens)
        return True

    def _next_epoch(self) -> None:
        if self._whole_epoch and self.epoch_tokens < self._length:  # or it would go round for ever on an empty source
            raise DataError(
                f"{self.feed.label} has {self.epoch_tokens} tokens, one sequence needs {self._length}: lower data.sequence_length or give more text"
            )
        self.seek(self.epoch + 1, 0, 0)


class SequenceStream:
    """Packed sequences without end: documents joined by the end-of-text token, cut into [sequence_length], permuted in each epoch.

    In a blend each sequence comes from one source, drawn with probability proportional to its weight by a hash of (seed, sequence number).
    """

    def __init__(self, feeds: Sequence[Feed], *, weights: Sequence[float], sequence_length: int, seed: int | None) -> None:
        self.sequence_length = sequence_length
        self._seed = 0 if seed is None else seed
        # each source gets its own seed, or equal files of a blend would be walked in step
        seeds = [None if seed is None else int(mix(np.array([number]), seed=seed, salt=1)[0]) for number in range(len(feeds))]
        self._packers = [_Packer(feed, sequence_length=sequence_length, seed=own) for feed, own in zip(feeds, seeds, strict=True)]
        self._weights = np.array(weights, dtype=np.float64)
        self._drawn = 0

    def next(self) -> torch.Tensor:
        """The next sequence, int64 [sequence_length].

        Raises:
            DataError: a source has less text than one sequence.
        """
        tokens = self._packers[self._draw(self._weights)].next()
        assert tokens is not None
        return torch.from_numpy(tokens.astype(np.int64))

    def first_epoch(self) -> Iterator[torch.Tensor]:
        """The sequences of a fresh stream up to the end of its sources' first epoch; sources that are used up leave the blend."""
        weights = self._weights.copy()
        while weights.any():
            chosen = self._draw(weights)
            tokens = self._packers[chosen].next(one_epoch=True)
            if tokens is None:
                weights[chosen] = 0.0
                self._drawn -= 1
            else:
                yield torch.from_numpy(tokens.astype(np.int64))

    @property
    def epoch_tokens(self) -> int:
        """Tokens met so far in the present epoch of all sources."""
        return sum(packer.epoch_tokens for packer in self._packers)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON: sequences drawn, and of each source the next unused token."""
        sources = [{"epoch": packer.epoch, "position": packer.position, "offset": packer.offset} for packer in self._packers]
        return {"drawn": self._drawn, "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the state was taken; of map-style sources only the present document is tokenised again.

        Raises:
            CheckpointError: the state is of another number of sources.
        """
        if len(state["sources"]) != len(self._packers):
            raise CheckpointError(f"the stored data position is of {len(state['sources'])} sources, but data names {len(self._packers)}")
        self._drawn = int(state["drawn"])
        for packer, where in zip(self._packers, state["sources"], strict=True):
            packer.seek(int(where["epoch"]), int(where["position"]), int(where["offset"]))

    def _draw(self, weights: np.ndarray) -> int:
        number, self._drawn = self._drawn, self._drawn + 1
        if len(weights) == 1:
            return 0
        share = float(mix(np.array([number]), seed=self._seed, salt=2)[0]) / 2.0**64
        edges = np.cumsum(weights) / weights.sum()
        chosen = int(np.searchsorted(edges, share, side="right"))
        return min(chosen, int(np.flatnonzero(weights)[-1]))
