"""Sequence to sequence with attention: additive, time first (M), and the tutorials' attention modules."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

import seqkern.nn
from seqkern import ops
from seqkern.models._attention import backend_of
from seqkern.models._layers import run
from seqkern.models.decoding import DecodingModule, reorder_state
from seqkern.models.teacher_forcing import forced_runs
from seqkern.nn import ProjectedKeys


class LuongAttention(nn.Module):
    """Luong's attention with M's parameters and order of results, on seqkern's kernels.

    The score of a query q and a key k is q · k ("dot"), q · W k ("general") or v · tanh(W [q; k]) ("concat").

    Construct:  LuongAttention(hidden_size, method="general", *, layers=seqkern.nn)
    Parameters: "general": W lin(H→H);  "concat": W lin(2H→H), v [H]; no biases

    Corrected:  M's "concat" squeezes the wrong axis.
    Source:     Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation",
                2015, section 3.1;  see seqkern.nn.LuongAttention, which returns (context, weights)
    """

    def __init__(self, hidden_size: int, method: str = "general", *, layers: ModuleType = seqkern.nn) -> None:
        super().__init__()
        if method not in ("dot", "general", "concat"):
            raise ValueError(f"method: expected 'dot', 'general' or 'concat', got {method!r}")
        self.hidden_size, self.method = hidden_size, method
        self._backend = backend_of(layers)
        if method == "general":
            self.W = nn.Linear(hidden_size, hidden_size, bias=False)
        elif method == "concat":
            self.W = nn.Linear(2 * hidden_size, hidden_size, bias=False)
            self.v = Parameter(torch.empty(hidden_size).uniform_(-(hidden_size**-0.5), hidden_size**-0.5))

    def forward(
        self, decoder_hidden: Tensor, encoder_outputs: Tensor, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:     decoder_hidden: [B, H];  encoder_outputs: [B, S, H];  lengths: [B] of the keys, None: all S
        Returns:  weights: [B, S];  context: [B, H]
        """
        query, keys = decoder_hidden.unsqueeze(1), encoder_outputs
        padding: dict[str, Any] = dict(lengths=lengths, backend=self._backend)
        if self.method == "concat":
            of_query, of_key = self.W.weight.split(self.hidden_size, dim=1)
            context, weights = ops.additive_attention(
                F.linear(query, of_query), F.linear(keys, of_key), self.v, keys, **padding
            )
        else:
            query = query @ self.W.weight if self.method == "general" else query  # q · W k = q W · k
            context, weights = ops.dot_attention(query, keys, keys, **padding)
        return weights.squeeze(1), context.squeeze(1)


class BahdanauAttention(nn.Module):
    """Additive attention with C's parameters and order of results, on seqkern's kernels.

    weights = softmax over s of Va tanh(Wa query + Ua key_s)

    Construct:  BahdanauAttention(hidden_size, *, layers=seqkern.nn)
    Parameters: Wa, Ua lin(H→H), Va lin(H→1), whose bias the softmax cancels: its gradient is zero

    Source:     Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and
                Translate", 2015;  see seqkern.nn.AdditiveAttention, which has no such bias
    """

    def __init__(self, hidden_size: int, *, layers: ModuleType = seqkern.nn) -> None:
        super().__init__()
        self.Wa = nn.Linear(hidden_size, hidden_size)
        self.Ua = nn.Linear(hidden_size, hidden_size)
        self.Va = nn.Linear(hidden_size, 1)
        self._backend = backend_of(layers)

    def forward(self, query: Tensor, keys: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:     query: [B, L, H], in C L = 1;  keys: [B, S, H];  lengths: [B] of the keys, None: all S
        Returns:  context: [B, L, H];  weights: [B, L, S]
        """
        v = self.Va.weight[0] + 0 * self.Va.bias
        return ops.additive_attention(
            self.Wa(query), self.Ua(keys), v, keys, lengths=lengths, backend=self._backend
        )


class AttnEncoder(nn.Module):
    """A bidirectional LSTM over source tokens, time first (M's Encoder of the version with attention).

    Construct:  AttnEncoder(input_dim, emb_dim, hid_dim, n_layers, dropout, *, dec_hid_dim=None,
                layers=seqkern.nn);  dec_hid_dim: the decoder's H, None: hid_dim
    Parameters: embedding, rnn;  bridge_h, bridge_c lin(2·hid_dim→dec_hid_dim)

    Corrected:  M's decoder expects both directions and its encoder has one. This one has both, and a bridge
                from both directions' final states to the decoder's first ones: tanh(bridge_h [h→; h←]) and
                bridge_c [c→; c←], per layer. Of M's state_dict embedding and the forward direction of rnn's
                first layer fit.
    """

    def __init__(
        self,
        input_dim: int,
        emb_dim: int,
        hid_dim: int,
        n_layers: int,
        dropout: float,
        *,
        dec_hid_dim: int | None = None,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        dec_hid_dim = hid_dim if dec_hid_dim is None else dec_hid_dim
        self.embedding = nn.Embedding(input_dim, emb_dim)
        self.rnn = layers.LSTM(
            emb_dim, hid_dim, n_layers, dropout=dropout if n_layers > 1 else 0.0, bidirectional=True
        )
        self.bridge_h = nn.Linear(2 * hid_dim, dec_hid_dim)
        self.bridge_c = nn.Linear(2 * hid_dim, dec_hid_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """
        Args:     src: [S, B] int64;  lengths: [B], None: all S
        Returns:  outputs: [S, B, 2·hid_dim], zero beyond each length;  h, c: [n_layers, B, dec_hid_dim]
        """
        outputs, (h, c) = run(self.rnn, self.dropout(self.embedding(src)), lengths)
        return outputs, (torch.tanh(self.bridge_h(_both(h))), self.bridge_c(_both(c)))


def _both(state: Tensor) -> Tensor:
    """[layers * 2, B, H] -> [layers, B, 2H]: forward, backward."""
    return torch.cat([state[0::2], state[1::2]], 2)


class AttnScore(nn.Module):
    """M's Attention: weights = softmax over s of v tanh(attn [hidden; encoder_output_s]).

    Construct:  AttnScore(enc_hid_dim, dec_hid_dim, *, layers=seqkern.nn)
    Parameters: attn lin(2·enc_hid_dim + dec_hid_dim→dec_hid_dim), v lin(dec_hid_dim→1) without bias
    Call:       weights = score(hidden, encoder_outputs)
    Decode:     keys = score.project_keys(encoder_outputs), once a sequence, then for each step
                context, weights = score.attend(hidden, keys)
    """

    def __init__(self, enc_hid_dim: int, dec_hid_dim: int, *, layers: ModuleType = seqkern.nn) -> None:
        super().__init__()
        self.enc_hid_dim, self.dec_hid_dim = enc_hid_dim, dec_hid_dim
        self.attn = nn.Linear(2 * enc_hid_dim + dec_hid_dim, dec_hid_dim)
        self.v = nn.Linear(dec_hid_dim, 1, bias=False)
        self._backend = backend_of(layers)

    def forward(self, hidden: Tensor, encoder_outputs: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """
        Args:     hidden: [B, dec_hid_dim];  encoder_outputs: [S, B, 2·enc_hid_dim]
                  lengths: [B] of the sources, None: all S
        Returns:  weights: [B, S]
        """
        return self.attend(hidden, self.project_keys(encoder_outputs, lengths))[1]

    @property
    def query_weight(self) -> Tensor:
        """[dec_hid_dim, dec_hid_dim], the part of attn that meets hidden."""
        return self.attn.weight[:, : self.dec_hid_dim]

    def project_keys(self, encoder_outputs: Tensor, lengths: Tensor | None = None) -> ProjectedKeys:
        """attn's part for encoder_outputs [S, B, 2·enc_hid_dim], the same in all steps."""
        value = encoder_outputs.transpose(0, 1)
        key = F.linear(value, self.attn.weight[:, self.dec_hid_dim :], self.attn.bias)
        return ProjectedKeys(key, value, lengths=lengths)

    def attend(self, hidden: Tensor, keys: ProjectedKeys) -> tuple[Tensor, Tensor]:
        """hidden [B, dec_hid_dim] -> (context [B, 2·enc_hid_dim], weights [B, S])."""
        query = F.linear(hidden, self.query_weight).unsqueeze(1)
        context, weights = ops.additive_attention(
            *(query, keys.key, self.v.weight[0], keys.value), lengths=keys.lengths, backend=self._backend
        )
        return context.squeeze(1), weights.squeeze(1)


class AttnDecoder(nn.Module):
    """An LSTM that is fed each token and what its last hidden state attends to (M's Decoder), time first.

        context_t = attend(h_{t-1} of the last layer);  y_t, h_t, c_t = rnn([embedded_t; context_t])
        logits_t  = fc_out([y_t; context_t; embedded_t])

    Construct:  AttnDecoder(output_dim, emb_dim, enc_hid_dim, dec_hid_dim, n_layers, dropout, attention, *,
                layers=seqkern.nn);  attention: an AttnScore
    Parameters: embedding, rnn LSTM(2·enc_hid_dim + emb_dim→dec_hid_dim), fc_out, attention.*

    Of several steps at once embedding and fc_out run as one. With n_layers=1 on a CPU so do attention and
    LSTM, in one operator; with more layers, or on a GPU, they go step by step, each on its own kernel, for
    the query is what the last layer gave a step before.
    """

    def __init__(
        self,
        output_dim: int,
        emb_dim: int,
        enc_hid_dim: int,
        dec_hid_dim: int,
        n_layers: int,
        dropout: float,
        attention: AttnScore,
        *,
        layers: ModuleType = seqkern.nn,
    ) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.attention = attention
        self.embedding = nn.Embedding(output_dim, emb_dim)
        self.rnn = layers.LSTM(
            2 * enc_hid_dim + emb_dim, dec_hid_dim, n_layers, dropout=dropout if n_layers > 1 else 0.0
        )
        self.fc_out = nn.Linear(2 * enc_hid_dim + dec_hid_dim + emb_dim, output_dim)
        self.dropout = nn.Dropout(dropout)
        self._backend = backend_of(layers)

    def forward(
        self, input: Tensor, hidden: Tensor, cell: Tensor, encoder_outputs: Tensor | ProjectedKeys
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:     input: [B] int64, one step, or [T, B], T > 0 steps
                  hidden, cell: [n_layers, B, dec_hid_dim]
                  encoder_outputs: [S, B, 2·enc_hid_dim], or what attention.project_keys made of it, which
                  knows lengths and is worth it when it serves several calls
        Returns:  logits: [B, V] or [T, B, V];  hidden, cell
        """
        one = input.dim() == 1
        keys = encoder_outputs
        if not isinstance(keys, ProjectedKeys):
            keys = self.attention.project_keys(keys)
        embedded = self.dropout(self.embedding(input.unsqueeze(0) if one else input))
        fused = self._backend is None and self.rnn.num_layers == 1 and embedded.is_cpu
        attend = self._all_steps if fused else self._step_by_step
        y, context, hidden, cell = attend(embedded, hidden, cell, keys)
        logits = self.fc_out(torch.cat([y, context, embedded], 2))
        return logits.squeeze(0) if one else logits, hidden, cell

    def _all_steps(
        self, x: Tensor, hidden: Tensor, cell: Tensor, keys: ProjectedKeys
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, (h_n, c_n), context, _ = ops.attention_decoder(
            *(x, (hidden[0], cell[0]), self.rnn.all_weights[0], self.attention.query_weight),
            *(keys.key, self.attention.v.weight[0], keys.value),
            lengths=keys.lengths,
        )
        return y, context, h_n.unsqueeze(0), c_n.unsqueeze(0)

    def _step_by_step(
        self, x: Tensor, hidden: Tensor, cell: Tensor, keys: ProjectedKeys
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs, contexts = [], []
        for x_t in x.split(1):
            context = self.attention.attend(hidden[-1], keys)[0].unsqueeze(0)
            y_t, (hidden, cell) = self.rnn(torch.cat([x_t, context], 2), (hidden, cell))
            outputs.append(y_t)
            contexts.append(context)
        return torch.cat(outputs), torch.cat(contexts), hidden, cell


class _State(NamedTuple):
    """hidden, cell: [n_layers, R, H];  keys of the R rows."""

    hidden: Tensor
    cell: Tensor
    keys: ProjectedKeys


class AttnSeq2Seq(DecodingModule):
    """AttnEncoder, then AttnDecoder over its outputs (M's Seq2Seq with attention), time first.

    Construct:  AttnSeq2Seq(encoder, decoder, device=None);  device: to move both to
    Call:       logits = model(src, trg, teacher_forcing_ratio=0.5, src_lengths=lengths)
    Decode:     model.decode(src, src_lengths, beam_width=5)

    The keys are projected once a sequence. Steps whose inputs are the target's go to the decoder in one call;
    all of them with teacher_forcing_ratio=1.
    """

    batch_dim = 1

    def __init__(
        self, encoder: AttnEncoder, decoder: AttnDecoder, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        if device is not None:
            self.to(device)

    def forward(
        self,
        src: Tensor,
        trg: Tensor,
        teacher_forcing_ratio: float = 0.5,
        *,
        src_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """
        Args:     src: [S, B] int64;  trg: [T, B] int64, T > 0, <sos> first
                  src_lengths: [B], None: all S, padding included
                  teacher_forcing_ratio, generator: as LSTMSeq2Seq takes them
        Returns:  logits: [T, B, V]; step 0 is zero, step t scores trg[t]
        Raises:   ValueError: a target of no steps, a ratio outside 0..1
        """
        if trg.dim() != 2 or not trg.shape[0]:
            raise ValueError(f"trg: expected [T, B] with T > 0, got {tuple(trg.shape)}")
        hidden, cell, keys = self.encode_source(src, src_lengths)
        outputs = [hidden.new_zeros((1, trg.shape[1], self.decoder.output_dim))]
        for start, stop in forced_runs(trg.shape[0] - 1, teacher_forcing_ratio, generator):
            inputs = trg[start:stop]
            if start:
                inputs = torch.cat([outputs[-1][-1:].argmax(2), inputs[1:]])
            logits, hidden, cell = self.decoder(inputs, hidden, cell, keys)
            outputs.append(logits)
        return torch.cat(outputs)

    def encode_source(self, src: Tensor, src_lengths: Tensor | None = None) -> _State:
        outputs, (hidden, cell) = self.encoder(src, src_lengths)
        return _State(hidden, cell, self.decoder.attention.project_keys(outputs, src_lengths))

    def step(self, ids: Tensor, state: _State) -> tuple[Tensor, _State]:
        logits, hidden, cell = self.decoder(ids, *state)
        return torch.log_softmax(logits, -1), state._replace(hidden=hidden, cell=cell)

    def reorder(self, state: _State, index: Tensor) -> _State:
        hidden, cell = reorder_state((state.hidden, state.cell), index, dim=1)
        return _State(hidden, cell, state.keys.reorder(index))
