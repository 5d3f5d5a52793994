"""Hugging Face decoders: discovery of their axes, reading and writing of their folders."""

from minitron.models.family import Family, NormKind, discover
from minitron.models.load import TeacherConfig, config_of, load_causal_lm, load_tokenizer, resolve_teacher

__all__ = ["Family", "NormKind", "TeacherConfig", "config_of", "discover", "load_causal_lm", "load_tokenizer", "resolve_teacher"]
