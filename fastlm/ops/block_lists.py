"""How a BlockMask is made: blocks told apart, equal ones found, live ones listed; and what its arguments must be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY, FULL, PARTIAL = 0, 1, 2  # a block's code; PARTIAL + p is a block that holds pattern p
_AT_ONCE = 256  # blocks looked at together


class _Patterns:
    """The distinct contents of partial blocks met so far."""

    def __init__(self, block):
        self._block, self._known = block, {}

    def codes(self, blocks, counted):
        """int64 [N] on the CPU: codes of blocks, bool [N, block_q, block_k]. counted, [1 or N, block_q, 1]: queries below S."""
        blocks = blocks & counted
        live, full = blocks.any(dim=(1, 2)), (blocks | ~counted).all(dim=(1, 2))
        codes = torch.where(full, FULL, PARTIAL).masked_fill(~live, EMPTY).cpu()
        partial = (codes == PARTIAL).nonzero().flatten()
        contents = blocks[partial.to(blocks.device)].cpu().numpy()
        codes[partial] += torch.tensor(
            [self._known.setdefault(content.tobytes(), len(self._known)) for content in contents], dtype=torch.int64
        )
        return codes

    def tensor(self):
        if not self._known:
            return torch.zeros(1, *self._block, dtype=torch.uint8)
        return torch.frombuffer(bytearray().join(self._known), dtype=torch.uint8).view(-1, *self._block)


def from_rows(rows, sizes, lengths, block, device):
    """The nine tensors of the BlockMask whose rows of blocks come one by one, each [n, T] bool, over batch, heads and queries."""
    T, (rows_of_blocks, columns) = lengths[1], grid(lengths, block)
    patterns, codes = _Patterns(block), []
    for row in rows:
        n = row.shape[0]
        padded = F.pad(row, (0, columns * block[1] - T, 0, block[0] - n))
        blocks = padded.unflatten(1, (columns, block[1])).transpose(0, 1)
        counted = torch.arange(block[0], device=row.device)[None, :, None] < n
        codes.append(patterns.codes(blocks, counted) if columns else torch.zeros(0, dtype=torch.int64))
    codes = torch.cat(codes) if codes else torch.zeros(0, dtype=torch.int64)
    codes = codes.view(*sizes, rows_of_blocks, columns).to(device)
    return _from_codes(codes, patterns.tensor().to(device))


def from_kinds(kinds, content, lengths, block):
    """The nine tensors of the BlockMask whose blocks hold content(kinds); kinds int64 [Bm, Hm, nQ, nK].

    content: bool [N, block_q, block_k] for kinds [N]; each kind is asked for once, or twice where the last queries are ragged.
    """
    rows = torch.arange(kinds.shape[2], device=kinds.device)[:, None]
    ragged = (rows + 1) * block[0] > lengths[0]  # the same kind holds less there
    found, inverse = (kinds * 2 + ragged).unique(return_inverse=True)
    queries, patterns, codes = torch.arange(block[0], device=kinds.device)[None, :, None], _Patterns(block), []
    for part in found.split(_AT_ONCE):
        here = torch.where(part % 2 == 1, lengths[0] % block[0] or block[0], block[0])
        codes.append(patterns.codes(content(part // 2), queries < here[:, None, None]))
    codes = torch.cat(codes).to(kinds.device)[inverse] if found.numel() else kinds
    return _from_codes(codes, patterns.tensor().to(kinds.device))


def _from_codes(codes, patterns):
    return *_lists(codes), *_lists(codes.transpose(-1, -2)), patterns


def _lists(codes):
    """count, partial, index and pattern of the live blocks along the last dimension."""
    if codes.shape[-1] == 0:
        codes = F.pad(codes, (0, 1))
    live, partial = codes != EMPTY, codes >= PARTIAL
    count = live.sum(-1)
    width = max(int(count.max()), 1) if count.numel() else 1
    rank = torch.where(partial, 0, torch.where(live, 1, 2)).to(torch.uint8)
    order = rank.sort(dim=-1, stable=True).indices[..., :width]
    pattern = (codes.gather(-1, order) - PARTIAL).clamp(min=0)
    index = order * (torch.arange(width, device=codes.device) < count[..., None])
    return tuple(x.to(torch.int32).contiguous() for x in (count, partial.sum(-1), index, pattern))


def grid(lengths, block):
    """(nQ, nK)"""
    return tuple(-(-length // size) for length, size in zip(lengths, block))


def diagonal(lengths, block):
    """The key block of the first and of the last query of each row of blocks, [nQ, 1] each."""
    start = torch.arange(0, lengths[0], block[0])[:, None]
    end = (start + block[0]).clamp(max=lengths[0]) - 1
    return tuple((query + lengths[1] - lengths[0]) // block[1] for query in (start, end))


def pooled(x, size):
    """fp32 [B, heads, blocks, Dh], the mean of each block of x [B, length, heads, Dh]."""
    length, missing = x.shape[1], -x.shape[1] % size
    x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    blocks = x.unflatten(1, (x.shape[1] // size, size))
    count = (length - torch.arange(0, length, size, device=x.device)).clamp(max=size)
    return (blocks.sum(2, dtype=torch.float32) / count[:, None, None]).transpose(1, 2)


def check_block(name, block):
    pair = block if isinstance(block, (tuple, list)) else (block, block)
    if len(pair) != 2 or not all(size in (16, 32, 64, 128, 256) for size in pair):
        raise ValueError(
            f"BlockMask.{name}: block must be 16, 32, 64, 128 or 256, or a pair (queries, keys) of them, got {block!r}"
        )
    return tuple(int(size) for size in pair)


def check_integer(name, argument, value, low, high=None):
    wanted = f">= {low}" if high is None else f"in {low}..{high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise ValueError(f"BlockMask.{name}: {argument} must be an integer {wanted}, got {value!r}")


def check_lengths(name, S, T):
    check_integer(name, "S", S, 0)
    check_integer(name, "T", T, 0)
    return S, T


def check_mask(name, argument, x, shape):
    if not isinstance(x, Tensor) or x.dtype is not torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"BlockMask.{name}: {argument} must be a bool tensor, got {got}; compare it with something first"
        )
    if x.ndim not in (2, 4):
        raise ValueError(
            f"BlockMask.{name}: {argument} must be {shape}, got {list(x.shape)}; unsqueeze what is missing"
        )


def check_seen(seen, shape):
    """What a rule returned, [n, T]."""
    if not isinstance(seen, Tensor) or seen.dtype is not torch.bool:
        got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
        raise TypeError(
            f"BlockMask.from_rule: rule must return a bool tensor, got {got}; combine comparisons with & and |"
        )
    try:
        return seen.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"BlockMask.from_rule: rule must return a tensor that broadcasts to {list(shape)}, got {list(seen.shape)}; compute "
            "it from the b, h, q and k it is given"
        ) from None


def check_queries(q, k):
    if not (q.is_floating_point() and k.is_floating_point()):
        raise TypeError(f"BlockMask.top_blocks: q and k must be floating point, got {q.dtype}, {k.dtype}")
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"BlockMask.top_blocks: q and k must be [B, S, H, Dh] and [B, T, H_kv, Dh], got {list(q.shape)}, {list(k.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"BlockMask.top_blocks: q's {q.shape[2]} heads must be a multiple of k's {k.shape[2]}")
    if q.device != k.device:
        raise ValueError(f"BlockMask.top_blocks: k must be on q's device {q.device}, got {k.device}")
