"""SGD with momentum for a whole list of tensors in one launch: each program updates one block of one parameter."""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_tensor import Numbers, number, place, pointer
from .optimizer_state import (
    code_words,
    half_of,
    launch,
    read_state,
    read_weight,
    weight_words,
    write_state,
    write_weight,
)


@triton.jit
def _update(p_ptr, g_ptr, b_ptr, master_ptr, remainder_ptr, average_ptr, scale_ptr, mask, left, lr, first, scale,
            momentum, rest, weight_decay, average_rest, words, pairs, NESTEROV: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    col = tl.arange(0, BLOCK)
    p = read_weight(p_ptr, master_ptr, remainder_ptr, col, mask)
    g = tl.load(g_ptr + col, mask=mask).to(tl.float32) * scale
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)  # 0 times an infinite weight would be NaN
    if b_ptr is None:
        p -= lr * g
    else:
        b = momentum * read_state(b_ptr, scale_ptr, col, mask, left, BLOCK) + rest * g
        b = tl.where(first, g, b)
        if NESTEROV:
            p -= lr * (g + momentum * b)
        else:
            p -= lr * b
        write_state(b_ptr, scale_ptr, b, col, mask, left, half_of(pairs, False), BLOCK)
    write_weight(p_ptr, master_ptr, remainder_ptr, average_ptr, col, mask, p, average_rest, words)


@triton.jit
def _sgd_kernel(
    table, numbers, momentum, rest, weight_decay,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, B_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr,
    REMAINDER_TYPE: tl.constexpr, AVERAGE_TYPE: tl.constexpr, SCALE_TYPE: tl.constexpr, NESTEROV: tl.constexpr,
    RANDOM_WEIGHTS: tl.constexpr, RANDOM_CODES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    owner, start, size = place(table, numbers.found_ptr, BLOCK)
    p_ptr = pointer(table, 0, owner, start, P_TYPE, 7, ALIGNED)
    g_ptr = pointer(table, 1, owner, start, G_TYPE, 7, ALIGNED)
    b_ptr = pointer(table, 2, owner, start, B_TYPE, 7, ALIGNED)
    master_ptr = pointer(table, 3, owner, start, MASTER_TYPE, 7, ALIGNED)
    remainder_ptr = pointer(table, 4, owner, start, REMAINDER_TYPE, 7, ALIGNED)
    average_ptr = pointer(table, 5, owner, start, AVERAGE_TYPE, 7, ALIGNED)
    scale_ptr = pointer(table, 6, owner, start // 256, SCALE_TYPE, 7, ALIGNED)
    lr, step = number(numbers.lr_ptr, numbers.lr), number(numbers.step_ptr, numbers.step)
    scale, average_rest = number(numbers.scale_ptr, numbers.scale), numbers.average_rest
    words = weight_words(table, numbers.seed_ptr, owner, start, step, RANDOM_WEIGHTS, BLOCK)
    pairs = code_words(table, numbers.seed_ptr, owner, start, step, RANDOM_CODES, BLOCK)
    if start + BLOCK <= size:  # without a mask: 16-byte accesses
        _update(p_ptr, g_ptr, b_ptr, master_ptr, remainder_ptr, average_ptr, scale_ptr, None, 0, lr, step == 1, scale,
                momentum, rest, weight_decay, average_rest, words, pairs, NESTEROV, BLOCK)  # fmt: skip
    else:
        _update(p_ptr, g_ptr, b_ptr, master_ptr, remainder_ptr, average_ptr, scale_ptr,
                start + tl.arange(0, BLOCK) < size, size - start, lr, step == 1, scale,
                momentum, rest, weight_decay, average_rest, words, pairs, NESTEROV, BLOCK)  # fmt: skip


def sgd_step(params, grads, momentum_buffers, masters, remainders, averages, momentum_buffer_scales,
             lr_tensor, step_tensor, grad_scale_tensor, found_inf, seed, streams, lr, step, grad_scale, average_decay,
             momentum, dampening, weight_decay, nesterov):  # fmt: skip
    """Updates all lists but grads in place. Each has one dtype or is empty, and tensors of equal place are contiguous. lr, step
    and grad_scale come from their tensors where these are given."""
    lists = (params, grads, momentum_buffers, masters, remainders, averages, momentum_buffer_scales)
    numbers = Numbers(
        lr_tensor, step_tensor, grad_scale_tensor, found_inf, seed, lr, step, grad_scale, 1 - average_decay
    )
    launch(_sgd_kernel, lists, streams, numbers, momentum, 1 - dampening, weight_decay, states=1, NESTEROV=nesterov)
