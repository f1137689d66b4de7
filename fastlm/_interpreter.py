"""A test-only repair of Triton's interpreter, which stores bf16 as uint16 and does integer arithmetic on it."""

from __future__ import annotations

import numpy as np


def repair_interpreter() -> None:
    """Makes bf16 `tl.dot`, arithmetic, constants and rounding right in the interpreter of triton 3.6. Does nothing without
    triton.

    Seen in 3.6.0: `tl.dot` of bf16 operands and bf16 + bf16 are computed on the raw 16-bit patterns, silently wrong;
    fp32 to bf16 cuts the lower bits off, where a GPU rounds to nearest.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "_fastlm_repaired", False):
        return

    def to_float(h):
        if h.dtype.scalar != tl.bfloat16:
            return h.data
        return (h.data.astype(np.uint32) << 16).view(np.float32)

    def to_bf16(x):
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # nearest, ties to even
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)

    plain_dot, plain_binary, plain_cast = builder.create_dot, builder.binary_op, builder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            return handle(np.matmul(to_float(a), to_float(b)) + d.data, d.dtype.scalar)
        return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar == tl.bfloat16:
            out = op(to_float(lhs), to_float(rhs))
            return handle(out, tl.int1) if out.dtype == bool else handle(to_bf16(out), tl.bfloat16)
        return plain_binary(self, lhs, rhs, op)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return handle(to_bf16(src.data), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    builder.binary_op = binary_op
    builder.get_bf16 = lambda self, value: handle(to_bf16(np.array([value], np.float32)), tl.bfloat16)
    builder._fastlm_repaired = True
