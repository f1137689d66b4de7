"""Launchers of the norms: which kernel, tile and warps for which width, and the tensors around them."""

from __future__ import annotations

import torch
import triton

from .common import at_two_strides, num_sms
from .norm_rows import _norm_bwd_kernel, _norm_fwd_kernel
from .norm_wide import _norm_wide_bwd_kernel, _norm_wide_fwd_kernel, _norm_wide_sums_kernel

_WIDE = 4096  # columns of a block of the looped kernels


def _tile(n: int, elements: int, most_warps: int, per_thread: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps): rows of a power of two columns, several of them in a tile of about so many elements."""
    block_n = triton.next_power_of_2(max(n, 16))
    block_m = max(1, elements // block_n)
    return block_m, block_n, max(4, min(most_warps, block_m * block_n // (32 * per_thread)))


def _dropout(dropout_p: float) -> tuple[int, float]:
    """What the kernels compare random words with, and what they scale the kept elements by."""
    return int(dropout_p * 2**32), 1 / (1 - dropout_p)


def norm_fwd(x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p, *, centred):
    """-> y [..., N] in x's dtype, residual_out [..., N] in residual's dtype (empty without one), mean [...] (empty unless
    centred), rstd [...] fp32."""
    N = x.shape[-1]
    kind = (x if residual is None else residual).dtype
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = torch.empty(x.shape if residual is not None else 0, dtype=kind, device=x.device)
    mean = torch.empty(x.shape[:-1] if centred else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, residual_out, mean, rstd
    M = x.numel() // N
    x, *x_rows = at_two_strides(x)
    r, *r_rows = (x, *x_rows) if residual is None else at_two_strides(residual)
    pointers = (x, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), r,
                x if seed is None else seed, y, y if residual is None else residual_out, mean, rstd)  # fmt: skip
    features = {
        "CENTRED": centred, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "DROPOUT": seed is not None, "ROUND_FIRST": llama,
    }  # fmt: skip
    numbers = (N, eps, weight_offset, *_dropout(dropout_p))
    widest = (
        16384 if seed is not None or (residual is not None and residual.element_size() > 2) else 32768
    )  # or it spills
    if widest < N:
        _norm_wide_fwd_kernel[(M,)](*pointers, *x_rows, *r_rows, *numbers, **features, BLOCK_N=_WIDE, num_warps=8)
    else:
        block_m, block_n, warps = _tile(N, 2048, 32, 16)
        _norm_fwd_kernel[(triton.cdiv(M, block_m),)](
            *pointers, *x_rows, *r_rows, M, *numbers, **features, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps
        )
    return y, residual_out, mean, rstd


def norm_bwd(dy, dresidual_out, x, weight, bias, mean, rstd, seed, has_residual, need_dweight, need_dbias, eps,
             weight_offset, dropout_p, *, centred):  # fmt: skip
    """-> dx [..., N] in dy's dtype, dresidual [..., N] in x's dtype (empty where it is dx, or without a residual), dweight
    [N], dbias [N] in their own dtypes (empty where not needed). x is what was normalised, or with dropout and without a
    residual what it was dropped from; eps is in rstd."""
    N, kinds = x.shape[-1], [(x if t is None else t).dtype for t in (weight, bias)]
    two_out = has_residual and (seed is not None or x.dtype != dy.dtype)
    dx = torch.empty(x.shape, dtype=dy.dtype, device=x.device)
    dresidual = torch.empty(x.shape if two_out else 0, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return (
            dx,
            dresidual,
            *(
                torch.zeros(N if need else 0, dtype=kind, device=x.device)
                for need, kind in zip((need_dweight, need_dbias), kinds)
            ),
        )
    M = x.numel() // N
    # Wider rows would spill: the sums of dweight (and dbias) alone are N fp32 numbers in the registers of one program.
    heavy, in32 = centred or seed is not None, max(x.element_size(), dy.element_size()) > 2
    widest = 4096 if heavy and two_out and in32 else 8192 if heavy or in32 else 16384
    launch = _wide_backward if widest < N else _row_backward
    (dy, *dy_rows), (x, *x_rows) = at_two_strides(dy), at_two_strides(x)
    ds, *ds_rows = (x, *x_rows) if dresidual_out is None else at_two_strides(dresidual_out)
    features = {
        "CENTRED": centred, "HAS_WEIGHT": weight is not None, "HAS_DSUM": dresidual_out is not None,
        "HAS_RESIDUAL": has_residual, "TWO_OUT": two_out, "DROPOUT": seed is not None, "NEED_DWEIGHT": need_dweight,
        "NEED_DBIAS": need_dbias,
    }  # fmt: skip
    partials = launch(
        dy, ds, x, x if weight is None else weight.contiguous(), mean if centred else rstd, rstd,
        x if seed is None else seed, dx, dresidual if two_out else dx, (*dy_rows, *ds_rows, *x_rows), M, N,
        (weight_offset, *_dropout(dropout_p)), features,
    )  # fmt: skip
    return (
        dx,
        dresidual,
        *(
            partial.sum(0).to(kind) if need else torch.empty(0, dtype=kind, device=x.device)
            for partial, need, kind in zip(partials, (need_dweight, need_dbias), kinds)
        ),
    )


def _partials(parts, N, features, device):
    return [torch.empty((parts if features[need] else 0, N), dtype=torch.float32, device=device)
            for need in ("NEED_DWEIGHT", "NEED_DBIAS")]  # fmt: skip


def _row_backward(dy, ds, x, weight, mean, rstd, seed, dx, dresidual, strides, M, N, numbers, features):
    elements, per_thread = (4096, 16) if not features["DROPOUT"] else (2048, 8)
    block_m, block_n, warps = _tile(N, elements, 16, per_thread)
    programs = min(triton.cdiv(M, block_m), 2 * num_sms(x.device))
    widest = max(x.element_size(), dy.element_size())
    reload = N > 4096 or (N * widest > 8192 and not features["DROPOUT"])
    partials = _partials(programs, N, features, x.device)
    _norm_bwd_kernel[(programs,)](
        dy, ds, x, weight, mean, rstd, seed, dx, dresidual, *partials, *strides, M, N, *numbers,
        **features, RELOAD=reload, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
    )  # fmt: skip
    return partials


def _wide_backward(dy, ds, x, weight, mean, rstd, seed, dx, dresidual, strides, M, N, numbers, features):
    along = torch.empty(M, dtype=torch.float32, device=x.device)
    centre = torch.empty(M if features["CENTRED"] else 0, dtype=torch.float32, device=x.device)
    _norm_wide_sums_kernel[(M,)](
        dy, x, weight, mean, rstd, seed, centre, along, *strides[:3], *strides[6:], N, *numbers,
        CENTRED=features["CENTRED"], HAS_WEIGHT=features["HAS_WEIGHT"],
        DROPOUT=features["DROPOUT"] and not features["HAS_RESIDUAL"], BLOCK_N=_WIDE // (x.element_size() // 2), num_warps=8,
    )  # fmt: skip
    block_m, block_n = 1 if features["DROPOUT"] or x.element_size() > 2 else 2, 1024
    blocks = triton.cdiv(N, block_n)
    parts = max(1, min(triton.cdiv(M, block_m), 2 * num_sms(x.device), triton.cdiv(8 * num_sms(x.device), blocks)))
    partials = _partials(parts, N, features, x.device)
    _norm_wide_bwd_kernel[(blocks, parts)](
        dy, ds, x, weight, mean, rstd, centre, along, seed, dx, dresidual, *partials, *strides, M, N, *numbers,
        **features, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return partials
