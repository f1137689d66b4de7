"""AdamW for a whole list of tensors in one launch.

The tensors are cut into blocks. A table on the device holds every tensor's address and size, another names the tensor and
the block of each program; both are built on the host and kept, since the same lists come back at every step.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_captured: list = []  # tables a CUDA graph reads at every replay


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
def _update(p_ptr, g_ptr, m_ptr, v_ptr, mask, decay, rate, root, scale, rest1, rest2, eps):
    p = tl.load(p_ptr, mask=mask).to(tl.float32)
    g = tl.load(g_ptr, mask=mask).to(tl.float32) * scale
    m = tl.load(m_ptr, mask=mask).to(tl.float32)
    v = tl.load(v_ptr, mask=mask).to(tl.float32)
    # x + (1 - beta)(y - x): beta itself, rounded to fp32, would shift the mean that v settles at by 1e-5.
    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    p -= decay * p
    p -= rate * m / (tl.sqrt(v) * root + eps)
    tl.store(p_ptr, p.to(p_ptr.dtype.element_ty), mask=mask)
    tl.store(m_ptr, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    address_ptr, size_ptr, owner_ptr, block_ptr, tensors,
    lr, step, scale, log_beta1, log_beta2, rest1, rest2, eps, weight_decay,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
    LOAD_LR: tl.constexpr, LOAD_STEP: tl.constexpr, LOAD_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    owner = tl.load(owner_ptr + tl.program_id(0))
    start = tl.load(block_ptr + tl.program_id(0)).to(tl.int64) * BLOCK
    size = tl.load(size_ptr + owner)
    p_ptr = tl.load(address_ptr + owner).to(tl.pointer_type(P_TYPE)) + start
    g_ptr = tl.load(address_ptr + tensors + owner).to(tl.pointer_type(G_TYPE)) + start
    m_ptr = tl.load(address_ptr + 2 * tensors + owner).to(tl.pointer_type(M_TYPE)) + start
    v_ptr = tl.load(address_ptr + 3 * tensors + owner).to(tl.pointer_type(V_TYPE)) + start
    if ALIGNED:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
    if LOAD_LR:
        lr = tl.load(lr).to(tl.float32)
    if LOAD_STEP:
        step = tl.load(step).to(tl.float32)
    if LOAD_SCALE:
        scale = tl.load(scale).to(tl.float32)
    rate = lr / _one_minus_power(log_beta1, step)
    root = 1.0 / tl.sqrt(_one_minus_power(log_beta2, step))
    decay = lr * weight_decay
    col = tl.arange(0, BLOCK)
    if start + BLOCK <= size:  # without a mask: 16-byte accesses
        _update(p_ptr + col, g_ptr + col, m_ptr + col, v_ptr + col, None,
                decay, rate, root, scale, rest1, rest2, eps)  # fmt: skip
    else:
        _update(p_ptr + col, g_ptr + col, m_ptr + col, v_ptr + col, start + col < size,
                decay, rate, root, scale, rest1, rest2, eps)  # fmt: skip


def _to_device(host, device):
    # From pinned memory the copy does not wait for the device.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@functools.lru_cache(maxsize=32)
def _addresses(pointers: tuple[int, ...], device: torch.device):
    return _to_device(torch.tensor(pointers, dtype=torch.int64), device)


@functools.lru_cache(maxsize=32)
def _blocks(sizes: tuple[int, ...], device: torch.device):
    """-> size of each tensor (int64), and for each program its tensor and its block within that tensor (int32)."""
    size = torch.tensor(sizes, dtype=torch.int64)
    count = (size + _BLOCK - 1) // _BLOCK
    owner = torch.repeat_interleave(torch.arange(len(sizes)), count)
    block = torch.arange(owner.numel()) - (count.cumsum(0) - count)[owner]
    return tuple(_to_device(t, device) for t in (size, owner.int(), block.int()))


def _tables(pointers, sizes, device):
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # The copies become nodes of the graph: their results hold nothing before a replay and must not be found later.
        tables = (_addresses.__wrapped__(pointers, device), *_blocks.__wrapped__(sizes, device))
        _captured.append(tables)
        return tables
    return (_addresses(pointers, device), *_blocks(sizes, device))


def adamw_step(params, grads, exp_avgs, exp_avg_sqs, lr_tensor, step_tensor, grad_scale_tensor, lr, step, grad_scale,
               beta1, beta2, eps, weight_decay):  # fmt: skip
    """Updates params, exp_avgs and exp_avg_sqs in place. Each list has one dtype, and tensors of equal place are
    contiguous. lr, step and grad_scale come from their tensors where these are given."""
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    device = params[0].device
    pointers = tuple(t.data_ptr() for tensors in lists for t in tensors)
    address, size, owner, block = _tables(pointers, tuple(t.numel() for t in params), device)
    if owner.numel() == 0:
        return
    loaded = [t is not None for t in (lr_tensor, step_tensor, grad_scale_tensor)]
    numbers = [
        n if t is None else t for t, n in ((lr_tensor, lr), (step_tensor, step), (grad_scale_tensor, grad_scale))
    ]
    _adamw_kernel[(owner.numel(),)](
        address, size, owner, block, len(params),
        *numbers, *(math.log(beta) if beta > 0 else -1e6 for beta in (beta1, beta2)), 1 - beta1, 1 - beta2, eps, weight_decay,
        *(_TL[tensors[0].dtype] for tensors in lists),
        LOAD_LR=loaded[0], LOAD_STEP=loaded[1], LOAD_SCALE=loaded[2],
        ALIGNED=all(p % 16 == 0 for p in pointers), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
