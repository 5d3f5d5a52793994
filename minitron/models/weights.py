"""Safetensors folders: read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitron.errors import CheckpointError
from minitron.models.load import check_has_weights

#: Files of a model folder that follow the weights unchanged.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "*.model",
)


class WeightReader:
    """Tensors of a model folder by name, one at a time, never the whole model."""

    def __init__(self, folder: Path) -> None:
        check_has_weights(folder)
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            else:
                with safe_open(str(folder / "model.safetensors"), framework="pt") as handle:
                    self.files = {name: "model.safetensors" for name in handle.keys()}
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"the weights in {folder} are damaged: {error}") from error

    def get(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            CheckpointError: it is not there, or its file is truncated.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.folder} has no weight '{name}'")
        path = self.folder / self.files[name]
        try:
            with safe_open(str(path), framework="pt") as handle:
                return handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def items(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors, one after another."""
        for name in names:
            yield name, self.get(name)


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = 5 * 10**9) -> int:
    """Write tensors as ``model.safetensors``, or as shards with an index when they exceed ``shard_bytes``. Returns the number of values."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = count = total = 0

    def flush() -> None:
        nonlocal pending, size
        try:
            save_file(pending, str(folder / f"shard-{len(shards)}.safetensors"), metadata={"format": "pt"})
            (folder / f"shard-{len(shards)}.safetensors").chmod(0o644)  # safetensors makes files that only their owner may read
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"weights cannot be written to {folder}: {error}") from error
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        if pending and size + flat.nbytes > shard_bytes:
            flush()
        pending[name] = flat
        size += flat.nbytes
        total += flat.nbytes
        count += flat.numel()
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return count
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return count


def copy_companions(source: Path, target: Path) -> None:
    """Carry tokenizer, chat template and generation config over."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
