"""torch's own fast functions that have no public name yet: one thin wrapper each, so that a change in torch is met here."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

# What F.cross_entropy calls, (input, target, weight, reduction, ignore_index, label_smoothing); the wrapper costs a small call
# a fifth of its time.
cross_entropy_loss = torch._C._nn.cross_entropy_loss
MEAN = 1  # its reduction


def fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, step: Tensor, **options: Any) -> None:
    """torch's fused AdamW step over lists of equal dtype and memory order, one 0-d `step` (from 1) for all. In place."""
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], [step] * len(params), amsgrad=False, maximize=False, **options
    )


def fused_sgd_(params, grads, momentum_buffers, **options: Any) -> None:
    """torch's fused SGD step over lists of equal dtype and memory order; no buffers ([]) without momentum. In place."""
    torch._fused_sgd_(params, grads, momentum_buffers, maximize=False, **options)


def int8_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] times b [K, N], both int8, as int32 [M, N]; into `out` where it is given."""
    return torch._int_mm(a, b) if out is None else torch._int_mm(a, b, out=out)


def int8_weight_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x [M, K] times int8 codes [N, K] transposed, columns times scale [N]; all but codes of one 16-bit dtype. CPU."""
    return torch._weight_int8pack_mm(x, codes, scale)


def pack_int4_for_cpu(codes: Tensor) -> Tensor:
    """Codes 0..15, int32 [N, K], N a multiple of 16, in the order of the CPU's int4 product."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def int4_weight_product(x: Tensor, packed: Tensor, group_size: int, scales_and_offsets: Tensor) -> Tensor:
    """x [M, K] times W transposed, W = scale * (code - 8) + offset; bf16 [K / group_size, N, 2] holds both. CPU."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_offsets)


@cache
def int8_products_are_exact() -> bool:
    """Whether the CPU's int8 products are oneDNN's and hold the largest sums: without VNNI instructions they may saturate."""
    if not torch.backends.mkldnn.is_available():
        return False
    for rows in (1, 3):
        a, b = torch.full((rows, 64), 127, dtype=torch.int8), torch.full((64, 48), -127, dtype=torch.int8)
        if not bool((int8_product(a, b) == -127 * 127 * 64).all()):
            return False
    return True


def scaled_product(
    a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """a [M, K] times b [N, K] transposed, both fp8, times scales [M, 1] and [1, N] (or one element each), plus bias, in dtype."""
    return torch._scaled_mm(a, b.t(), *scales, bias, out_dtype=dtype)


def softmax_gradient(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient by s of y = softmax(s, -1), both of one dtype; rows are summed in fp32."""
    return torch._softmax_backward_data(dy, y, -1, y.dtype)
