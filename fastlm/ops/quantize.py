"""Weights as codes of 8 or 4 bits with a scale per output row or per group of columns: quantising, packing, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

GROUPS = (32, 64, 128)
# Codes of symmetric weights, and of those with a zero point. -128 and, in four bits, 0 (which stands for -8) are left out of the
# symmetric ones: so the negative of every weight has a code as well.
_RANGES = {(8, True): (-127, 127), (8, False): (-128, 127), (4, True): (1, 15), (4, False): (0, 15)}
_MIDDLE = 8  # what 4-bit codes are counted from where there is no zero point


class QuantizedWeight(NamedTuple):
    """A matrix [N, K] as `quantize_weight` stores it: weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g]) with
    g = k // group_size.

    Attributes:
        codes: int8 [N, K] for 8 bits; for 4 bits uint8 [N, ceil(K / group_size) * group_size / 2], see `pack_int4`.
        scale: fp32 or bf16 [N, ceil(K / group_size)], or [N] without groups.
        zero: like scale, in int8 (8 bits) or uint8 (4 bits); None for symmetric weights, where it is 0 (8 bits) or 8 (4 bits).
        bits: 8 or 4.
        group_size: columns that share a scale; None for whole rows. The last group may be short.
        columns: K.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int | None
    columns: int


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """The nearest codes of a matrix, rows or groups of columns each scaled to their own largest value.

    Args:
        weight: [N, K], any float dtype, any strides.
        bits: 8 or 4.
        group_size: 32, 64 or 128 columns to a scale; None (8 bits only) for one scale a row. K need not be a multiple: the
            last group is short then.
        symmetric: False stores a zero point beside each scale, for values that lie to one side of 0. 0 itself is always exact.
        scale_dtype: torch.float32, or torch.bfloat16, which halves what the scales of small groups cost.

    Returns:
        A QuantizedWeight. With fp32 scales no weight is off by more than half its scale (a whole one where a zero point had to
        be rounded); a weight that was quantised before, by the same arguments and with symmetric=True, gets its own codes again.

    Raises:
        ValueError: a shape, number of bits or group_size that is not supported, an inf or NaN in fp32. TypeError: weight is not
        floating point.
    """
    _check_format(weight, bits, group_size, scale_dtype)
    N, K = weight.shape
    width = group_size or max(K, 1)
    values = weight.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("quantize_weight: weight holds inf or NaN (or values beyond fp32); quantise a finite one")
    count = -(-K // width) if group_size else 1
    if count * width > K:  # zeros change no group's largest value, as 0 is always in its range
        values = torch.nn.functional.pad(values, (0, count * width - K))
    values = values.reshape(N, count, width)
    low, high = _RANGES[bits, symmetric]
    tiny = torch.finfo(torch.float32).tiny  # an all-zero group; and below it the division would overflow
    if symmetric:
        zero = None
        scale = (values.abs().amax(-1, keepdim=True) / ((high - low) // 2)).clamp_(min=tiny).to(scale_dtype)
        scale = _finite(scale, values)
        middle = (high + low) // 2
    else:
        least, most = values.amin(-1, keepdim=True).clamp_(max=0), values.amax(-1, keepdim=True).clamp_(min=0)
        # Divided first: the difference of the two may be beyond fp32.
        scale = (most / (high - low) - least / (high - low)).clamp_(min=tiny).to(scale_dtype)
        scale = _finite(scale, values)
        middle = zero = (low - least / scale.float()).round_().clamp_(low, high)
    codes = (values / scale.float()).round_().add_(middle).clamp_(low, high)
    if zero is not None:  # a zero point that was rounded may put the largest numbers that there are a code too far out
        steps = codes - zero
        codes.sub_(steps.sign().mul_((steps * scale.float()).isinf()))
    whole = codes.view(N, count * width)
    kind = torch.int8 if bits == 8 else torch.uint8
    stored = whole[:, :K].to(kind).contiguous() if bits == 8 else pack_int4(whole.to(kind), group_size)
    shape = (N,) if group_size is None else (N, count)
    return QuantizedWeight(
        stored, scale.reshape(shape), None if zero is None else zero.to(kind).reshape(shape), bits, group_size, K
    )


def _finite(scale, values):
    """Scales a step smaller where one that was rounded up gives inf for the largest value: of groups near fp32's largest."""
    largest = values.abs().amax(-1, keepdim=True)
    beyond = ((largest / scale.float()).round_() * scale.float()).isinf()
    return torch.where(beyond, scale * (1 - torch.finfo(scale.dtype).eps), scale)


def zero_weight(
    N: int,
    K: int,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> QuantizedWeight:
    """What `quantize_weight` makes of zeros [N, K], without them: on any device, meta too. Arguments and errors as there."""
    _check_numbers(bits, group_size, scale_dtype)
    low, high = _RANGES[bits, symmetric]
    code = (low + high) // 2 if symmetric else low
    count = -(-K // group_size) if group_size else 1
    shape = (N,) if group_size is None else (N, count)
    kind = torch.int8 if bits == 8 else torch.uint8
    width, code_bytes = (K, code) if bits == 8 else (count * group_size // 2, code + 16 * code)
    codes = torch.full((N, width), code_bytes, dtype=kind, device=device)
    scale = torch.full(shape, torch.finfo(torch.float32).tiny, dtype=scale_dtype, device=device)
    zero = None if symmetric else torch.full(shape, low, dtype=kind, device=device)
    return QuantizedWeight(codes, scale, zero, bits, group_size, K)


def dequantize_weight(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    columns: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """scale * (code - zero) as [N, K] in `dtype`, rounded once from fp32 (fp64 for fp64).

    Args:
        codes, scale, zero, bits, group_size, columns: as in QuantizedWeight. columns: K; None for as many as there are codes.
        dtype: of the result.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if bits == 4:
        values = unpack_int4(codes, group_size).to(wide)
    else:
        values = codes.to(wide)
    K = values.shape[1] if columns is None else columns
    if group_size is None:
        scale, zero = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
        values = _scaled(values, scale, zero, bits, wide)
    else:
        count = scale.shape[1]
        if values.shape[1] < count * group_size:
            values = torch.nn.functional.pad(values, (0, count * group_size - values.shape[1]))
        grouped = values.view(values.shape[0], count, group_size)
        zero = None if zero is None else zero.unsqueeze(-1)
        values = _scaled(grouped, scale.unsqueeze(-1), zero, bits, wide).view(values.shape[0], count * group_size)
    return values[:, :K].to(dtype)


def _scaled(values, scale, zero, bits, wide):
    """scale * (values - zero) in the memory of `values`, a fresh tensor."""
    if zero is not None:
        values.sub_(zero.to(wide))
    elif bits == 4:
        values.sub_(_MIDDLE)
    return values.mul_(scale.to(wide))


def pack_int4(codes: Tensor, group_size: int) -> Tensor:
    """Two 4-bit codes to a byte. Within a group of G columns byte j holds column j in its low half and column j + G / 2 in its
    high half: a kernel that unpacks a group's G / 2 bytes has two runs of neighbouring columns, nothing to interleave.

    Args:
        codes: uint8 [N, K] of 0..15, K a multiple of group_size (`quantize_weight` fills up the last group).
        group_size: G, even.

    Returns:
        uint8 [N, K / 2].

    Raises:
        ValueError: codes is not a matrix, group_size not an even number above 0, or K not a multiple of it. TypeError: codes are
        not uint8. Codes beyond 15 are not looked for.
    """
    _check_packing("pack_int4", codes, group_size)
    N, K = codes.shape
    if K % group_size:
        raise ValueError(f"pack_int4: K = {K} must be a multiple of group_size {group_size}; fill up the last group")
    low, high = codes.reshape(N, K // group_size, 2, group_size // 2).unbind(2)
    return (low | (high << 4)).reshape(N, K // 2)


def unpack_int4(packed: Tensor, group_size: int) -> Tensor:
    """The codes uint8 [N, K] of bytes [N, K / 2]: the inverse of `pack_int4`."""
    _check_packing("unpack_int4", packed, group_size)
    N, half = packed.shape
    if half * 2 % group_size:
        raise ValueError(
            f"unpack_int4: {half} bytes a row are not whole groups of {group_size} codes; check group_size"
        )
    grouped = packed.reshape(N, half * 2 // group_size, 1, group_size // 2)
    return torch.cat((grouped & 15, grouped >> 4), 2).reshape(N, half * 2)


def _check_packing(name: str, codes: Tensor, group_size: int) -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(f"{name}: codes must be torch.uint8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"{name}: codes must be a matrix, got {list(codes.shape)}")
    if not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise ValueError(f"{name}: group_size must be an even number above 0, got {group_size!r}")


def _check_format(weight: Tensor, bits: int, group_size: int | None, scale_dtype: torch.dtype) -> None:
    if weight.ndim != 2:
        raise ValueError(f"quantize_weight: weight must be [N, K], got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"quantize_weight: weight must be floating point, got {weight.dtype}")
    _check_numbers(bits, group_size, scale_dtype)


def _check_numbers(bits: int, group_size: int | None, scale_dtype: torch.dtype) -> None:
    if bits not in (4, 8):
        raise ValueError(f"quantize_weight: bits must be 8 or 4, got {bits!r}")
    if group_size not in GROUPS and not (group_size is None and bits == 8):
        allowed = "32, 64 or 128" + (", or None for whole rows" if bits == 8 else " for 4 bits")
        raise ValueError(f"quantize_weight: group_size must be {allowed}, got {group_size!r}")
    if scale_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"quantize_weight: scale_dtype must be torch.float32 or torch.bfloat16, got {scale_dtype}")
