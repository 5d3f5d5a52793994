"""Quality of finished models."""

from minitron.evaluate.perplexity import EvaluateConfig, perplexity

__all__ = ["EvaluateConfig", "perplexity"]
