"""The linear-chain conditional random field: log-likelihood, log Z, marginals and best sequences of tags.

Letters: T steps, B batch, K tags.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _attention, _backend, _layers
from seqkern.reference import crf as reference

# In Python, so that an install without a compiler has them. The kernels: csrc/cpu/crf.h and seqkern.triton.
LIBRARY = torch.library.Library("seqkern", "FRAGMENT")
_CHAIN = "Tensor emissions, Tensor start, Tensor end, Tensor transitions"
LIBRARY.define(
    f"crf_forward({_CHAIN}, Tensor? tags, Tensor? mask, Tensor? lengths, bool save) -> "
    "(Tensor value, Tensor alphas)"
)
LIBRARY.define(
    f"crf_backward(Tensor dvalue, {_CHAIN}, Tensor? tags, Tensor? mask, Tensor? lengths, Tensor alphas, "
    "bool need_dparams) -> (Tensor demissions, Tensor dstart, Tensor dend, Tensor dtransitions)"
)
LIBRARY.define(f"crf_decode({_CHAIN}, Tensor? mask, Tensor? lengths, int n) -> (Tensor best, Tensor scores)")

ALPHAS_MULTIPLE = 16  # tags are padded to a multiple of this in alphas, which backward needs

# What says which steps count: mask [T, B] bool, lengths [B] int64, at most one of them.
Steps = tuple[Tensor | None, Tensor | None]


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    start_transitions: Tensor,
    end_transitions: Tensor,
    transitions: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """log p(tags | emissions) = score(tags) - log Z, per sequence.

        score(y) = start[y_0] + sum over t of emissions_t[y_t]
                 + sum over t > 0 of transitions[y_{t-1}, y_t] + end[y_last]
        log Z    = log(sum over all sequences y of exp(score(y)))

    float32 and float64 are computed as they are, 16-bit tensors (also under autocast) in float32; of several
    dtypes the widest counts. -inf in emissions or transitions forbids. Impossible tags have the
    log-likelihood -inf; if no sequence is possible at all, log Z counts as zero in it and has no gradient.
    Gradients are finite in either case.

    Args:
        emissions: [T, B, K] floating, any strides, T > 0
        tags: [T, B] integers in 0..K-1; at steps that do not count, any
        start_transitions, end_transitions: [K], scores of the first and the last tag
        transitions: [K, K], score of tag j after tag i at [i, j]
        mask: [T, B] bool (or integers, 0 is off): the steps that count; the first always does. Emissions
            elsewhere (NaN too) are never read and have the gradient zero. Where such steps lie between others
            everything is as in pytorch-crf, which skips them in log Z, but takes tags[t - 1] for the tag
            before tags[t] and tags[number of steps that count - 1] for the last one, whatever the mask says
            there: leave such steps out beforehand to have a likelihood
        lengths: [B] integers in 1..T on emissions' device: row b counts up to lengths[b]. Not with mask
        allowed: [T, B, K] bool: where False, a tag is impossible at that step. None: all are possible
        backend: "eager", "cpu" or "triton"; None: the fastest that is correct. See seqkern.use_backend
    Returns:
        [B] float32 or float64
    Raises:
        ValueError: a wrong shape or dtype; mask off at a first step; lengths outside 1..T
        IndexError: a tag that counts outside 0..K-1
        RuntimeError: different devices; a named backend cannot serve the request
        On devices other than a CPU, where looking would cost a synchronisation, values are not checked: the
        first step counts, lengths are clamped to 1..T, a wrong tag gives NaN.
    Source:
        seqkern/reference/crf.py
    """
    chain, steps = _prepare(
        emissions, start_transitions, end_transitions, transitions, mask, lengths, allowed
    )
    tags = _check_tags(tags, emissions)
    return _value(chain, tags, steps, backend)


def crf_log_partition(
    emissions: Tensor,
    start_transitions: Tensor,
    end_transitions: Tensor,
    transitions: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """log Z per sequence, [B]: -inf with gradient zero where no sequence is possible.

    With `allowed` less log Z without it is the log-probability that every tag is an allowed one: the
    log-likelihood of tags known in part. Arguments and errors as for `crf_log_likelihood`.
    """
    chain, steps = _prepare(
        emissions, start_transitions, end_transitions, transitions, mask, lengths, allowed
    )
    return _value(chain, None, steps, backend)


def crf_marginals(
    emissions: Tensor,
    start_transitions: Tensor,
    end_transitions: Tensor,
    transitions: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """p(tag k at step t | emissions), [T, B, K]: zero at steps that do not count, and where no sequence is
    possible. Its gradient is that of the eager formula. Arguments and errors as for `crf_log_likelihood`.
    """
    chain, steps = _prepare(
        emissions, start_transitions, end_transitions, transitions, mask, lengths, allowed
    )
    chosen = _choose("crf", chain, backend)
    if chosen == "eager":
        _check_values(chain[0], None, steps)
        with _without_autocast(emissions):
            return reference.crf_marginals(*chain, _valid(chain[0], steps))
    if _layers.wants_grad(chain):
        return MarginalsFunction.apply(*_layers.distinct(*chain, *steps), chosen)
    return _marginals(chain, steps, chosen)


def crf_decode(
    emissions: Tensor,
    start_transitions: Tensor,
    end_transitions: Tensor,
    transitions: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    n: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequences of the highest score, by the Viterbi algorithm. Nothing here has a gradient.

    The best one is pytorch-crf's, bit for bit: sums are in its order, and of equal sums the lower tag wins.
    If no sequence is possible the best one has the score -inf and means nothing. Several are computed by the
    CPU's kernel, on other devices by the eager formula.

    Args:     n: how many, best first, None for the best one; the others as for `crf_log_likelihood`
    Returns:  tags: [B, T] int64, with n [n, B, T]; -1 behind the last step that counts, and, with n, in
              sequences that are not possible;
              scores: [B], with n [n, B], -inf where there are fewer than n possible sequences
    Raises:   ValueError: n < 1; the others as for `crf_log_likelihood`
    """
    if n is not None and n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    with torch.no_grad():
        chain, steps = _prepare(
            emissions, start_transitions, end_transitions, transitions, mask, lengths, allowed
        )
        how_many = 1 if n is None else n
        chosen = _choose("crf" if how_many == 1 else "crf_nbest", chain, backend)
        if chosen == "eager":
            _check_values(chain[0], None, steps)
            with _without_autocast(emissions):
                tags, scores = reference.crf_best(*chain, _valid(chain[0], steps), how_many)
        else:
            tags, scores = _operator("decode", chosen, chain[0])(*chain, *steps, how_many)
        if n is None:
            return tags.squeeze(0), scores.squeeze(0)
        return torch.where(scores.unsqueeze(2) == -torch.inf, -1, tags), scores


# ---- the route ---------------------------------------------------------------------------------------------


def _value(chain: Sequence[Tensor], tags: Tensor | None, steps: Steps, backend: str | None) -> Tensor:
    """The tags' log-likelihood, or log Z without tags."""
    chosen = _choose("crf", chain, backend)
    if chosen == "eager":
        _check_values(chain[0], tags, steps)
        with _without_autocast(chain[0]):
            return _eager(chain, tags, steps)
    if _layers.wants_grad(chain):
        return CRFFunction.apply(*_layers.distinct(*chain, tags, *steps), chosen)
    return _operator("forward", chosen, chain[0])(*chain, tags, *steps, False)[0]


def _eager(chain: Sequence[Tensor], tags: Tensor | None, steps: Steps) -> Tensor:
    emissions, start, end, transitions = chain
    valid = _valid(emissions, steps)
    if tags is None:
        return reference.crf_log_partition(emissions, start, end, transitions, valid)
    return reference.crf_log_likelihood(emissions, tags, start, end, transitions, valid)


def _marginals(chain: Sequence[Tensor], steps: Steps, backend: str) -> Tensor:
    """As the gradient of log Z."""
    value, alphas = _operator("forward", backend, chain[0])(*chain, None, *steps, True)
    backward = _operator("backward", backend, chain[0])
    return backward(torch.ones_like(value), *chain, None, *steps, alphas, False)[0]


class CRFFunction(torch.autograd.Function):
    """Log-likelihood or log Z on the operators. Kept for backward: the inputs, and each step's log of the
    sums over all sequences so far."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Tensor,
        start: Tensor,
        end: Tensor,
        transitions: Tensor,
        tags: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        backend: str,
    ) -> Tensor:
        inputs = (emissions, start, end, transitions, tags, mask, lengths)
        value, alphas = _operator("forward", backend, emissions)(*inputs, True)
        ctx.backend = backend
        ctx.save_for_backward(*inputs, alphas)
        return value

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, alphas = ctx.saved_tensors
        chain, (tags, mask, lengths) = inputs[:4], inputs[4:]
        needed = ctx.needs_input_grad
        rest = (None,) * 4
        if torch.is_grad_enabled():  # create_graph=True
            grads = _layers.differentiate_eager(
                lambda *chain: (_eager(chain, tags, (mask, lengths)),), chain, needed[:4], (dvalue,)
            )
            return (*grads, *rest)
        backward = _operator("backward", ctx.backend, chain[0])
        found = backward(dvalue, *inputs, alphas, any(needed[1:4]))
        return (*_layers.wanted(found, needed[:4]), *rest)


class MarginalsFunction(torch.autograd.Function):
    """Marginals on the operators; their gradient by the eager formula, which is run again for it."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Tensor,
        start: Tensor,
        end: Tensor,
        transitions: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        backend: str,
    ) -> Tensor:
        chain, steps = (emissions, start, end, transitions), (mask, lengths)
        ctx.save_for_backward(*chain, *steps)
        return _marginals(chain, steps, backend)

    @staticmethod
    def backward(ctx: Any, dmarginals: Tensor | None) -> tuple[Tensor | None, ...]:
        *chain, mask, lengths = ctx.saved_tensors
        valid = _valid(chain[0], (mask, lengths))
        grads = _layers.differentiate_eager(
            lambda e, start, end, transitions: (reference.crf_marginals(e, start, end, transitions, valid),),
            chain,
            ctx.needs_input_grad[:4],
            (dmarginals,),
        )
        if not torch.is_grad_enabled():
            grads = (None if grad is None else grad.detach() for grad in grads)
        return (*grads, None, None, None)


def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from seqkern import triton

    return triton.crf_forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from seqkern import triton

    return triton.crf_backward(*arguments)


def _triton_decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    from seqkern import triton

    return triton.crf_decode(*arguments)


_TRITON = {"forward": _triton_forward, "backward": _triton_backward, "decode": _triton_decode}
for _name, _launcher in _TRITON.items():
    LIBRARY.impl(f"crf_{_name}", _launcher, "CUDA")


def _operator(name: str, backend: str, emissions: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The operator; where Triton interprets on CPU tensors, its launcher itself."""
    if backend == "triton" and emissions.is_cpu:
        return _TRITON[name]
    return getattr(torch.ops.seqkern, f"crf_{name}").default


def _why_no_cpu() -> str | None:
    if _backend.WHY_NO_KERNELS is not None:
        return _backend.WHY_NO_KERNELS
    if not torch._C._dispatch_has_kernel_for_dispatch_key("seqkern::crf_forward", "CPU"):
        return "it was built without the CRF's operators"
    return None


WHY_NO_CPU: str | None = _why_no_cpu()


def _choose(op: str, chain: Sequence[Tensor], backend: str | None) -> str:
    emissions = chain[0]
    wish = _backend.current_wish() if backend is None else backend
    on_gpu = not emissions.is_cpu or wish == "triton"
    return _backend.choose(
        op,
        _layers.device_type(emissions),
        emissions.dtype,
        transformed=_layers.transformed(chain),
        wish=wish,
        missing=_backend.WHY_NO_TRITON if on_gpu else WHY_NO_CPU,
        num_tags=emissions.shape[2],
        interpreted=_backend.triton_interprets(),
    )


def _without_autocast(emissions: Tensor) -> torch.autocast:
    return torch.autocast(emissions.device.type, enabled=False)


# ---- checks ------------------------------------------------------------------------------------------------


def _prepare(
    emissions: Tensor,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    allowed: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Steps]:
    """Emissions (-inf where they are not allowed), start, end, transitions, of one dtype, and which steps
    count."""
    if emissions.dim() != 3:
        raise ValueError(f"emissions: expected 3 dimensions [T, B, K], got {tuple(emissions.shape)}")
    T, B, K = emissions.shape
    if T == 0:
        raise ValueError("emissions: expected at least one step, got T = 0")
    dtype = emissions.dtype
    for name, scores, shape in (
        ("start_transitions", start, (K,)),
        ("end_transitions", end, (K,)),
        ("transitions", transitions, (K, K)),
    ):
        if scores.shape != shape:
            raise ValueError(f"{name}: expected {shape} for K = {K} tags, got {tuple(scores.shape)}")
        _check_device(name, scores, emissions)
        if scores.dtype is not dtype:
            dtype = torch.promote_types(dtype, scores.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"emissions: expected a floating dtype, got {emissions.dtype}")
    if dtype in _layers.SIXTEEN_BITS:
        dtype = torch.float32
    if mask is not None:
        if lengths is not None:
            raise ValueError("lengths: expected None with mask")
        _check_shape("mask", mask, emissions, (T, B))
        if mask.dtype is not torch.bool:
            if mask.dtype not in _layers.INTEGERS:
                raise ValueError(f"mask: expected bool or integers, got {mask.dtype}")
            mask = mask != 0
    if lengths is not None:
        lengths = _layers.check_lengths(lengths, T, B, emissions.device)
    emissions = _as(emissions, dtype)
    if allowed is not None:
        _check_shape("allowed", allowed, emissions, (T, B, K))
        if allowed.dtype is not torch.bool:
            raise ValueError(f"allowed: expected bool, got {allowed.dtype}")
        emissions = torch.where(allowed, emissions, -torch.inf)
    return (emissions, _as(start, dtype), _as(end, dtype), _as(transitions, dtype)), (mask, lengths)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def _check_device(name: str, x: Tensor, emissions: Tensor) -> None:
    if x.device != emissions.device:
        raise RuntimeError(f"{name}: expected the device of emissions, {emissions.device}, got {x.device}")


def _check_shape(name: str, x: Tensor, emissions: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        letters = "[T, B, K]" if len(shape) == 3 else "[T, B]"
        raise ValueError(f"{name}: expected {letters} = {tuple(shape)} as emissions, got {tuple(x.shape)}")
    _check_device(name, x, emissions)


def _check_tags(tags: Tensor, emissions: Tensor) -> Tensor:
    _check_shape("tags", tags, emissions, tuple(emissions.shape[:2]))
    if tags.dtype not in _layers.INTEGERS:
        raise ValueError(f"tags: expected integers, got {tags.dtype}")
    return tags if tags.dtype is torch.int64 else tags.to(torch.int64)


def _check_values(emissions: Tensor, tags: Tensor | None, steps: Steps) -> None:
    """For the eager backend, what the CPU's operators check themselves."""
    mask, lengths = steps
    given = [t for t in (emissions, tags, mask, lengths) if t is not None]
    if emissions.device.type != "cpu" or not all(map(_layers.has_values, given)):
        return
    if torch.compiler.is_compiling():
        return _assert_values(emissions, tags, steps)
    T, _, K = emissions.shape
    if mask is not None and not mask[0].all():
        b = int((~mask[0]).nonzero()[0])
        raise ValueError(f"mask: mask of the first timestep must all be on, got off for sequence {b}")
    if lengths is not None and (lengths < 1).any():
        b = int((lengths < 1).nonzero()[0])
        raise ValueError(f"lengths: expected values in 1..T = 1..{T}, got lengths[{b}] = {lengths[b].item()}")
    if tags is not None and (bad := _wrong_tags(tags, K, _valid(emissions, steps))).any():
        t, b = bad.nonzero()[0].tolist()
        raise IndexError(
            f"tags: expected values in 0..K-1 = 0..{K - 1}, got {tags[t, b].item()} at step {t} "
            f"of sequence {b}"
        )


def _assert_values(emissions: Tensor, tags: Tensor | None, steps: Steps) -> None:
    """The same in a compiled graph, which looks when it runs."""
    mask, lengths = steps
    if mask is not None:
        torch._assert_async(mask[0].all(), "mask: mask of the first timestep must all be on")
    if lengths is not None:
        torch._assert_async((lengths >= 1).all(), "lengths: expected values in 1..T")
    if tags is not None:
        wrong = _wrong_tags(tags, emissions.shape[2], _valid(emissions, steps))
        torch._assert_async(~wrong.any(), "tags: expected values in 0..K-1")


def _wrong_tags(tags: Tensor, K: int, valid: Tensor | None) -> Tensor:
    """Which of the tags that the score reads are none, [T, B] bool."""
    wrong = (tags < 0) | (tags >= K)
    if valid is None:
        return wrong
    read = valid.clone()
    read[:-1] |= valid[1:]
    last = valid.sum(0) - 1
    read |= torch.arange(len(tags), device=tags.device).unsqueeze(1) == last
    return wrong & read


def _valid(emissions: Tensor, steps: Steps) -> Tensor | None:
    """Which steps count, [T, B] bool; None: all. The first one always does."""
    mask, lengths = steps
    if lengths is not None:
        return _attention.valid_from_lengths(lengths.clamp(min=1), emissions.shape[0]).transpose(0, 1)
    if mask is None or mask.is_cpu:  # and checked
        return mask
    return torch.cat([torch.ones_like(mask[:1]), mask[1:]])
