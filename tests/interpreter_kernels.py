"""Run by test_interpreter.py: prints as JSON what bf16 kernels get wrong in the interpreter as it is ("plain"), repaired, and
then made quick; after the repair also a digest of everything that kernels of many kinds make of random numbers.
"""

import hashlib
import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

from fastlm._interpreter import repair_interpreter
from tests.quick_interpreter import quicken_interpreter


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


@triton.jit
def _larger_of(a, a_at, b, b_at):
    take = (b > a) | ((b == a) & (b_at < a_at))
    return tl.where(take, b, a), tl.where(take, b_at, a_at)


@triton.jit
def _rows_of(x_ptr, rows, columns, N):
    """Nothing above N; a device function that calls one of triton's own."""
    x = tl.load(x_ptr + rows[:, None] * N + columns[None, :], mask=(columns < N)[None, :], other=-1.0)
    return tl.maximum(x.to(tl.float32), tl.zeros_like(x).to(tl.float32) - 0.5)


@triton.jit
def _mixed_kernel(x_ptr, y_ptr, at_ptr, count_ptr, M, N, scale, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Loops, device functions, reductions with and without a function of ours, products, integers of all widths, atomics."""
    rows, columns = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, BLOCK)
    total = tl.zeros((16, 16), tl.float32)
    for i in range(0, 3):
        x = _rows_of(x_ptr, (rows + i) % M, columns, N)
        total += tl.dot(x.to(DTYPE), tl.trans(x.to(DTYPE)), input_precision="ieee") * scale
    top, at = tl.reduce((total, tl.broadcast_to(tl.arange(0, 16)[None, :], (16, 16))), 1, _larger_of)
    mean = (
        tl.sum(total, 1) / 16
        + tl.cumsum(tl.exp2(-tl.abs(top)), 0)
        + tl.max(total, 1)
        - tl.sqrt(tl.min(tl.abs(total), 1))
    )
    tl.store(y_ptr + rows * 2, mean.to(DTYPE), mask=rows < M)
    tl.store(y_ptr + rows * 2 + 1, tl.where(rows % 2 == 0, top, -top).to(DTYPE), mask=rows < M)
    mixed = (at.to(tl.int64) * 2654435761 + (rows // 3 - 7) % 5) ^ (at << 3).to(tl.int64)
    tl.store(at_ptr + rows, mixed + tl.umulhi(at.to(tl.uint32), 4000000000), mask=rows < M)
    tl.atomic_add(count_ptr, tl.sum((top > 0).to(tl.int32), 0))
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(count_ptr + 1, M - N)


def digest():
    """Of all that _mixed_kernel makes of three dtypes, two launches each."""
    found = hashlib.sha256()
    for dtype, kind in ((torch.float32, tl.float32), (torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)):
        for M, N in ((21, 13), (40, 32)):
            x, y = torch.randn(M, N).to(dtype), torch.zeros(M, 2, dtype=dtype)
            at, count = torch.zeros(M, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
            _mixed_kernel[(triton.cdiv(M, 16),)](x, y, at, count, M, N, 0.3, BLOCK=32, DTYPE=kind)
            assert y.abs().sum() > 0 and count[0] > 0 and count[1] == M - N
            for tensor in (y.view(torch.uint8), at, count):
                found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def wrong(got, want):
    """Elements that differ bitwise, but for NaNs of another pattern."""
    return int(((got.view(torch.int16) != want.view(torch.int16)) & ~(got.isnan() & want.isnan())).sum())


def errors(repaired):
    """What each kernel gets wrong, by name."""
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
    if repaired:  # without the repair these stop with an AttributeError
        _constant_kernel[(1,)](a, out, 64, BLOCK=64)
        found |= {"scale": wrong(out[0], a * 1.5), "constant": wrong(out[1], torch.full_like(a, -0.3))}
        found["digest"] = digest()
    return found


untouched = dict(vars(tl)), tl.tensor.__add__, tl.math.exp2
found = {"plain": errors(False)}
for kind, change in (("repaired", repair_interpreter), ("quick", quicken_interpreter)):
    change()
    change()  # a second time changes nothing
    found[kind] = errors(True)
assert (dict(vars(tl)), tl.tensor.__add__, tl.math.exp2) == untouched, "a launch left something replaced"
print(json.dumps(found))
