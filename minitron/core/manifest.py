"""Stage folders: fingerprints of inputs, manifests, and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minitron.errors import CheckpointError

MANIFEST = "manifest.json"
#: Training state of a stage at work; not part of what it makes.
CHECKPOINTS = "checkpoints"
_HASHES = ".fingerprints.json"


@dataclass
class Manifest:
    """What a finished stage was made from and what came of it.

    ``settings`` and ``inputs`` decide whether the stage is skipped; ``recorded`` is for the reader.
    """

    stage: str
    settings: dict[str, dict[str, Any]]
    inputs: dict[str, str]
    recorded: dict[str, Any] = field(default_factory=dict)
    code_version: str = ""
    started: str = ""
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    tokens: int = 0
    results: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, atomically."""
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1, default=str))

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, or None when the stage has not been finished there.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def differing_settings(self, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """``section.key: old → new`` for every setting that differs."""
        rows = []
        for section in sorted(set(self.settings) | set(settings)):
            old, new = self.settings.get(section, {}), settings.get(section, {})
            for key in sorted(set(old) | set(new)):
                a, b = plain(old.get(key)), plain(new.get(key))
                if a != b:
                    rows.append(f"{section}.{key}: {a} → {b}" if section else f"{key}: {a} → {b}")
        return rows

    def differing_inputs(self, inputs: Mapping[str, str]) -> list[str]:
        """Names of inputs whose content changed."""
        return sorted(name for name in set(self.inputs) | set(inputs) if self.inputs.get(name) != inputs.get(name))


def plain(value: Any) -> Any:
    """A value as JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


def write_text(path: Path, text: str) -> None:
    """Write a file beside its name and rename it into place."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def fingerprint_folder(folder: Path) -> str:
    """A hash of the names and contents of a folder's files; manifests, checkpoints and hidden files are left out.

    Large files are hashed once: the hash is kept beside them, keyed by size and modification time.
    """
    known: dict[str, list[Any]] = {}
    store = folder / _HASHES
    if store.is_file():
        try:
            known = json.loads(store.read_text())
        except ValueError:
            known = {}
    total, fresh = hashlib.sha256(), {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        parts = path.relative_to(folder).parts
        if path.name == MANIFEST or parts[0] == CHECKPOINTS or any(part.startswith(".") for part in parts):
            continue
        stat = path.stat()
        entry = known.get(name)
        if not entry or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            entry = [stat.st_size, stat.st_mtime_ns, _digest(path)]
        fresh[name] = entry
        total.update(f"{name}\0{entry[2]}\n".encode())
    if fresh != known:
        try:
            write_text(store, json.dumps(fresh))
        except OSError:
            pass  # a read-only folder is hashed anew each time
    return total.hexdigest()


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free ``<name>.old-<n>``."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.replace(folder, target)
    return target


def publish(partial: Path, final: Path) -> None:
    """Rename a finished folder into place; an older one there is removed once the new one stands."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        old = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, final)
