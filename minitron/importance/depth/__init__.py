"""Depth scoring: what only watches the shared forward is an observer; what leaves layers out or needs gradients has a pass of its own."""

from __future__ import annotations

from minitron.importance.depth.config import DepthConfig, DepthPass, LacoConfig, Subject
from minitron.importance.depth.passes import run_depth_passes
from minitron.importance.depth.walk import Walk

__all__ = ["DepthConfig", "DepthPass", "LacoConfig", "Subject", "Walk", "run_depth_passes"]
