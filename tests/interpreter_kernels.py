"""Run by test_interpreter.py with "plain" or "repaired": prints as JSON what bf16 kernels get wrong in the interpreter."""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

if sys.argv[1] == "repaired":
    from fastlm._interpreter import repair_interpreter

    repair_interpreter()
    repair_interpreter()  # a second call changes nothing


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, acc_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(acc_ptr + at))
    tl.store(c_ptr + at, c)


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + n + i, a * b)
    tl.store(out_ptr + 2 * n + i, a - b)
    tl.store(out_ptr + 3 * n + i, tl.where(a > b, a, b))
    tl.store(out_ptr + 4 * n + i, -a)
    tl.store(out_ptr + 5 * n + i, a / b)
    tl.store(out_ptr + 6 * n + i, a.to(tl.float32).to(tl.bfloat16))
    tl.store(out_ptr + 7 * n + i, (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16))
    tl.store(out_ptr + 8 * n + i, tl.maximum(a, -a))
    tl.store(out_ptr + 9 * n + i, tl.abs(a))


@triton.jit
def _constant_kernel(a_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(a_ptr + i) * 1.5)
    tl.store(out_ptr + n + i, tl.full((BLOCK,), -0.3, tl.bfloat16))


def wrong(got, want):
    """Elements that differ bitwise, but for NaNs of another pattern."""
    return int(((got.view(torch.int16) != want.view(torch.int16)) & ~(got.isnan() & want.isnan())).sum())


torch.manual_seed(0)
found = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    a, b = torch.randn(2, 16, 16).to(dtype)
    acc, c = torch.randn(16, 16), torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, acc, BLOCK=16)
    found[f"dot {dtype}"] = (c - (a.float() @ b.float() + acc)).abs().max().item()
a, b = torch.randn(2, 64).bfloat16()
b[0], a[1], a[2] = float("nan"), float("inf"), 3.3e38
out = torch.empty(10, 64, dtype=torch.bfloat16)
_arithmetic_kernel[(1,)](a, b, out, 64, BLOCK=64)
want = [a + b, a * b, a - b, torch.where(a > b, a, b), -a, a / b, a, a * b, torch.maximum(a, -a), a.abs()]
names = ["add", "multiply", "subtract", "compare", "negate", "divide", "round trip", "cast", "maximum", "abs"]
found |= {name: wrong(got, expected) for name, got, expected in zip(names, out, want)}
if sys.argv[1] == "repaired":  # without the repair these stop with an AttributeError
    _constant_kernel[(1,)](a, out, 64, BLOCK=64)
    found |= {"scale": wrong(out[0], a * 1.5), "constant": wrong(out[1], torch.full_like(a, -0.3))}
print(json.dumps(found))
