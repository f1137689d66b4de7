"""Lion for a whole list of tensors in one launch: each program updates one block of one parameter (see multi_tensor.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .moment_bound import in_two
from .multi_tensor import Numbers, number, place, pointer
from .optimizer_state import (
    code_words,
    half_of,
    launch,
    mean,
    read_state,
    read_weight,
    weight_words,
    write_state,
    write_weight,
)


@triton.jit
def _update(p_ptr, g_ptr, m_ptr, master_ptr, remainder_ptr, average_ptr, scale_ptr, mask, left,
            lr, decay, scale, high1, low1, high2, low2, rest1, rest2, average_rest, words, pairs,
            BLOCK: tl.constexpr):  # fmt: skip
    col = tl.arange(0, BLOCK)
    p = read_weight(p_ptr, master_ptr, remainder_ptr, col, mask)
    g = tl.load(g_ptr + col, mask=mask).to(tl.float32) * scale
    m = read_state(m_ptr, scale_ptr, col, mask, left, BLOCK)
    c = mean(m, high1, low1, rest1, g)
    c = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))  # NaN stays
    p -= decay * p
    p -= lr * c
    m = mean(m, high2, low2, rest2, g)
    write_weight(p_ptr, master_ptr, remainder_ptr, average_ptr, col, mask, p, average_rest, words)
    write_state(m_ptr, scale_ptr, m, col, mask, left, half_of(pairs, False), BLOCK)


@triton.jit
def _lion_kernel(
    table, numbers, high1, low1, high2, low2, rest1, rest2, weight_decay,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr,
    REMAINDER_TYPE: tl.constexpr, AVERAGE_TYPE: tl.constexpr, SCALE_TYPE: tl.constexpr,
    RANDOM_WEIGHTS: tl.constexpr, RANDOM_CODES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    owner, start, size = place(table, numbers.found_ptr, BLOCK)
    p_ptr = pointer(table, 0, owner, start, P_TYPE, 7, ALIGNED)
    g_ptr = pointer(table, 1, owner, start, G_TYPE, 7, ALIGNED)
    m_ptr = pointer(table, 2, owner, start, M_TYPE, 7, ALIGNED)
    master_ptr = pointer(table, 3, owner, start, MASTER_TYPE, 7, ALIGNED)
    remainder_ptr = pointer(table, 4, owner, start, REMAINDER_TYPE, 7, ALIGNED)
    average_ptr = pointer(table, 5, owner, start, AVERAGE_TYPE, 7, ALIGNED)
    scale_ptr = pointer(table, 6, owner, start // 256, SCALE_TYPE, 7, ALIGNED)
    lr, step = number(numbers.lr_ptr, numbers.lr), number(numbers.step_ptr, numbers.step)
    scale, average_rest = number(numbers.scale_ptr, numbers.scale), numbers.average_rest
    words = weight_words(table, numbers.seed_ptr, owner, start, step, RANDOM_WEIGHTS, BLOCK)
    pairs = code_words(table, numbers.seed_ptr, owner, start, step, RANDOM_CODES, BLOCK)
    decay = lr * weight_decay
    if start + BLOCK <= size:  # without a mask: 16-byte accesses
        _update(p_ptr, g_ptr, m_ptr, master_ptr, remainder_ptr, average_ptr, scale_ptr, None, 0,
                lr, decay, scale, high1, low1, high2, low2, rest1, rest2, average_rest, words, pairs, BLOCK)  # fmt: skip
    else:
        _update(p_ptr, g_ptr, m_ptr, master_ptr, remainder_ptr, average_ptr, scale_ptr,
                start + tl.arange(0, BLOCK) < size, size - start,
                lr, decay, scale, high1, low1, high2, low2, rest1, rest2, average_rest, words, pairs, BLOCK)  # fmt: skip


def lion_step(params, grads, exp_avgs, masters, remainders, averages, exp_avg_scales,
              lr_tensor, step_tensor, grad_scale_tensor, found_inf, seed, streams, lr, step, grad_scale, average_decay,
              beta1, beta2, weight_decay):  # fmt: skip
    """Updates all lists but grads in place. Each has one dtype or is empty, and tensors of equal place are contiguous. lr, step
    and grad_scale come from their tensors where these are given."""
    lists = (params, grads, exp_avgs, masters, remainders, averages, exp_avg_scales)
    numbers = Numbers(
        lr_tensor, step_tensor, grad_scale_tensor, found_inf, seed, lr, step, grad_scale, 1 - average_decay
    )
    betas = (*in_two(beta1), *in_two(beta2), 1 - beta1, 1 - beta2)
    launch(_lion_kernel, lists, streams, numbers, *betas, weight_decay, states=1)
