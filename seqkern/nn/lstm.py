"""LSTM and LSTMCell: torch.nn's modules on seqkern.ops.lstm."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern import ops
from seqkern.nn import _base, _recurrent

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LSTM(_recurrent.Regularised, torch.nn.LSTM):
    """torch.nn.LSTM on seqkern's kernels: same constructor, parameters, results and gradients.

    Construct:  LSTM(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
                bidirectional=False, proj_size=0, device=None, dtype=None), and by keyword what regularises
                the recurrence: seqkern.nn.Regularised
    Call:       output, (h_n, c_n) = lstm(input, (h_0, c_0), lengths=lengths, reset=reset)

    TorchScript is not supported; tracing and ONNX export run torch.nn's own forward.
    Compile with seqkern.compile, which turns on what Dynamo asks for every subclass of torch.nn.LSTM.

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    _cell = "lstm"

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(  # type: ignore[overload-cannot-match]  # as torch is skipped, and with it the difference
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I], with batch_first [B, T, I], unbatched [T, I], or a PackedSequence
            hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), unbatched [L*D, P] and [L*D, H]; None for zeros. P =
                proj_size or H
            lengths: [B] integers in 0..T on input's device, for a padded batch whose row b has lengths[b]
                steps: outputs beyond are zero, the reverse direction starts at the last valid step, h_n and
                c_n are those after it (h_0, c_0 where the length is 0). No sorting, no packing. Not with a
                PackedSequence, nor with unbatched input (slice that instead)
            reset: bool [T, B], with batch_first [B, T], unbatched [T], for a PackedSequence another one or
                its data: True at t: the state before step t is zero, no gradient passes, and the reverse
                direction stops there, too. On a GPU, reading it synchronises: give it on the CPU
        Returns:
            output: [T, B, D*P], [B, T, D*P], [T, D*P] or a PackedSequence, as input;  (h_n, c_n): as hx
        Raises:
            ValueError: input is neither 2-D nor 3-D, input's dtype is not the weights', lengths are wrong
            RuntimeError: any other wrong shape, dtype or device; T = 0
        """
        if reset is not None or _recurrent.is_regularised(self):
            projects = self.proj_size > 0
            params = _recurrent.plain_params(_base.flat_weights(self), self.bias, projects)
            return _recurrent.run(self, params, input, hx, lengths, reset)
        if lengths is None and _base.exporting_to_torchscript_or_onnx():
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths)
        x, batched = _base.as_batch("LSTM", input, self.batch_first)
        if hx is not None:
            hx = _base.as_states("lstm", ("h", "c"), hx, batched)
        if not batched:
            _base.refuse_lengths(lengths, "unbatched input")
        y, (h_n, c_n) = ops.lstm(
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
            return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return y.transpose(0, 1) if self.batch_first else y, (h_n, c_n)

    def _forward_packed(
        self, packed: PackedSequence, hx: tuple[Tensor, Tensor] | None, lengths: Tensor | None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        _base.refuse_lengths(lengths, "a PackedSequence")
        if hx is not None:
            h_0, c_0 = hx
            hx = (
                _base.permute_state(h_0, packed.sorted_indices),
                _base.permute_state(c_0, packed.sorted_indices),
            )
        y, (h_n, c_n) = ops.lstm(
            packed.data,
            hx,
            _base.flat_weights(self),
            batch_sizes=packed.batch_sizes,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
        )
        h_n = _base.permute_state(h_n, packed.unsorted_indices)
        c_n = _base.permute_state(c_n, packed.unsorted_indices)
        return _base.repack(y, packed), (h_n, c_n)

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
            proj_size: int = 0,
            device: _base.Device = None,
            dtype: torch.dtype | None = None,
            **regularisers: Unpack[_recurrent.RegulariserOptions],
        ) -> None: ...

        __call__ = forward


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell on seqkern's kernels: same constructor, parameters, results and gradients.

    Construct:  LSTMCell(input_size, hidden_size, bias=True, device=None, dtype=None)
    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: [B, I], unbatched [I]
            hx: (h_0, c_0), [B, H] each, unbatched [H]; None for zeros
        Returns:
            (h_1, c_1): as hx
        Raises:
            ValueError: input, h_0 or c_0 is neither 1-D nor 2-D
            RuntimeError: any other wrong shape, dtype or device
        """
        x, batched = _base.cell_input("LSTMCell", input)
        if hx is not None:
            for k, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
            if isinstance(hx, Tensor):
                raise TypeError("hx: expected a pair (h_0, c_0), got one tensor")
            if len(hx) != 2:
                raise RuntimeError(f"hx: lstm_cell expects two hidden states (h_0, c_0), got {len(hx)}")
            if not batched:
                hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h_1, c_1 = ops.lstm_cell(x, hx, _base.cell_weights(self))
        return (h_1, c_1) if batched else (h_1.squeeze(0), c_1.squeeze(0))

    if TYPE_CHECKING:
        __call__ = forward
