"""Text in, packed token sequences out: files, Hugging Face datasets, blends, and the documentation of the running Python."""

from minitron.data.batches import IGNORE_INDEX, GlobalBatches, shifted_labels
from minitron.data.config import DataConfig
from minitron.data.stream import SequenceStream
from minitron.data.text import Blends, Text, data_fingerprint, open_text

__all__ = ["IGNORE_INDEX", "Blends", "DataConfig", "GlobalBatches", "SequenceStream", "Text", "data_fingerprint", "open_text", "shifted_labels"]
