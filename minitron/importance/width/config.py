"""The ``importance`` section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron.core.axes import AXES
from minitron.core.options import option
from minitron.errors import ConfigError, nearest

#: How absolute values are aggregated over the samples, or over the positions of one.
AGGREGATIONS = ("mean", "l2", "variance")
#: Which side of the activation function neurons are seen on.
NEURONS = ("post", "pre")
#: What an expert's activation is, at a token that is routed to it.
EXPERTS = ("output", "frequency", "weight")
#: How the matrices of a coupled group are put together.
GROUPS = ("sum", "max", "product")
ORDERS = ("first", "second", "mixed")
#: Axes that scoring in rounds can shrink. A masked expert would still take its share of the routing.
ROUND_AXES = tuple(axis for axis in AXES if axis not in ("layer", "expert"))


@dataclass(frozen=True)
class ImportanceConfig:
    """Section ``importance``."""

    name: str = option("activation", "width metric")
    num_samples: int = option(1024, "calibration sequences")
    batch_size: int = option(4, "sequences per forward", recorded=True)
    checkpoint_every: int = option(64, "forwards between checkpoints of the pass", recorded=True)
    samples: str = option("l2", "activation: aggregation over samples: mean (of absolute values), l2 or variance")
    sequence: str = option("mean", "activation: aggregation over the positions of a sample: mean (of absolute values), l2 or variance")
    neurons: str = option("post", "activation: see neurons at the down projection's input (post) or at the activation function's (pre)")
    experts: str = option("output", "activation: an expert by the norm of its routed output, its frequency, or its routing weight")
    group: str = option("sum", "magnitude, taylor: how the matrices of a unit's coupled group are put together: sum, max or product")
    order: str = option("first", "taylor: first order |w g|, second order w² F with the diagonal Fisher F, or mixed |w g - w² F / 2|")
    rounds: int = option(1, "score, mask a share of what shrink_to cuts, score again, this many times")
    shrink_to: dict[str, int] | None = option(None, "rounds > 1: units left on each axis after the last round, as {hidden: 384, ffn: 1024}")

    def check(self) -> None:
        """Refuse unknown words and rounds without sizes.

        Raises:
            ConfigError: the first one, with what is known.
        """
        words: dict[str, tuple[str, Sequence[str]]] = {
            "samples": (self.samples, AGGREGATIONS),
            "sequence": (self.sequence, AGGREGATIONS),
            "neurons": (self.neurons, NEURONS),
            "experts": (self.experts, EXPERTS),
            "group": (self.group, GROUPS),
            "order": (self.order, ORDERS),
        }
        for name, (word, known) in words.items():
            if word not in known:
                raise ConfigError(f"importance.{name}={word} is unknown; {nearest(word, known)}")
        for name in ("num_samples", "batch_size", "checkpoint_every", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"importance.{name}={getattr(self, name)} must be at least 1")
        if (self.rounds > 1) != bool(self.shrink_to):
            raise ConfigError(
                f"importance.rounds={self.rounds} with importance.shrink_to={self.shrink_to}: several rounds need the sizes that the last one "
                "leaves, as importance.shrink_to={ffn: 1024}, and one round needs none"
            )
        for axis, size in (self.shrink_to or {}).items():
            if axis not in ROUND_AXES:
                raise ConfigError(f"importance.shrink_to has no axis '{axis}'; {nearest(axis, ROUND_AXES)}")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"importance.shrink_to.{axis}={size!r} must be a whole number of at least 1")
