"""Text in, packed token sequences out: files, Hugging Face datasets, blends, and the documentation of the running Python."""

from minitron.data.ahead import BatchesAhead
from minitron.data.batches import GlobalBatches
from minitron.data.config import DataConfig
from minitron.data.stream import SequenceStream
from minitron.data.text import Blends, Text, data_fingerprint, open_text, separator_of

__all__ = ["BatchesAhead", "Blends", "DataConfig", "GlobalBatches", "SequenceStream", "Text", "data_fingerprint", "open_text", "separator_of"]
