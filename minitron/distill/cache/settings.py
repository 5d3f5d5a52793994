"""Section ``cache``, and the bytes that a stored token takes."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.core.options import option
from minitron.distill.losses import LossConfig, build_losses, sparse_losses
from minitron.errors import ConfigError, nearest

SIGNALS = ("hidden_states", "top_k", "samples")
_LIVE = ("replicate", "shard", "offload")
#: Draws of one token are counted in two bytes at most.
_MAX_SAMPLES = 65535


@dataclass(frozen=True)
class CacheConfig:
    """Section ``cache``: the teacher's signal, stored once and read by ``teacher.placement=cached``."""

    signal: str = option("hidden_states", "hidden_states, top_k or samples")
    k: int = option(100, "top_k: how many of the teacher's likeliest tokens are stored; all others as one")
    num_samples: int = option(12, "samples: tokens drawn from the teacher at every position")
    proposal: float = option(1.0, "samples: tokens are drawn in proportion to p ** proposal and weighted so that they count as drawn from p")
    placement: str | None = option(
        None, "where the teacher lies while it is cached; null: as teacher.placement says, and replicate where that is cached", recorded=True
    )
    shard_mb: float = option(256.0, "size of a file, in MB", recorded=True)
    path: str | None = option(None, "a cache made elsewhere; null: this run's cache/", recorded=True)

    def check(self) -> None:
        """Refuse values that cannot work with any teacher.

        Raises:
            ConfigError: an unknown word, or a number out of range.
        """
        if self.signal not in SIGNALS:
            raise ConfigError(f"cache.signal={self.signal} is unknown; {nearest(self.signal, SIGNALS)}")
        if self.k < 1:
            raise ConfigError(f"cache.k={self.k} must be at least 1")
        if not 1 <= self.num_samples <= _MAX_SAMPLES:
            raise ConfigError(f"cache.num_samples={self.num_samples} must lie between 1 and {_MAX_SAMPLES}")
        if not 0 < self.proposal < float("inf"):
            raise ConfigError(f"cache.proposal={self.proposal} must be positive")
        if not 0 < self.shard_mb < float("inf"):
            raise ConfigError(f"cache.shard_mb={self.shard_mb} must be positive")
        if self.placement is not None and self.placement not in _LIVE:
            raise ConfigError(f"cache.placement={self.placement} is unknown; {nearest(self.placement, _LIVE)}")

    def check_vocabulary(self, num_tokens: int) -> None:
        """Refuse more tokens than a vocabulary has.

        Raises:
            ConfigError: ``k`` is larger.
        """
        if self.signal == "top_k" and self.k > num_tokens:
            raise ConfigError(f"cache.k={self.k} is more than the {num_tokens} tokens of the teacher's vocabulary")


def check_loss(loss: LossConfig, *, signal: str, k: int) -> None:
    """Refuse a loss that cannot be computed from a stored signal.

    Raises:
        ConfigError: a loss that needs logits or another temperature than was stored, or more tokens than were stored.
    """
    losses = build_losses(loss)
    if signal == "hidden_states" or not any(term.function.needs_teacher for term in losses):
        return
    sparse_losses(losses, signal)
    if loss.temperature != 1.0:
        raise ConfigError(
            f"loss.temperature={loss.temperature} cannot be had from cached {signal}, which are of temperature 1: "
            "use loss.temperature=1 or cache.signal=hidden_states"
        )
    if signal == "top_k" and any(term.name == "top_k" for term in losses) and loss.k > k:
        raise ConfigError(f"loss.k={loss.k} is more than the {k} tokens that the cache holds of every position (cache.k)")


def id_bytes(num_tokens: int) -> int:
    """Bytes of a token's number: two where the vocabulary permits, else four."""
    return 2 if num_tokens <= 1 << 16 else 4


def count_bytes(num_samples: int) -> int:
    """Bytes of how often a token was drawn."""
    return 1 if num_samples <= 255 else 2


def bytes_per_token(config: CacheConfig, *, hidden_size: int, num_tokens: int, dtype_bytes: int) -> int:
    """Bytes that a token takes in the cache of a teacher with this hidden size, vocabulary and bytes of a number of its weights.

    Log-probabilities are float32: in float16 a log-probability of −10 is off by up to 0.004, and so is the probability, relatively.
    """
    if config.signal == "hidden_states":
        return hidden_size * dtype_bytes
    if config.signal == "top_k":
        return config.k * (id_bytes(num_tokens) + 4) + 4
    one = id_bytes(num_tokens) + count_bytes(config.num_samples) + 4
    return config.num_samples * one + (4 if config.proposal != 1.0 else 0)
