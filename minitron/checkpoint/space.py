"""Whether the disk holds the checkpoints that a training will write, asked before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from minitron.errors import CheckpointError
from minitron.log import get_logger

logger = get_logger(__name__)


def check_room(folder: Path, *, num_bytes: int, keep: int, others: int = 0, free: int | None = None) -> None:
    """Compare the room below ``folder`` with checkpoints of ``num_bytes`` over all ranks, ``keep`` of which stand while one more is written.

    Args:
        others: bytes that are wanted beside them (best weights).
        free: free bytes; None asks the disk. What already lies in the folder counts as room, because it will be replaced.

    Raises:
        CheckpointError: not even one fits.
    """
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    room = (shutil.disk_usage(_existing(folder)).free if free is None else free) + present
    need = (keep + 1) * num_bytes + others
    if room < num_bytes + others:
        raise CheckpointError(
            f"a checkpoint takes {_gigabytes(num_bytes + others)} and {folder} has room for {_gigabytes(room)}: give run_dir on a larger disk, or "
            "training.checkpoint_every=0 to train without"
        )
    if room < need:
        logger.warning(
            "  disk: %d checkpoints and one being written take %s, there is room for %s at %s: lower training.keep_checkpoints or make room",
            keep,
            _gigabytes(need),
            _gigabytes(room),
            folder,
        )


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
