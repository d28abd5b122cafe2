"""The modules: torch.nn's constructors, parameters and forwards on seqkern's operations."""

from seqkern.nn.gru import GRU, GRUCell
from seqkern.nn.lstm import LSTM, LSTMCell
from seqkern.nn.rnn import RNN, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
