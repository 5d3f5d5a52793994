"""Hugging Face decoders: discovery of their axes, reading and writing of their folders."""

from minitron.models.checkpoint_form import checkpoint_form
from minitron.models.family import Family, discover
from minitron.models.load import TeacherConfig, config_of, further_teachers, load_causal_lm, load_tokenizer, resolve_teacher
from minitron.models.taps import NormKind, Taps

__all__ = [
    "Family",
    "NormKind",
    "Taps",
    "TeacherConfig",
    "checkpoint_form",
    "config_of",
    "discover",
    "further_teachers",
    "load_causal_lm",
    "load_tokenizer",
    "resolve_teacher",
]
