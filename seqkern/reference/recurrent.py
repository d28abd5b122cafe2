"""One layer of any recurrent cell, step by step, with what regularises the recurrence."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.reference import gru_steps, lstm_steps, rnn_steps
from seqkern.reference._steps import (
    StepOptions,
    add,
    join_directions,
    layer_norm,
    time_order,
    valid_steps,
    zero_padding,
)
from seqkern.reference.masks import DROP, ZONE_C, ZONE_H

STEPS = rnn_steps.STEPS | gru_steps.STEPS | lstm_steps.STEPS


def recurrent_layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    lengths: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    h_scale: Tensor | None = None,
    keep_h: float = 0.0,
    keep_c: float = 0.0,
    candidate_scale: float = 1.0,
    cell_clip: float = math.inf,
    proj_clip: float = math.inf,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """One layer of `cell`, whose equations are its step's in rnn_steps, gru_steps and lstm_steps.

    Args:
        cell: a key of STEPS
        x: [T, B, I] any floating dtype, any strides
        states: h0 [D, B, P], then what else the cell carries, [D, B, H] each; D = 1 or 2 directions
        params: per direction one tensor or None for each of the cell's positions (seqkern.ops._cells)
        lengths: [B] integers in 0..T; None: every row has T steps
        mask: [T, B, D*H] uint8, see seqkern.reference.masks.recurrent_mask. Zoneout (Krueger et al. 2017):
            where bit 0 is set h is h_prev, where bit 1 is set so are the other states, of which the new h
            is computed before. Recurrent dropout (Semeniuta et al. 2016): where bit 2 is set the candidate
            is 0, elsewhere it is multiplied with candidate_scale
        h_scale: [D, B, P], multiplies h_prev wherever it enters the product with W_hh, at all steps:
            variational dropout (Gal and Ghahramani 2016)
        keep_h, keep_c: without a mask, zoneout's expectation: h = keep_h * h_prev + (1 - keep_h) * h_new,
            and the other states likewise with keep_c
        cell_clip: the cell state is clamped to -cell_clip..cell_clip before it is used for h
        proj_clip: so is the projected h
        eps: of layer normalisation
    Returns:
        y: [T, B, D*P], zero beyond a row's length;  the final states, each after its row's last valid step
    """
    valid = None if lengths is None else valid_steps(lengths, x.shape[0])
    x = zero_padding(x, valid)
    D = states[0].shape[0]
    per_direction = len(params) // D
    outputs, final_states = [], []
    for d, state in enumerate(zip(*(state.unbind(0) for state in states), strict=True)):
        weights = params[d * per_direction : (d + 1) * per_direction]
        projected = _project(cell, x, weights, eps).unbind(0)
        bits = None if mask is None else mask.chunk(D, dim=-1)[d]
        factor = None
        if bits is not None:
            zone_h, zone_c = (bits & 1 << ZONE_H).bool(), (bits & 1 << ZONE_C).bool()
            factor = candidate_scale * (bits & 1 << DROP).eq(0).to(x.dtype)
        steps: list[Tensor] = list(projected)
        for t in time_order(len(projected), reverse=d == 1):
            h_in = state[0] if h_scale is None else state[0] * h_scale[d]
            options = StepOptions(None if factor is None else factor[t], cell_clip, proj_clip, eps)
            new = STEPS[cell](projected[t], h_in, state, weights, options)
            if bits is not None:
                # A projected h, which has another size than the mask, is never kept.
                keeps = [
                    zone_h[t] if state[0].shape == zone_h[t].shape else None,
                    *[zone_c[t]] * (len(new) - 1),
                ]
                new = tuple(
                    s if keep is None else torch.where(keep, s_prev, s)
                    for keep, s_prev, s in zip(keeps, state, new, strict=True)
                )
            else:
                keeps = [keep_h, *[keep_c] * (len(new) - 1)]
                new = tuple(
                    s if keep == 0 else keep * s_prev + (1 - keep) * s
                    for keep, s_prev, s in zip(keeps, state, new, strict=True)
                )
            if valid is not None:
                new = tuple(torch.where(valid[t], s, s_prev) for s, s_prev in zip(new, state, strict=True))
            state = new
            steps[t] = state[0] if valid is None else torch.where(valid[t], state[0], 0)
        outputs.append(torch.stack(steps))
        final_states.append(state)
    return join_directions(outputs, final_states)


def _project(cell: str, x: Tensor, params: Sequence[Tensor | None], eps: float) -> Tensor:
    """What x adds to the gates at every step: W_ih x + b_ih, or LN_i(W_ih x) + b. [T, B, G]"""
    w_ih, b_ih = params[0], params[2]
    if not cell.startswith("layer_norm"):
        return F.linear(x, w_ih, b_ih)
    gamma_i, beta_i = params[5:7]
    return add(layer_norm(F.linear(x, w_ih), gamma_i, beta_i, eps), b_ih)
