"""Models at sizes that people run, with random weights, and what to give them: the cases of bench_models.py."""

from .case import Entry, Workload, build, class_of
from .decoders import DECODERS
from .media import AUDIO, VISION
from .multimodal import VISION_LANGUAGE
from .seq2seq import SEQ2SEQ
from .text import TEXT

__all__ = ["ENTRIES", "Entry", "Workload", "build", "class_of"]

ENTRIES: list[Entry] = [*TEXT, *VISION, *AUDIO, *SEQ2SEQ, *VISION_LANGUAGE, *DECODERS]
