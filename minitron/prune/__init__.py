"""Weight surgery: a pure function from weights, plan and family to weights."""

from minitron.prune.proof import prove
from minitron.prune.surgery import layout_of, prune_weights, target_config

__all__ = ["layout_of", "prove", "prune_weights", "target_config"]
