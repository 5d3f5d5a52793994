"""From a budget to candidate shapes."""

from minitron.search.enumerate import Found, find_shapes
from minitron.search.prediction import Workload, predicted_costs
from minitron.search.space import SearchConfig, axis_values
from minitron.search.target import TargetConfig, budget, explicit_shape, limits_of, require_limits

__all__ = [
    "Found",
    "SearchConfig",
    "TargetConfig",
    "Workload",
    "axis_values",
    "budget",
    "explicit_shape",
    "find_shapes",
    "limits_of",
    "predicted_costs",
    "require_limits",
]
