"""Resumable state of long stages: tensors in safetensors, the rest in JSON, nothing that executes code on load."""

from minitron.checkpoint.checkpointer import Checkpointer, random_state, restore_random_state
from minitron.checkpoint.signals import StopSignal

__all__ = ["Checkpointer", "StopSignal", "random_state", "restore_random_state"]
