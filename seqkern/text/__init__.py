"""From text files to batches of ids: what a model's training reads.

files and readers    files, plain or .gz, as lines, whole texts, or records of the standard formats
tokenization, bpe    text → tokens or subword units
vocabulary           tokens ↔ ids;  characters: the same for characters
batches              lists of ids → padded tensors with lengths; batches of like length
corpus               texts → streams and windows for language models
vectors              pretrained word vectors
toy                  small corpora made by rule

A user of the layers, like any program outside this package: `import seqkern` never imports it. The package
tokenizers is imported by BytePairEncoding, datasets by download, neither by `import seqkern.text`.
"""

from seqkern.text import toy
from seqkern.text.batches import (
    BucketSampler,
    collate,
    collate_offsets,
    collate_pairs,
    one_hot,
    pad_sequences,
)
from seqkern.text.bpe import BytePairEncoding
from seqkern.text.characters import CharVocabulary
from seqkern.text.corpus import CharCorpus, Windows, WordCorpus, read_words, split
from seqkern.text.files import CorpusError, Text, read_lines, read_texts, standard_library
from seqkern.text.readers import (
    Labelled,
    Pair,
    Tagged,
    download,
    easy_pairs,
    read_conll,
    read_conllu,
    read_imdb,
    read_labelled_lines,
    read_names,
    read_pairs,
    read_parallel,
    read_tsv,
)
from seqkern.text.tokenization import (
    basic_english,
    clean_text,
    letters_only,
    normalize_string,
    unicode_to_ascii,
    word_tokenize,
)
from seqkern.text.vectors import WordVectors
from seqkern.text.vocabulary import Vocabulary

__all__ = [
    "BucketSampler",
    "BytePairEncoding",
    "CharCorpus",
    "CharVocabulary",
    "CorpusError",
    "Labelled",
    "Pair",
    "Tagged",
    "Text",
    "Vocabulary",
    "Windows",
    "WordCorpus",
    "WordVectors",
    "basic_english",
    "clean_text",
    "collate",
    "collate_offsets",
    "collate_pairs",
    "download",
    "easy_pairs",
    "letters_only",
    "normalize_string",
    "one_hot",
    "pad_sequences",
    "read_conll",
    "read_conllu",
    "read_imdb",
    "read_labelled_lines",
    "read_lines",
    "read_names",
    "read_pairs",
    "read_parallel",
    "read_texts",
    "read_tsv",
    "read_words",
    "split",
    "standard_library",
    "toy",
    "unicode_to_ascii",
    "word_tokenize",
]
