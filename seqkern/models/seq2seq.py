"""Sequence to sequence without attention over time that varies: encoder, decoder, teacher forcing."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkern.nn
from seqkern import ops
from seqkern.models._attention import backend_of
from seqkern.models._layers import run
from seqkern.models.decoding import DecodingModule, reorder_state
from seqkern.models.teacher_forcing import forced_runs


class LSTMEncoder(nn.Module):
    """The final states of an LSTM over source tokens (M's Encoder), batch first.

    Construct:  LSTMEncoder(input_size, hidden_size, embed_size, num_layers=1, *, layers=seqkern.nn)
    Parameters: embedding, lstm
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        embed_size: int,
        num_layers: int = 1,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(input_size, embed_size)
        self.lstm = layers.LSTM(embed_size, hidden_size, num_layers, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:     x: [B, S] int64;  lengths: [B], None: all S
        Returns:  hidden, cell: [num_layers, B, H], after each row's last token
        """
        _, (hidden, cell) = run(self.lstm, self.embedding(x), lengths)
        return hidden, cell


class LSTMDecoder(nn.Module):
    """An LSTM language model that starts from given states (M's Decoder), batch first.

    Construct:  LSTMDecoder(output_size, hidden_size, embed_size, num_layers=1, *, layers=seqkern.nn)
    Parameters: embedding, lstm, fc
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int,
        embed_size: int,
        num_layers: int = 1,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.embedding = nn.Embedding(output_size, embed_size)
        self.lstm = layers.LSTM(embed_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:     x: [B] int64, one step, or [B, T], T steps in one call of the layer
                  hidden, cell: [num_layers, B, H]
        Returns:  logits: [B, V] or [B, T, V];  hidden, cell
        """
        one = x.dim() == 1
        y, (hidden, cell) = run(self.lstm, self.embedding(x.unsqueeze(1) if one else x), None, (hidden, cell))
        logits = self.fc(y)
        return logits.squeeze(1) if one else logits, hidden, cell


class LSTMSeq2Seq(DecodingModule):
    """LSTMEncoder, then LSTMDecoder from its states (M's Seq2Seq), batch first.

    Construct:  LSTMSeq2Seq(encoder, decoder)
    Call:       logits = model(src, src_lengths, trg, teacher_forcing_ratio=0.5)
    Decode:     model.decode(src, src_lengths, beam_width=5)

    Steps whose inputs are the target's run in one call of the decoder's layer; all of them with
    teacher_forcing_ratio=1.

    Source:     Sutskever, Vinyals and Le, "Sequence to Sequence Learning with Neural Networks", 2014
    """

    def __init__(self, encoder: LSTMEncoder, decoder: LSTMDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self,
        src: Tensor,
        src_lengths: Tensor | None,
        trg: Tensor,
        teacher_forcing_ratio: float = 0.5,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """
        Args:     src: [B, S] int64;  src_lengths: [B], None: all S;  trg: [B, T] int64, T > 0, <sos> first
                  teacher_forcing_ratio: how often a step is given the target's token and not the likeliest
                  one; generator: of these choices, on the CPU
        Returns:  logits: [B, T, V]; step 0 is zero, step t scores trg[:, t]
        Raises:   ValueError: a target of no steps, a ratio outside 0..1
        """
        _check_target(trg, 1)
        hidden, cell = self.encoder(src, src_lengths)
        outputs = [hidden.new_zeros((trg.shape[0], 1, self.decoder.output_size))]
        for start, stop in forced_runs(trg.shape[1] - 1, teacher_forcing_ratio, generator):
            inputs = trg[:, start:stop]
            if start:
                inputs = torch.cat([outputs[-1][:, -1:].argmax(2), inputs[:, 1:]], 1)
            logits, hidden, cell = self.decoder(inputs, hidden, cell)
            outputs.append(logits)
        return torch.cat(outputs, 1)

    def encode_source(self, src: Tensor, src_lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.encoder(src, src_lengths)

    def step(self, ids: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits, hidden, cell = self.decoder(ids, *state)
        return torch.log_softmax(logits, -1), (hidden, cell)

    def reorder(self, state: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        return reorder_state(state, index, dim=1)  # [num_layers, R, H]


class EncoderRNN(nn.Module):
    """A GRU over source tokens (C), batch first.

    Construct:  EncoderRNN(input_size, hidden_size, dropout_p=0.1, *, layers=seqkern.nn)
    Parameters: embedding, gru
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout_p: float = 0.1,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.embedding = nn.Embedding(input_size, hidden_size)
        self.gru = layers.GRU(hidden_size, hidden_size, batch_first=True)
        self.dropout = nn.Dropout(dropout_p)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:     input: [B, S] int64;  lengths: [B], None: all S
        Returns:  output: [B, S, H];  hidden: [1, B, H]
        """
        return run(self.gru, self.dropout(self.embedding(input)), lengths)


class DecoderRNN(nn.Module):
    """A GRU that writes from an encoder's final state (C), batch first.

    Construct:  DecoderRNN(hidden_size, output_size, *, sos_index=0, max_length=10, layers=seqkern.nn)
    Parameters: embedding, gru, out

    With a target all steps run in one call of the layer. sos_index and max_length are C's globals.
    """

    def __init__(
        self,
        hidden_size: int,
        output_size: int,
        *,
        sos_index: int = 0,
        max_length: int = 10,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.sos_index, self.max_length = sos_index, max_length
        self.embedding = nn.Embedding(output_size, hidden_size)
        self.gru = layers.GRU(hidden_size, hidden_size, batch_first=True)
        self.out = nn.Linear(hidden_size, output_size)

    def forward(
        self, encoder_outputs: Tensor, encoder_hidden: Tensor, target_tensor: Tensor | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """
        Args:     encoder_outputs: [B, S, H], of which only B is read;  encoder_hidden: [1, B, H]
                  target_tensor: [B, T] int64, T > 0, without <sos>: teacher forcing; None: max_length steps,
                  each given the likeliest token of the one before
        Returns:  log-probabilities: [B, T or max_length, V];  hidden: [1, B, H];  None, as C has it
        Raises:   ValueError: a target of no steps
        """
        start = torch.full(
            (encoder_outputs.shape[0], 1), self.sos_index, dtype=torch.int64, device=encoder_outputs.device
        )
        if target_tensor is not None:
            _check_target(target_tensor, 1)
            logits, hidden = self.forward_step(
                torch.cat([start, target_tensor[:, :-1].to(start)], 1), encoder_hidden
            )
            return F.log_softmax(logits, -1), hidden, None
        steps, tokens, hidden = [], start, encoder_hidden
        for _ in range(self.max_length):
            logits, hidden = self.forward_step(tokens, hidden)
            tokens = logits.detach().argmax(-1)
            steps.append(logits)
        return F.log_softmax(torch.cat(steps, 1), -1), hidden, None

    def forward_step(self, input: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """input: [B, T] int64, T mostly 1 -> (logits [B, T, V], hidden [1, B, H])."""
        output, hidden = self.gru(F.relu(self.embedding(input)), hidden)
        return self.out(output), hidden


class CharEncoder(nn.Module):
    """A GRU over characters (D's Encoder).

    Construct:  CharEncoder(input_size, hidden_size, *, batch_first=False, layers=seqkern.nn)
    Parameters: embedding, gru
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        batch_first: bool = False,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.embedding = nn.Embedding(input_size, hidden_size)
        self.gru = layers.GRU(hidden_size, hidden_size, batch_first=batch_first)

    def forward(
        self, input: Tensor, hidden: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:     input: [S, B] int64, with batch_first [B, S];  hidden: [1, B, H], None: zeros
                  lengths: [B], None: all S
        Returns:  outputs: as input, with H;  hidden: [1, B, H]
        """
        return run(self.gru, self.embedding(input), lengths, hidden)


class CharDecoder(nn.Module):
    """A GRU that is fed each character and what it attends to (D's Decoder).

        weights = softmax over s of attention([h; encoder_output_s])
        h_t     = gru([embedding(x_t); sum over s of weights_s encoder_output_s], h_{t-1});  logits = out(h_t)

    Construct:  CharDecoder(output_size, hidden_size, *, batch_first=False, layers=seqkern.nn)
    Parameters: embedding, gru (2H → H), attention lin(2H→1), out

    The score is linear: what it takes from h is the same for all s, and the softmax cancels it, as it does
    the bias. So one context serves all steps, which run in one call of the layer, and those parameters'
    gradients are zero.

    Corrected:  D concatenates and normalises along the wrong axes, and gives the GRU 2H where it takes H.
                Here its input is 2H, so that of D's state_dict gru.weight_ih_l0 does not fit.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int,
        *,
        batch_first: bool = False,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.hidden_size, self.batch_first = hidden_size, batch_first
        self.embedding = nn.Embedding(output_size, hidden_size)
        self.gru = layers.GRU(2 * hidden_size, hidden_size, batch_first=batch_first)
        self.attention = nn.Linear(2 * hidden_size, 1)
        self.out = nn.Linear(hidden_size, output_size)
        self._backend = backend_of(layers)

    def forward(
        self,
        input: Tensor,
        hidden: Tensor,
        encoder_outputs: Tensor,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:     input: [B] int64, one step, or [T, B], with batch_first [B, T]: teacher forcing
                  hidden: [1, B, H];  encoder_outputs: [S, B, H], with batch_first [B, S, H]
                  lengths: [B] of the sources, None: all S
        Returns:  logits: as input, with V;  hidden: [1, B, H];  weights: [B, S], of every step
        """
        keys = encoder_outputs if self.batch_first else encoder_outputs.transpose(0, 1)
        query = self.attention.weight[:, self.hidden_size :] + 0 * self.attention.bias  # the bias's gradient
        context, weights = ops.dot_attention(
            query.expand(keys.shape[0], 1, -1), keys, keys, lengths=lengths, backend=self._backend
        )
        steps_dim = 1 if self.batch_first else 0
        one = input.dim() == 1
        x = self.embedding(input.unsqueeze(steps_dim) if one else input)
        context = context if self.batch_first else context.transpose(0, 1)
        y, hidden = self.gru(torch.cat([x, context.expand_as(x)], 2), hidden)
        logits = self.out(y)
        return logits.squeeze(steps_dim) if one else logits, hidden, weights.squeeze(1)


def _check_target(trg: Tensor, steps_dim: int) -> None:
    if trg.dim() != 2 or not trg.shape[steps_dim]:
        letters = "[T, B]" if steps_dim == 0 else "[B, T]"
        raise ValueError(f"trg: expected {letters} with T > 0, got {tuple(trg.shape)}")
