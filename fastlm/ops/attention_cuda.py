"""Attention by the CUDA library: forward on Hopper (csrc/attention.cu); Triton's backward takes the same log-sum-exp."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from fastlm.ops import _cuda
from fastlm.ops.attention_reference import FROM_START, Call

WIDTHS = (64, 128, 256)
LENGTHS = 2**29  # the kernel adds a query's number and the diagonal in 32 bits
SCALES = (2.0**-126, 2.0**127)  # between which scale and scale * log2(e) are normal fp32 numbers
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def reason_against(call: Call) -> str | None:
    """Why the kernel cannot serve this call, or None."""
    q, v = call.q, call.v
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"its products take bfloat16 and float16, got {str(q.dtype)[6:]}"
    if q.shape[3] not in WIDTHS or v.shape[3] != q.shape[3]:
        return f"its heads are 64, 128 or 256 wide, those of v like those of q, got {q.shape[3]} and {v.shape[3]}"
    if q.device.type == "cuda" and torch.cuda.get_device_properties(q.device).major != 9:
        return "it is written for Hopper (compute capability 9.0)"
    for name in ("key_lengths", "bias", "distances", "sinks"):
        if getattr(call, name) is not None:
            return f"it takes no {name.replace('distances', 'relative_bias')}"
    if call.extras:
        return "it takes no alibi_slopes, packed sequences, key_starts, prefix_lengths, document_ids, block_mask or dropout"
    if call.left >= 0 or call.softcap or call.dropout:
        return "it takes no window to the left, softcap or dropout"
    if not SCALES[0] <= call.scale <= SCALES[1]:
        return f"its softmax needs scale > 0, from 2^-126 to 2^127, got {call.scale}"
    if max(q.shape[1], v.shape[1]) >= LENGTHS:
        return f"its queries and keys are fewer than 2^29, got {q.shape[1]} and {v.shape[1]}"
    if not _HAS_TRITON and torch.is_grad_enabled() and any(t.requires_grad for t in call[:3]):
        return "its backward is Triton's, which is not installed; `pip install 'fastlm[triton]'`"
    return None


def forward(*args) -> tuple[Tensor, Tensor]:
    """Takes Call -> o [B, S, H, Dv] in q's dtype, lse [B, H, S] fp32, natural logarithm."""
    call = Call(*args)
    S, T = call.q.shape[1], call.k.shape[1]
    diagonal = T if call.right < 0 else call.right + (0 if call.align == FROM_START else T - S)
    return _cuda.function("attention_fwd")(call.q, call.k, call.v, diagonal, call.scale)


def backward(*args) -> tuple[Tensor, ...]:
    """Takes the arguments of the op's backward."""
    return importlib.import_module("fastlm.kernels.attention_bwd").attention_bwd(*args)
