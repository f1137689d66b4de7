"""The backward of bf16 causal attention on the CPU, where torch's own is slow. Part of attention's torch form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._tensor import grad_of

_QUERIES = 64  # in a block
_LONGEST = 512  # tokens, beyond which torch's backward catches up


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal` is for this call: gradients wanted, bf16 on the CPU, as many keys as queries, and not too many."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape[1] == k.shape[1]
        and q.shape[1] <= _LONGEST
        and q.numel() > 0
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
    )


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, formula: Callable[..., Tensor]) -> Tensor:
    """F.scaled_dot_product_attention with is_causal, on q [B, S, H, Dh], k [B, S, H_kv, Dh], v [B, S, H_kv, Dv].

    The backward takes blocks of 64 queries and the keys they see, and lets products of whole batches do the work: 11.3 ms
    where torch's takes 16.7 (B 4, S 256, H 6, H_kv 2, Dh 64, one thread), and 8.1 when Inductor fuses what lies between the
    products; from S 1024 on there is no gain. Scores are fp32, since rounded ones give wrong probabilities where attention is
    sharp; the gradients are as close to the exact ones as torch's. `formula(q, k, v, scale)` is the same in plain operations,
    for second derivatives.
    """
    return _Causal.apply(q, k, v, scale, formula)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, formula):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale, enable_gqa=grouped).transpose(
            1, 2
        )
        ctx.save_for_backward(q, k, v, out)
        ctx.scale, ctx.formula = scale, formula
        return out

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled():  # create_graph
            return *grad_of(lambda q, k, v: ctx.formula(q, k, v, ctx.scale), ctx.saved_tensors[:3], (dout,)), None, None
        q, k, v, out = ctx.saved_tensors
        B, S, H, D = q.shape
        H_kv = k.shape[2]
        groups = H // H_kv
        # Query heads of one key head are rows of one product: [B H_kv, groups, S, D].
        dot = (dout.float() * out).sum(-1, keepdim=True)
        q, dout, dot = (_grouped(t, H_kv) for t in (q, dout, dot))
        k, v = (t.transpose(1, 2).reshape(B * H_kv, S, -1) for t in (k, v))
        wide_q, wide_k = q.float() * ctx.scale, k.float()
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=torch.float32) for t in (k, v))
        unseen = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool).triu_(1)
        for start in range(0, S, _QUERIES):
            end = min(start + _QUERIES, S)
            rows, here = (B * H_kv, groups * (end - start), -1), slice(start, end)
            block = (B * H_kv, groups, end - start, end)
            q_rows, dout_rows = q[:, :, here].reshape(rows), dout[:, :, here].reshape(rows)
            scores = torch.bmm(wide_q[:, :, here].reshape(rows), wide_k[:, :end].transpose(1, 2)).view(block)
            scores[..., start:].masked_fill_(unseen[: end - start, : end - start], float("-inf"))
            p = scores.softmax(-1)
            dp = torch.bmm(dout_rows, v[:, :end].transpose(1, 2)).view(block)
            dv[:, :end] += torch.bmm(p.to(v.dtype).view(rows).transpose(1, 2), dout_rows)
            ds = (p * (dp - dot[:, :, here])).mul_(ctx.scale).to(q.dtype).view(rows)
            dk[:, :end] += torch.bmm(ds.transpose(1, 2), q_rows)
            dq[:, :, here] = torch.bmm(ds, k[:, :end]).view(B * H_kv, groups, end - start, D)
        dq = dq.view(B, H, S, D).transpose(1, 2)
        dk, dv = (t.to(q.dtype).view(B, H_kv, S, -1).transpose(1, 2) for t in (dk, dv))
        return dq, dk, dv, None, None


def _grouped(t: Tensor, H_kv: int) -> Tensor:
    """[B, S, H, D] as [B H_kv, H / H_kv, S, D], contiguous."""
    B, S, H, D = t.shape
    return t.transpose(1, 2).reshape(B * H_kv, H // H_kv, S, D)
