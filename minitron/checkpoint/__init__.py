"""Resumable state of long stages: tensors in safetensors, the rest in JSON, nothing that executes code on load."""

from minitron.checkpoint.checkpointer import Checkpointer, discard
from minitron.checkpoint.generators import random_state, restore_random_state
from minitron.checkpoint.heartbeat import Heartbeat
from minitron.checkpoint.lock import RunLock
from minitron.checkpoint.signals import StopSignal
from minitron.checkpoint.space import check_room

__all__ = ["Checkpointer", "Heartbeat", "RunLock", "StopSignal", "check_room", "discard", "random_state", "restore_random_state"]
