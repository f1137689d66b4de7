"""Attention layers over ops.attention: one with everything the op can do, and torch's own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.cache import KVCache
from fastlm.nn.norm import RMSNorm
from fastlm.nn.recording import attend


def alibi_slopes(n_heads: int, device: torch.device | str | None = None) -> Tensor:
    """fp32 [n_heads]: ALiBi's slope of each head, 2^(-8/n), 2^(-16/n), ..., 2^-8 (Press et al. 2022, arXiv:2108.12409).

    Where n_heads is no power of two, the slopes of the next lower one n and behind them every other one of 2n's, as in the
    paper's code. Raises ValueError for n_heads below 1.
    """
    if n_heads < 1:
        raise ValueError(f"alibi_slopes: n_heads must be at least 1, got {n_heads}")
    n = 2 ** int(math.log2(n_heads))
    exponents = [8 * (i + 1) / n for i in range(n)] + [4 * (2 * i + 1) / n for i in range(n_heads - n)]
    return torch.tensor([2.0**-e for e in exponents], dtype=torch.float32, device=device)


class Attention(nn.Module):
    """Self- or cross-attention with one product for queries, keys and values, and what recent models put around it.

    Args:
        d_model: width D of the input and the output.
        n_heads, n_kv_heads: H query heads and H_kv (None: H) key and value heads, which H must be a multiple of.
        head_dim: width Dh of a head; None for D / H.
        bias: whether the two products have one.
        qk_norm: an RMSNorm over Dh for queries and for keys, before the rotation (Henry et al. 2020, arXiv:2010.04245).
        norm_eps: the epsilon of those norms.
        window, softcap: as in ops.attention.
        sinks: one learned logit per head, 0 at first (Xiao et al. 2023, arXiv:2309.17453).
        relative_bias: (buckets, max_distance, bidirectional) of T5's learned bias by distance, or None.
        alibi: a fixed bias by distance, with `alibi_slopes`.
        dropout: probability in [0, 1) with which weights are dropped in training.

    Parameters: qkv.weight [(H + 2 H_kv) Dh, D] (rows: queries, keys, values), out.weight [D, H Dh], and as chosen qkv.bias,
    out.bias, q_norm.weight and k_norm.weight [Dh], sinks [H], relative_bias.weight [buckets, H].

    Raises ValueError for head counts that do not divide.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        relative_bias: tuple[int, int, bool] | None = None,
        alibi: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"Attention: n_heads {n_heads} must be a multiple of n_kv_heads {n_kv_heads}, both at least 1"
            )
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"Attention: d_model {d_model} must be a multiple of n_heads {n_heads}, or give head_dim")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.window, self.softcap, self.dropout = window, softcap, dropout
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=bias, **where)
        self.out = nn.Linear(n_heads * self.head_dim, d_model, bias=bias, **where)
        self.q_norm = RMSNorm(self.head_dim, norm_eps, **where) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps, **where) if qk_norm else None
        self.register_parameter("sinks", nn.Parameter(torch.zeros(n_heads, **where)) if sinks else None)
        self.relative_bias, self.buckets = None, relative_bias
        if relative_bias is not None:
            self.relative_bias = nn.Embedding(relative_bias[0], n_heads, **where)
            nn.init.zeros_(self.relative_bias.weight)
        self.alibi_slopes: Tensor | None
        self.register_buffer("alibi_slopes", alibi_slopes(n_heads, device) if alibi else None, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Attention:
        super()._apply(fn, recurse)
        if (
            self.alibi_slopes is not None
        ):  # made anew: `.to(bfloat16)` would round the slopes, to_empty leave them unwritten
            self.alibi_slopes = alibi_slopes(self.n_heads, self.alibi_slopes.device)
        return self

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        **options: Any,
    ) -> Tensor:
        """The layer's output, of the shape of x.

        Args:
            x: [B, S, D], or [total, D] with cu_seqlens_q.
            context: [B, T, D] ([total, D] with cu_seqlens_k): what keys and values are made from; None for x (self-attention).
            cos, sin: rotary tables as in ops.rotary, for self-attention only: row i for token i, unless `positions` ([S] or
                [B, S]; packed [total]) says where each token stands, or a cache does.
            cache, layer: keys and values are appended to the cache's layer and read from it; `cache.advance` is for the
                caller, once all layers are done. The keys of unequal rows need causal=True, as always in decoding.
            options: everything else ops.attention takes: causal (False by default), key_lengths, key_starts, prefix_lengths,
                document_ids, cu_seqlens_q, block_mask, bias, scale, seed, ... An option that the layer has too wins over it.

        Raises:
            ValueError: rotary tables or a cache together with a context; what ops.attention raises.
        """
        if context is not None and (cos is not None or cache is not None):
            raise ValueError("Attention: cos, sin and cache are for self-attention; leave them out with a context")
        q, k, v = self._heads(x, context)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None:
            if cache is not None and positions is None:
                positions = cache.positions(x.shape[1])
            if q.ndim == 3:  # packed
                q, k = (t[0] for t in ops.rotary(q[None], k[None], cos, sin, positions=positions))
            else:
                q, k = ops.rotary(q, k, cos, sin, positions=positions)
        if cache is not None:
            k, v = cache.append(layer, k, v)
            if cache.length is None:
                options.setdefault("key_lengths", cache.lengths + x.shape[1])
        return self.out(attend(self, q, k, v, **{**self._options(), **options}).flatten(-2))

    def _heads(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """q [..., H, Dh], k and v [..., H_kv, Dh]."""
        H, H_kv = self.n_heads, self.n_kv_heads
        if context is None:
            return self.qkv(x).unflatten(-1, (-1, self.head_dim)).split((H, H_kv, H_kv), dim=-2)
        sizes = (H * self.head_dim, 2 * H_kv * self.head_dim)
        weights = self.qkv.weight.split(sizes)
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        q, kv = (F.linear(t, w, b).unflatten(-1, (-1, self.head_dim)) for t, w, b in zip((x, context), weights, biases))
        return q, *kv.split(H_kv, dim=-2)

    def _options(self) -> dict[str, Any]:
        """What the layer itself asks of ops.attention."""
        options: dict[str, Any] = {"window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        options["alibi_slopes"] = self.alibi_slopes
        if self.relative_bias is not None:
            _, reach, both = self.buckets
            options["relative_bias"] = ops.RelativeBias(self.relative_bias.weight, both, reach)
        options["dropout_p"] = self.dropout if self.training else 0.0
        return options
