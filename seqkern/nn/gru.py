"""GRU and GRUCell: torch.nn's modules on seqkern.ops.gru."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern import ops
from seqkern.nn import _base, _recurrent
from seqkern.ops.recurrent import UPDATE_GATES

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Gates:
    """Where the gates of a GRU act, by keywords of the constructor or attributes. On the class as long as
    they have their defaults, which are torch.nn's.

    reset_after: the reset gate acts after the product, n = tanh(W_in x + b_in + r * (W_hn h + b_hn)), else
        before it, n = tanh(W_in x + b_in + W_hn (r * h) + b_hn), as in Cho et al. 2014
    update_gate: "keep", h = (1 - z) * n + z * h, or "replace", h = (1 - z) * h + z * n
    """

    reset_after: bool = True
    update_gate: str = "keep"

    def __init__(
        self, *args: Any, reset_after: bool = True, update_gate: str = "keep", **kwargs: Any
    ) -> None:
        if not isinstance(reset_after, bool):
            raise TypeError(f"reset_after: expected a bool, got {type(reset_after).__name__}")
        if update_gate not in UPDATE_GATES:
            raise ValueError(f"update_gate: expected 'keep' or 'replace', got {update_gate!r}")
        super().__init__(*args, **kwargs)
        if not reset_after:
            self.reset_after = reset_after
        if update_gate != "keep":
            self.update_gate = update_gate

    @property
    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    @property
    def _is_torchs(self) -> bool:
        return self.reset_after and self.update_gate == "keep"

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        text += "" if self.reset_after else ", reset_after=False"
        return text + ("" if self.update_gate == "keep" else f", update_gate={self.update_gate}")


class GRU(_Gates, _recurrent.Regularised, torch.nn.GRU):  # type: ignore[override]
    """torch.nn.GRU on seqkern's kernels: same constructor, parameters, results and gradients.

    Construct:  GRU(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
                bidirectional=False, device=None, dtype=None), and by keyword reset_after=True,
                update_gate="keep" (or "replace"), and what regularises the recurrence: seqkern.nn.Regularised
    Call:       output, h_n = gru(input, h_0, lengths=lengths, reset=reset)

    reset_after=False: the reset gate before the product, n = tanh(W_in x + b_in + W_hn (r * h) + b_hn).
    update_gate="replace": h = (1 - z) * h + z * n.

    TorchScript is not supported; tracing and ONNX export run torch.nn's own forward.
    Compile with seqkern.compile, which turns on what Dynamo asks for every subclass of torch.nn.GRU.

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(  # type: ignore[overload-cannot-match]  # as torch is skipped, and with it the difference
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I], with batch_first [B, T, I], unbatched [T, I], or a PackedSequence
            hx: h_0 [L*D, B, H], unbatched [L*D, H]; None for zeros
            lengths: [B] integers in 0..T on input's device, for a padded batch whose row b has lengths[b]
                steps: outputs beyond are zero, the reverse direction starts at the last valid step, h_n is
                the state after it (h_0 where the length is 0). No sorting, no packing. Not with a
                PackedSequence, nor with unbatched input (slice that instead)
            reset: bool [T, B], with batch_first [B, T], unbatched [T], for a PackedSequence another one or
                its data: True at t: the state before step t is zero, no gradient passes, and the reverse
                direction stops there, too. On a GPU, reading it synchronises: give it on the CPU
        Returns:
            output: [T, B, D*H], [B, T, D*H], [T, D*H] or a PackedSequence, as input;  h_n: as hx
        Raises:
            ValueError: input is neither 2-D nor 3-D, input's dtype is not the weights', lengths are wrong
            RuntimeError: any other wrong shape, dtype or device; T = 0
        """
        if reset is not None or _recurrent.is_regularised(self) or not self._is_torchs:
            params = _recurrent.plain_params(_base.flat_weights(self), self.bias, False)
            return _recurrent.run(self, params, input, hx, lengths, reset, update_gate=self.update_gate)
        if lengths is None and _base.exporting_to_torchscript_or_onnx():
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths)
        x, batched = _base.as_batch("GRU", input, self.batch_first)
        if hx is not None:
            hx = _base.as_state(hx, batched)
        if not batched:
            _base.refuse_lengths(lengths, "unbatched input")
        y, h_n = ops.gru(
            x,
            hx,
            _base.flat_weights(self),
            lengths=lengths,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
        )
        if not batched:
            return y.squeeze(1), h_n.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y, h_n

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None, lengths: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        _base.refuse_lengths(lengths, "a PackedSequence")
        if hx is not None:
            hx = _base.permute_state(hx, packed.sorted_indices)
        y, h_n = ops.gru(
            packed.data,
            hx,
            _base.flat_weights(self),
            batch_sizes=packed.batch_sizes,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
        )
        return _base.repack(y, packed), _base.permute_state(h_n, packed.unsorted_indices)

    if TYPE_CHECKING:  # the constructor and the call, of which torch.nn's classes say less or nothing

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: _base.Device = None,
            dtype: torch.dtype | None = None,
            *,
            reset_after: bool = True,
            update_gate: str = "keep",
            **regularisers: Unpack[_recurrent.RegulariserOptions],
        ) -> None: ...

        __call__ = forward


class GRUCell(_Gates, torch.nn.GRUCell):
    """torch.nn.GRUCell on seqkern's kernels: same constructor, parameters, results and gradients.

    Construct:  GRUCell(input_size, hidden_size, bias=True, device=None, dtype=None, *, reset_after=True,
                update_gate="keep"), as in GRU
    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        update_gate: str = "keep",
    ) -> None:
        super().__init__(
            *(input_size, hidden_size, bias, device, dtype), reset_after=reset_after, update_gate=update_gate
        )

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: [B, I], unbatched [I]
            hx: h_0 [B, H], unbatched [H]; None for zeros
        Returns:
            h_1: as hx
        Raises:
            ValueError: input or hx is neither 1-D nor 2-D
            RuntimeError: any other wrong shape, dtype or device
        """
        x, batched = _base.cell_input("GRUCell", input)
        h_0 = _base.cell_state("GRUCell", hx, batched)
        weights = _base.cell_weights(self)
        if self._is_torchs:
            h_1 = ops.gru_cell(x, h_0, weights)
        else:
            params = _recurrent.plain_params(weights, len(weights) == 4, False)
            states = None if h_0 is None else [h_0]
            (h_1,) = ops.recurrent_cell(self._cell, x, states, params, update_gate=self.update_gate)
        return h_1 if batched else h_1.squeeze(0)

    if TYPE_CHECKING:
        __call__ = forward
