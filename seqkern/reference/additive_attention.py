"""Additive attention, literally: it makes [B, L, S, H], which the kernels never do."""

import torch
from torch import Tensor


def additive_attention(
    query: Tensor, key: Tensor, v: Tensor, value: Tensor, key_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the valid keys, scored by a tanh layer.

        score_ls  = v · tanh(query_l + key_s)
        weights_l = softmax over the valid s of score_ls          context_l = sum over s of weights_ls value_s

    A row without a valid key gives context = 0, weights = 0 and no gradient.

    Args:
        query: [B, L, H] any floating dtype, any strides: W q of the paper
        key: [B, S, H]: U h of the paper, with the bias if there is one
        v: [H]
        value: [B, S, D]
        key_valid: [B, S] bool, False is padding, whose values (NaN too) reach nothing
    Returns:
        context: [B, L, D];  weights: [B, L, S]
    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
        2015, section 3.1 and appendix A.1.2
    """
    if key_valid is not None:
        key = torch.where(key_valid.unsqueeze(-1), key, 0)
        value = torch.where(key_valid.unsqueeze(-1), value, 0)
    score = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v
    weights = masked_softmax(score, key_valid)
    return weights @ value, weights


def masked_softmax(score: Tensor, key_valid: Tensor | None) -> Tensor:
    """softmax over the valid keys of score [B, L, S]; zeros where there is none."""
    if key_valid is None:
        return torch.softmax(score, -1)
    valid = key_valid.unsqueeze(1)
    some = valid.any(-1, keepdim=True)
    score = torch.where(valid, score, torch.where(some, -torch.inf, 0.0).to(score.dtype))
    return torch.where(valid, torch.softmax(score, -1), 0)
