"""Where the configuration and kernel sources lie: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def _first_existing(name: str) -> Path:
    for candidate in (_PACKAGE / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"minitron's folder '{name}' is neither in nor beside {_PACKAGE}")


def conf_dir() -> Path:
    """The folder of Hydra configuration groups."""
    return _first_existing("conf")


def kernels_dir() -> Path:
    """The folder of CUDA and C++ sources."""
    return _first_existing("kernels")


def cache_dir() -> Path:
    """A per-user folder for things made once (converted teachers): ``$MINITRON_CACHE`` or ``~/.cache/minitron``."""
    root = os.environ.get("MINITRON_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "minitron")
    return Path(root)


def source_commit() -> dict[str, Any] | None:
    """The commit of the checkout that this code runs from, and whether it was changed since; None for an installed package."""
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root)]
        commit = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        changed = subprocess.run(
            [*ask, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):  # no git here, or a folder that it does not trust
        return None
    return {"commit": commit, "changed": bool(changed.strip())}
