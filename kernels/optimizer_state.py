"""What every optimizer kernel does around its formula: weights and states from memory to fp32 and back.

The formats are those of master_weights.py in fastlm/ops (remainders, stochastic rounding), bit for bit, and of block_quantize.py
(8-bit codes): the same scales, and the same codes but where a value lies within fp32 rounding of the border between two, since
division and root are approximate on a GPU. A pointer that is None belongs to a list that is absent, and its code is not
compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_tensor import Numbers, type_of
from .tensor_table import BLOCK, draws, table_of

_NAN = tl.constexpr(0x7FC00000)  # the quiet NaN whose lower 16 bits are 0
_GROUP = tl.constexpr(256)  # elements that share a scale


@triton.jit
def mean(old, high, low, rest, new):
    """beta old + rest new, of beta in two parts (moment_bound.py); fused operations, alike in every instance of a kernel."""
    return tl.fma(high, old, tl.fma(rest, new, low * old))


@triton.jit
def read_weight(p_ptr, master_ptr, remainder_ptr, col, mask):
    """The weight in fp32. p_ptr is to int16, the bits of bf16, where there are remainders or the rounding is stochastic."""
    if master_ptr is not None:
        w = tl.load(master_ptr + col, mask=mask)
    elif p_ptr.dtype.element_ty == tl.int16:
        bits = tl.load(p_ptr + col, mask=mask).to(tl.int32) << 16
        if remainder_ptr is not None:
            bits += tl.load(remainder_ptr + col, mask=mask).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(p_ptr + col, mask=mask).to(tl.float32)
    return w


@triton.jit
def write_weight(p_ptr, master_ptr, remainder_ptr, average_ptr, col, mask, w, average_rest, words):
    """The new weight into the parameter and what belongs to it. words: as many random ones as half the elements, or None."""
    if average_ptr is not None:
        average = tl.load(average_ptr + col, mask=mask).to(tl.float32)
        apart = w - average  # from the nearer end: an average that is given up leaves no rounding of its own
        average = tl.where(average_rest < 0.5, average + average_rest * apart, w - (1 - average_rest) * apart)
        tl.store(average_ptr + col, average.to(average_ptr.dtype.element_ty), mask=mask)
    bits = tl.where(w == w, w.to(tl.int32, bitcast=True), _NAN)
    if remainder_ptr is not None:
        high = (bits + 0x8000) >> 16  # to nearest, ties away from zero
        tl.store(p_ptr + col, high.to(tl.int16), mask=mask)
        tl.store(remainder_ptr + col, (bits - (high << 16)).to(tl.int16), mask=mask)
    elif words is not None:
        random = tl.reshape(tl.join(half_of(words, False), half_of(words, True)), col.shape)
        raised = (bits + random) >> 16
        raised = tl.where((raised & 0x7FFF) == 0x7F80, bits >> 16, raised)  # never inf of what is finite
        tl.store(p_ptr + col, tl.where(w == w, raised, bits >> 16).to(tl.int16), mask=mask)
    else:
        if master_ptr is not None:
            tl.store(master_ptr + col, w, mask=mask)
        tl.store(p_ptr + col, w.to(p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def random_words(seed_ptr, stream, step, first, COUNT: tl.constexpr):
    """COUNT random words from number `first` (a multiple of 4) of a stream on: Philox counter (number // 4, stream, step,
    offset), word number % 4."""
    zero = tl.zeros((COUNT // 4,), tl.int32)
    c0 = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.int32)
    c2 = (tl.zeros((COUNT // 4,), tl.float32) + step).to(tl.int32)
    c3 = zero + (tl.load(seed_ptr + 1) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, zero + stream, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes count 0, 1, 2, 3
    return tl.reshape(words, (COUNT,)).to(tl.int32, bitcast=True)


@triton.jit
def weight_words(table, seed_ptr, owner, start, step, WANTED: tl.constexpr, BLOCK: tl.constexpr):
    """The random words of `write_weight`, two elements from each; None if not wanted."""
    if WANTED:
        words = random_words(seed_ptr, tl.load(table.stream + owner), step, start // 2, BLOCK // 2)
    else:
        words = None
    return words


@triton.jit
def code_words(table, seed_ptr, owner, start, step, WANTED: tl.constexpr, BLOCK: tl.constexpr):
    """A random word for the codes of each element, others than the weights'; None if not wanted."""
    if WANTED:
        words = random_words(seed_ptr, tl.load(table.stream + owner) ^ -2147483648, step, start, BLOCK)
    else:
        words = None
    return words


@triton.jit
def half_of(words, LAST: tl.constexpr):
    """One half of each word, in [0, 65536); None of None."""
    if words is None:
        half = None
    else:
        half = (words >> 16) & 0xFFFF if LAST else words & 0xFFFF
    return half


@triton.jit
def _power(t, SIGNED: tl.constexpr):
    fourth = (t * t) * (t * t)
    return fourth if SIGNED else fourth * fourth


@triton.jit
def read_state(s_ptr, scale_ptr, col, mask, left, BLOCK: tl.constexpr):
    """A state in fp32; `left` elements of the tensor are left from the block's first on."""
    x = tl.load(s_ptr + col, mask=mask).to(tl.float32)
    if scale_ptr is not None:
        row = tl.arange(0, BLOCK // _GROUP)
        scale = tl.load(scale_ptr + row, mask=None if mask is None else row * _GROUP < left)
        part = tl.reshape(x, (BLOCK // _GROUP, _GROUP))
        if s_ptr.dtype.element_ty == tl.int8:
            part *= 0.007874015748031496  # 1 / 127: gives exactly 1 for the largest code
            value = tl.where(part < 0, -_power(part, True), _power(part, True))
        else:
            part *= 0.00392156862745098  # 1 / 255, likewise
            value = _power(part, False)
        x = tl.reshape(value * scale[:, None], (BLOCK,))
    return x


@triton.jit
def write_state(s_ptr, scale_ptr, x, col, mask, left, half, BLOCK: tl.constexpr):
    """A state back to memory. half: a random number in [0, 65536) for each element, or None to round codes to nearest."""
    if scale_ptr is None:
        tl.store(s_ptr + col, x.to(s_ptr.dtype.element_ty), mask=mask)
    else:
        SIGNED: tl.constexpr = s_ptr.dtype.element_ty == tl.int8
        TOP: tl.constexpr = 127.0 if SIGNED else 255.0
        size = tl.abs(x)
        size = tl.where(size < float("inf"), size, float("inf"))  # NaN too, which a maximum would not see
        if mask is not None:
            size = tl.where(mask, size, 0.0)
        size = tl.reshape(size, (BLOCK // _GROUP, _GROUP))
        scale = tl.max(size, 1)
        usable = (scale > 0) & (scale < float("inf"))
        less = tl.where(scale > 1e30, 0.00390625, 1.0)  # `/` gives 0 on a GPU for divisors above 2^126
        divisor = tl.where(usable, scale * less, 1.0)
        part = tl.where(usable[:, None], size * less[:, None] / divisor[:, None], 0.0)
        root = tl.sqrt(tl.sqrt(part))
        if not SIGNED:
            root = tl.sqrt(root)
        part, root = tl.reshape(part, (BLOCK,)), tl.reshape(root * TOP, (BLOCK,))
        if half is None:
            code = tl.floor(root + 0.5)
        else:
            code = tl.floor(root)
            exact, low, high = _power(root, SIGNED), _power(code, SIGNED), _power(code + 1, SIGNED)
            random = (half.to(tl.float32) + 0.5) * (1 / 65536)
            code = tl.where(random * (high - low) < exact - low, code + 1, code)
        code = tl.minimum(code, TOP)
        if SIGNED:
            code = tl.where(x < 0, -code, code).to(tl.int32)
        else:
            code = tl.where(part > 0, tl.maximum(code, 1.0), code).to(tl.int32)
        tl.store(s_ptr + col, code.to(s_ptr.dtype.element_ty), mask=mask)
        row = tl.arange(0, BLOCK // _GROUP)
        tl.store(scale_ptr + row, scale, mask=None if mask is None else row * _GROUP < left)


def launch(kernel, lists, streams, numbers: Numbers, *constants: float, states: int, **flags: bool) -> None:
    """Runs a step kernel on lists in the order of the op's schema: params, grads, the states, masters, remainders, averages, and
    the states' scales. flags: the kernel's own constexprs."""
    stochastic, random_codes = draws(lists, states, numbers.seed_ptr is not None)
    if not (stochastic or random_codes):
        numbers = numbers._replace(seed_ptr=None)
    table, aligned = table_of(lists, streams if numbers.seed_ptr is not None else None)
    types = [type_of(tensors) for tensors in lists]
    if stochastic or lists[3 + states]:
        types[0] = tl.int16  # the bits of bf16
    kernel[(table.owner.numel(),)](
        table, numbers, *constants, *types, **flags, RANDOM_WEIGHTS=stochastic,
        RANDOM_CODES=random_codes, ALIGNED=aligned, BLOCK=BLOCK,
        num_warps=4 if any(lists[5 + states :]) else 8,  # 16 elements to a thread: 16-byte accesses of codes too
    )  # fmt: skip
