"""From a budget to candidate shapes."""

from minitron.search.enumerate import enumerate_shapes, pick_diverse
from minitron.search.space import SearchConfig, TargetConfig, axis_values, budget, explicit_shape

__all__ = ["SearchConfig", "TargetConfig", "axis_values", "budget", "enumerate_shapes", "explicit_shape", "pick_diverse"]
