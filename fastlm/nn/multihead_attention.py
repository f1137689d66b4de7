"""torch.nn.MultiheadAttention over ops.attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops
from fastlm.nn.recording import attend


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention computed by ops.attention: same arguments, state dict and results.

    forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
    is_causal=False) -> (output, weights or None), as torch documents it, with these differences:

    - a query whose keys are all hidden gets weights 0 and the output of 0 (out_proj.bias), where torch gives NaN;
    - dropout draws other random numbers, and the weights returned are those before it;
    - the weights cost a second product of queries and keys: pass need_weights=False where they are not needed;
    - is_causal=True needs no attn_mask; one that is given is taken to be the causal mask and is not read;
    - nested tensors raise ValueError.

    torch.nn.TransformerEncoderLayer in evaluation does not call its attention module but a fused function of its own.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        _check_inputs(query, key, value)
        batched = query.ndim == 3
        q, k, v = (self._arranged(x, batched) for x in self._projected(query, key, value))
        added = 0
        if self.bias_k is not None:
            k, v = (
                torch.cat((x, b.to(x.dtype).expand(x.shape[0], -1, -1)), 1)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
            added += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            added += 1
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (q, k, v))
        options = self._masks(q, k, added, batched, key_padding_mask, attn_mask, is_causal)
        out = attend(self, q, k, v, dropout_p=self.dropout if self.training else 0.0, **options).flatten(2)
        out = self.out_proj(out[0] if not batched else out if self.batch_first else out.transpose(0, 1))
        if not need_weights:
            return out, None
        weights = ops.attention_weights(q, k, **options).to(q.dtype)
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [..., E]; one product where all three are the same tensor."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))

    def _arranged(self, x: Tensor, batched: bool) -> Tensor:
        """x as [N, L, E]."""
        return x[None] if not batched else x if self.batch_first else x.transpose(0, 1)

    def _masks(self, q, k, added, batched, key_padding_mask, attn_mask, is_causal) -> dict:
        """The options of ops.attention. The last `added` keys are the layer's own, which no mask hides."""
        N, L, T = q.shape[0], q.shape[1], k.shape[1] - added
        options: dict = {}
        biases = []
        if is_causal and not added:
            options["causal"] = "top_left"
        elif is_causal:
            attn_mask = torch.ones(L, T, dtype=torch.bool, device=q.device).triu(1)
        elif attn_mask is not None:
            allowed = [(L, T), (N * self.num_heads, L, T)]
            _check_mask("attn_mask", attn_mask, allowed)
        if attn_mask is not None and "causal" not in options:
            mask = attn_mask.unflatten(0, (N, -1)) if attn_mask.ndim == 3 else attn_mask[None, None]
            biases.append(F.pad(_additive(mask, q.dtype), (0, added)))
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, [(N, T)] if batched else [(T,)])
            hidden = key_padding_mask if batched else key_padding_mask[None]
            hidden = F.pad(hidden, (0, added))
            if hidden.dtype == torch.bool:  # documents rather than a bias: nothing of the size of the scores
                options["document_ids"] = (hidden.new_zeros((N, L), dtype=torch.int32), hidden.int())
            else:
                biases.append(hidden[:, None, None])
        if biases:
            options["bias"] = sum(biases[1:], biases[0])
        return options


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask, True where hidden, as 0 and -inf; others as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError(
            "MultiheadAttention: nested tensors are not taken; pad them and pass key_padding_mask, or pack them for "
            "fastlm.nn.Attention with cu_seqlens_q"
        )
    if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            "MultiheadAttention: query, key and value must be all [L, E] or all [N, L, E] ([L, N, E] unless batch_first), got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"MultiheadAttention: {name} must be boolean (True hides) or floating point, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"MultiheadAttention: {name} must be {wanted}, got {list(mask.shape)}")
