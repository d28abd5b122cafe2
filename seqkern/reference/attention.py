"""Scaled dot-product attention, literally, and the dropout mask that every kernel draws."""

import torch
from torch import Tensor

from seqkern.reference._philox import hits


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_valid: Tensor | None = None,
    query_valid: Tensor | None = None,
    *,
    scale: float,
    left: int = -1,
    right: int = -1,
    offset: int | Tensor = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every query over the keys that it may attend to.

        score_nls = scale * q_nl · k_ns + bias_nls      P      = softmax over the allowed s of score_nls
        out_nl    = sum over s of (P ∘ D)_nls v_ns      lse_nl = log(sum over the allowed s of exp(score_nls))

    A query with no allowed key gives out = 0, P = 0, lse = -inf and no gradient. D is 0 for what dropout
    drops, else 1 / (1 - dropout_p).

    Args:
        q: [B, N, L, E] any floating dtype, any strides
        k: [B, Nk, S, E], N a multiple of Nk: query head n reads key head n // (N // Nk)
        v: [B, Nk, S, Ev]
        bias: broadcastable to [B, N, L, S]; bool: True attends; floating: added to the scores, -inf blocks
        key_valid: [B, S] bool, False is padding, whose values (NaN too) reach nothing
        query_valid: [B, L] bool, False is padding: out = 0 there
        scale: factor of q · k
        left, right: with d = s - l - offset, keys with -left <= d <= right are allowed; -1: no limit.
            Causal attention is right = 0
        offset: the diagonal's shift, one for all or [B]; S - L aligns it with the last query and key
        dropout_p: probability of dropping a weight
        seed: [1] int64, given if dropout_p > 0
    Returns:
        out: [B, N, L, Ev];  lse: [B, N, L];  weights: P ∘ D, [B, N, L, S]
    Source:
        Vaswani et al., "Attention Is All You Need", 2017, section 3.2;
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    B, N, L, _ = q.shape
    _, Nk, S, _ = k.shape
    if key_valid is not None:
        k = torch.where(key_valid[:, None, :, None], k, 0)
        v = torch.where(key_valid[:, None, :, None], v, 0)
    if query_valid is not None:
        q = torch.where(query_valid[:, None, :, None], q, 0)
    if Nk != N:
        k = k.repeat_interleave(N // Nk, dim=1)
        v = v.repeat_interleave(N // Nk, dim=1)

    score = scale * (q @ k.transpose(-2, -1))
    allowed = allowed_pairs(B, L, S, q.device, key_valid, query_valid, left=left, right=right, offset=offset)
    if bias is not None and bias.dtype is torch.bool:
        allowed = allowed & bias
    elif bias is not None:
        score = score + bias
    allowed = allowed & (score != -torch.inf)

    some = allowed.any(-1, keepdim=True)
    score = torch.where(allowed, score, torch.where(some, -torch.inf, 0.0).to(score.dtype))
    weights = torch.where(allowed, torch.softmax(score, -1), 0)
    lse = torch.where(some.squeeze(-1), torch.logsumexp(score, -1), -torch.inf)
    if dropout_p > 0:
        keep = dropout_keep(seed, dropout_p, (B, N, L, S))
        weights = torch.where(keep, weights / (1 - dropout_p), 0) if dropout_p < 1 else weights * 0
    return torch.where(some, weights @ v, 0), lse, weights


def allowed_pairs(
    B: int,
    L: int,
    S: int,
    device: torch.device,
    key_valid: Tensor | None = None,
    query_valid: Tensor | None = None,
    *,
    left: int = -1,
    right: int = -1,
    offset: int | Tensor = 0,
) -> Tensor:
    """Which queries may attend to which keys by position and padding: bool, [B or 1, 1, L, S]. Arguments as
    for `attention`."""
    distance = torch.arange(S, device=device) - torch.arange(L, device=device)[:, None]  # [L, S]
    if isinstance(offset, Tensor):
        distance = distance - offset.view(-1, 1, 1, 1)
    else:
        distance = (distance - offset)[None, None]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        allowed = allowed & (distance >= -left)
    if right >= 0:
        allowed = allowed & (distance <= right)
    if key_valid is not None:
        allowed = allowed & key_valid[:, None, None, :]
    if query_valid is not None:
        allowed = allowed & query_valid[:, None, :, None]
    return allowed


def dropout_keep(
    seed: Tensor, p: float, shape: tuple[int, int, int, int], first: tuple[int, int, int] = (0, 0, 0)
) -> Tensor:
    """The weights that dropout keeps, bool [B, N, L, S]: a function of the seed and the position alone.

    A weight is dropped where `hits` of seqkern.reference._philox says so, with s as the unit and the counters
    l, b * N + n, 0.

    Args:
        seed: [1] int64 on any device, which the result shares
        p: probability of dropping
        shape: (B, N, L, S), or a part of it: (1, heads, queries, S) beginning at `first`
        first: (b * N + n, l, s) of the part's first weight, s a multiple of 8
    """
    B, N, L, S = shape
    row, l0, s0 = first
    device = seed.device
    rows = torch.arange(row, row + B * N, device=device)[:, None]
    queries = torch.arange(l0, l0 + L, device=device)
    dropped = hits(seed, p, S, queries, rows, rows.new_zeros(()), first=s0)
    return ~dropped.view(B, N, L, S)
