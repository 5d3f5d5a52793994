"""Quality and speed of finished models, and what they write."""

from minitron.evaluate.generate import Written, agreement_from_start, prompt_ids, write_on
from minitron.evaluate.perplexity import perplexity
from minitron.evaluate.settings import EvaluateConfig, GenerateConfig, SpeedConfig
from minitron.evaluate.speed import measure_speed
from minitron.evaluate.tasks import Tasks, check_tasks

__all__ = [
    "EvaluateConfig",
    "GenerateConfig",
    "SpeedConfig",
    "Tasks",
    "Written",
    "agreement_from_start",
    "check_tasks",
    "measure_speed",
    "perplexity",
    "prompt_ids",
    "write_on",
]
