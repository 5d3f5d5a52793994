"""Texts, tokenizer and held-out windows of a suite."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from minitron.data import DataConfig, Text, open_text
from minitron.data.readers import local_files, read_documents
from minitron.errors import DataError

#: The folder of the text when ``--data`` does not say.
VARIABLE = "MINITRON_CLAIMS_TEXT"
_PARTS = ("train", "validation")


def text_files(folder: Path | None) -> dict[str, Path]:
    """The files ``*.train.jsonl*`` and ``*.validation.jsonl*`` of a folder.

    Raises:
        DataError: no folder is named, or it does not hold exactly one file of each kind.
    """
    given = folder if folder is not None else Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
    if given is None:
        raise DataError(f"the claims need a text: give --data FOLDER or set {VARIABLE} to a folder with one *.train.jsonl and one *.validation.jsonl")
    files = {part: sorted(given.glob(f"*.{part}.jsonl*")) for part in _PARTS}
    for part, found in files.items():
        if len(found) != 1:
            raise DataError(f"the text folder {given} holds {len(found)} files *.{part}.jsonl* (also .gz .xz .zst); exactly one is needed")
    return {part: found[0] for part, found in files.items()}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with end-of-text 0, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def documents(file: Path) -> Iterator[str]:
    """The texts of a file of JSON lines."""
    return read_documents(local_files(str(file))[0], text_column="text")


class Corpus:
    """One text: training streams of any seed, calibration samples, and held-out windows that are the same for every arm."""

    def __init__(self, train: Text, held_out: Text, *, held_out_split: str, sequence_length: int, num_windows: int) -> None:
        self.train = train
        self._held_out, self._split = held_out, held_out_split
        self._length, self._num_windows = sequence_length, num_windows

    @functools.cached_property
    def windows(self) -> torch.Tensor:
        """[windows, sequence]: evenly spaced over the held-out text, so that no single document speaks for all.

        Raises:
            DataError: the held-out text is too short.
        """
        rows = list(self._held_out.stream(split=self._split, sequence_length=self._length, seed=0).first_epoch())
        if len(rows) < self._num_windows:
            raise DataError(
                f"the held-out text of {self._held_out.label} fills {len(rows)} windows of {self._length}, {self._num_windows} are needed"
            )
        return torch.stack([rows[number * len(rows) // self._num_windows] for number in range(self._num_windows)])

    def calibration(self, count: int, *, seed: int) -> torch.Tensor:
        """[count, sequence] of training text in the order of a seed that no student's data order uses."""
        return self.train.take(count, split="train", sequence_length=self._length, seed=1_000_000 + seed)


def open_corpus(name: str, files: dict[str, Path], tokenizer: Any, *, sequence_length: int, num_windows: int) -> Corpus:
    """``main``: the given files. ``other``: the documentation of the running Python, split by document."""
    sizes = {"sequence_length": sequence_length, "num_windows": num_windows}
    if name == "other":
        docs = open_text(DataConfig(builtin="python_docs", sequence_length=sequence_length, validation_fraction=0.05), tokenizer, seed=0)
        return Corpus(docs, docs, held_out_split="validation", **sizes)
    parts = {
        part: open_text(DataConfig(path=str(file), sequence_length=sequence_length, validation_fraction=0.0), tokenizer, seed=0)
        for part, file in files.items()
    }
    return Corpus(parts["train"], parts["validation"], held_out_split="train", **sizes)
