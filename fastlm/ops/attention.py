"""Attention over dense tensors: causal to either corner, grouped heads, key lengths, differentiable log-sum-exp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops import attention_cpu
from fastlm.ops._op import Op, autocast_dtype, compute_dtype, grad_of, host_values

MAX_WIDTH = 256
_NO_CORNER, _BOTTOM_RIGHT, _TOP_LEFT = 0, 1, 2
_CORNERS = {False: _NO_CORNER, True: _BOTTOM_RIGHT, "bottom_right": _BOTTOM_RIGHT, "top_left": _TOP_LEFT}


def _seen(S, T, key_lengths, corner, device):
    """Which query sees which key: [S, T], or [B, S, T] with key_lengths; None where every query sees every key."""
    if corner == _NO_CORNER and key_lengths is None:
        return None
    key = torch.arange(T, device=device)
    lengths = T if key_lengths is None else key_lengths.clamp(0, T)[:, None, None]
    seen = key < lengths
    if corner:
        query = torch.arange(S, device=device)[:, None]
        seen = seen & (key <= query + (lengths - S if corner == _BOTTOM_RIGHT else 0))
    return seen


def _without_unseen_keys(x, key_lengths):
    """x [B, T, ...] with zeros at and past key_lengths: 0 * garbage is NaN where the garbage is."""
    past = torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]
    return x.masked_fill(past[:, :, None, None], 0)


def _reference(q, k, v, key_lengths, corner, scale, return_lse):
    S, T, groups = q.shape[1], k.shape[1], (k.shape[2], q.shape[2] // k.shape[2])
    if key_lengths is not None:
        k, v = _without_unseen_keys(k, key_lengths), _without_unseen_keys(v, key_lengths)
    dtype = compute_dtype(q)
    qf = q.to(dtype).transpose(1, 2).unflatten(1, groups)
    kf, vf = (x.to(dtype).transpose(1, 2).unsqueeze(2) for x in (k, v))
    scores = qf @ kf.transpose(-1, -2) * scale
    seen = _seen(S, T, key_lengths, corner, q.device)
    if seen is None:
        dead = torch.full((), T == 0, device=q.device)
        probs = scores.softmax(-1)
    else:
        seen = seen[:, None, None] if seen.ndim == 3 else seen
        dead = ~seen.any(-1, keepdim=True)
        # Rows that see nothing get equal scores, so that no derivative of any order meets inf - inf.
        scores = scores.masked_fill(~seen, float("-inf")).masked_fill(dead, 0)
        probs = scores.softmax(-1).masked_fill(~seen, 0)
    out = (probs @ vf).flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous()
    if not return_lse:
        return out
    lse = torch.logsumexp(scores, -1, keepdim=True).masked_fill(dead, float("-inf"))
    return out, lse.squeeze(-1).flatten(1, 2)


def _torch(q, k, v, key_lengths, corner, scale, return_lse):
    if key_lengths is None:
        return _sdpa(q, k, v, corner, scale)
    lengths = host_values(key_lengths)
    if lengths is None:
        return _sdpa_masked(q, k, v, key_lengths, corner, scale)
    if len(set(lengths)) <= 1:
        T = lengths[0] if lengths else 0
        return _sdpa(q, k[:, :T], v[:, :T], corner, scale)
    # One call per row of the batch, cut to its length: no mask, no work on keys that nobody sees.
    rows = zip(q.split(1), k.split(1), v.split(1), lengths)
    return torch.cat([_sdpa(q, k[:, :T], v[:, :T], corner, scale) for q, k, v, T in rows])


def _decided(condition):
    """A plain bool for SDPA's flags: torch.compile passes its symbols through bool(), but guards on a branch."""
    if condition:  # noqa: SIM103
        return True
    return False


def _sdpa(q, k, v, corner, scale):
    """F.scaled_dot_product_attention on transposed views; every key of k is visible to someone or cut off here."""
    S, T = q.shape[1], k.shape[1]
    if S == 1 and q.device.type == "cpu":
        return _sdpa_one_query(q, k if corner != _TOP_LEFT else k[:, :1], v if corner != _TOP_LEFT else v[:, :1], scale)
    if corner == _BOTTOM_RIGHT and S > T:  # the first rows see nothing
        live = _sdpa(q[:, S - T :], k, v, corner, scale)
        return torch.cat([live.new_zeros(q.shape[0], S - T, q.shape[2], v.shape[3]), live], 1)
    if corner == _TOP_LEFT and S < T:  # the last keys are seen by nobody
        k, v, T = k[:, :S], v[:, :S], S
    # torch's is_causal means top-left; on a square the two corners are one.
    square = corner != _NO_CORNER and _decided(S == T)
    if square and attention_cpu.serves(q, k, v):
        return attention_cpu.causal(q, k, v, scale, _causal_reference)
    mask = None if square else _seen(S, T, None, corner, q.device)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=square, scale=scale, enable_gqa=_decided(q.shape[2] != k.shape[2]),
    ).transpose(1, 2)  # fmt: skip


def _causal_reference(q, k, v, scale):
    return _reference(q, k, v, None, _BOTTOM_RIGHT, scale, False)


def _sdpa_one_query(q, k, v, scale):
    """Decoding on the CPU: the query heads of a group become queries of one head.

    A product with one row is slow there in 16 bits: measured 3.6x (T 128) to 6x (T 1024) with three heads to a group, and
    1.5x to 1.8x for ungrouped heads by writing the query twice (a view) and dropping the second answer.
    """
    B, _, H, D = q.shape
    rows = q.reshape(B, k.shape[2], H // k.shape[2], D)
    alone = rows.shape[2] == 1 and q.dtype.itemsize == 2
    if alone:
        rows = rows.expand(-1, -1, 2, -1)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return (out[:, :, :1] if alone else out).reshape(B, 1, H, v.shape[3])


def _sdpa_masked(q, k, v, key_lengths, corner, scale):
    """key_lengths that the host must not read (a GPU, a traced graph): a mask, and rows that see nothing put right."""
    seen = _seen(q.shape[1], k.shape[1], key_lengths, corner, q.device)
    seen = seen.expand(-1, q.shape[1], -1)
    dead = ~seen.any(-1, keepdim=True)
    k, v = _without_unseen_keys(k, key_lengths), _without_unseen_keys(v, key_lengths)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=(seen | dead)[:, None], scale=scale, enable_gqa=_decided(q.shape[2] != k.shape[2]),
    )  # fmt: skip
    return out.transpose(1, 2).masked_fill(dead[:, :, :, None], 0)


def _supports(backend, q, k, v, key_lengths, return_lse, scale):
    if backend == "torch" and return_lse:
        return "torch's attention returns no differentiable log-sum-exp"
    if backend == "triton":
        if max(q.shape[3], v.shape[3]) > MAX_WIDTH:
            return f"its heads are at most {MAX_WIDTH} wide, got {max(q.shape[3], v.shape[3])}"
        if scale <= 0:
            return f"its softmax needs scale > 0, got {scale}"
    return None


OP = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, int corner, float scale, str backend) -> (Tensor o, Tensor lse)",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? key_lengths, int corner,"
    " float scale, str backend) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("attention:attention_fwd", "attention_bwd:attention_bwd")},
    supports=_supports,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)


def _fake_forward(q, k, v, key_lengths, corner, scale, backend):
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, v.shape[3]), q.new_empty(B, H, S, dtype=torch.float32)


def _fake_backward(dout, dlse, q, k, v, o, lse, key_lengths, corner, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


OP.fake(_fake_forward, _fake_backward)


@OP.autograd
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_lengths, corner, scale, backend):
        o, lse = OP.below(q, k, v, key_lengths, corner, scale, backend)
        ctx.save_for_backward(q, k, v, o, lse, key_lengths)
        ctx.options = corner, scale, backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, o, lse, key_lengths = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros(o.shape, dtype=o.dtype, device=o.device)
        return (*OP.backward(dout, dlse, q, k, v, o, lse, key_lengths, *ctx.options), None, None, None, None)


@OP.backward_reference
def _backward_reference(dout, dlse, q, k, v, o, lse, key_lengths, corner, scale, backend):
    def forward(q, k, v):
        return _reference(q, k, v, key_lengths, corner, scale, True)

    return tuple(grad_of(forward, (q, k, v), (dout, dlse)))


def _rules(k, key_lengths, make):
    """DTensor rules: a split of the batch, or of the heads where whole groups fall to each part.

    make(place of q, k, v and o, place of lse, place of key_lengths) -> one rule.
    """
    from torch.distributed.tensor import Replicate, Shard

    def rule(tensor, lse, lengths):
        return make(tensor, lse, None if key_lengths is None else lengths)

    rules = [rule(Replicate(), Replicate(), Replicate()), rule(Shard(0), Shard(0), Shard(0))]
    if k.shape[2] % k.mesh.size() == 0:
        rules.append(rule(Shard(2), Shard(1), Replicate()))
    return rules


def _shard_forward(q, k, v, key_lengths, corner, scale, backend):
    def make(tensor, lse, lengths):
        return [tensor, lse], [tensor, tensor, tensor, lengths, None, None, None]

    return _rules(k, key_lengths, make)


def _shard_backward(dout, dlse, q, k, v, o, lse, key_lengths, corner, scale, backend):
    def make(tensor, lse_place, lengths):
        dlse_place = None if dlse is None else lse_place
        return [tensor] * 3, [tensor, dlse_place, *[tensor] * 4, lse_place, lengths, None, None, None]

    return _rules(k, key_lengths, make)


OP.sharding(_shard_forward, _shard_backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v per head, without storing the S x T scores.

    Args:
        q: [B, S, H, Dh], fp16, bf16, fp32 (any float dtype on the reference), any strides.
        k: [B, T, H_kv, Dh], dtype of q; H must be a multiple of H_kv, query head h reads key head h // (H // H_kv).
        v: [B, T, H_kv, Dv], dtype of q; Dv may differ from Dh.
        causal: False; True or "bottom_right": query i sees key j where j <= i + T - S, so the last query sees the last key
            (flash-attention's meaning); "top_left": j <= i (that of torch's is_causal).
        scale: multiplies the scores; None for Dh ** -0.5.
        key_lengths: int32 or int64 [B] in [0, T], or None for T everywhere. Keys at or past it are not seen, whatever they
            hold, NaN included; bottom_right then aligns the last query with key key_lengths[b] - 1, which is decoding
            against a preallocated cache. Out of range it raises on the CPU and is clamped on a GPU.
        return_lse: also return the log-sum-exp of the scaled, masked scores, differentiable.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        o [B, S, H, Dv] in q's dtype; with return_lse the pair (o, lse), lse [B, H, S] fp32, natural logarithm. A query that
        sees no key gives o = 0, lse = -inf and gradients that are exactly 0. Under autocast q, k and v are cast. Scores and
        sums are fp32; fp32 products follow torch.get_float32_matmul_precision() in the triton form.

    Raises:
        ValueError: shapes that do not fit, key_lengths out of range, an unknown causal or an unsupported backend.
        TypeError: dtypes that are not floating point or differ, key_lengths that are not integers.

    Backends: triton on compute capability >= 8.0, Dh and Dv <= 256, scale > 0, bitwise repeatable gradients; torch without
    return_lse and without second derivatives. Papers: Dao 2023, arXiv:2307.08691; Ainslie et al. 2023, arXiv:2305.13245.
    """
    _check(q, k, v, key_lengths)
    try:
        corner = _CORNERS[causal]
    except (KeyError, TypeError):
        raise ValueError(
            f"attention: causal must be False, True, 'bottom_right' or 'top_left', got {causal!r}"
        ) from None
    dtype = autocast_dtype(q)
    if dtype is not None and q.dtype is not torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them")
    if scale is None:
        scale = q.shape[3] ** -0.5
    if corner == _BOTTOM_RIGHT and q.shape[1] == 1:
        corner = _NO_CORNER  # one query at the bottom right sees every key
    backend = OP.choose(backend, q, k, v, key_lengths, return_lse, scale)
    if backend in OP.plain_forms:
        return OP.plain(backend, q, k, v, key_lengths, corner, scale, return_lse)
    o, lse = OP.forward(q, k, v, key_lengths, corner, scale, backend)
    return (o, lse) if return_lse else o


def _check(q, k, v, key_lengths):
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise TypeError(f"attention: q, k and v must be floating point, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            "attention: q, k and v must be [B, S, H, Dh], [B, T, H_kv, Dh] and [B, T, H_kv, Dv], got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    B, _, H, D = q.shape
    T, H_kv = k.shape[1], k.shape[2]
    if k.shape[0] != B or k.shape[3] != D or D == 0:
        raise ValueError(f"attention: k must be [{B}, T, H_kv, {D}] like q {list(q.shape)}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: v must be [{B}, {T}, {H_kv}, Dv] like k {list(k.shape)}, got {list(v.shape)}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"attention: q's {H} heads must be a multiple of k's and v's {H_kv}")
    if not q.device == k.device == v.device == (q if key_lengths is None else key_lengths).device:
        raise ValueError(f"attention: k, v and key_lengths must be on q's device {q.device}, got {k.device}, {v.device}"
                         + ("" if key_lengths is None else f", {key_lengths.device}"))  # fmt: skip
    if key_lengths is None:
        return
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention: key_lengths must be int32 or int64, got {key_lengths.dtype}")
    if key_lengths.ndim != 1 or key_lengths.shape[0] != B:
        raise ValueError(f"attention: key_lengths must be [{B}], got {list(key_lengths.shape)}")
    lengths = host_values(key_lengths)
    if lengths and not 0 <= min(lengths) <= max(lengths) <= T:
        raise ValueError(f"attention: key_lengths must lie in [0, {T}] (k's length), got {lengths}")
