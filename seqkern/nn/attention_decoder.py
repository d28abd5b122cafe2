"""A decoder with attention and input feeding: one step, or teacher-forced over a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from seqkern import ops
from seqkern.nn import _base
from seqkern.nn.encoder_decoder import (
    AdditiveAttention,
    LuongAttention,
    ProjectedKeys,
    QueriedAttention,
)
from seqkern.nn.gru import GRUCell
from seqkern.nn.lstm import LSTMCell


class DecoderState(NamedTuple):
    """hidden: [B, H];  cell: [B, H] of an LSTM, else None;  fed: [B, H] the attentional state h~ that Luong's
    decoder feeds back, else None."""

    hidden: Tensor
    cell: Tensor | None = None
    fed: Tensor | None = None

    def reorder(self, index: Tensor) -> DecoderState:
        """Row b of the result is row index[b] of this, for beam search."""
        return DecoderState(*(None if t is None else t.index_select(0, index) for t in self))


class AttentionDecoder(nn.Module):
    """An LSTM or a GRU that attends to an encoder's output and is fed what it attended to.

        "bahdanau":  c_t = attend(h_{t-1});  h_t = cell([x_t; c_t], h_{t-1});  output h_t
        "luong":     h_t = cell([x_t; h~_{t-1}], h_{t-1});  c_t = attend(h_t);
                     output h~_t = tanh(W_c [c_t; h_t])

    Construct:  AttentionDecoder(input_size, hidden_size, key_dim=None, value_dim=None, cell="lstm",
                feeding="bahdanau", attention=None, attention_dim=None, bias=True, batch_first=False,
                device=None, dtype=None)
                key_dim: size of an encoder's output, None: hidden_size;  value_dim: None: key_dim
                cell: "lstm" or "gru"
                attention: "additive", "dot", "general", "concat", or a module such as
                DotProductAttention(hard=True);  None: "additive" for "bahdanau", "general" for "luong"
                attention_dim: of "additive" and "concat", None: hidden_size
    Call:       output, state, context, weights = decoder(input, keys, state, lengths=lengths)
    Decode:     projected = decoder.project_keys(keys, lengths=lengths), once a sequence, then for each step
                output, state, context, weights = decoder.step(input, projected, state)
    Parameters: cell.weight_ih [G*H, I + fed], cell.weight_hh, cell.bias_ih, cell.bias_hh: torch.nn's cells';
                attention.*;  with "luong" combine.weight [H, D + H]

    On a CPU a "bahdanau" decoder with additive attention runs all steps in one operator, forward and
    backward; the others go step by step through the attention's and the cell's own kernels, as all do on a
    GPU.

    Source:     Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and
                Translate", 2015; Luong, Pham and Manning, "Effective Approaches to Attention-based Neural
                Machine Translation", 2015, sections 3 and 3.3
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        cell: str = "lstm",
        feeding: str = "bahdanau",
        attention: str | QueriedAttention | None = None,
        attention_dim: int | None = None,
        bias: bool = True,
        batch_first: bool = False,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if cell not in ("lstm", "gru"):
            raise ValueError(f"cell: expected 'lstm' or 'gru', got {cell!r}")
        if feeding not in ("bahdanau", "luong"):
            raise ValueError(f"feeding: expected 'bahdanau' or 'luong', got {feeding!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.key_dim = hidden_size if key_dim is None else key_dim
        self.value_dim = self.key_dim if value_dim is None else value_dim
        self.feeding, self.batch_first = feeding, batch_first
        fed = self.value_dim if feeding == "bahdanau" else hidden_size
        kind = LSTMCell if cell == "lstm" else GRUCell
        self.cell = kind(input_size + fed, hidden_size, bias, device, dtype)
        if attention is None:
            attention = "additive" if feeding == "bahdanau" else "general"
        self.attention = self._make_attention(attention, attention_dim, device, dtype)
        if feeding == "luong":
            self.combine = nn.Linear(self.value_dim + hidden_size, hidden_size, False, device, dtype)

    def _make_attention(
        self,
        attention: str | QueriedAttention,
        attention_dim: int | None,
        device: _base.Device,
        dtype: torch.dtype | None,
    ) -> QueriedAttention:
        if isinstance(attention, QueriedAttention):
            return attention
        if attention == "additive":
            return AdditiveAttention(self.hidden_size, self.key_dim, attention_dim, False, device, dtype)
        if attention not in ("dot", "general", "concat"):
            raise ValueError(
                "attention: expected 'additive', 'dot', 'general', 'concat' or such a module, got "
                f"{attention!r}"
            )
        return LuongAttention(self.hidden_size, self.key_dim, attention, attention_dim, device, dtype)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, feeding={self.feeding!r}"

    def project_keys(
        self,
        keys: Tensor,
        values: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> ProjectedKeys:
        """Project keys [B, S, K] once for all steps: as the attention's own project_keys."""
        if keys.dim() != 3:
            raise RuntimeError(f"keys: expected [B, S, K], got {tuple(keys.shape)}")
        return self.attention.project_keys(keys, values, key_padding_mask, lengths=lengths)

    def initial_state(self, input: Tensor, B: int) -> DecoderState:
        """Zeros, as input's dtype and device."""
        zeros = input.new_zeros((B, self.hidden_size))
        lstm = isinstance(self.cell, LSTMCell)
        return DecoderState(zeros, zeros if lstm else None, zeros if self.feeding == "luong" else None)

    def forward(
        self,
        input: Tensor,
        keys: Tensor | ProjectedKeys,
        state: DecoderState | None = None,
        values: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, DecoderState, Tensor, Tensor]:
        """Decode a sequence whose inputs are all known: teacher forcing.

        Args:
            input: [T, B, I], with batch_first [B, T, I], T > 0
            keys: [B, S, K], batch first in any case, or what project_keys returned
            state: None: zeros
            values, key_padding_mask, lengths: as for AdditiveAttention, about the keys
        Returns:
            output: [T, B, H] or [B, T, H];  state: after the last step;  context: as output, with D;
            weights: [B, T, S]
        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit
            ValueError: a wrong padding mask or lengths, or either beside projected keys
        """
        letters = "[B, T, I]" if self.batch_first else "[T, B, I]"
        if input.dim() != 3 or input.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError(f"input: expected {letters} with T > 0, got {tuple(input.shape)}")
        projected = self._projected(keys, values, key_padding_mask, lengths)
        x = input.transpose(0, 1) if self.batch_first else input
        state = self.initial_state(x, x.shape[1]) if state is None else state
        run = self._all_steps if self._is_fused(x) else self._step_by_step
        output, state, context, weights = run(x, projected, state)
        if self.batch_first:
            output, context = output.transpose(0, 1), context.transpose(0, 1)
        return output, state, context, weights

    def step(
        self, input: Tensor, keys: Tensor | ProjectedKeys, state: DecoderState | None = None
    ) -> tuple[Tensor, DecoderState, Tensor, Tensor]:
        """One step.

        Args:     input: [B, I];  keys: what project_keys returned, or [B, S, K], projected anew;
                  state: None: zeros
        Returns:  output: [B, H];  state;  context: [B, D];  weights: [B, S]
        """
        if input.dim() != 2:
            raise RuntimeError(f"input: expected [B, I], got {tuple(input.shape)}")
        projected = self._projected(keys, None, None, None)
        state = self.initial_state(input, input.shape[0]) if state is None else state
        return self._step(input, projected, state)

    def _projected(
        self,
        keys: Tensor | ProjectedKeys,
        values: Tensor | None,
        key_padding_mask: Tensor | None,
        lengths: Tensor | None,
    ) -> ProjectedKeys:
        if not isinstance(keys, ProjectedKeys):
            return self.project_keys(keys, values, key_padding_mask, lengths=lengths)
        if values is not None or key_padding_mask is not None or lengths is not None:
            raise ValueError(
                "keys: what project_keys returned carries values, key_padding_mask and lengths; "
                "expected None for them"
            )
        return keys

    def _step(
        self, x: Tensor, keys: ProjectedKeys, state: DecoderState
    ) -> tuple[Tensor, DecoderState, Tensor, Tensor]:
        if self.feeding == "bahdanau":
            context, weights = self.attention(state.hidden, keys)
            hidden, cell = self._run_cell(torch.cat([x, context], -1), state)
            return hidden, DecoderState(hidden, cell), context, weights
        hidden, cell = self._run_cell(torch.cat([x, state.fed], -1), state)
        context, weights = self.attention(hidden, keys)
        output = torch.tanh(self.combine(torch.cat([context, hidden], -1)))
        return output, DecoderState(hidden, cell, output), context, weights

    def _run_cell(self, x: Tensor, state: DecoderState) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.cell, LSTMCell):
            return self.cell(x, (state.hidden, state.cell))
        return self.cell(x, state.hidden), None

    def _step_by_step(
        self, x: Tensor, keys: ProjectedKeys, state: DecoderState
    ) -> tuple[Tensor, DecoderState, Tensor, Tensor]:
        steps = []
        for x_t in x.unbind(0):
            output, state, context, weights = self._step(x_t, keys, state)
            steps.append((output, context, weights))
        outputs, contexts, all_weights = zip(*steps, strict=True)
        return torch.stack(outputs), state, torch.stack(contexts), torch.stack(all_weights, 1)

    def _is_fused(self, x: Tensor) -> bool:
        """Does ops.attention_decoder compute this?"""
        return self.feeding == "bahdanau" and isinstance(self.attention, AdditiveAttention) and x.is_cpu

    def _all_steps(
        self, x: Tensor, keys: ProjectedKeys, state: DecoderState
    ) -> tuple[Tensor, DecoderState, Tensor, Tensor]:
        lstm = isinstance(self.cell, LSTMCell)
        output, last, context, weights = ops.attention_decoder(
            x,
            (state.hidden, state.cell) if lstm else state.hidden,
            _base.cell_weights(self.cell),
            self.attention.query_projection.weight,
            keys.key,
            self.attention.v,
            keys.value,
            key_padding_mask=keys.key_padding_mask,
            lengths=keys.lengths,
        )
        return output, DecoderState(*last) if lstm else DecoderState(last), context, weights

    if TYPE_CHECKING:
        __call__ = forward
