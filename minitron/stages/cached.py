"""A teacher's cache in place of the teacher: where it lies, what it was made for, and whether that is this run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.core.manifest import fingerprint_folder, plain
from minitron.core.options import relevant
from minitron.distill.cache import CachedSignal, CacheHeader, CacheStore, Wanted, check_belongs, check_loss
from minitron.distill.cache.store import HEADER, INDEX
from minitron.distill.settings import later_blends
from minitron.errors import CheckpointError
from minitron.log import get_logger
from minitron.models import config_of
from minitron.models.load import DTYPES
from minitron.stages.calibration import fingerprint_tokenizer
from minitron.stages.context import StageContext

logger = get_logger(__name__)


def cache_folder(run_dir: Path, path: str | None) -> Path:
    """The cache to read: ``cache.path``, else this run's."""
    return Path(path).expanduser() if path else run_dir / "cache"


def drawn_by(context: StageContext) -> list[list[int]]:
    """Sequence length and number of sequences of every phase of ``training``."""
    phases = context.sections.training.phase_table(context.sections.data.sequence_length)
    return [[phase.sequence_length, phase.num_steps * phase.batch_size] for phase in phases]


def wanted_by(context: StageContext, *, teacher: str) -> Wanted:
    """What a cache for this run is made of; ``teacher`` is the fingerprint of its folder."""
    training, data = context.sections.training, context.sections.data
    later, dtype = later_blends(training, data), context.sections.teacher.dtype
    return Wanted(
        teacher=teacher,
        tokenizer=fingerprint_tokenizer(context.tokenizer()),
        data=context.data_fingerprint(later),
        text=dict(plain({**relevant(data), "packing": context.packing()})),
        seed=context.seed,
        drawn=drawn_by(context),
        num_validation=len(context.held_out(training.num_validation_sequences, later)),
        teacher_name=str(context.teacher_folder()),
        tokenizer_name=str(context.original_teacher()),
        dtype=None if dtype == "auto" else str(DTYPES[dtype]).removeprefix("torch."),
    )


def cache_inputs(context: StageContext) -> dict[str, Any]:
    """What a distillation from a cache depends on, once the cache is found to be of this run. Hidden states are the teacher itself.

    Raises:
        ConfigError: the loss cannot be computed from it.
        CheckpointError: there is no cache, or it is of something else.
    """
    folder = cache_folder(context.run_dir, context.sections.cache.path)
    header = CacheHeader.read(folder)
    check_loss(context.sections.loss, signal=header.signal, k=header.k)
    check_belongs(header, wanted_by(context, teacher=fingerprint_folder(context.teacher_folder())), folder)
    found: dict[str, Any] = {"teacher": header.teacher}
    if header.signal != "hidden_states":
        content = b"".join((folder / name).read_bytes() for name in (HEADER, INDEX))
        found["cache"] = hashlib.sha256(content).hexdigest()
    return found


def open_cached(context: StageContext, source: Path) -> CachedSignal:
    """The stored teacher of the student in a folder.

    Raises:
        CheckpointError: the cache is damaged, or its targets are over more tokens than the student has.
    """
    store = CacheStore(cache_folder(context.run_dir, context.sections.cache.path))
    header, rows = store.header, int(config_of(source, context.sections.teacher).vocab_size)
    if header.signal != "hidden_states" and rows < header.vocab_size:
        raise CheckpointError(
            f"{source} has a vocabulary of {rows} rows, the targets in {store.folder} are over {header.vocab_size}: use cache.signal=hidden_states"
        )
    if dist.is_main():
        logger.info("  the teacher's %s come from %s, %d bytes per token", header.signal, store.folder, header.bytes_per_token)
    return CachedSignal(store)
