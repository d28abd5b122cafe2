"""A linear-chain conditional random field with pytorch-crf's API, and constraints on its tags."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from seqkern import ops
from seqkern.nn import _base

REDUCTIONS = ("none", "sum", "mean", "token_mean")


class Constraints(NamedTuple):
    """Which tags may begin a sequence, end it, and follow each other: bool, True is allowed."""

    start: Tensor  # [K]
    end: Tensor  # [K]
    transitions: Tensor  # [K, K]: tag j after tag i at [i, j]


# scheme: (prefixes that begin an entity, go on with it, end it, are all of it)
SCHEMES = {"BIO": ("B", "I", "", ""), "BIOUL": ("B", "I", "L", "U"), "BIOES": ("B", "I", "E", "S")}


def bio_constraints(tags: Sequence[str], scheme: str = "BIO") -> Constraints:
    """The constraints of a chunk tagging scheme.

    BIO (also called IOB2): I-x stands only after B-x or I-x. BIOUL (BILOU) and BIOES: an entity is U-x (S-x),
    or B-x, any number of I-x, and L-x (E-x).

    Args:     tags: the names of tags 0 … K - 1, "O" or a prefix of the scheme, "-" and a type, as "B-PER"
              scheme: "BIO", "BIOUL" or "BIOES"
    Raises:   ValueError: no such scheme, or a name that does not belong to it

    >>> bio_constraints(["O", "B-PER", "I-PER"]).transitions.int().tolist()
    [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    begin, inside, last, whole = SCHEMES[scheme]
    parsed = [_parse(tag, scheme) for tag in tags]
    ends_itself = last != ""  # else an entity ends where the next tag does not go on with it

    def opens(prefix: str) -> bool:
        return prefix in ("O", begin, whole)

    def closes(prefix: str) -> bool:
        return not ends_itself or prefix in ("O", last, whole)

    def follows(before: tuple[str, str], after: tuple[str, str]) -> bool:
        if opens(after[0]):
            return closes(before[0])
        return before[0] in (begin, inside) and before[1] == after[1]

    return Constraints(
        torch.tensor([opens(prefix) for prefix, _ in parsed], dtype=torch.bool),
        torch.tensor([closes(prefix) for prefix, _ in parsed], dtype=torch.bool),
        torch.tensor([[follows(a, b) for b in parsed] for a in parsed], dtype=torch.bool),
    )


def _parse(tag: str, scheme: str) -> tuple[str, str]:
    """(prefix, type) of a tag's name."""
    if tag == "O":
        return tag, ""
    prefix, dash, kind = tag.partition("-")
    if not dash or not prefix or prefix not in SCHEMES[scheme]:
        prefixes = ", ".join(f"{prefix}-…" for prefix in SCHEMES[scheme] if prefix)
        raise ValueError(f"tags: expected O, {prefixes} in {scheme}, got {tag!r}")
    return prefix, kind


class CRF(nn.Module):
    """pytorch-crf's CRF on seqkern's kernels: same constructor, parameters, initialisation and results.

    Construct:  CRF(num_tags, batch_first=False, *, constraints=None, device=None, dtype=None)
        constraints: `Constraints`, or three such tensors: what they forbid has probability zero everywhere,
            and a sequence of tags that breaks them the log-likelihood -inf. See `bio_constraints`. They are
            no part of the state_dict
    Parameters: start_transitions [K], end_transitions [K], transitions [K, K]: score of tag j after tag i at
        [i, j]
    Beyond pytorch-crf: `lengths` for `mask`; `allowed`, the tags that are possible at each step;
        `log_partition`; `marginals`; several best sequences, and their scores, from `decode`
    Source:     https://pytorch-crf.readthedocs.io; the equations are in seqkern/reference/crf.py

    Shapes are [T, B, …], with batch_first [B, T, …]; K is num_tags. Arguments that all methods share:

        emissions: [T, B, K] float32, float64, bfloat16 or float16 (computed in float32)
        mask: [T, B] bool or integers (0 is off): the steps that count; the first of each sequence must be on.
            Off in the middle, too: see seqkern.ops.crf_log_likelihood
        lengths: [B] integers in 1..T: sequence b has lengths[b] steps. Not with mask
        allowed: [T, B, K] bool: where False, a tag is impossible at that step

    Errors: ValueError for a wrong shape or dtype, a mask off at a first step, lengths outside 1..T;
    IndexError for tags outside 0..K-1 at steps that count. On a GPU values are not looked at: see
    seqkern.ops.crf_log_likelihood.
    """

    __prepare_scriptable__ = _base.refuse_torchscript

    def __init__(
        self,
        num_tags: int,
        batch_first: bool = False,
        *,
        constraints: Sequence[Tensor] | None = None,
        device: _base.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: expected at least 1, got {num_tags}")
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = nn.Parameter(torch.empty(num_tags, device=device, dtype=dtype))
        self.end_transitions = nn.Parameter(torch.empty(num_tags, device=device, dtype=dtype))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags, device=device, dtype=dtype))
        allowed = (None, None, None) if constraints is None else self._check(constraints, device)
        for name, tensor in zip(("start", "end", "transitions"), allowed, strict=True):
            self.register_buffer(f"_allowed_{name}", tensor, persistent=False)
        self.reset_parameters()

    def _check(self, constraints: Sequence[Tensor], device: _base.Device) -> list[Tensor]:
        if len(constraints) != 3:
            raise ValueError(f"constraints: expected start, end, transitions, got {len(constraints)} tensors")
        K = self.num_tags
        for name, tensor, shape in zip(Constraints._fields, constraints, ((K,), (K,), (K, K)), strict=True):
            if tensor.shape != shape or tensor.dtype is not torch.bool:
                raise ValueError(
                    f"constraints.{name}: expected {shape} bool, got {tuple(tensor.shape)} {tensor.dtype}"
                )
        return [tensor.to(device, copy=True) for tensor in constraints]

    def reset_parameters(self) -> None:
        """Uniform in -0.1 … 0.1, in pytorch-crf's order."""
        nn.init.uniform_(self.start_transitions, -0.1, 0.1)
        nn.init.uniform_(self.end_transitions, -0.1, 0.1)
        nn.init.uniform_(self.transitions, -0.1, 0.1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_tags={self.num_tags})"

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: str = "sum",
        *,
        lengths: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """The log-likelihood of the tags; a training loss is its negative.

        Args:
            tags: [T, B] integers
            reduction: "none": [B]; "sum"; "mean": over the sequences; "token_mean": the sum over the number
                of steps that count
        Returns:
            [B] or a scalar, float32 (float64 if a tensor is); -inf for tags that are impossible
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"invalid reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        steps = self._steps(emissions, mask, lengths, allowed)
        if self.batch_first and tags.dim() == 2:
            tags = tags.transpose(0, 1)
        value = ops.crf_log_likelihood(self._time_first(emissions), tags, *self._scores(), **steps)
        if reduction == "none":
            return value
        if reduction == "mean":
            return value.mean()
        total = value.sum()
        if reduction == "sum":
            return total
        if mask is not None:
            return total / (mask != 0).sum()
        return total / (tags.numel() if lengths is None else lengths.sum())

    if TYPE_CHECKING:
        __call__ = forward

    def log_partition(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """log Z, [B]: -inf where no sequence is possible.

        `log_partition(emissions, allowed=known) - log_partition(emissions)` is the log-likelihood of tags
        known in part: of all sequences within `known`.
        """
        steps = self._steps(emissions, mask, lengths, allowed)
        return ops.crf_log_partition(self._time_first(emissions), *self._scores(), **steps)

    def marginals(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Each tag's probability at each step, shaped as emissions; zero at steps that do not count."""
        steps = self._steps(emissions, mask, lengths, allowed)
        found = ops.crf_marginals(self._time_first(emissions), *self._scores(), **steps)
        return found.transpose(0, 1) if self.batch_first else found

    @overload
    def decode(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        nbest: None = None,
        pad_tag: int = -1,
        *,
        lengths: Tensor | None = None,
        allowed: Tensor | None = None,
        return_scores: Literal[False] = False,
    ) -> list[list[int]]: ...

    @overload
    def decode(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        nbest: None = None,
        pad_tag: int = -1,
        *,
        lengths: Tensor | None = None,
        allowed: Tensor | None = None,
        return_scores: Literal[True],
    ) -> tuple[list[list[int]], Tensor]: ...

    @overload
    def decode(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        nbest: int = ...,
        pad_tag: int = -1,
        *,
        lengths: Tensor | None = None,
        allowed: Tensor | None = None,
        return_scores: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def decode(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        nbest: int = ...,
        pad_tag: int = -1,
        *,
        lengths: Tensor | None = None,
        allowed: Tensor | None = None,
        return_scores: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def decode(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        nbest: int | None = None,
        pad_tag: int = -1,
        *,
        lengths: Tensor | None = None,
        allowed: Tensor | None = None,
        return_scores: bool = False,
    ) -> Any:
        """The tags of the highest score.

        Args:
            nbest: how many sequences, best first; None: one, as a list
            pad_tag: with nbest, what stands behind a sequence's last step, and in sequences that are not
                possible
            return_scores: return (tags, scores)
        Returns:
            a list of B lists, of as many tags as steps count; with nbest a tensor [nbest, B, T] int64,
            whatever batch_first is;  scores: [B], with nbest [nbest, B], -inf where no further sequence is
            possible
        """
        if nbest is not None and nbest < 1:
            raise ValueError(f"nbest: expected at least 1, got {nbest}")
        steps = self._steps(emissions, mask, lengths, allowed)
        tags, scores = ops.crf_decode(self._time_first(emissions), *self._scores(), n=nbest, **steps)
        found: Any
        if nbest is not None:
            found = tags if pad_tag == -1 else torch.where(tags < 0, pad_tag, tags)
        elif mask is None and lengths is None:
            found = tags.tolist()
        else:
            counts = (tags >= 0).sum(1).tolist()
            found = [row[:count] for row, count in zip(tags.tolist(), counts, strict=True)]
        return (found, scores) if return_scores else found

    def _scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """start, end, transitions: -inf where the constraints forbid."""
        scores = (self.start_transitions, self.end_transitions, self.transitions)
        if self._buffers.get("_allowed_start") is None:  # nor there, where pytorch-crf's constructor made it
            return scores
        start, end, transitions = scores
        return (
            torch.where(self._allowed_start, start, -torch.inf),
            torch.where(self._allowed_end, end, -torch.inf),
            torch.where(self._allowed_transitions, transitions, -torch.inf),
        )

    def _time_first(self, emissions: Tensor) -> Tensor:
        return emissions.transpose(0, 1) if self.batch_first else emissions

    def _steps(
        self, emissions: Tensor, mask: Tensor | None, lengths: Tensor | None, allowed: Tensor | None
    ) -> dict[str, Tensor | None]:
        """mask, lengths and allowed for ops/, after what only the module can check."""
        if emissions.dim() != 3:
            raise ValueError(f"emissions: expected 3 dimensions, got {tuple(emissions.shape)}")
        if emissions.shape[2] != self.num_tags:
            raise ValueError(
                f"emissions: expected K = num_tags = {self.num_tags}, got {tuple(emissions.shape)}"
            )
        if self.batch_first:
            mask = mask.transpose(0, 1) if mask is not None and mask.dim() == 2 else mask
            allowed = allowed.transpose(0, 1) if allowed is not None and allowed.dim() == 3 else allowed
        return {"mask": mask, "lengths": lengths, "allowed": allowed}
