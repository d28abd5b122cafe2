"""From text files to batches of ids: what a model's training reads.

A user of the layers, like any program outside this package: `import seqkern` never imports it.
"""

from seqkern.text.characters import (
    CharCorpus,
    CharVocabulary,
    CorpusError,
    Text,
    Windows,
    read_texts,
    split,
    standard_library,
)

__all__ = [
    "CharCorpus",
    "CharVocabulary",
    "CorpusError",
    "Text",
    "Windows",
    "read_texts",
    "split",
    "standard_library",
]
