"""The text of a run: sources opened and split, tokenised on demand, streamed to training and evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from minitron.data.ahead import Workers
from minitron.data.config import DataConfig, SourceConfig, source_configs
from minitron.data.sources import SPLITS, open_documents, open_rows, source_fingerprint, split_documents
from minitron.data.stream import Feed, MapFeed, RowFeed, SequenceStream, Tokenize
from minitron.errors import DataError, nearest

#: Sources of blends that follow the `data` section's own.
Blends = Sequence[Sequence[SourceConfig]]


class Text:
    """Text split by document into ``train`` and ``validation``, as packed token sequences."""

    def __init__(self, config: DataConfig, feeds: dict[str, list[Feed]], *, blends: Sequence[Sequence[float]], label: str, seed: int) -> None:
        """``blends`` are weights of all sources: the section's own blend, then later ones."""
        self.config = config
        self.label = label
        self._feeds, self._blends, self._seed = feeds, blends, seed
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """See ``data_fingerprint``."""
        if self._fingerprint is None:
            self._fingerprint = data_fingerprint(self.config)
        return self._fingerprint

    def stream(self, *, split: str = "train", sequence_length: int | None = None, seed: int | None = None, blend: int = 0) -> SequenceStream:
        """An endless stream; without a seed, training text is shuffled by the text's own seed and validation text stays in order.

        Streams of all blends and lengths take each other's states: each source goes on where it stood.
        """
        if split not in SPLITS:
            raise DataError(f"there is no split '{split}': {nearest(split, SPLITS)}")
        if seed is None and split == "train":
            seed = self._seed
        length = sequence_length or self.config.sequence_length
        return SequenceStream(self._feeds[split], weights=self._blends[blend], sequence_length=length, seed=seed)

    def take(self, num_sequences: int, *, split: str, sequence_length: int | None = None, seed: int | None = None) -> torch.Tensor:
        """The first sequences of one epoch, int64 [num_sequences, sequence_length]; no text is repeated.

        Raises:
            DataError: the split has too few tokens.
        """
        stream = self.stream(split=split, sequence_length=sequence_length, seed=seed)
        length = stream.sequence_length
        sequences: list[torch.Tensor] = []
        if num_sequences > 0:
            for sequence in stream.first_epoch():
                sequences.append(sequence)
                if len(sequences) == num_sequences:
                    return torch.stack(sequences)
            raise DataError(
                f"the {split} text of {self.label} has {stream.epoch_tokens} tokens, which is {len(sequences)} sequences of {length}; "
                f"{num_sequences} were asked for (need {num_sequences * length} tokens): "
                "lower the number of sequences or their length, or give more text"
            )
        return torch.empty(0, length, dtype=torch.int64)

    def num_tokens(self, split: str) -> int:
        """Tokens of one epoch of a split.

        Raises:
            DataError: a source is streaming, so that nobody knows.
        """
        total = 0
        for feed in self._feeds[split]:
            if not isinstance(feed, MapFeed):
                raise DataError(f"{feed.label} is streaming: the number of its tokens is not known before it is read")
            total += feed.num_tokens()
        return total


def open_text(config: DataConfig, tokenizer: Any, *, seed: int, later: Blends = ()) -> Text:
    """Open the sources of a `data` section, and of blends that follow it; nothing is tokenised yet.

    Raises:
        ConfigError: the section names no source or a wrong one.
        DataError: a source is missing, unreadable or empty.
    """
    sources, blends = united([source_configs(config), *later])
    tokenize, workers = _tokenize_with(tokenizer), Workers(config.num_workers)
    if config.num_workers:
        tokenize(["a"])  # settings that a tokeniser changes at its first call must not be changed by several threads at once
    feeds: dict[str, list[Feed]] = {split: [] for split in SPLITS}
    for source in sources:
        for split, feed in _open_source(source, config, tokenize, workers).items():
            feeds[split].append(feed)
    label = " + ".join(source.label for source, weight in zip(sources, blends[0], strict=True) if weight)
    return Text(config, feeds, blends=blends, label=label, seed=seed)


def separator_of(tokenizer: Any) -> int | None:
    """The token that closes each document: the end-of-text token, else the start-of-text token, else None."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    return eos if eos is not None else bos  # type: ignore[no-any-return]


def united(blends: Sequence[Sequence[SourceConfig]]) -> tuple[list[SourceConfig], list[list[float]]]:
    """All sources of some blends, each once and the first blend's first, and for every blend the weights of all of them."""
    sources: list[SourceConfig] = []
    rows: list[dict[int, float]] = []
    for blend in blends:
        row: dict[int, float] = {}
        for source in blend:
            same = (i for i, known in enumerate(sources) if i not in row and replace(known, weight=source.weight) == source)
            number = next(same, len(sources))
            if number == len(sources):
                sources.append(source)
            row[number] = float(source.weight)
        rows.append(row)
    return sources, [[row.get(number, 0.0) for number in range(len(sources))] for row in rows]


def data_fingerprint(config: DataConfig, *, later: Blends = ()) -> str:
    """A hash of what the text is (content, column, split, held-out share, weights) and not of where it lies; needs no tokenizer.

    ``later``: the blends that follow it, in order.

    Raises:
        ConfigError, DataError: as ``open_text``.
    """
    parts: list[Any] = [config.validation_fraction, *_blend_parts(source_configs(config))]
    parts += [_blend_parts(sources) for sources in later]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _blend_parts(sources: Sequence[SourceConfig]) -> list[Any]:
    parts = []
    for source in sources:
        hub = [source.name is not None, source.subset, source.split] if source.name is not None else []
        # one source's weight is no choice; a blend's is
        parts.append([source_fingerprint(source), hub, source.text_column, float(source.weight) if len(sources) > 1 else 1.0])
    return parts


def _open_source(source: SourceConfig, config: DataConfig, tokenize: Tokenize, workers: Workers) -> dict[str, Feed]:
    fraction, skip = config.validation_fraction, config.skip_corrupt
    more: dict[str, Any] = {"tokenize": tokenize, "workers": workers}
    labels = {split: f"the {split} text of {source.label}" for split in SPLITS}
    if source.streaming:
        rows = open_rows(source, buffer=config.shuffle_buffer, skip_corrupt=skip)
        return {split: RowFeed(rows, split=split, validation_fraction=fraction, label=label, **more) for split, label in labels.items()}
    documents = open_documents(source, skip_corrupt=skip)
    numbers = split_documents(documents, validation_fraction=fraction)
    return {split: MapFeed(documents, numbers[split], label=label, **more) for split, label in labels.items()}


def _tokenize_with(tokenizer: Any) -> Tokenize:
    """Texts to token arrays, each closed by the separator, where there is one."""
    separator = separator_of(tokenizer)
    tail = [] if separator is None else [separator]

    def tokenize(texts: list[str]) -> list[np.ndarray]:
        # verbose=False: a document longer than the model's context is no problem here, it is cut
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return [np.array(ids + tail, dtype=np.uint32) for ids in encoded["input_ids"]]

    return tokenize
