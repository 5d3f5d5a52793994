"""minitron makes large language models small: importance, search, pruning and distillation in one run folder."""

__version__ = "0.1.0"
