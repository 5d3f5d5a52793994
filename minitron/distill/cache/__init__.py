"""A teacher's signal on disk: written once by the stage ``cache``, read by training in place of a teacher."""

from minitron.distill.cache.belongs import Wanted, check_belongs
from minitron.distill.cache.settings import SIGNALS, CacheConfig, bytes_per_token, check_loss
from minitron.distill.cache.signal import CachedSignal
from minitron.distill.cache.store import CacheHeader, CacheStore
from minitron.distill.cache.write import CacheWriter, header_of

__all__ = [
    "SIGNALS",
    "CacheConfig",
    "CacheHeader",
    "CacheStore",
    "CacheWriter",
    "CachedSignal",
    "Wanted",
    "bytes_per_token",
    "check_belongs",
    "check_loss",
    "header_of",
]
