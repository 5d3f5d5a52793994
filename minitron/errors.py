"""Errors that a user can mend. The command line prints them as one sentence and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MinitronError(Exception):
    """Base of every error caused by input rather than by a bug."""


class ConfigError(MinitronError):
    """An option, value or combination of options that cannot be used."""


class ArchitectureError(MinitronError):
    """A model shape or family that cannot be pruned as asked."""


class DataError(MinitronError):
    """Text that is missing, unreadable or too small."""


class CheckpointError(MinitronError):
    """A model folder, run folder or training checkpoint that is missing, damaged or foreign."""


class DivergenceError(MinitronError):
    """A training whose numbers are not finite, with no way back that has not been tried."""


class LaunchError(MinitronError):
    """A process group, port, device or disk that is not as needed."""


class Interrupted(Exception):
    """A stage stopped at a checkpoint because a signal asked for it; the same command goes on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that names the nearest known word (of a bare key every section that has it), and all of them when they are few."""
    choices = sorted(known)
    same = [c for c in choices if c.rpartition(".")[2] == name.rpartition(".")[2]]  # a key may be right but for its section
    close = [] if same and "." not in name else difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    close = close or same[:4]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
    listing = f"known: {', '.join(choices)}" if len(choices) <= 16 else ""
    return " ".join(part for part in (hint, listing) if part)
