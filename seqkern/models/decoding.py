"""Decoding a sequence token by token: greedy and beam search, ancestral sampling, for any model.

A model is a function `step(ids [R] int64, state) -> (log_probs [R, V], state)`: one token for each of R rows
and what it knows of them so far. The searches choose tokens; where rows move, `reorder(state, index)` gives
the state whose row r is row index[r] of the one before, by default `reorder_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqkern.models.sampling import sample

State = Any
Step = Callable[[Tensor, State], tuple[Tensor, State]]
Reorder = Callable[[State, Tensor], State]


class Hypotheses(NamedTuple):
    """Decoded sequences, one for each row [B], or, from beam_search, the n best [B, n], the best first.

    ids: [B, T] or [B, n, T] int64, without the start, <eos> included, pad_index beyond the length
    lengths: [B] or [B, n] int64, <eos> counted; 0 where there are fewer than n
    log_probs: as lengths, the sum over the tokens;  scores: log_probs / lengths ** length_penalty
    """

    ids: Tensor
    lengths: Tensor
    log_probs: Tensor
    scores: Tensor

    def best(self) -> Hypotheses:
        """Of the n best the best: [B, T] of [B, n, T]."""
        lengths = self.lengths[:, 0]
        longest = int(lengths.max()) if len(lengths) else 0
        return Hypotheses(self.ids[:, 0, :longest], lengths, self.log_probs[:, 0], self.scores[:, 0])

    def tolist(self, eos_index: int | None) -> list[Any]:
        """The ids without <eos> and padding: a list for each sequence, nested as the shapes are."""

        def without_padding(ids: list[Any], lengths: Any) -> list[Any]:
            if isinstance(lengths, list):
                return [without_padding(*pair) for pair in zip(ids, lengths, strict=True)]
            ended = lengths and ids[lengths - 1] == eos_index
            return ids[: lengths - 1 if ended else lengths]

        return without_padding(self.ids.tolist(), self.lengths.tolist())


def reorder_state(state: State, index: Tensor, dim: int = 0) -> State:
    """The state whose row r is row index[r] of the one given.

    Args:     state: a tensor; an object with a method `reorder(index)`, which returns the new one or changes
              itself and returns None; None, a number or a string, which are as they were; or a tuple, list or
              dict of these
              index: [R'] int64;  dim: of the rows in the tensors, 1 for a recurrent layer's h [layers, R, H]
    Raises:   TypeError: a state of another kind
    """
    if state is None or isinstance(state, (int, float, str)):
        return state
    if isinstance(state, Tensor):
        return state.index_select(dim, index)
    if hasattr(state, "reorder"):
        reordered = state.reorder(index)
        return state if reordered is None else reordered
    if isinstance(state, dict):
        return {key: reorder_state(part, index, dim) for key, part in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [reorder_state(part, index, dim) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    raise TypeError(f"state: expected tensors, or what can be reordered, got {type(state).__name__}")


# ---- one sequence a row ------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_search(
    step: Step, state: State, start: Tensor, *, eos_index: int | None, max_len: int, pad_index: int = 0
) -> Hypotheses:
    """Take the likeliest token at every step, of equal ones the first, until every row has its <eos>.

    Args:     start: [B] int64, the first token of each row, as a rule <sos>;  eos_index: None: there is none
              max_len: tokens at most, <eos> included;  pad_index: what stands beyond a row's length
    Returns:  Hypotheses of [B, T], T <= max_len;  scores are log_probs
    Raises:   ValueError: start, eos_index or max_len do not fit
    """

    def likeliest(log_probs: Tensor) -> Tensor:
        return log_probs.argmax(-1)

    return _roll_out(step, state, start, likeliest, eos_index, max_len, pad_index)


@torch.no_grad()
def ancestral_sampling(
    step: Step,
    state: State,
    start: Tensor,
    *,
    eos_index: int | None,
    max_len: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    pad_index: int = 0,
) -> Hypotheses:
    """Draw every token from the model's distribution.

    Args:     temperature, top_k, top_p, generator: as seqkern.models.sample takes them
              the others: as for greedy_search
    Returns:  Hypotheses of [B, T];  log_probs and scores are the model's own, of its whole distribution
    """

    def draw(log_probs: Tensor) -> Tensor:
        return sample(log_probs, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

    return _roll_out(step, state, start, draw, eos_index, max_len, pad_index)


def _roll_out(
    step: Step,
    state: State,
    start: Tensor,
    choose: Callable[[Tensor], Tensor],
    eos_index: int | None,
    max_len: int,
    pad_index: int,
) -> Hypotheses:
    _check(start, max_len)
    (B,) = start.shape
    tokens, finished = start, torch.zeros(B, dtype=torch.bool, device=start.device)
    lengths = torch.zeros(B, dtype=torch.int64, device=start.device)
    columns: list[Tensor] = []
    total: Tensor | None = None
    while len(columns) < max_len and not bool(finished.all()):
        log_probs, state = step(tokens, state)
        chosen = choose(log_probs)
        gained = _wide(log_probs).gather(1, chosen.unsqueeze(1)).squeeze(1).masked_fill(finished, 0)
        total = gained if total is None else total + gained
        lengths += ~finished
        columns.append(chosen.masked_fill(finished, pad_index))
        if eos_index is not None:
            finished = finished | (chosen == eos_index)
            chosen = chosen.masked_fill(finished, eos_index)
        tokens = chosen
    if total is None:  # no row
        total = torch.zeros(B, device=start.device)
    ids = torch.stack(columns, 1) if columns else start.new_zeros((B, 0))
    return Hypotheses(ids, lengths, total, total)


# ---- beam search -------------------------------------------------------------------------------------------


@torch.no_grad()
def beam_search(
    step: Step,
    state: State,
    start: Tensor,
    *,
    eos_index: int,
    max_len: int,
    beam_width: int = 5,
    length_penalty: float = 1.0,
    n_best: int = 1,
    early_stop: bool = True,
    pad_index: int = 0,
    reorder: Reorder = reorder_state,
) -> Hypotheses:
    """Extend the beam_width likeliest sequences of each row, token by token; return the n best.

        score = log p / length ** length_penalty,  length counting <eos>

    At each step the extensions of a row's live sequences are ranked by log p. Those of the first beam_width
    that end with <eos> are finished: they are put aside, scored once and never extended. The first beam_width
    that do not end live on, so that finished ones take no place from them. What lives at max_len is a
    hypothesis, too, without its <eos>, unless the row has stopped. Of equals the one from the better beam
    goes first, then the smaller id: equal inputs give equal results, in any batch. Rows that have stopped
    leave the batch. With beam_width 1 this is greedy search.

    Args:
        start: [B] int64, the first token of each row, as a rule <sos>
        max_len: tokens at most, <eos> included
        length_penalty: 0 for log p itself, 1 for the mean over the tokens; above 0 favours longer ones
        n_best: hypotheses to return for each row, at most beam_width
        early_stop: a row stops when beam_width of its sequences have finished; False: when none that lives
            can come among the n best any more
        pad_index: what stands beyond a hypothesis' length
        reorder: (state, index [R'] int64) -> the state with the rows at index. At first R is B, then
            beam_width (at the second step maybe fewer) for every row that has not stopped
    Returns:
        Hypotheses of [B, n_best, T], the best first
    Raises:
        ValueError: start, max_len, beam_width or n_best do not fit
    Source:
        Graves, "Sequence Transduction with Recurrent Neural Networks", 2012; the length penalty: Boulanger-
        Lewandowski et al., "Audio Chord Recognition with Recurrent Neural Networks", 2013, in the form usual
        now
    """
    _check(start, max_len)
    if beam_width < 1:
        raise ValueError(f"beam_width: expected at least 1, got {beam_width}")
    if not 1 <= n_best <= beam_width:
        raise ValueError(f"n_best: expected 1 to beam_width = {beam_width}, got {n_best}")
    (B,) = start.shape
    best = _Best(B, beam_width, max_len, pad_index, length_penalty, start.device)
    rows = torch.arange(B, device=start.device)  # the row of `start` that each group of live sequences is of
    ids = start.new_zeros((B, 1, 0))  # [A, W, T], of A rows that have not stopped
    log_probs: Tensor | None = None  # [A, W]; -inf: no sequence
    tokens = start
    for length in range(1, max_len + 1):
        if not len(rows):
            break
        gained, state = step(tokens, state)  # [A * W, V]
        A, W, _ = ids.shape
        gained, tokens = _largest(_wide(gained), min(2 * beam_width, gained.shape[-1]))
        candidates = gained.view(A, W, -1)
        candidates = (candidates if log_probs is None else candidates + log_probs.unsqueeze(2)).flatten(1)
        log_probs, order = candidates.sort(dim=1, descending=True, stable=True)
        log_probs, order = log_probs[:, : 2 * beam_width], order[:, : 2 * beam_width]
        parents, tokens = order // gained.shape[1], tokens.view(A, -1).gather(1, order)
        ids = torch.cat([_take(ids, parents), tokens.unsqueeze(2)], 2)

        ends = tokens == eos_index
        first = slice(0, beam_width)
        ended = torch.where(ends, log_probs, -torch.inf)
        best.add(rows, ids[:, first], ended[:, first], length)
        log_probs = torch.where(ends, -torch.inf, log_probs)
        lives = (
            ends.to(torch.int8).sort(dim=1, stable=True).indices[:, first]
        )  # those that do not end, by rank
        log_probs, ids = log_probs.gather(1, lives), _take(ids, lives)

        going = ~best.settled(rows, log_probs[:, 0], length, n_best, early_stop)
        index = torch.arange(A, device=start.device).unsqueeze(1) * W + parents.gather(1, lives)
        if not bool(going.all()):
            rows, ids, log_probs, index = rows[going], ids[going], log_probs[going], index[going]
        if length < max_len and len(rows):
            state = reorder(state, index.flatten())
            tokens = ids[:, :, -1].flatten()
    if len(rows):
        best.add(rows, ids, log_probs, max_len)
    return best.hypotheses(n_best)


class _Best:
    """The best hypotheses of each row so far, the best first: W places a row, those not taken of length 0."""

    def __init__(
        self, B: int, W: int, max_len: int, pad_index: int, length_penalty: float, device: torch.device
    ) -> None:
        self.ids = torch.full((B, W, max_len), pad_index, device=device)
        self.lengths = torch.zeros((B, W), dtype=torch.int64, device=device)
        self.log_probs: Tensor | None = None  # [B, W], -inf where there is none
        self.scores: Tensor | None = None
        self.max_len, self.pad_index, self.length_penalty = max_len, pad_index, length_penalty

    def add(self, rows: Tensor, ids: Tensor, log_probs: Tensor, length: int) -> None:
        """rows: [A];  ids: [A, n, length];  log_probs: [A, n], -inf where there is no hypothesis."""
        if self.log_probs is None or self.scores is None:
            self.log_probs = torch.full(self.lengths.shape, -torch.inf, device=rows.device).to(log_probs)
            self.scores = self.log_probs.clone()
        valid = log_probs > -torch.inf
        if not bool(valid.any()):
            return
        new = torch.full((*log_probs.shape, self.max_len), self.pad_index, device=rows.device)
        new[:, :, :length] = torch.where(valid.unsqueeze(2), ids, self.pad_index)
        lengths = torch.where(valid, length, 0)
        scores = torch.cat([self.scores[rows], log_probs / length**self.length_penalty], 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        order = order[:, : self.lengths.shape[1]]
        self.scores[rows] = scores[:, : self.lengths.shape[1]]
        self.ids[rows] = _take(torch.cat([self.ids[rows], new], 1), order)
        self.lengths[rows] = torch.cat([self.lengths[rows], lengths], 1).gather(1, order)
        self.log_probs[rows] = torch.cat([self.log_probs[rows], log_probs], 1).gather(1, order)

    def settled(self, rows: Tensor, likeliest: Tensor, length: int, n_best: int, early_stop: bool) -> Tensor:
        """[A] bool: is this row's search over? likeliest: [A], the largest log p of what lives in it."""
        nothing_lives = likeliest == -torch.inf
        if early_stop:
            return nothing_lives | (self.lengths[rows, -1] > 0)
        # log p only falls, so that what lives can score at most this, at its longest or, where shorter ones
        # are favoured, at its next step.
        reach = self.max_len if self.length_penalty >= 0 else length + 1
        assert self.scores is not None  # as something was added
        return nothing_lives | (self.scores[rows, n_best - 1] >= likeliest / reach**self.length_penalty)

    def hypotheses(self, n_best: int) -> Hypotheses:
        ids, lengths = self.ids[:, :n_best], self.lengths[:, :n_best]
        longest = int(lengths.max()) if lengths.numel() else 0
        log_probs, scores = self.log_probs, self.scores
        if log_probs is None or scores is None:  # no row, so no step
            log_probs = scores = torch.zeros(self.lengths.shape, device=self.lengths.device)
        return Hypotheses(ids[:, :, :longest], lengths, log_probs[:, :n_best], scores[:, :n_best])


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [R, N], in order, of equal ones the first: (values [R, k], indices [R, k]).

    topk takes any of those that equal the last one it takes. Rows where that matters are sorted.
    """
    values, indices = x.topk(k, dim=1)
    last = values[:, -1:]
    tied = ((x >= last).sum(1) > k) & (last.squeeze(1) > -torch.inf)
    if bool(tied.any()):
        indices[tied] = x[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    indices = indices.sort(1).values
    values, order = x.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """x [A, n, T] at places [A, m] -> [A, m, T]."""
    return x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _wide(log_probs: Tensor) -> Tensor:
    """Sums of 16-bit numbers would lose what tells hypotheses apart."""
    return log_probs if log_probs.dtype is torch.float64 else log_probs.float()


def _check(start: Tensor, max_len: int) -> None:
    if start.dim() != 1 or start.dtype is not torch.int64:
        raise ValueError(f"start: expected [B] int64, got {tuple(start.shape)} {start.dtype}")
    if max_len < 1:
        raise ValueError(f"max_len: expected at least 1, got {max_len}")


# ---- models that decode ------------------------------------------------------------------------------------


class DecodingModule(nn.Module):
    """`decode` for a model that translates one sequence into another.

    A model has `encode_source(src, src_lengths) -> state`, `step(ids, state) -> (log_probs, state)` and,
    where reorder_state does not do, `reorder(state, index) -> state`. Ids by default are those of the usual
    vocabulary <unk>, <pad>, <sos>, <eos>.
    """

    pad_index = 1
    sos_index = 2
    eos_index = 3
    batch_dim = 0  # of src

    def encode_source(self, src: Tensor, src_lengths: Tensor | None = None) -> State:
        """What `step` knows of the sources before the first token."""
        raise NotImplementedError

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """ids: [R] int64 -> (log-probabilities of the next token [R, V], state)."""
        raise NotImplementedError

    def reorder(self, state: State, index: Tensor) -> State:
        """Row r of the result is row index[r] of this."""
        return reorder_state(state, index)

    @torch.no_grad()
    def decode(
        self,
        src: Tensor,
        src_lengths: Tensor | None = None,
        *,
        max_len: int = 50,
        beam_width: int = 1,
        length_penalty: float = 1.0,
        n_best: int | None = None,
        early_stop: bool = True,
        sos_index: int | None = None,
        eos_index: int | None = None,
    ) -> Hypotheses:
        """Translate, in eval mode: greedy_search, or with beam_width above 1 beam_search.

        Args:     src, src_lengths: as the model takes them
                  n_best: None: the best alone, else as many, at most beam_width
                  sos_index, eos_index: None: the model's own;  the others: as for beam_search
        Returns:  Hypotheses of [B, T], with n_best of [B, n_best, T]
        """
        sos_index = self.sos_index if sos_index is None else sos_index
        eos_index = self.eos_index if eos_index is None else eos_index
        start = torch.full((src.shape[self.batch_dim],), sos_index, device=src.device)
        shared: dict[str, Any] = dict(eos_index=eos_index, max_len=max_len, pad_index=self.pad_index)
        was_training = self.training
        self.eval()
        try:
            state = self.encode_source(src, src_lengths)
            if beam_width == 1 and n_best is None:
                return greedy_search(self.step, state, start, **shared)
            found = beam_search(
                *(self.step, state, start),
                beam_width=beam_width,
                length_penalty=length_penalty,
                n_best=n_best or 1,
                early_stop=early_stop,
                reorder=self.reorder,
                **shared,
            )
            return found.best() if n_best is None else found
        finally:
            self.train(was_training)
