"""Attention: one op for every mask and every change of the scores, all of which go together."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import attention_cuda, attention_torch
from fastlm.ops._cuda import not_measured
from fastlm.ops._op import Op
from fastlm.ops._tensor import grad_of
from fastlm.ops.attention_options import RelativeBias, make_call
from fastlm.ops.attention_reference import Call, reference
from fastlm.ops.block_mask import BlockMask

MAX_WIDTH = 256


def _supports(backend, call, return_lse):
    if backend == "torch":
        return attention_torch.reason_against(call, return_lse)
    if backend == "cuda":
        return attention_cuda.reason_against(call)
    if backend == "triton":
        width = max(call.q.shape[3], call.v.shape[3])
        if width > MAX_WIDTH:
            return f"its heads are at most {MAX_WIDTH} wide, got {width}"
        if call.scale <= 0:
            return f"its softmax needs scale > 0, got {call.scale}"
        slopes = call.extras[0] if call.extras else None
        if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
            return (
                "it has no gradient of alibi_slopes, which are constants in the paper; detach them or use relative_bias"
            )
    return None


_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_lengths, Tensor? bias, Tensor? distances, Tensor? sinks, Tensor?[] extras,"
    " int align, int left, int right, float scale, float softcap, float dropout, str backend"
)
OP = Op(
    "attention",
    f"({_CALL}) -> (Tensor o, Tensor lse)",
    f"(Tensor dout, Tensor? dlse, Tensor o, Tensor lse, bool[] wanted, {_CALL})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor ddistances, Tensor dsinks)",
    reference=reference,
    torch=attention_torch.attend,
    kernels={
        "cuda": (attention_cuda.forward, attention_cuda.backward),
        "triton": ("attention:attention_fwd", "attention_bwd:attention_bwd"),
    },
    supports=lambda backend, *args: _supports(backend, Call(*args[:-1]), args[-1]),
    slower=not_measured,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(q, k, v, *rest):
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, v.shape[3]), q.new_empty(B, H, S, dtype=torch.float32)


def _fake_backward(dout, dlse, o, lse, wanted, q, k, v, key_lengths, bias, distances, sinks, *rest):
    small = [
        x.new_empty(x.shape if want else 0) if x is not None else q.new_empty(0)
        for x, want in zip((bias, distances, sinks), wanted)
    ]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *small


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        o, lse = OP.below(*args)
        call = Call(*args[:-1])
        ctx.save_for_backward(o, lse, *call[:7], *call.extras)
        ctx.rest = args[8:]
        ctx.wanted = [bool(x is not None and x.requires_grad) for x in (call.bias, call.distances, call.sinks)]
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        o, lse, *saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros(o.shape, dtype=o.dtype, device=o.device)
        dq, dk, dv, *small = OP.backward(dout, dlse, o, lse, ctx.wanted, *saved[:7], saved[7:], *ctx.rest)
        small = [x if want else None for x, want in zip(small, ctx.wanted)]
        return dq, dk, dv, None, *small, *[None] * 8


@OP.backward_reference
def _backward_reference(dout, dlse, o, lse, wanted, *args):
    call = Call(*args[:-1])

    def forward(q, k, v, *small):
        return reference(*call._replace(q=q, k=k, v=v, **dict(zip(("bias", "distances", "sinks"), small))), True)

    small = [x if want else None for x, want in zip(call[4:7], wanted)]
    if all(x is None for x in small):
        found = grad_of(lambda q, k, v: forward(q, k, v, *call[4:7]), call[:3], (dout, dlse))
    else:
        chosen = lambda given: [g if want else x for g, x, want in zip(given, call[4:7], wanted)]  # noqa: E731
        found = grad_of(lambda q, k, v, *given: forward(q, k, v, *chosen(given)), (*call[:3], *small), (dout, dlse))
    empty = call.q.new_empty(0)
    small = [g if g is not None else empty if x is None else x.new_empty(0)
             for g, x in zip([*found[3:], None, None, None], call[4:7])]  # fmt: skip
    return *found[:3], *small


def _rules(call, make):
    """DTensor rules: a split of the batch, or of the heads where whole groups fall to each part.

    make(place of q, k, v and o, place of lse, place of key_lengths) -> one rule.
    """
    from torch.distributed.tensor import Replicate, Shard

    def rule(tensor, lse, lengths):
        return make(tensor, lse, None if call.key_lengths is None else lengths)

    rules = [rule(Replicate(), Replicate(), Replicate())]
    if all(x is None for x in call[4:7]):  # else a part would need its own part of them
        rules.append(rule(Shard(0), Shard(0), Shard(0)))
        if call.k.shape[2] % call.k.mesh.size() == 0:
            rules.append(rule(Shard(2), Shard(1), Replicate()))
    return rules


def _small(call):
    """Places of bias, distances and sinks, always whole."""
    from torch.distributed.tensor import Replicate

    return [None if x is None else Replicate() for x in call[4:7]]


def _shard_forward(*args):
    call = Call(*args[:-1])

    def make(tensor, lse, lengths):
        return [tensor, lse], [tensor, tensor, tensor, lengths, *_small(call), *[None] * 8]

    return _rules(call, make)


def _shard_backward(dout, dlse, o, lse, wanted, *args):
    from torch.distributed.tensor import Replicate

    call = Call(*args[:-1])

    def make(tensor, lse_place, lengths):
        dlse_place = None if dlse is None else lse_place
        inputs = [tensor, dlse_place, tensor, lse_place, None, *[tensor] * 3, lengths, *_small(call), *[None] * 8]
        return [*[tensor] * 3, *[Replicate()] * 3], inputs

    return _rules(call, make)


OP.sharding(_shard_forward, _shard_backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    relative_bias: RelativeBias | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    block_mask: BlockMask | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(softmax(softcap(q k^T * scale) + biases + mask)) v per head.

    The triton form stores nothing of size S x T; the torch form a mask of that size where one is needed, the reference the
    scores. All options go together. A key is seen if every mask given lets it through.

    Args:
        q: [B, S, H, Dh], fp16, bf16, fp32 (any float dtype on the reference), any strides; [total, H, Dh] with cu_seqlens.
        k: [B, T, H_kv, Dh] (or [total, H_kv, Dh]), dtype of q; H must be a multiple of H_kv, query head h reads key head
            h // (H // H_kv).
        v: [B, T, H_kv, Dv] (or [total, H_kv, Dv]), dtype of q; Dv may differ from Dh.
        causal: False; True or "bottom_right": query i sees key j where j <= i + T - S, so the last query sees the last key
            (flash-attention's meaning); "top_left": j <= i (that of torch's is_causal).
        window: (left, right): only keys from `left` before to `right` after the diagonal that causal names (without causal
            the one that ends at the last key of k, whatever key_lengths says); -1 or None for no limit on that side.
        scale: multiplies the scores; None for Dh ** -0.5.
        bias: floating point, broadcastable to [B, H, S, T], added to the scores; gets a gradient. Values below -2e38, -inf and
            torch.finfo(torch.float32).min among them, hide a key. With packed sequences S and T are positions within a
            sequence, and at least the longest one's lengths.
        relative_bias: learned bias by distance, never stored as S x T: a RelativeBias (T5's bucket table) or a tensor
            [H, 2 R + 1], the bias of distances from -R to R, clamped; gets a gradient. A key's distance is counted from the
            diagonal as window does it: key - query where there are as many keys as queries.
        alibi_slopes: [H]: adds -slope * |distance from the diagonal| (Press et al. 2022, arXiv:2108.12409).
        softcap: scores become softcap * tanh(scores / softcap), before anything is added (Gemma 2).
        sinks: [H], a learned logit per head that takes part in the softmax without a value (Xiao et al. 2023,
            arXiv:2309.17453); gets a gradient.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1], from 0 to total: sequences packed one behind the other. The second
            may be left out where it equals the first. Rows of no sequence (on a GPU, where nobody checks) come out as 0.
        max_seqlen_q, max_seqlen_k: not needed; if given, checked wherever values are.
        key_lengths: int32 or int64 [B] in [0, T], or None for T everywhere. Keys at or past it are not seen, whatever they
            hold, NaN included; causal=True then aligns the last query with key key_lengths[b] - 1, which is decoding against
            a preallocated cache. Without causal the lengths move nothing, which is right padding.
        key_starts: int32 or int64 [B]: keys before it are not seen, whatever they hold: left padding.
        prefix_lengths: int32 or int64 [B]: keys below it are seen despite causal and window: prefix-LM.
        document_ids: int32 or int64 [B, S] (packed [total]), or a pair for queries and keys: only keys of the query's own
            document are seen. Where documents lie one behind the other, cu_seqlens does the same without the work.
        block_mask: a BlockMask: blocks of scores that are not in it are skipped (in the torch form where the mask stands alone).
        dropout_p: probability in [0, 1) with which each softmax weight is dropped, the others being scaled up.
        seed: an int, or int64 [2] (seed, offset) on q's device, so that it can change under a CUDA graph; None draws one. The
            same seed drops the same weights on every backend (Philox 4x32-10).
        return_lse: also return the log-sum-exp of the masked scores (and sink), before dropout; differentiable.
        check: check the values of key_lengths, cu_seqlens, ... on a GPU too, at the price of a wait.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    Returns:
        o [B, S, H, Dv] (packed [total, H, Dv]) in q's dtype; with return_lse the pair (o, lse), lse [B, H, S] (packed
        [H, total]) fp32, natural logarithm. A query that sees no key gives o = 0, lse = -inf and gradients that are exactly 0.
        Under autocast q, k and v are cast. Scores and sums are fp32; fp32 products follow
        torch.get_float32_matmul_precision() in the triton form.

    Raises:
        ValueError: shapes that do not fit, values out of range (seen on the CPU or with check=True; clamped on a GPU), an
        unknown causal or an unsupported backend.
        TypeError: dtypes that are not floating point or differ, lengths that are not integers.

    Backends: triton on compute capability >= 8.0, Dh and Dv <= 256, scale > 0, bitwise repeatable gradients; cuda on Hopper, bf16
    and fp16, Dh = Dv of 64, 128 or 256, causal or not and a limit to the right, nothing else (Shah et al. 2024, arXiv:2407.08608;
    gradients by the Triton kernels; not chosen by "auto", since it was not measured yet); torch (the CPU's
    choice) without return_lse, softcap, sinks and dropout, and without second derivatives on bf16. Derivatives of any order,
    vmap and forward mode come from the reference. Papers: Dao 2023, arXiv:2307.08691; Ainslie et al. 2023, arXiv:2305.13245.
    """
    call = make_call(
        q, k, v, causal=causal, window=window, scale=scale, bias=bias, relative_bias=relative_bias, alibi_slopes=alibi_slopes,
        softcap=softcap, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, key_lengths=key_lengths, key_starts=key_starts, prefix_lengths=prefix_lengths,
        document_ids=document_ids, block_mask=block_mask, dropout_p=dropout_p, seed=seed, check=check,
    )  # fmt: skip
    backend = OP.choose(backend, *call, return_lse)
    if backend in OP.plain_forms:
        found = OP.plain(backend, *call, return_lse)
    else:
        found = OP.forward(*call, backend)
        found = found if return_lse else found[0]
    if q.ndim == 4:
        return found
    return (found[0][0], found[1][0]) if return_lse else found[0]
