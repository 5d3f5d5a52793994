"""Models that are built without their weights: parameters on the meta device, read from the folder's files by whoever places them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from minitron.core.axes import SizeOf
from minitron.core.lazy import bind_source
from minitron.errors import ArchitectureError
from minitron.log import get_logger
from minitron.models.family import Family, discover
from minitron.models.load import attention_for, brings_code, config_of, load_causal_lm, quiet_transformers
from minitron.models.stored import StoredTensor
from minitron.models.weights import Kept, WeightReader

logger = get_logger(__name__)


def load_lazily(folder: Path, *, dtype: torch.dtype, attention: str = "auto", trust_remote_code: bool = False) -> nn.Module:
    """A model in eval mode whose parameters are on the meta device and bound to their source; buffers are real and on the CPU.

    An engine's ``prepare`` reads every rank's own share. A model that is not understood tensor by tensor (foreign code, a checkpoint with other
    names than its family publishes) is loaded whole on the CPU instead, which one line in the log says.

    Raises:
        CheckpointError: as :func:`load_causal_lm`; damage inside a tensor's data shows when it is read.
    """
    if not brings_code(folder):
        reader = WeightReader(folder)
        config = config_of(folder)
        config.dtype, config.use_cache = dtype, False  # as the finished model has it, so that its family is found once
        try:
            family = discover(config)
            reason = mismatch(reader, family)
            if not reason:
                source = FolderWeights(reader, family)
                model = build_lazily(config, family, source, dtype=dtype, attention=attention)
                bind_source(model, source)
                return model
        except ArchitectureError as error:
            reason = str(error)
        logger.info("%s is read whole by every process: %s", folder, reason)
        reader.close()
    else:
        logger.info("%s is read whole by every process: it brings code of its own", folder)
    return load_causal_lm(folder, dtype=dtype, device=torch.device("cpu"), attention=attention, trust_remote_code=trust_remote_code)


class TensorReader(Protocol):
    """Tensors by their stored names, as :class:`minitron.models.weights.WeightReader` gives them."""

    files: dict[str, str]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""

    def dtype_of(self, name: str) -> torch.dtype:
        """A tensor's dtype."""

    def get(self, name: str, kept: Kept = ()) -> torch.Tensor:
        """A tensor, or the part of it that ``kept`` names."""

    def close(self) -> None:
        """Close all files."""


def mismatch(reader: TensorReader, family: Family) -> str:
    """Why a folder's tensors cannot be placed by their names and shapes alone; empty when they can."""
    size_of, found = family.architecture.size, set(reader.files)
    in_memory = {spec.name: spec.shape(size_of) for spec in family.layout.parameters}
    expected = in_memory if in_memory.keys() <= found else {item.spec.name: item.spec.shape(size_of) for item in family.stored}
    for name in sorted(expected.keys() ^ found):
        return f"'{name}' is {'not in its files' if name in expected else 'in its files and not in the model'}"
    for name, shape in expected.items():
        if reader.shape_of(name) != shape:
            return f"'{name}' has shape {reader.shape_of(name)} in its files and {shape} in the model"
    return ""


def build_lazily(config: Any, family: Family, source: FolderWeights, *, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model on the meta device with real buffers, in the dtypes that transformers would load, which ``source`` is told."""
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    with parameters_on_meta(), torch.random.fork_rng(devices=[]):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_for(dtype, attention))
    wide = _kept_wide(model, dtype)
    for name, parameter in model.named_parameters():
        if wide is not None and wide.search(name):
            parameter.data = parameter.data.float()
        source.dtypes[name] = parameter.dtype
    for spec in family.layout.parameters:
        if spec.buffer:
            buffer = model.get_buffer(spec.name)
            source.dtypes[spec.name] = torch.float32 if wide is not None and wide.search(spec.name) else buffer.dtype
            module, _, attribute = spec.name.rpartition(".")
            setattr(model.get_submodule(module), attribute, source.read(spec.name))
    return model.eval()  # type: ignore[no-any-return]


def _kept_wide(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What transformers loads in float32 whatever narrower dtype is asked for."""
    patterns = model._get_dtype_plan(dtype)
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns))) if patterns else None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device and their buffers as their constructors compute them.

    ``torch.device("meta")`` would take the buffers along, and rotary frequencies, which no checkpoint holds, would be left without values.
    A parameter that was made on the meta device stays the same object, so tied ones stay tied.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Piece:
    """A stored tensor and the region [low, high) of the parameter that it fills; ``expert_dim`` is a dimension that it lacks."""

    name: str
    low: tuple[int, ...]
    high: tuple[int, ...]
    expert_dim: int | None = None
    transposed: bool = False


class FolderWeights:
    """Parameters by their names in memory, or some of their rows, read from the tensors of a folder, which may be named and split otherwise.

    ``dtypes`` has the dtype that each is wanted in; one that is not in it comes as it is stored.
    """

    def __init__(self, reader: TensorReader, family: Family) -> None:
        self._reader = reader
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes = {spec.name: spec.shape(family.architecture.size) for spec in family.layout.parameters}
        self._pieces: dict[str, list[_Piece]] = {}
        if all(name in reader.files for name in self.shapes):
            self._pieces = {name: [_Piece(name, (0,) * len(shape), shape)] for name, shape in self.shapes.items()}
            return
        for item in family.stored:
            self._pieces.setdefault(item.source.name, []).append(_piece(item, family.architecture.size))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows from ``start`` to ``stop`` of a parameter: memory for these rows, and where several tensors hold them for one more of those."""
        shape = self.shapes[name]
        stop = shape[0] if stop is None and shape else stop or 0
        pieces = self._pieces[name]
        dtype = self.dtypes.get(name) or self._reader.dtype_of(pieces[0].name)
        if len(pieces) == 1 and pieces[0].low == (0,) * len(shape) and pieces[0].high == shape:
            return self._rows(pieces[0], start, stop).to(dtype)
        out = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        for piece in pieces:
            first, last = max(start, piece.low[0]), min(stop, piece.high[0])
            if first < last:
                inner = tuple(slice(low, high) for low, high in zip(piece.low[1:], piece.high[1:], strict=True))
                out[(slice(first - start, last - start), *inner)] = self._rows(piece, first - piece.low[0], last - piece.low[0])
        return out

    def whole(self, name: str) -> str | None:
        """The stored tensor that is a parameter as it stands; None where it is several, or lies otherwise."""
        pieces = self._pieces.get(name, [])
        plain = len(pieces) == 1 and not pieces[0].transposed and pieces[0].expert_dim is None
        return pieces[0].name if plain and pieces[0].high == self.shapes[name] and not any(pieces[0].low) else None

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def _rows(self, piece: _Piece, first: int, last: int) -> torch.Tensor:
        """Rows of a piece, counted from its own first one, in the parameter's dimensions."""
        num_dims = len(piece.low)
        dims = [dim for dim in range(num_dims) if dim != piece.expert_dim]
        if piece.transposed:
            dims[-2:] = dims[-1], dims[-2]
        kept: list[torch.Tensor | None] = [None] * len(dims)
        if 0 in dims and (first, last) != (0, piece.high[0] - piece.low[0]):
            kept[dims.index(0)] = torch.arange(first, last)
        tensor = self._reader.get(piece.name, kept)
        if piece.transposed:
            tensor = tensor.transpose(-1, -2)
        return tensor if piece.expert_dim is None else tensor.unsqueeze(piece.expert_dim)


def _piece(item: StoredTensor, size_of: SizeOf) -> _Piece:
    """The region of the parameter that a stored tensor holds."""
    low, high = [], []
    expert_dim = None
    for dim, (segments, part) in enumerate(zip(item.source.dims, item.parts, strict=True)):
        if part is None:
            assert item.spec.expert is not None
            expert_dim = dim
            low.append(item.spec.expert)
            high.append(item.spec.expert + 1)
            continue
        sizes = [segment.size(size_of) for segment in segments]
        low.append(sum(sizes[: part[0]]))
        high.append(sum(sizes[: part[1]]))
    return _Piece(item.spec.name, tuple(low), tuple(high), expert_dim, item.transposed)
