"""The recurrent network by hand, and the plain layer with a linear head.

In all models: B batch, T steps, I input, E embedding, H hidden, V vocabulary, O outputs or classes.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

import seqkern.nn
from seqkern.models import _layers


class RNNStep(nn.Module):
    """One step of a recurrent network on the concatenation z = [x; h]: h' = tanh(i2h z), output =
    log_softmax(i2o z), of the old hidden state.

    Construct:  RNNStep(input_size, hidden_size, output_size, *, layers=seqkern.nn)
                layers: taken as by every model; this one has none of them
    Call:       output, hidden = step(input, hidden)
    Parameters: i2h, i2o: Linear layers of I + H inputs
    Source:     M's SimpleRNN
    """

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, *, layers: ModuleType = seqkern.nn
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.i2h = nn.Linear(input_size + hidden_size, hidden_size)
        self.i2o = nn.Linear(input_size + hidden_size, output_size)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, input: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:     input: [B, I];  hidden: [B, H]
        Returns:  log-probabilities [B, O];  the new hidden state [B, H]
        """
        z = torch.cat([input, hidden], dim=1)
        return self.softmax(self.i2o(z)), torch.tanh(self.i2h(z))

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        """Zeros [B, H]."""
        return self.i2h.weight.new_zeros(batch_size, self.hidden_size)


class SimpleRNN(nn.Module):
    """fc of the hidden state at the last step.

    Construct:  SimpleRNN(input_size, hidden_size, output_size, *, layers=seqkern.nn)
    Call:       output = model(x, lengths)
    Parameters: rnn: RNN, batch first;  fc: Linear
    Source:     S's SimpleRNN
    """

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, *, layers: ModuleType = seqkern.nn
    ) -> None:
        super().__init__()
        self.rnn = layers.RNN(input_size, hidden_size, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     x: [B, T, I];  lengths: [B] integers in 0..T, None: all steps
        Returns:  [B, O]
        """
        _, state = _layers.run(self.rnn, x, lengths)
        return self.fc(_layers.last_hidden(state))


class CharRNN(nn.Module):
    """A sequence of one-hot letters to the log-probabilities of its class.

    Construct:  CharRNN(input_size, hidden_size, output_size, *, logits=False, layers=seqkern.nn)
                logits: return unnormalised scores, for CrossEntropyLoss: the improvement that C's slides
                suggest
    Call:       scores = model(line, lengths)
    Parameters: rnn: RNN, time first;  h2o: Linear
    Source:     C's CharRNN
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        logits: bool = False,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.logits = logits
        self.rnn = layers.RNN(input_size, hidden_size)
        self.h2o = nn.Linear(hidden_size, output_size)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, line: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     line: [T, B, I];  lengths: [B] integers in 0..T, None: all steps
        Returns:  [B, O] log-probabilities, or logits
        """
        _, state = _layers.run(self.rnn, line, lengths)
        scores = self.h2o(_layers.last_hidden(state))
        return scores if self.logits else self.softmax(scores)
