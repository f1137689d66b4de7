"""attn_implementation="fastlm" for unmodified models of the transformers library (version 5).

A model asks its mask interface once per forward for what hides the keys, and passes the answer to the attention function of
every layer. Where the answer is causality, a window or padding, ours is an integer tensor [B, 1, 1, T], 1 for keys that are
not padding, whose dtype says which rule stands above it: nothing of the size S x T is made. The dtype is what survives
everything models do with masks (slices, copies to another device, gradient checkpointing), and no mask of a user's has it:
those are boolean or additive, and are taken as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.recording import attend
from fastlm.ops.attention_maps import OPTIONS

KEYS_ONLY, CAUSAL, SLIDING = torch.int8, torch.int16, torch.int32


def register(name: str = "fastlm") -> None:
    """Makes `name` an attn_implementation of transformers: from_pretrained(..., attn_implementation="fastlm"), or
    model.set_attn_implementation("fastlm"). Calling it again does no harm.

    Outputs and gradients are those of "eager" within rounding, for causal, bidirectional and cross-attention, grouped heads,
    windows, softcaps, sinks, T5's position bias, padding on either side, caches and dropout (whose random numbers differ).
    Queries that see no key (padding) give 0. output_attentions=True in a call is served by ops.attention_weights.

    Raises ImportError where transformers is missing.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("fastlm.nn.transformers needs transformers >= 5; `pip install transformers`") from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' contract for an attention function: query [B, H, S, Dh], key and value [B, H_kv, T, Dh].

    Returns the output [B, S, H, Dv] and None, or the weights [B, H, S, T] if output_attentions is passed.
    """
    if kwargs.get("cache") is not None:
        raise ValueError('attn_implementation="fastlm" has no paged cache for continuous batching; use "sdpa" there')
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "bias": position_bias}
    if attention_mask is None:
        options["causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
    elif attention_mask.dtype in (KEYS_ONLY, CAUSAL, SLIDING):
        options |= _rule(attention_mask, q, k, sliding_window)
    else:
        mask = _additive(attention_mask, q.dtype)[..., : k.shape[1]]
        options["bias"] = mask if position_bias is None else position_bias + mask
    options["causal"] = bool(options.get("causal", False))
    out = attend(module, q, k, v, dropout_p=dropout, **options).contiguous()
    if not kwargs.get("output_attentions"):
        return out, None
    return out, ops.attention_weights(q, k, **{n: x for n, x in options.items() if n in OPTIONS}).to(q.dtype)


def _rule(mask: Tensor, q: Tensor, k: Tensor, sliding_window: int | None) -> dict[str, Any]:
    """The options of ops.attention that an integer mask of `attention_mask` stands for."""
    options: dict[str, Any] = {"causal": mask.dtype != KEYS_ONLY}
    if mask.dtype == SLIDING:
        if sliding_window is None:
            raise ValueError(
                'attn_implementation="fastlm": the model has a sliding-window mask but passes no sliding_window to its '
                'attention, so the window is not known there; use "sdpa" for this model'
            )
        options["window"] = (sliding_window - 1, None)
    if mask.shape[-1] != 1 or k.shape[1] == 1:  # else no key is hidden
        keys = mask[:, 0, 0].expand(k.shape[0], -1).int()
        if keys.shape[1] != k.shape[1]:
            raise ValueError(
                f'attn_implementation="fastlm": the mask is for {keys.shape[1]} keys, and the layer has {k.shape[1]}; '
                "pass the model a mask as long as past and new tokens together"
            )
        options["document_ids"] = (keys.new_ones(q.shape[:2]), keys)
    return options


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask, True where seen, as 0 and -inf; additive ones as they are."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(
            f'attn_implementation="fastlm": a 4-D attention_mask must be boolean or floating point, got {mask.dtype}'
        )
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """transformers' contract for a mask function: what `attention_forward` is to get as its mask.

    None where the rule that the layer knows itself is all; an integer tensor for padding and windows (see the module); else
    what transformers makes for "sdpa", as 0 and -inf [B, 1, S, T]: other patterns, and fixed-size caches. Values are read only
    where that costs no wait: on the CPU.
    """
    # The flags say that mask_function is the plain causal or the plain bidirectional rule, apart from local_size.
    causal = allow_is_causal_skip
    plain = causal or allow_is_bidirectional_skip
    window = local_size if local_size is not None and kv_length > local_size else None
    if window is not None and not (causal and local_size == getattr(config, "sliding_window", None)):
        plain = False  # a bidirectional window, or chunks
    if window is not None and local_size == getattr(config, "attention_chunk_size", None):
        plain = False
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if not plain or (causal and not aligned):
        return _materialized(
            dtype, batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, device=device, use_vmap=kwargs.get("use_vmap", False),
        )  # fmt: skip
    keys = None
    if attention_mask is not None:
        keys = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        keys = nn.functional.pad(keys, (0, kv_length - keys.shape[1]))
        free = keys.device.type == "cpu" and not torch.compiler.is_compiling()
        keys = None if free and bool(keys.all()) else keys
    if keys is None and window is None:
        return None
    kind = SLIDING if window is not None else CAUSAL if causal else KEYS_ONLY
    if keys is None:
        return torch.ones(1, 1, 1, 1, dtype=kind, device=device)
    return keys[:, None, None].to(kind)


def _materialized(dtype: torch.dtype, **options: Any) -> Tensor:
    from transformers.masking_utils import sdpa_mask

    seen = sdpa_mask(**options, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return _additive(seen, dtype)
