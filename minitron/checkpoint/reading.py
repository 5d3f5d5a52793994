"""A checkpoint read on any number of ranks: each takes the numbers it needs from whichever files hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from minitron import dist
from minitron.checkpoint.files import Part, is_sound, read_parts, read_span
from minitron.core.share import Span, missing

#: From the name and shape of a whole tensor to the numbers of it that are asked for.
Wanted = Callable[[str, tuple[int, ...]], Span]


class Damaged(Exception):
    """A checkpoint that is not what it says; the message names the file."""


def read_checkpoint(files: list[Path], shapes: Mapping[str, tuple[int, ...]], wanted: Wanted | None) -> dict[str, torch.Tensor]:
    """This rank's tensors: its private ones, and of those in ``shapes`` what it wants (None: what it saved).

    Every file is hashed by one rank, its own where as many ranks come as saved. What an unsound file held is worth nothing on any rank, which
    the caller finds out.

    Raises:
        Damaged: a file does not match its checksum, or numbers are missing.
        OSError, ValueError: a file cannot be read.
    """
    world, rank = dist.world_size(), dist.rank()
    for path in files[rank::world]:
        if not is_sound(path):
            raise Damaged(f"{path.name} does not match its checksum")
    own = files[rank] if rank < len(files) else None
    ordered = [*files[rank:], *files[:rank]] if own is not None else files
    gathering = _Gathering(shapes, wanted)
    for path in ordered:
        if path != own and gathering.complete:
            break
        gathering.take(path, private=path == own)
    return gathering.result()


class _Gathering:
    """Tensors that fill up from one file after another."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], wanted: Wanted | None) -> None:
        self._shapes, self._wanted = shapes, wanted
        self._spans: dict[str, Span] = {} if wanted is None else {name: wanted(name, shape) for name, shape in shapes.items()}
        self._left = {name: missing(span, []) for name, span in self._spans.items()}
        self._flat: dict[str, torch.Tensor] = {}
        self._private: dict[str, torch.Tensor] = {}

    @property
    def complete(self) -> bool:
        return not any(self._left.values())

    def take(self, path: Path, *, private: bool) -> None:
        """Read what is still missing and this file has; from a rank's own file also what is its alone."""
        for name, part in read_parts(path).items():
            if part.private or self._wanted is None:
                if private:
                    self._private[name] = self._read_all(path, part)
                continue
            if name not in self._shapes or self._shapes[name] != part.shape:
                raise Damaged(f"{path.name} holds '{name}' as {part.shape}, which state.json does not")
            for start, stop in list(self._left[name]):
                overlap = max(start, part.start), min(stop, part.stop)
                if overlap[0] < overlap[1]:
                    self._fill(path, name, part, overlap)

    def _read_all(self, path: Path, part: Part) -> torch.Tensor:
        out = torch.empty(part.stop - part.start, dtype=part.dtype)
        read_span(path, part, (part.start, part.stop), out)
        whole = math.prod(part.shape) == out.numel()
        return out.view(part.shape) if whole else out

    def _fill(self, path: Path, name: str, part: Part, overlap: Span) -> None:
        first, last = self._spans[name]
        if name not in self._flat:
            self._flat[name] = torch.empty(last - first, dtype=part.dtype)
        out = self._flat[name]
        if out.dtype != part.dtype:
            raise Damaged(f"{path.name} holds '{name}' in {part.dtype}, another file in {out.dtype}")
        read_span(path, part, overlap, out[overlap[0] - first : overlap[1] - first])
        self._left[name] = [piece for span in self._left[name] for piece in missing(span, [overlap])]

    def result(self) -> dict[str, torch.Tensor]:
        """All of it, whole rows in their shape."""
        for name, left in self._left.items():
            if left:
                raise Damaged(f"numbers {left[0][0]} to {left[0][1]} of '{name}' are in no file")
        found = dict(self._private)
        for name, (start, stop) in self._spans.items():
            shape = self._shapes[name]
            flat = self._flat.get(name, torch.empty(0))
            row = math.prod(shape[1:])
            if not shape or (stop - start == math.prod(shape)):
                flat = flat.view(shape)
            elif row and start % row == 0 and stop % row == 0:
                flat = flat.view(-1, *shape[1:])
            found[name] = flat
        return found
