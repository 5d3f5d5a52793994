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


class LaunchError(MinitronError):
    """A process group, port, device or disk that is not as needed."""


class Interrupted(Exception):
    """A stage stopped at a checkpoint because a signal asked for it; the same command goes on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that names the nearest known word, and all of them when they are few."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if not close:  # a key may be right but for its section: compare the last parts as well
        close = [c for c in choices if c.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    hint = f"did you mean '{close[0]}'?" if close else ""
    listing = f"known: {', '.join(choices)}" if len(choices) <= 16 else ""
    return " ".join(part for part in (hint, listing) if part)
