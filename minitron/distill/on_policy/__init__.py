"""On-policy distillation: the student learns on text that it writes itself. A data source that wraps the batches, and one loss term.

GKD (arXiv 2306.13649) replaces a share of the batches and keeps the loss; MiniLLM (arXiv 2306.08543) descends the reverse KL divergence of
whole sequences.
"""

from __future__ import annotations

from minitron.distill.on_policy.batches import OnPolicyBatches, ResumableBatches
from minitron.distill.on_policy.root import SamplingRoot, root_class
from minitron.distill.on_policy.sampling import ContinuationSampler
from minitron.distill.on_policy.settings import METHODS, OFF, OnPolicyConfig

__all__ = [
    "METHODS",
    "OFF",
    "ContinuationSampler",
    "OnPolicyBatches",
    "OnPolicyConfig",
    "ResumableBatches",
    "SamplingRoot",
    "root_class",
]
