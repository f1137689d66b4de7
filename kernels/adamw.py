"""AdamW for a whole list of tensors in one launch: each program updates one block of one parameter (see multi_tensor.py)."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .moment_bound import in_two, least_root
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
def _one_minus_power(log_beta, step):
    """1 - beta^step. The series where the difference would cancel: at step 1 fp32 keeps 4 digits of 1 - 0.999."""
    x = log_beta * step
    series = 1.0 + x / 9
    series = 1.0 + x / 8 * series
    series = 1.0 + x / 7 * series
    series = 1.0 + x / 6 * series
    series = 1.0 + x / 5 * series
    series = 1.0 + x / 4 * series
    series = 1.0 + x / 3 * series
    series = 1.0 + x / 2 * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp2(x * 1.4426950408889634))


@triton.jit
def _update(p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, remainder_ptr, average_ptr, m_scale_ptr, v_scale_ptr, mask, left,
            decay, rate, root, scale, high1, low1, high2, low2, rest1, rest2, least, eps, average_rest, words, pairs,
            BLOCK: tl.constexpr):  # fmt: skip
    col = tl.arange(0, BLOCK)
    p = read_weight(p_ptr, master_ptr, remainder_ptr, col, mask)
    g = tl.load(g_ptr + col, mask=mask).to(tl.float32) * scale
    m = read_state(m_ptr, m_scale_ptr, col, mask, left, BLOCK)
    v = read_state(v_ptr, v_scale_ptr, col, mask, left, BLOCK)
    if m_scale_ptr is not None or v_scale_ptr is not None:
        # Codes are rounded one by one: where v came out too small for its m, the step would be many times lr.
        bound = (m * least) * (m * least)
        v = tl.where(bound > v, bound, v)  # NaN in v stays
    m = mean(m, high1, low1, rest1, g)
    v = mean(v, high2, low2, rest2 * g, g)
    p -= decay * p
    p -= rate * m / (tl.sqrt(v) * root + eps)
    write_weight(p_ptr, master_ptr, remainder_ptr, average_ptr, col, mask, p, average_rest, words)
    write_state(m_ptr, m_scale_ptr, m, col, mask, left, half_of(pairs, False), BLOCK)
    write_state(v_ptr, v_scale_ptr, v, col, mask, left, half_of(pairs, True), BLOCK)


@triton.jit
def _adamw_kernel(
    table, numbers, log_beta1, log_beta2, high1, low1, high2, low2, rest1, rest2, least, eps, weight_decay,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr,
    REMAINDER_TYPE: tl.constexpr, AVERAGE_TYPE: tl.constexpr, M_SCALE_TYPE: tl.constexpr, V_SCALE_TYPE: tl.constexpr,
    RANDOM_WEIGHTS: tl.constexpr, RANDOM_CODES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    owner, start, size = place(table, numbers.found_ptr, BLOCK)
    p_ptr = pointer(table, 0, owner, start, P_TYPE, 9, ALIGNED)
    g_ptr = pointer(table, 1, owner, start, G_TYPE, 9, ALIGNED)
    m_ptr = pointer(table, 2, owner, start, M_TYPE, 9, ALIGNED)
    v_ptr = pointer(table, 3, owner, start, V_TYPE, 9, ALIGNED)
    master_ptr = pointer(table, 4, owner, start, MASTER_TYPE, 9, ALIGNED)
    remainder_ptr = pointer(table, 5, owner, start, REMAINDER_TYPE, 9, ALIGNED)
    average_ptr = pointer(table, 6, owner, start, AVERAGE_TYPE, 9, ALIGNED)
    m_scale_ptr = pointer(table, 7, owner, start // 256, M_SCALE_TYPE, 9, ALIGNED)
    v_scale_ptr = pointer(table, 8, owner, start // 256, V_SCALE_TYPE, 9, ALIGNED)
    lr, step = number(numbers.lr_ptr, numbers.lr), number(numbers.step_ptr, numbers.step)
    scale, average_rest = number(numbers.scale_ptr, numbers.scale), numbers.average_rest
    words = weight_words(table, numbers.seed_ptr, owner, start, step, RANDOM_WEIGHTS, BLOCK)
    pairs = code_words(table, numbers.seed_ptr, owner, start, step, RANDOM_CODES, BLOCK)
    rate = lr / _one_minus_power(log_beta1, step)
    root = 1.0 / tl.sqrt(_one_minus_power(log_beta2, step))
    decay = lr * weight_decay
    if start + BLOCK <= size:  # without a mask: 16-byte accesses
        _update(p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, remainder_ptr, average_ptr, m_scale_ptr, v_scale_ptr, None, 0,
                decay, rate, root, scale, high1, low1, high2, low2, rest1, rest2, least, eps, average_rest, words, pairs,
                BLOCK)  # fmt: skip
    else:
        _update(p_ptr, g_ptr, m_ptr, v_ptr, master_ptr, remainder_ptr, average_ptr, m_scale_ptr, v_scale_ptr,
                start + tl.arange(0, BLOCK) < size, size - start,
                decay, rate, root, scale, high1, low1, high2, low2, rest1, rest2, least, eps, average_rest, words, pairs,
                BLOCK)  # fmt: skip


def adamw_step(params, grads, exp_avgs, exp_avg_sqs, masters, remainders, averages, exp_avg_scales, exp_avg_sq_scales,
               lr_tensor, step_tensor, grad_scale_tensor, found_inf, seed, streams, lr, step, grad_scale, average_decay,
               beta1, beta2, eps, weight_decay):  # fmt: skip
    """Updates all lists but grads in place. Each has one dtype or is empty, and tensors of equal place are contiguous. lr, step
    and grad_scale come from their tensors where these are given."""
    lists = (
        params, grads, exp_avgs, exp_avg_sqs, masters, remainders, averages, exp_avg_scales, exp_avg_sq_scales
    )  # fmt: skip
    numbers = Numbers(
        lr_tensor, step_tensor, grad_scale_tensor, found_inf, seed, lr, step, grad_scale, 1 - average_decay
    )
    logs = [math.log(beta) if beta > 0 else -1e6 for beta in (beta1, beta2)]
    rest = (1 - beta1, 1 - beta2, least_root(beta1, beta2), eps, weight_decay)
    launch(_adamw_kernel, lists, streams, numbers, *logs, *in_two(beta1), *in_two(beta2), *rest, states=2)
