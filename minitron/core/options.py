"""Fields of the typed configuration sections. A section is a dataclass that stands beside the code it configures."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(default: Any, help: str, *, recorded: bool = False) -> Any:
    """A configuration field.

    Args:
        default: the value when no group file and no command line gives one; lists and dicts are copied.
        help: one line shown by ``minitron STAGE --help``.
        recorded: True for settings that do not change results (parallelism, logging): written to the manifest, never compared.
    """
    metadata = {"help": help, "recorded": recorded}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def relevant(section: Any) -> dict[str, Any]:
    """A section's result-relevant settings as plain values."""
    names = [f.name for f in dataclasses.fields(section) if not f.metadata.get("recorded", False)]
    values = dataclasses.asdict(section)
    return {name: values[name] for name in names}
