"""The cells' equations once more, from the papers, for one row and one step, in float64, without seqkern.

w holds one direction's weights by name: w_ih, w_hh, b_ih, b_hh (absent ones are zero) and the cell's own.
x, and what a state holds, are vectors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor | None]


def sigmoid(a: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-a))


def gates(w: Weights, names: str, x: Tensor, h: Tensor) -> dict[str, Tensor]:
    """W x + b_ih + U h + b_hh, cut into the gates of these names."""
    both = input_part(w, names, x)
    return {name: both[name] + part for name, part in hidden_part(w, names, h).items()}


def input_part(w: Weights, names: str, x: Tensor) -> dict[str, Tensor]:
    return rows(names, w["w_ih"] @ x, w.get("b_ih"))


def hidden_part(w: Weights, names: str, h: Tensor) -> dict[str, Tensor]:
    return rows(names, w["w_hh"] @ h, w.get("b_hh"))


def rows(names: str, y: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    y = y if bias is None else y + bias
    H = len(y) // len(names)
    return {name: y[k * H : (k + 1) * H] for k, name in enumerate(names)}


def layer_norm(y: Tensor, gamma: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    mean = y.sum() / len(y)
    variance = ((y - mean) ** 2).sum() / len(y)
    y = (y - mean) / torch.sqrt(variance + eps) * gamma
    return y if beta is None else y + beta


class Step:
    """What one step does beside the equations: factors of the candidate and of h_prev, limits."""

    def __init__(self, candidate: Any = 1.0, cell_clip: float | None = None, scale: Any = 1.0, **rest: Any):
        self.candidate, self.cell_clip, self.scale = candidate, cell_clip, scale
        self.proj_clip, self.eps = rest.get("proj_clip"), rest.get("eps", 1e-5)

    def clip(self, c: Tensor, limit: float | None = None) -> Tensor:
        limit = limit or self.cell_clip
        return c if limit is None else torch.minimum(torch.maximum(c, c * 0 - limit), c * 0 + limit)


def rnn(activation: Callable) -> Callable:
    def step(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
        (h,) = state
        return (activation(gates(w, "n", x, h * s.scale)["n"]),)

    return step


def indrnn(activation: Callable) -> Callable:
    def step(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
        (h,) = state
        recurrent = w["w_hh"] * (h * s.scale)
        recurrent = recurrent if w.get("b_hh") is None else recurrent + w["b_hh"]
        return (activation(input_part(w, "n", x)["n"] + recurrent),)

    return step


def gru(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step, replace: bool = False) -> tuple[Tensor, ...]:
    (h,) = state
    a, b = input_part(w, "rzn", x), hidden_part(w, "rzn", h * s.scale)
    r, z = sigmoid(a["r"] + b["r"]), sigmoid(a["z"] + b["z"])
    n = torch.tanh(a["n"] + r * b["n"]) * s.candidate
    return ((1 - z) * h + z * n if replace else (1 - z) * n + z * h,)


def gru_reset_before(
    w: Weights, x: Tensor, state: Sequence[Tensor], s: Step, replace: bool = False
) -> tuple[Tensor, ...]:
    (h,) = state
    g = gates(w, "rzn", x, h * s.scale)
    r, z = sigmoid(g["r"]), sigmoid(g["z"])
    n = torch.tanh(gates(w, "rzn", x, r * (h * s.scale))["n"]) * s.candidate
    return ((1 - z) * h + z * n if replace else (1 - z) * n + z * h,)


def mgu(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    (h,) = state
    f = sigmoid(gates(w, "fn", x, h * s.scale)["f"])
    n = torch.tanh(gates(w, "fn", x, f * (h * s.scale))["n"]) * s.candidate
    return ((1 - f) * h + f * n,)


def nested_gru(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    (h,) = state
    a, b = input_part(w, "rzn", x), hidden_part(w, "rzn", h * s.scale)
    r, z = sigmoid(a["r"] + b["r"]), sigmoid(a["z"] + b["z"])
    n = torch.tanh(a["n"] + r * b["n"]) * s.candidate
    inner = {name: w.get(f"inner_{name}") for name in ("w_ih", "w_hh", "b_ih", "b_hh")}
    return gru(inner, (1 - z) * n, (z * h,), Step())


def layer_norm_gru(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    (h,) = state
    a = layer_norm(w["w_ih"] @ x, w["gamma_i"], w.get("beta_i"), s.eps)
    b = layer_norm(w["w_hh"] @ (h * s.scale), w["gamma_h"], w.get("beta_h"), s.eps)
    a, b = rows("rzn", a, w.get("b_ih")), rows("rzn", b, None)
    r, z = sigmoid(a["r"] + b["r"]), sigmoid(a["z"] + b["z"])
    n = torch.tanh(a["n"] + r * b["n"]) * s.candidate
    return ((1 - z) * n + z * h,)


def lstm(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    h, c = state
    g = gates(w, "ifgo", x, h * s.scale)
    c = s.clip(sigmoid(g["f"]) * c + sigmoid(g["i"]) * (torch.tanh(g["g"]) * s.candidate))
    h = sigmoid(g["o"]) * torch.tanh(c)
    return (h if w.get("w_hr") is None else s.clip(w["w_hr"] @ h, s.proj_clip or float("inf"))), c


def peephole_lstm(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    h, c = state
    g = gates(w, "ifgo", x, h * s.scale)
    p = rows("ifo", w["w_peep"], None)
    i, f = sigmoid(g["i"] + p["i"] * c), sigmoid(g["f"] + p["f"] * c)
    c = s.clip(f * c + i * (torch.tanh(g["g"]) * s.candidate))
    return sigmoid(g["o"] + p["o"] * c) * torch.tanh(c), c


def cifg_lstm(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    h, c = state
    g = gates(w, "igo", x, h * s.scale)
    i = sigmoid(g["i"])
    c = s.clip((1 - i) * c + i * (torch.tanh(g["g"]) * s.candidate))
    return sigmoid(g["o"]) * torch.tanh(c), c


def nested_lstm(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    h, c, d = state
    g = gates(w, "ifgo", x, h * s.scale)
    x_inner = sigmoid(g["i"]) * (torch.tanh(g["g"]) * s.candidate)
    h_inner = sigmoid(g["f"]) * c
    inner = {name: w.get(f"inner_{name}") for name in ("w_ih", "w_hh", "b_ih", "b_hh")}
    k = gates(inner, "ifgo", x_inner, h_inner)
    d = s.clip(sigmoid(k["f"]) * d + sigmoid(k["i"]) * torch.tanh(k["g"]))
    c = s.clip(sigmoid(k["o"]) * torch.tanh(d))
    return sigmoid(g["o"]) * torch.tanh(c), c, d


def slstm(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    h, c, n, m = state
    heads, _, k = w["w_hh"].shape
    g = input_part(w, "ifzo", x)
    for j, name in enumerate("ifzo"):  # each gate's block-diagonal matrix, written out
        R = torch.block_diag(*(w["w_hh"][a, j * k : (j + 1) * k] for a in range(heads)))
        g[name] = g[name] + R @ (h * s.scale)
        if w.get("b_hh") is not None:
            g[name] = g[name] + w["b_hh"][j * len(h) : (j + 1) * len(h)]
    log_f = torch.log(sigmoid(g["f"]))
    new = []
    for u in range(len(h)):  # unit after unit, as n decides
        i, before = g["i"][u], log_f[u] + m[u]
        m_ = i if n[u] == 0 else torch.maximum(before, i)
        f_ = torch.zeros_like(m_) if n[u] == 0 else torch.exp(before - m_)
        i_ = torch.exp(i - m_)
        z = torch.tanh(g["z"][u]) * (s.candidate if isinstance(s.candidate, float) else s.candidate[u])
        c_, n_ = f_ * c[u] + i_ * z, f_ * n[u] + i_
        new.append((sigmoid(g["o"][u]) * c_ / n_, c_, n_, m_))
    return tuple(torch.stack(list(part)) for part in zip(*new, strict=True))


def layer_norm_lstm(w: Weights, x: Tensor, state: Sequence[Tensor], s: Step) -> tuple[Tensor, ...]:
    h, c = state
    a = layer_norm(w["w_ih"] @ x, w["gamma_i"], w.get("beta_i"), s.eps)
    b = layer_norm(w["w_hh"] @ (h * s.scale), w["gamma_h"], w.get("beta_h"), s.eps)
    g = rows("ifgo", a + b, w.get("b_ih"))
    c = s.clip(sigmoid(g["f"]) * c + sigmoid(g["i"]) * (torch.tanh(g["g"]) * s.candidate))
    return sigmoid(g["o"]) * torch.tanh(layer_norm(c, w["gamma_c"], w.get("beta_c"), s.eps)), c


STEPS: dict[str, Callable] = {
    "rnn_tanh": rnn(torch.tanh),
    "rnn_relu": rnn(torch.relu),
    "indrnn_tanh": indrnn(torch.tanh),
    "indrnn_relu": indrnn(torch.relu),
    "gru": gru,
    "gru_reset_before": gru_reset_before,
    "mgu": mgu,
    "nested_gru": nested_gru,
    "layer_norm_gru": layer_norm_gru,
    "lstm": lstm,
    "peephole_lstm": peephole_lstm,
    "cifg_lstm": cifg_lstm,
    "nested_lstm": nested_lstm,
    "slstm": slstm,
    "layer_norm_lstm": layer_norm_lstm,
}

# Names of the positions after w_ih, w_hh, b_ih, b_hh, w_hr.
INNER = ("inner_w_ih", "inner_w_hh", "inner_b_ih", "inner_b_hh")
OWN: dict[str, tuple[str, ...]] = {
    "peephole_lstm": ("w_peep",),
    "nested_lstm": INNER,
    "nested_gru": INNER,
    "layer_norm_lstm": ("gamma_i", "beta_i", "gamma_h", "beta_h", "gamma_c", "beta_c"),
    "layer_norm_gru": ("gamma_i", "beta_i", "gamma_h", "beta_h"),
}


def names_of(cell: str) -> tuple[str, ...]:
    return ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", *OWN.get(cell, ()))


def layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor | None],
    lengths: Sequence[int] | None = None,
    reset: Tensor | None = None,
    bits: Tensor | None = None,
    candidate_scale: float = 1.0,
    h_scale: Tensor | None = None,
    zoneout: tuple[float, float] | None = None,
    replace: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """One layer, row after row and step after step.

    bits: [T, B, D, H] of what happens in training, zoneout: the probabilities, in evaluation
    """
    T, B, _ = x.shape
    D = len(states[0])
    names = names_of(cell)
    step = STEPS[cell]
    extra = {"replace": True} if replace else {}
    y = [[[torch.zeros_like(states[0][0, 0])] * D for _ in range(B)] for _ in range(T)]
    finals = [[[None] * B for _ in range(D)] for _ in states]
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        for d in range(D):
            w = dict(zip(names, params[d * len(names) : (d + 1) * len(names)], strict=True))
            state = tuple(s[d, b] for s in states)
            for t in range(length) if d == 0 else reversed(range(length)):
                if reset is not None:
                    boundary = t if d == 0 else t + 1
                    if boundary < length and reset[boundary, b]:
                        state = tuple(torch.zeros_like(s) for s in state)
                scale = 1.0 if h_scale is None else h_scale[d, b]
                candidate: Any = 1.0
                if bits is not None:
                    candidate = candidate_scale * ((bits[t, b, d] & 4) == 0).double()
                new = step(w, x[t, b], state, Step(candidate, scale=scale, **options), **extra)
                if bits is not None:
                    zone = [(bits[t, b, d] >> min(k, 1) & 1).double() for k in range(len(new))]
                    if len(zone[0]) != len(new[0]):  # projected
                        zone[0] = torch.zeros_like(new[0])
                    new = tuple(k * old + (1 - k) * s for k, old, s in zip(zone, state, new, strict=True))
                elif zoneout is not None:
                    keep = [zoneout[min(k, 1)] for k in range(len(new))]
                    new = tuple(k * old + (1 - k) * s for k, old, s in zip(keep, state, new, strict=True))
                state = new
                y[t][b][d] = state[0]
            for k, s in enumerate(state):
                finals[k][d][b] = s
    output = torch.stack([torch.stack([torch.cat(parts) for parts in row]) for row in y])
    return (output, *(torch.stack([torch.stack(by_row) for by_row in state]) for state in finals))
