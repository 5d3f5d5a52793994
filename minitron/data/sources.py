"""Opens the sources of a `data` section: documents by number (map-style) or as a stream, and fingerprints of their content."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minitron.data.builtin import python_docs
from minitron.data.config import SourceConfig
from minitron.data.readers import DamagedFileError, local_files, read_documents, text_of
from minitron.errors import DataError, MinitronError
from minitron.log import get_logger

SPLITS = ("train", "validation")
_LARGE_BYTES = 2 << 30
#: Damaged files that this process has passed over.
_SKIPPED: set[Path] = set()

_logger = get_logger(__name__)


class Documents(Protocol):
    """Texts by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...

    def __iter__(self) -> Iterator[str]: ...


class _DatasetColumn:
    """The text column of a memory-mapped Hugging Face dataset."""

    def __init__(self, dataset: Any, *, column: str, label: str) -> None:
        self._rows, self._column, self._label = dataset.select_columns([column]), column, label

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return text_of(self._rows[int(index)][self._column], column=self._column, where=self._label)

    def __iter__(self) -> Iterator[str]:
        for batch in self._rows.iter(batch_size=1000):
            for value in batch[self._column]:
                yield text_of(value, column=self._column, where=self._label)


class RowStream:
    """A source that is read front to back; an epoch shuffles it through a buffer."""

    def __init__(self, dataset: Any, *, column: str, buffer: int, label: str) -> None:
        self._dataset, self._column, self._buffer, self._label = dataset, column, buffer, label

    def rows(self, *, start: int, shuffle_seed: int | None) -> Iterator[tuple[int, str]]:
        """Numbered texts from the given row of the (shuffled) order on; skipped rows are still read by the dataset, not tokenised."""
        dataset = self._dataset
        if shuffle_seed is not None:
            dataset = dataset.shuffle(seed=shuffle_seed, buffer_size=self._buffer)
        rows = iter(dataset.skip(start) if start else dataset)
        for number in count(start):
            try:
                row = next(rows)
            except StopIteration:
                return
            except MinitronError:
                raise
            except Exception as error:  # networks, archives and formats fail in their own ways
                told = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
                raise DataError(f"{self._label} cannot be read after {number} rows: {type(error).__name__}: {told}") from error
            if self._column not in row:
                raise DataError(f"{self._label} has no column '{self._column}' (its columns: {', '.join(map(str, row))}): set data.text_column")
            yield number, text_of(row[self._column], column=self._column, where=self._label)


def open_documents(source: SourceConfig, *, skip_corrupt: bool = False) -> Documents:
    """A map-style source; ``skip_corrupt`` leaves out what comes after the damage in a local file.

    Raises:
        DataError: missing, unreadable, without the text column, or empty.
    """
    documents: Documents
    if source.name is not None:
        dataset = _load(source)
        _require_column(dataset.column_names, source)
        documents = _DatasetColumn(dataset, column=source.text_column, label=source.label)
    elif source.path is not None:
        files = local_files(source.path)
        if sum(file.stat().st_size for file in files) > _LARGE_BYTES:
            _logger.warning("data.path=%s is read whole into memory by every rank; data.streaming=true reads it on the way", source.path)
        documents = [text for file in files for text in _documents_in(file, source.text_column, skip_corrupt)]
    else:
        documents = list(python_docs())
    if not len(documents):
        told = ", or none that can be read" if skip_corrupt else ""
        raise DataError(f"{source.label} holds no documents{told}")
    return documents


def open_rows(source: SourceConfig, *, buffer: int, skip_corrupt: bool = False) -> RowStream:
    """A streaming source: a Hugging Face dataset, or local files read on the way.

    Raises:
        DataError: missing, unreadable or without the text column.
    """
    if source.name is not None:
        dataset, column = _load(source), source.text_column
        if dataset.column_names is not None:
            _require_column(dataset.column_names, source)
    else:
        arguments: dict[str, Any] = {}
        if source.path is not None:
            arguments = {"files": [str(file) for file in local_files(source.path)], "column": source.text_column, "skip_corrupt": skip_corrupt}
        generator = _file_rows if source.path is not None else _builtin_rows
        dataset, column = _datasets(source).IterableDataset.from_generator(generator, gen_kwargs=arguments or None), "text"
    return RowStream(dataset, column=column, buffer=buffer, label=source.label)


def split_of(text: str, validation_fraction: float) -> str:
    """Which split a text belongs to, from its hash alone: the same text is never in both."""
    return "validation" if _hash(text) < validation_fraction * 2.0**64 else "train"


def split_documents(texts: Iterable[str], *, validation_fraction: float) -> dict[str, np.ndarray]:
    """Document numbers of each split; blank documents are in none.

    With two different documents or more and a fraction above 0, each split gets at least one.
    """
    numbers, hashes = [], []
    for number, text in enumerate(texts):
        if text and not text.isspace():
            numbers.append(number)
            hashes.append(_hash(text))
    index = np.array(numbers, dtype=np.int64)
    hashed = np.array(hashes, dtype=np.uint64)
    held_out = np.array([value < validation_fraction * 2.0**64 for value in hashes], dtype=bool)
    if validation_fraction > 0 and len(set(hashes)) >= 2:
        if not held_out.any():
            held_out = hashed == hashed.min()
        elif held_out.all():
            held_out = hashed != hashed.max()
    return {"train": index[~held_out], "validation": index[held_out]}


def source_fingerprint(source: SourceConfig) -> str:
    """A hash of the content: of local files' bytes, of the builtin's documents, of a hub dataset's revision.

    Raises:
        DataError: the source is missing.
    """
    digest = hashlib.blake2b(digest_size=16)
    if source.path is not None:
        _hash_files(digest, local_files(source.path), Path(source.path).expanduser())
    elif source.name is not None and Path(source.name).expanduser().exists():
        root = Path(source.name).expanduser()
        _hash_files(digest, sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root], root)
    elif source.name is not None:
        builder = _guarded(lambda: _datasets(source).load_dataset_builder(source.name, source.subset), source)
        digest.update(f"{source.name} {builder.config.name} {builder.hash}".encode())
    else:
        for document in python_docs():
            digest.update(_hash(document).to_bytes(8, "big"))
    return digest.hexdigest()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _hash_files(digest: Any, files: Sequence[Path], root: Path) -> None:
    for file in files:
        # the name inside the folder sets the order; where the folder lies must not matter
        digest.update((file.relative_to(root).as_posix() if file != root else "").encode() + b"\0")
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)


def _documents_in(file: Path, column: str, skip_corrupt: bool) -> Iterator[str]:
    """The documents of a file; of a damaged one, if wanted, those before the damage, with a line that says so once."""
    number = 0
    try:
        for text in read_documents(file, text_column=column):
            yield text
            number += 1
    except DamagedFileError as error:
        if not skip_corrupt:
            raise
        if file not in _SKIPPED:
            _SKIPPED.add(file)
            _logger.warning("%s; read were %d documents before it, the rest is skipped (damaged files so far: %d)", error, number, len(_SKIPPED))


def _file_rows(files: list[str], column: str, skip_corrupt: bool) -> Iterator[dict[str, str]]:
    for file in files:
        for text in _documents_in(Path(file), column, skip_corrupt):
            yield {"text": text}


def _builtin_rows() -> Iterator[dict[str, str]]:
    for text in python_docs():
        yield {"text": text}


def _datasets(source: SourceConfig) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"reading {source.label} needs the package datasets: pip install datasets") from error


def _load(source: SourceConfig) -> Any:
    datasets = _datasets(source)
    root = Path(source.name or "").expanduser()
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():  # written by save_to_disk, which load_dataset refuses
        stored = _guarded(lambda: datasets.load_from_disk(str(root)), source)
        if isinstance(stored, dict):
            if source.split not in stored:
                raise DataError(f"{source.label} has no split '{source.split}' (its splits: {', '.join(stored)}): set data.split")
            stored = stored[source.split]
        return stored.to_iterable_dataset() if source.streaming else stored
    name = str(root) if root.exists() else source.name
    return _guarded(lambda: datasets.load_dataset(name, source.subset, split=source.split, streaming=source.streaming), source)


def _guarded(load: Any, source: SourceConfig) -> Any:
    """A hub, cache or format failure as one sentence; the libraries below raise a wide family of types for it."""
    errors = _datasets(source).exceptions
    try:
        return load()
    except (OSError, ValueError, errors.DatasetsError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise DataError(f"the dataset data.name={source.label} (split {source.split}) cannot be loaded: {type(error).__name__}: {reason}") from error


def _require_column(columns: Sequence[str], source: SourceConfig) -> None:
    if source.text_column not in columns:
        raise DataError(f"{source.label} has no column '{source.text_column}' (its columns: {', '.join(columns)}): set data.text_column")
