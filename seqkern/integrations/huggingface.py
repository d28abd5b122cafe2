"""seqkern's attention for Hugging Face models: register(), then attn_implementation="seqkern".

transformers asks two functions of an attention: one makes the mask of a forward, once, from the padding and
the pattern that the model has; the other attends, in every layer. Here the mask is a bool one [B, 1, L, S] of
everything that is allowed, so that nothing can be dropped, whatever a model does to it on the way. Where the
pattern is one that the kernels know (all of the keys, or causal) the mask carries a note that says so, by
which the layers leave out padding instead of reading a mask.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqkern.ops import scaled_dot_product_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
except ImportError as error:  # pragma: no cover
    raise ImportError(f"seqkern.integrations.huggingface needs transformers 5.4 or newer: {error}") from error

NAME = "seqkern"
_NOTE = "_seqkern_note"


class _Note(NamedTuple):
    """What a mask says, and of which of its versions."""

    version: int
    is_causal: bool
    key_padding: Tensor  # [B, S] bool: True is padding


def register() -> None:
    """Make attn_implementation="seqkern" known to transformers; call it once, before the model is made.

    The models' results are those of "eager" but at tokens that may attend to nothing, which are padding:
    there attention is zero. Grouped-query attention, sliding windows, packed sequences, caches and additive
    masks work. Weights are not returned (output_attentions), soft caps and attention sinks are refused.

    >>> import transformers
    >>> from seqkern.integrations import huggingface
    >>> huggingface.register()
    >>> config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=50)
    >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="seqkern")

    Source:   https://huggingface.co/docs/transformers/attention_interface
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        module: the layer; its `is_causal` holds where neither is_causal nor a mask is given
        query: [B, N, L, E];  key: [B, Nk, S, E], N a multiple of Nk;  value: [B, Nk, S, Ev]
        attention_mask: broadcastable to [B, N, L, at least S]; bool: True attends; floating: added to the
            scores. With it the causal flag is not looked at: the mask says it
        position_bias: [.., N, L, S], added to the scores
    Returns:
        [B, L, N, Ev], and None for the weights
    Raises:
        ValueError: a soft cap or attention sinks;  RuntimeError: shapes that do not fit
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(
                f'{name}: not supported by attn_implementation="{NAME}"; take "eager" for this model'
            )
    if options.get("output_attentions"):
        warnings.warn(
            f'output_attentions: attn_implementation="{NAME}" returns no weights; take "eager" for them',
            stacklevel=2,
        )
    L, S = query.shape[2], key.shape[2]
    pattern: dict[str, Any] = {}
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        # One query comes last, behind all keys; several are the first ones, as transformers has it.
        pattern["is_causal"] = bool(is_causal) and L > 1
    elif (note := _note_of(attention_mask)) is not None and attention_mask.shape[-1] == S:
        pattern["is_causal"] = note.is_causal
        pattern["causal_alignment"] = "bottom_right"
        pattern["key_padding_mask"] = note.key_padding
    else:
        pattern["attn_mask"] = attention_mask[..., :S]
    if position_bias is not None:
        pattern = {"attn_mask": _with_bias(position_bias, pattern, attention_mask, L, S)}
    out: Any = scaled_dot_product_attention(
        *(query, key, value), dropout_p=dropout, scale=scaling, enable_gqa=True, **pattern
    )
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """transformers' mask function: [B, 1, L, S] bool, True attends; None where the causal flag says it all.

    Args:
        attention_mask: [B, tokens so far], False or 0 is padding
        mask_function, options: as transformers.masking_utils.sdpa_mask, which makes the mask
    """
    mask = sdpa_mask(
        *(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask), **options
    )
    is_causal = mask_function is causal_mask_function
    if mask is None or not (is_causal or mask_function is bidirectional_mask_function):
        return mask
    if torch.compiler.is_compiling() or isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return mask
    if is_causal and q_offset + q_length != kv_offset + kv_length:
        return mask  # a cache longer than what it holds
    padding = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=mask.device)
    if attention_mask is not None:
        known = attention_mask[:, kv_offset : kv_offset + kv_length]
        padding[:, : known.shape[1]] = known == 0
        padding[:, known.shape[1] :] = True
    setattr(mask, _NOTE, _Note(mask._version, is_causal, padding))
    return mask


def _note_of(mask: Tensor) -> _Note | None:
    """What the mask says, if it is as it was made. Slices and copies have no note."""
    if torch.compiler.is_compiling():
        return None
    note = getattr(mask, _NOTE, None)
    return note if note is not None and note.version == mask._version else None


def _with_bias(bias: Tensor, pattern: dict[str, Any], mask: Tensor | None, L: int, S: int) -> Tensor:
    """position_bias and the mask, or the causal pattern, as one additive mask."""
    if mask is None:
        if not pattern["is_causal"]:
            return bias
        mask = torch.ones(L, S, dtype=torch.bool, device=bias.device).tril()
    mask = mask[..., :S]
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask
