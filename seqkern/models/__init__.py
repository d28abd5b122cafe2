"""The reference models: the classic sequence tutorials' modules on seqkern's layers.

A state_dict of the torch.nn original loads. Every model takes `layers`, the module its recurrent and
attention layers come from: seqkern.nn, or torch.nn for the same model on PyTorch's own layers. Where a
tutorial has a slip, the model's docstring says what is corrected.

The tutorials, by the letters that the docstrings use: M PyTorch Masterclass, part 3: NLP; T Tutorial 07:
sequential tasks; C CMSC 473/673: recurrent networks; S PyTorch sequence modeling; D deep learning for NLP.
Names that collide between them, or with seqkern.nn's:

    tutorial                                        here
    M SimpleRNN                                     RNNStep
    S SimpleRNN                                     SimpleRNN
    M SentimentLSTM                                 SentimentLSTM
    D SentimentLSTM                                 BinarySentimentLSTM
    M Attention(hidden_dim)                         OutputAttention
    M Encoder, Decoder, Seq2Seq                     LSTMEncoder, LSTMDecoder, LSTMSeq2Seq
    M the same with attention, Attention            AttnEncoder, AttnDecoder, AttnSeq2Seq, AttnScore
    D Encoder, Decoder                              CharEncoder, CharDecoder
    M MultiHeadAttention, of the Transformer        SelfAttention
    M MultiHeadAttention, in block form             AttentionBlock
    M Encoder, Decoder, Transformer                 VanillaEncoder, VanillaDecoder, VanillaTransformer
    T MultiHeadAttention                            MultiHeadAttentionHA
    T PositionalEncoding                            DropoutPositionalEncoding
    M, S, D PositionalEncoding                      PositionalEncoding, for D with batch_first=False

Two corrections change shapes, so that not all of a tutorial's state_dict fits: AttnEncoder has both
directions and a bridge, and CharDecoder's GRU reads 2H.
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
from seqkern.models.decoding import (
    DecodingModule,
    Hypotheses,
    ancestral_sampling,
    beam_search,
    greedy_search,
    reorder_state,
)
from seqkern.models.elmo import BidirectionalLanguageModel, ContextualEmbedding, ScalarMix
from seqkern.models.language_models import RNNLanguageModel, char_language_model, word_language_model
from seqkern.models.positional import DropoutPositionalEncoding, PositionalEncoding
from seqkern.models.recurrent import CharRNN, RNNStep, SimpleRNN
from seqkern.models.sampling import filter_logits, sample
from seqkern.models.seq2seq import (
    CharDecoder,
    CharEncoder,
    DecoderRNN,
    EncoderRNN,
    LSTMDecoder,
    LSTMEncoder,
    LSTMSeq2Seq,
)
from seqkern.models.seq2seq_attention import (
    AttnDecoder,
    AttnEncoder,
    AttnScore,
    AttnSeq2Seq,
    BahdanauAttention,
    LuongAttention,
)
from seqkern.models.taggers import BiLSTMCRF, RNNTagger
from seqkern.models.teacher_forcing import scheduled_sampling
from seqkern.models.transformer import (
    CNN,
    Embeddings,
    EncoderLayer,
    MultiHeadAttentionHA,
    SimpleTransformer,
    TransformerClassifier,
    TransformerEncoder,
    TransformerModel,
)
from seqkern.models.translation import TranslationGRU, TranslationModel, TranslationTransformer
from seqkern.models.vanilla_transformer import (
    AttentionBlock,
    DecoderBlock,
    SelfAttention,
    TransformerBlock,
    VanillaDecoder,
    VanillaEncoder,
    VanillaTransformer,
)

__all__ = [
    "CNN",
    "AttentionBlock",
    "AttnDecoder",
    "AttnEncoder",
    "AttnScore",
    "AttnSeq2Seq",
    "BahdanauAttention",
    "BiLSTMCRF",
    "BiLSTMModel",
    "BidirectionalLanguageModel",
    "BinarySentimentLSTM",
    "CharDecoder",
    "CharEncoder",
    "CharRNN",
    "CharacterEncoder",
    "CharacterOptions",
    "ContextualEmbedding",
    "DecoderBlock",
    "DecoderRNN",
    "DecodingModule",
    "DropoutPositionalEncoding",
    "EmbeddingModel",
    "Embeddings",
    "EncoderLayer",
    "EncoderRNN",
    "GRUClassifier",
    "GRUWithAttention",
    "Hypotheses",
    "LSTMClassifier",
    "LSTMDecoder",
    "LSTMEncoder",
    "LSTMModel",
    "LSTMSeq2Seq",
    "LuongAttention",
    "MultiHeadAttentionHA",
    "OutputAttention",
    "PositionalEncoding",
    "RNNClassifier",
    "RNNLanguageModel",
    "RNNStep",
    "RNNTagger",
    "ScalarMix",
    "SelfAttention",
    "SentimentLSTM",
    "SentimentLSTMWithAttention",
    "SimpleRNN",
    "SimpleTransformer",
    "TransformerBlock",
    "TransformerClassifier",
    "TransformerEncoder",
    "TransformerModel",
    "TranslationGRU",
    "TranslationModel",
    "TranslationTransformer",
    "TweetClassifier",
    "VanillaDecoder",
    "VanillaEncoder",
    "VanillaTransformer",
    "ancestral_sampling",
    "beam_search",
    "char_language_model",
    "filter_logits",
    "greedy_search",
    "reorder_state",
    "sample",
    "scheduled_sampling",
    "word_language_model",
]
