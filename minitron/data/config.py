"""The `data` section, and the text sources that it describes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minitron.core.options import option
from minitron.errors import ConfigError, nearest

BUILTINS = ("python_docs",)
PACKINGS = ("auto", "separate", "joined")
_HOW = (
    "data.path=FILE_OR_FOLDER, data.name=HF_DATASET, data.builtin=python_docs (the documentation of the running Python) "
    "or data.sources=[{path: …, weight: …}, …]"
)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut. Of path, name, sources and builtin the first that is given is used."""

    path: str | None = option(None, "text file or folder: .txt .md .rst .jsonl .json (also .gz .xz .zst) .parquet", recorded=True)
    name: str | None = option(None, "Hugging Face dataset: hub id or local folder")
    subset: str | None = option(None, "configuration name of the Hugging Face dataset")
    split: str = option("train", "split of the Hugging Face dataset that is read")
    streaming: bool = option(False, "read while training instead of loading first")
    builtin: str | None = option(None, f"text that needs no download: {', '.join(BUILTINS)}")
    text_column: str = option("text", "column or JSON key that holds the text")
    sequence_length: int = option(1024, "tokens per training sequence")
    validation_fraction: float = option(0.05, "share of the documents that is held out, by a hash of their text")
    sources: list[dict[str, Any]] | None = option(None, "a blend: list of {path|name|builtin, subset, split, streaming, text_column, weight}")
    shuffle_buffer: int = option(10000, "documents in the shuffling buffer of streaming sources")
    packing: str = option("auto", "documents in one sequence: separate (none sees another), joined, or auto: separate where the model can")
    num_workers: int = option(0, "threads that read and tokenise ahead of the training; 0: text is read when it is needed", recorded=True)
    skip_corrupt: bool = option(False, "go on without the rest of a file that cannot be read, instead of stopping with its name")


@dataclass(frozen=True)
class SourceConfig:
    """One source of a blend; exactly one of path, name and builtin is set."""

    path: str | None = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    builtin: str | None = None
    text_column: str = "text"
    weight: float = 1.0

    @property
    def label(self) -> str:
        """What a person would call this source."""
        parts = [self.path or self.name or self.builtin or "", self.subset or ""]
        return ":".join(part for part in parts if part)


def source_configs(config: DataConfig, *, where: str = "data") -> tuple[SourceConfig, ...]:
    """The sources that a `data` section names, checked; ``where`` is what errors call the section.

    Raises:
        ConfigError: no source, an unknown key or builtin, or a value out of range.
    """
    if not 0.0 <= config.validation_fraction < 1.0:
        raise ConfigError(f"{where}.validation_fraction={config.validation_fraction} is not a share: give a number from 0 to below 1")
    for name in ("sequence_length", "shuffle_buffer"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{where}.{name}={getattr(config, name)} must be at least 1")
    if config.num_workers < 0:
        raise ConfigError(f"{where}.num_workers={config.num_workers} must be 0 (text is read when it is needed) or a number of threads")
    if config.packing not in PACKINGS:
        raise ConfigError(f"{where}.packing={config.packing} is unknown; {nearest(config.packing, PACKINGS)}")
    if config.path is None and config.name is None and config.sources is not None:
        if not config.sources:
            raise ConfigError(f"{where}.sources is an empty list: give at least one {{path: …}} or {{name: …}}")
        return tuple(_blend_member(entry, f"{where}.sources[{number}]") for number, entry in enumerate(config.sources))
    kind = next((kind for kind in ("path", "name", "builtin") if getattr(config, kind) is not None), None)
    if kind is None:
        raise ConfigError(f"{where} needs a source of text: {_HOW}")
    source = SourceConfig(
        **{kind: getattr(config, kind)}, subset=config.subset, split=config.split, streaming=config.streaming, text_column=config.text_column
    )
    return (_checked(source, where),)


def changed_sources(config: DataConfig, change: dict[str, Any], *, where: str) -> tuple[SourceConfig, ...]:
    """The sources of a section whose text is exchanged; of the rest ``text_column`` and the held-out share stay.

    Args:
        change: path, name, builtin or sources, with subset, split, streaming and text_column.

    Raises:
        ConfigError: as ``source_configs``, or a key that is not one of these.
    """
    kinds: dict[str, type] = {"path": str, "name": str, "builtin": str, "sources": list}
    kinds |= {"subset": str, "split": str, "streaming": bool, "text_column": str}
    for key, value in change.items():
        if key not in kinds:
            raise ConfigError(f"{where} has no key '{key}': {nearest(str(key), kinds)}")
        if not isinstance(value, kinds[key]):
            raise ConfigError(f"{where}.{key}={value!r} is not of type {kinds[key].__name__}")
    fresh = {"path": None, "name": None, "builtin": None, "sources": None, "subset": None, "split": "train", "streaming": False}
    return source_configs(dataclasses.replace(config, **{**fresh, **change}), where=where)


def _blend_member(entry: dict[str, Any], where: str) -> SourceConfig:
    known = [field.name for field in dataclasses.fields(SourceConfig)]
    for key in entry:
        if key not in known:
            raise ConfigError(f"{where} has no key '{key}': {nearest(str(key), known)}")
    given = [kind for kind in ("path", "name", "builtin") if entry.get(kind) is not None]
    if len(given) != 1:
        raise ConfigError(f"{where} needs exactly one of path, name and builtin, and gives {' and '.join(given) or 'none'}")
    source = SourceConfig(**entry)
    number_given = isinstance(source.weight, (int, float)) and not isinstance(source.weight, bool)
    if not number_given or not 0 < source.weight < float("inf"):
        raise ConfigError(f"{where}.weight={source.weight!r} must be a number above 0")
    return _checked(source, where)


def _checked(source: SourceConfig, where: str) -> SourceConfig:
    if source.builtin is not None and source.builtin not in BUILTINS:
        raise ConfigError(f"{where}.builtin='{source.builtin}' is unknown: {nearest(source.builtin, BUILTINS)}")
    return source
