"""One step of the cells without gates.

Every step function of this package takes, with B rows: projected [B, G], what W_ih x_t and its bias give;
h_in [B, P], h_prev as it enters the product with W_hh; the previous states; the direction's parameters, one
or None per position (seqkern.ops._cells); the options. It returns the new states, h first.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference._steps import StepOptions, add

Activation = Callable[[Tensor], Tensor]


def rnn(
    activation: Activation,
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor]:
    """Elman 1990.  h = act(W x + b_ih + W_hh h_prev + b_hh)"""
    _, w_hh, _, b_hh, _ = params
    return (activation(projected + F.linear(h_in, w_hh, b_hh)),)


def indrnn(
    activation: Activation,
    projected: Tensor,
    h_in: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor | None],
    options: StepOptions,
) -> tuple[Tensor]:
    """Li et al., "Independently Recurrent Neural Network", 2018, equation 2: one recurrent weight a unit.

    h = act(W x + b_ih + u * h_prev + b_hh)
    """
    _, u, _, b_hh, _ = params
    return (activation(projected + add(u * h_in, b_hh)),)


STEPS = {
    "rnn_tanh": partial(rnn, torch.tanh),
    "rnn_relu": partial(rnn, torch.relu),
    "indrnn_tanh": partial(indrnn, torch.tanh),
    "indrnn_relu": partial(indrnn, torch.relu),
}
