"""fp8_linear, its operands rounded at every call, against a bf16 linear and torch's own scaled product."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops

CODES = torch.float8_e4m3fn


def make(dtype, device, N, D, F):
    x, weight = torch.randn(N, D, device=device), torch.randn(F, D, device=device)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def op(x, weight, backend):
    return ops.fp8_linear(x, weight, backend=backend)


class _ByHand(torch.autograd.Function):
    """As a user writes it: scales of rows, torch's scaled product, 16-bit products backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        parts = []
        for t in (x, weight):
            scale = t.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
            parts.append(((t.float() / scale).clamp(-448, 448).to(CODES), scale))
        (a, scale_a), (b, scale_b) = parts
        out = x.dtype if x.device.type == "cpu" else torch.bfloat16
        return torch._scaled_mm(a, b.t(), scale_a, scale_b.t().contiguous(), out_dtype=out).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.t() @ x


def flops(mode, x, weight):
    return (2 if mode == "forward" else 4) * x.shape[0] * weight.numel()


BENCH = Bench(
    op="fp8_linear",
    make=make,
    reference=lambda *args: op(*args, backend="reference"),
    providers=[
        *ours("fp8_linear", op),
        plain(_ByHand.apply, "torch._scaled_mm"),
        compiled(_ByHand.apply, "torch._scaled_mm, compiled"),
        Provider("bf16 linear (another result)", lambda: F.linear),
    ],
    sizes={
        "tiny": [{"N": 4, "D": 32, "F": 16}],
        "cpu": [{"N": 256, "D": 384, "F": 1536}, {"N": 1, "D": 384, "F": 1536}],
        "quick": [
            {"N": 8192, "D": 4096, "F": 4096},
            {"N": 8192, "D": 4096, "F": 14336},
            {"N": 8192, "D": 14336, "F": 4096},
            {"N": 64, "D": 4096, "F": 4096},
        ],
    },
    flops=flops,
    peak="float8_e4m3fn",  # the backward's products have 16 bits
    plain="torch._scaled_mm",
)

_FP8 = (90, 100)  # an A100 has no fp8 products
_X, _W = meta(8192, 4096), meta(14336, 4096)
AOT = [
    Aot("fp8_product:fp8_linear_fwd", _X, _W, None, None, None, True, archs=_FP8),
    Aot("fp8_product:fp8_linear_fwd", _X, _W, meta(14336), None, None, False, archs=_FP8),
    Aot("fp8_product:fp8_linear_fwd", meta(16, 4096), meta(4096, 4096, dtype=CODES), None, meta(4096, dtype=torch.float32),
        None, True, archs=_FP8),
    Aot("fp8_product:fp8_linear_fwd", meta(512, 1000), meta(999, 1000, dtype=torch.float32), None, None, None, True, archs=_FP8),
]  # fmt: skip
