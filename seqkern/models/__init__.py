"""The reference models: the classic sequence tutorials' modules on seqkern's layers.

A state_dict of the torch.nn original loads. Every model takes `layers`, the module its recurrent and
attention layers come from: seqkern.nn, or torch.nn for the same model on PyTorch's own layers. Where a
tutorial has a slip, the model's docstring says what is corrected.

The tutorials, by the letters that the docstrings use: M PyTorch Masterclass, part 3: NLP; T Tutorial 07:
sequential tasks; C CMSC 473/673: recurrent networks; S PyTorch sequence modeling; D deep learning for NLP.
Names that collide between them, or with seqkern.nn's:

    tutorial                here
    M SimpleRNN             RNNStep
    S SimpleRNN             SimpleRNN
    M SentimentLSTM         SentimentLSTM
    D SentimentLSTM         BinarySentimentLSTM
    M Attention(hidden_dim) OutputAttention
"""

from seqkern.models.characters import CharacterEncoder, CharacterOptions
from seqkern.models.classifiers import (
    BiLSTMModel,
    BinarySentimentLSTM,
    EmbeddingModel,
    GRUClassifier,
    GRUWithAttention,
    LSTMClassifier,
    LSTMModel,
    OutputAttention,
    RNNClassifier,
    SentimentLSTM,
    SentimentLSTMWithAttention,
    TweetClassifier,
)
from seqkern.models.elmo import BidirectionalLanguageModel, ContextualEmbedding, ScalarMix
from seqkern.models.language_models import RNNLanguageModel, char_language_model, word_language_model
from seqkern.models.recurrent import CharRNN, RNNStep, SimpleRNN
from seqkern.models.sampling import filter_logits, sample
from seqkern.models.taggers import BiLSTMCRF, RNNTagger

__all__ = [
    "BiLSTMCRF",
    "BiLSTMModel",
    "BidirectionalLanguageModel",
    "BinarySentimentLSTM",
    "CharRNN",
    "CharacterEncoder",
    "CharacterOptions",
    "ContextualEmbedding",
    "EmbeddingModel",
    "GRUClassifier",
    "GRUWithAttention",
    "LSTMClassifier",
    "LSTMModel",
    "OutputAttention",
    "RNNClassifier",
    "RNNLanguageModel",
    "RNNStep",
    "RNNTagger",
    "ScalarMix",
    "SentimentLSTM",
    "SentimentLSTMWithAttention",
    "SimpleRNN",
    "TweetClassifier",
    "char_language_model",
    "filter_logits",
    "sample",
    "word_language_model",
]
