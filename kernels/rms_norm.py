"""RMSNorm with an optional dropout and residual add before it: norm_rows.py's kernels without the mean."""

from __future__ import annotations

from .norm_launch import norm_bwd, norm_fwd


def rms_norm_fwd(x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p):
    """-> y [..., N] in x's dtype, residual_out [..., N] in residual's dtype (empty without one), an empty tensor in the
    place of the mean, rstd [...] fp32."""
    return norm_fwd(x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p, centred=False)


def rms_norm_bwd(dy, dresidual_out, x, weight, bias, mean, rstd, seed, has_residual, need_dweight, need_dbias, eps,
                 weight_offset, dropout_p):  # fmt: skip
    """-> dx, dresidual, dweight, dbias; see norm_bwd."""
    return norm_bwd(dy, dresidual_out, x, weight, bias, mean, rstd, seed, has_residual, need_dweight, need_dbias, eps,
                    weight_offset, dropout_p, centred=False)  # fmt: skip
