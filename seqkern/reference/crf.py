"""A linear-chain conditional random field, step by step.

Letters: T steps, B batch, K tags. Arguments that all functions here share:

    emissions: [T, B, K] any floating dtype, any strides; -inf forbids a tag at a step
    start, end: [K], scores of beginning and ending with a tag
    transitions: [K, K], score of tag j after tag i at [i, j]; -inf forbids it
    valid: [T, B] bool, the steps that count, step 0 always among them; None: all. What stands in the others
        (NaN too) reaches nothing

With s_t = emissions_t a sequence of tags y has

    score(y) = start[y_0] + s_0[y_0] + sum over t > 0 of (transitions[y_{t-1}, y_t] + s_t[y_t]) + end[y_last]
    p(y)     = exp(score(y) - log Z),   log Z = log(sum over all y of exp(score(y)))

A step that does not count is left out of log Z: the tag before it goes over into the one after it. Where
such steps lie between others, score and best sequences follow pytorch-crf, which reads by place: the tag
before t is tags[t - 1], counted or not, the last tag is tags[number of steps that count - 1], and the best
sequence is traced back over the places number - 1 … 0. Where the steps that count come first, all this
agrees.

Source:  Lafferty, McCallum and Pereira, "Conditional Random Fields", 2001; the forward-backward and Viterbi
         algorithms as in Rabiner, "A Tutorial on Hidden Markov Models", 1989;
         https://pytorch-crf.readthedocs.io
"""

import torch
from torch import Tensor


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """log p(tags) = score(tags) - log Z, [B]; -inf for impossible tags, also where no sequence is possible.

    Args:     tags: [T, B] int64 in 0..K-1 where they count
    """
    log_z = crf_log_partition(emissions, start, end, transitions, valid)
    log_z = torch.where(log_z == -torch.inf, 0, log_z)
    return crf_score(emissions, tags, start, end, transitions, valid) - log_z


def crf_score(
    emissions: Tensor,
    tags: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """The score of the tags, [B]: NaN if one that counts is no tag. Arguments as for crf_log_likelihood."""
    T, _, K = emissions.shape
    emissions, valid = _without_padding(emissions, valid)
    known = (tags >= 0) & (tags < K)  # padding may be any number
    tags = tags.clamp(0, K - 1)
    emitted = torch.where(known, emissions.gather(2, tags.unsqueeze(2)).squeeze(2), torch.nan)
    score = start[tags[0]] + emitted[0]
    for t in range(1, T):
        score = torch.where(valid[t], score + transitions[tags[t - 1], tags[t]] + emitted[t], score)
    last = tags.gather(0, valid.sum(0, keepdim=True) - 1).squeeze(0)
    return score + end[last]


def crf_log_partition(
    emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, valid: Tensor | None = None
) -> Tensor:
    """log Z, [B]: -inf, without gradient, where no sequence is possible.

    alpha_0[j] = start[j] + s_0[j]
    alpha_t[j] = log(sum over i of exp(alpha_{t-1}[i] + transitions[i, j])) + s_t[j]
    """
    emissions, valid = _without_padding(emissions, valid)
    return logsumexp(_alphas(emissions, start, transitions, valid)[-1] + end, 1)


def crf_marginals(
    emissions: Tensor, start: Tensor, end: Tensor, transitions: Tensor, valid: Tensor | None = None
) -> Tensor:
    """p(y_t = j), [T, B, K], by the forward-backward algorithm: zero at steps that do not count, and where no
    sequence is possible.

    beta_last[i] = end[i]      beta_{t-1}[i] = log(sum over j of exp(transitions[i, j] + s_t[j] + beta_t[j]))
    p(y_t = j) = exp(alpha_t[j] + beta_t[j] - log Z)
    """
    T, B, K = emissions.shape
    emissions, valid = _without_padding(emissions, valid)
    alphas = _alphas(emissions, start, transitions, valid)
    beta = end.expand(B, K)
    betas = [beta]
    for t in range(T - 1, 0, -1):
        ahead = logsumexp(transitions + (emissions[t] + beta).unsqueeze(1), 2)
        beta = torch.where(valid[t].unsqueeze(1), ahead, beta)
        betas.append(beta)
    log_z = logsumexp(alphas[-1] + end, 1)
    log_z = torch.where(log_z == -torch.inf, 0, log_z).unsqueeze(1)
    marginals = torch.stack([torch.exp(a + b - log_z) for a, b in zip(alphas, reversed(betas), strict=True)])
    return torch.where(valid.unsqueeze(2), marginals, 0)


def crf_best(
    emissions: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    valid: Tensor | None = None,
    n: int = 1,
) -> tuple[Tensor, Tensor]:
    """The n best sequences by the Viterbi algorithm, best first; of equal scores the one whose last tags are
    lower.

    Args:     n: at least 1
    Returns:  tags: [n, B, T] int64, -1 behind the last step that counts;  scores: [n, B], -inf where there
              are fewer than n possible sequences; the tags of those mean nothing
    """
    T, B, K = emissions.shape
    emissions, valid = _without_padding(emissions, valid)
    score = torch.full((B, K, n), -torch.inf, dtype=emissions.dtype, device=emissions.device)
    score = torch.cat([(start + emissions[0]).unsqueeze(2), score[:, :, 1:]], 2)
    pointers = []  # [B, n * K]: number of the place before, K tags * n ranks
    for t in range(1, T):
        # [B, K, n, K]: from a tag's rank to a tag
        ahead = score.unsqueeze(3) + transitions.unsqueeze(1) + emissions[t][:, None, None, :]
        ahead, pointer = ahead.flatten(1, 2).sort(dim=1, descending=True, stable=True)
        pointers.append(pointer[:, :n].transpose(1, 2).flatten(1))
        score = torch.where(valid[t][:, None, None], ahead[:, :n].transpose(1, 2), score)
    scores, place = (score + end.unsqueeze(1)).flatten(1).sort(dim=1, descending=True, stable=True)
    scores, place = scores[:, :n], place[:, :n]
    count = valid.sum(0).unsqueeze(1)
    tags = [torch.where(count == T, place // n, -1)]
    for t in range(T - 1, 0, -1):
        place = torch.where(t < count, pointers[t - 1].gather(1, place), place)
        tags.append(torch.where(t <= count, place // n, -1))
    return torch.stack(tags[::-1], 2).transpose(0, 1), scores.transpose(0, 1)


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """log(sum(exp(x))), which is -inf, with gradient zero rather than NaN, where every x is -inf."""
    highest = x.detach().amax(dim, keepdim=True)
    highest = torch.where(highest == -torch.inf, 0, highest)
    total = torch.exp(x - highest).sum(dim)
    some = total != 0
    return torch.where(some, torch.log(torch.where(some, total, 1)) + highest.squeeze(dim), -torch.inf)


def _alphas(emissions: Tensor, start: Tensor, transitions: Tensor, valid: Tensor) -> list[Tensor]:
    """alpha_t [B, K], T times; a step that does not count repeats the one before."""
    alpha = start + emissions[0]
    alphas = [alpha]
    for t in range(1, emissions.shape[0]):
        ahead = logsumexp(alpha.unsqueeze(2) + transitions + emissions[t].unsqueeze(1), 1)
        alpha = torch.where(valid[t].unsqueeze(1), ahead, alpha)
        alphas.append(alpha)
    return alphas


def _without_padding(emissions: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Emissions with zeros where they do not count, and valid [T, B]."""
    if valid is None:
        return emissions, torch.ones(emissions.shape[:2], dtype=torch.bool, device=emissions.device)
    return torch.where(valid.unsqueeze(2), emissions, 0), valid
