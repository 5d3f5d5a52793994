"""The random generators of a rank as tensors."""

from __future__ import annotations

import torch


def random_state() -> dict[str, torch.Tensor]:
    """This rank's random generators as tensors."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put this rank's random generators back; those of a rank that no checkpoint knows stay as they are."""
    if "random/cpu" in state:
        torch.set_rng_state(state["random/cpu"])
    if "random/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random/cuda"])
