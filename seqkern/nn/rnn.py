"""RNN and RNNCell: torch.nn's modules on seqkern.ops.rnn."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern import ops
from seqkern.nn import _base, _recurrent

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RNN(_recurrent.Regularised, torch.nn.RNN):
    """torch.nn.RNN on seqkern's kernels: same constructor, parameters, results and gradients.

    Construct:  RNN(input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True, batch_first=False,
                dropout=0.0, bidirectional=False, device=None, dtype=None), and by keyword what regularises
                the recurrence: seqkern.nn.Regularised
    Call:       output, h_n = rnn(input, h_0, lengths=lengths, reset=reset)

    TorchScript is not supported; tracing and ONNX export run torch.nn's own forward.
    Compile with seqkern.compile, which turns on what Dynamo asks for every subclass of torch.nn.RNN.

    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
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
        if reset is not None or _recurrent.is_regularised(self):
            params = _recurrent.plain_params(_base.flat_weights(self), self.bias, False)
            return _recurrent.run(self, params, input, hx, lengths, reset)
        if lengths is None and _base.exporting_to_torchscript_or_onnx():
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths)
        x, batched = _base.as_batch("RNN", input, self.batch_first)
        if hx is not None:
            hx = _base.as_state(hx, batched)
        if not batched:
            _base.refuse_lengths(lengths, "unbatched input")
        y, h_n = ops.rnn(
            x,
            hx,
            _base.flat_weights(self),
            lengths=lengths,
            num_layers=self.num_layers,
            nonlinearity=self._activation,
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
        y, h_n = ops.rnn(
            packed.data,
            hx,
            _base.flat_weights(self),
            batch_sizes=packed.batch_sizes,
            num_layers=self.num_layers,
            nonlinearity=self._activation,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
        )
        return _base.repack(y, packed), _base.permute_state(h_n, packed.unsorted_indices)

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return f"rnn_{self._activation}"

    @property
    def _activation(self) -> str:
        """torch.nn.RNN computes what `mode` says; `nonlinearity` is how the constructor was told."""
        return "relu" if self.mode == "RNN_RELU" else "tanh"

    if TYPE_CHECKING:  # the constructor and the call, of which torch.nn's classes say less or nothing

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: _base.Device = None,
            dtype: torch.dtype | None = None,
            **regularisers: Unpack[_recurrent.RegulariserOptions],
        ) -> None: ...

        __call__ = forward


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell on seqkern's kernels: same constructor, parameters, results and gradients.

    Construct:  RNNCell(input_size, hidden_size, bias=True, nonlinearity="tanh", device=None, dtype=None)
    Source:     https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: [B, I], unbatched [I]
            hx: h_0 [B, H], unbatched [H]; None for zeros
        Returns:
            h_1: as hx
        Raises:
            ValueError: input or hx is neither 1-D nor 2-D
            RuntimeError: any other wrong shape, dtype or device; an unknown nonlinearity
        """
        x, batched = _base.cell_input("RNNCell", input)
        h_0 = _base.cell_state("RNNCell", hx, batched)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        h_1 = ops.rnn_cell(x, h_0, _base.cell_weights(self), nonlinearity=self.nonlinearity)
        return h_1 if batched else h_1.squeeze(0)

    if TYPE_CHECKING:
        __call__ = forward
