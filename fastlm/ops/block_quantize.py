"""8-bit codes for optimizer states: one fp32 scale for each block of 256 elements, and companded codes."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale (Dettmers et al. 2022, arXiv:2110.02861, take 2048)


def block_quantize(x: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x -> (codes, scales): each block's largest magnitude, and 8-bit codes of what is left when it is divided out.

        signed, for first moments:    x = sign(c) (c / 127)^4 * scale,   c in -127..127, int8
        unsigned, for second moments: x = (c / 255)^8 * scale,           c in    0..255, uint8

    A power's steps shrink towards 0, as the values do: for x = r * scale half a step is 1.6% r^(-1/4) of m = x, and 0.8%
    r^(-1/4) of r = sqrt(x / scale), the root that divides it. x > 0 never gets the unsigned code 0. A block with inf or NaN
    comes back as NaN throughout.

    Args:
        x: any shape, fp32 (fp64 for references), read in the order of its elements.
        random: numbers in (0, 1), as many as x has elements; the code is then one of the two neighbours, with
            probabilities that make the mean exact. None takes the nearer one of the companded values: then the second moment
            cannot follow changes below half a step, such as the 0.1% by which it shrinks at beta2 = 0.999.

    Returns:
        codes of x's shape, int8 or uint8; scales [ceil(x.numel() / 256)] in x's dtype.

    Powers that are roots of roots: no table to search. Backends make the same scales, and the same codes but where a value lies
    within fp32 rounding of the border between two: division and root are approximate in GPU kernels. Chosen by the error of
    AdamW's update in a small transformer, relative to that of fp32 states on the same path, random codes, mean (and worst
    step) of two seeds at beta2 = 0.95: fourth and eighth power 0.049 (0.067); square and fourth power 0.11 (0.35);
    logarithmic codes over 16 and 32 octaves 0.09 (0.12); the softsign and square root of Gonzalez Ortiz et al. 2026,
    arXiv:2602.23349, 0.11 (0.14).

    m and v are rounded one by one. Where gradients within a block differ by 1e6 and more, a v that came out too small made
    steps of 11 to 78 lr (gradients of 1e-6 and 1e-8 of the block's largest, beta1 = 0.9, beta2 = 0.95, eps = 1e-8 and 300
    steps; 0.85 with exact states). AdamW therefore raises v to r^2 m^2 when it reads codes, the least that any gradients can
    leave beside m (kernels/moment_bound.py). Then steps of exact and of 8-bit states have the same bound, lr / r * sqrt(1 -
    beta2^step) / (1 - beta1^step): 1 / r is 1.17 at beta2 = 0.95 and 7.3 at 0.999; there is none for beta1^2 >= beta2. In
    the same measurement: 1.16 lr. What such small elements' codes can tell stays coarse: at 1e-6 the root mean square of
    the steps is 1.45 times that of exact states, at 1e-8 it is 1.75 times (before: 1.7 and 6.5). In the transformer above it
    raises 1 in 12000 and leaves the error as it is.
    """
    flat = x.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    size = padded.abs()
    scales = size.amax(1, keepdim=True)
    scales = torch.where(scales.isfinite(), scales, torch.inf)  # amax knows NaN; 0 * inf brings it back
    part = torch.where((scales > 0) & (scales < torch.inf), size / scales, 0)
    root = part.sqrt().sqrt() * 127 if signed else part.sqrt().sqrt().sqrt() * 255
    if random is None:
        code = (root + 0.5).floor()
    else:
        code = root.floor()
        exact, low, high = (_power(t, signed) for t in (root, code, code + 1))
        random = torch.nn.functional.pad(random.reshape(-1), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        code = code + (random * (high - low) < exact - low)
    if signed:
        code = code.clamp(max=127).copysign(padded).to(torch.int8)
    else:
        code = torch.where((part > 0) & (code < 1), 1, code.clamp(max=255)).to(torch.uint8)
    return code.view(-1)[: flat.numel()].view(x.shape), scales.view(-1)


def block_dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of `block_quantize`'s codes, of their shape, in the dtype of the scales."""
    signed = codes.dtype == torch.int8
    flat = codes.reshape(-1).to(scales.dtype)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    part = flat * (1 / 127 if signed else 1 / 255)  # these two fp32 constants give exactly 1 for the largest code
    value = _power(part, signed).copysign(part)
    return (value * scales[:, None]).view(-1)[: codes.numel()].view(codes.shape)


def _power(t: Tensor, signed: bool) -> Tensor:
    fourth = (t * t).square()
    return fourth if signed else fourth.square()
