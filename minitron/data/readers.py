"""Documents out of local files: plain text, JSON lines and parquet, also compressed."""

from __future__ import annotations

import importlib
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minitron.errors import DataError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSON_SUFFIXES = (".jsonl", ".json")
COMPRESSIONS = (".gz", ".xz", ".zst")
ACCEPTED = f"{' '.join(TEXT_SUFFIXES + JSON_SUFFIXES)} (each also with {' '.join(COMPRESSIONS)}) and .parquet"

# A book in one file would be one document, and could be either trained on or held out, not both: long files are cut at blank lines.
PIECE_CHARACTERS = 16_384


class DamagedFileError(DataError):
    """A file whose content is not what its name says, or that ends too early."""


def local_files(path: str) -> list[Path]:
    """The readable text files at a path, in the order of their names.

    Raises:
        DataError: nothing is there, or nothing that can be read as text.
    """
    root = Path(path).expanduser()
    if root.is_file():
        if _kind(root) is None:
            raise DataError(f"data.path={path} has a suffix that is not read as text: accepted are {ACCEPTED}")
        return [root]
    if not root.is_dir():
        raise DataError(f"data.path={path} does not exist (looked in {Path.cwd()})" if not root.is_absolute() else f"data.path={path} does not exist")
    files = []
    for file in sorted(root.rglob("*"), key=lambda file: file.relative_to(root).as_posix()):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if not hidden and file.is_file() and _kind(file) is not None:
            files.append(file)
    if not files:
        raise DataError(f"the folder data.path={path} holds no text: accepted are {ACCEPTED}")
    return files


def read_documents(file: Path, *, text_column: str) -> Iterator[str]:
    """The documents of one file: a whole text (cut at blank lines when long), or one per row.

    Raises:
        DamagedFileError: the file is damaged or not UTF-8; names the file and the line.
        DataError: it lacks the text column, or reading it needs a package that is not there.
    """
    kind = _kind(file)
    if kind == "parquet":
        yield from _parquet(file, text_column)
        return
    damaged: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError, *_zstd_errors(file))
    try:
        with _opened(file) as stream:
            if kind == "json":
                yield from _json_rows(stream, file, text_column)
            else:
                yield from _pieces(stream)
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start} of a block") from error
    except damaged as error:
        raise DamagedFileError(f"{file} cannot be read, it is damaged or cut short: {error}") from error


def _kind(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "text" if last in TEXT_SUFFIXES else "json" if last in JSON_SUFFIXES else None


def _opened(file: Path) -> IO[str]:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        import gzip

        return gzip.open(file, "rt", encoding="utf-8")
    if suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8")
    if suffix == ".zst":
        stream: IO[str] = _zstd(file).open(file, "rt", encoding="utf-8")
        return stream
    return open(file, encoding="utf-8")


def _zstd(file: Path) -> Any:
    for module in ("compression.zstd", "zstandard"):  # the standard library has it since Python 3.14
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise DataError(f"reading {file} needs the package zstandard: pip install zstandard")


def _zstd_errors(file: Path) -> tuple[type[Exception], ...]:
    return (_zstd(file).ZstdError,) if file.suffix.lower() == ".zst" else ()


def _pieces(stream: IO[str]) -> Iterator[str]:
    """Cut a text at the first blank line after every PIECE_CHARACTERS."""
    lines: list[str] = []
    size = 0
    for line in stream:
        lines.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS and not line.strip():
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _json_rows(stream: IO[str], file: Path, text_column: str) -> Iterator[str]:
    """One object a line, or one JSON list of objects."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            rows = _parsed(line + stream.read(), file, number)
            for index, row in enumerate(rows, 1):
                yield _column(row, text_column, f"{file}, row {index},")
            return
        yield _column(_parsed(line.strip(), file, number), text_column, f"{file}, line {number},")


def _parsed(text: str, file: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DamagedFileError(f"{file}, line {number + error.lineno - 1}, is not JSON: {error.msg} at column {error.colno}") from error


def _column(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f'{where} is not a JSON object but a {type(row).__name__}: each row must look like {{"{column}": "…"}}')
    if column not in row:
        raise DataError(f"{where} has no column '{column}' (its columns: {', '.join(map(str, row))}): set data.text_column")
    return text_of(row[column], column=column, where=where)


def text_of(value: Any, *, column: str, where: str) -> str:
    """A cell as text; an empty one is a blank document.

    Raises:
        DataError: the cell holds something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where} column '{column}' holds {type(value).__name__}, not text: set data.text_column")
    return value


def _parquet(file: Path, text_column: str) -> Iterator[str]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow_error = importlib.import_module("pyarrow").ArrowException
    except ImportError as error:
        raise DataError(f"reading {file} needs the package datasets (for pyarrow): pip install datasets") from error
    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_column not in columns:
                raise DataError(f"{file} has no column '{text_column}' (its columns: {', '.join(columns)}): set data.text_column")
            for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
                for row in batch.to_pylist():
                    yield _column(row, text_column, str(file))
    except (arrow_error, OSError) as error:
        raise DamagedFileError(f"{file} cannot be read, it is damaged or no parquet file: {error}") from error
