"""Block-sparse masks: which blocks of attention's scores exist, which of them are whole, and what the others hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastlm.ops import block_lists as lists


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which keys each query sees, by blocks of scores. `attention(..., block_mask=...)` spends no time on empty blocks.

    A block is full if each of its queries sees all of its keys (queries at or past S do not count, and nobody sees keys at or
    past T), empty if no query sees a key, and partial otherwise. Made by `from_dense`, `from_rule`, `from_blocks`, the
    patterns `local`, `strided`, `longformer` and `bigbird`, or `top_blocks`; `a | b` and `a & b` combine masks of the same
    lengths and block. Making one reads values, so on a GPU it synchronises: make it once, not at each step.

    The lists of a row hold its live blocks: first the partial ones, ascending, then the full ones, ascending. Bm is 1 or B,
    Hm is 1 or H (query heads), nQ = ceil(S / block_q), nK = ceil(T / block_k), W the longest list (at least 1).

    Attributes:
        lengths: (S, T), queries and keys.
        block: (queries, keys) of a block, each a power of two from 16 to 256.
        row_count: int32 [Bm, Hm, nQ], the live blocks of each row of blocks.
        row_partial: int32 [Bm, Hm, nQ], how many of them are partial.
        row_index: int32 [Bm, Hm, nQ, W], which key blocks; 0 past row_count.
        row_pattern: int32 [Bm, Hm, nQ, W], which of `patterns` a partial block holds; 0 past row_partial.
        column_count, column_partial, column_index, column_pattern: the same for each column of blocks: [Bm, Hm, nK] and
            [Bm, Hm, nK, W'], whose indices are query blocks.
        patterns: uint8 [max(P, 1), block_q, block_k], the P distinct contents of partial blocks, 1 where the query sees
            the key and 0 at queries at or past S.
    """

    lengths: tuple[int, int]
    block: tuple[int, int]
    row_count: Tensor
    row_partial: Tensor
    row_index: Tensor
    row_pattern: Tensor
    column_count: Tensor
    column_partial: Tensor
    column_index: Tensor
    column_pattern: Tensor
    patterns: Tensor

    @classmethod
    def from_dense(
        cls, mask: Tensor, *, block: int | tuple[int, int] = 128, device: torch.device | str | None = None
    ) -> BlockMask:
        """The BlockMask of `mask`: bool [S, T] or [Bm, Hm, S, T], True where the query sees the key.

        `device` is where the result lies, by default that of `mask`. Raises ValueError or TypeError for a wrong shape or dtype.
        """
        lists.check_mask("from_dense", "mask", mask, "[S, T] or [Bm, Hm, S, T]")
        mask = mask if mask.ndim == 4 else mask[None, None]
        (batch, heads), lengths = mask.shape[:2], (mask.shape[2], mask.shape[3])
        block = lists.check_block("from_dense", block)
        rows = (
            mask[b, h, start : start + block[0]]
            for b in range(batch)
            for h in range(heads)
            for start in range(0, lengths[0], block[0])
        )
        device = mask.device if device is None else device
        return cls(lengths, block, *lists.from_rows(rows, (batch, heads), lengths, block, device))

    @classmethod
    def from_rule(
        cls,
        rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        S: int,
        T: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The BlockMask of rule(b, h, q, k), True where query q of head h of sequence b sees key k.

        The rule gets int64 tensors [1, 1], [1, 1], [n, 1] and [1, T] on `device` (default: the CPU), one row of blocks after
        the other, n <= block_q, and returns a bool tensor that broadcasts to [n, T]: the mask is never held as a whole.
        `batch` and `heads` stay 1 for a rule that does not look at b or h. Raises ValueError for bad sizes or a result of
        another shape, TypeError for one that is not bool.
        """
        lengths, block = lists.check_lengths("from_rule", S, T), lists.check_block("from_rule", block)
        for name, size in (("batch", batch), ("heads", heads)):
            lists.check_integer("from_rule", name, size, 1)
        queries, keys = (torch.arange(n, device=device) for n in lengths)

        def row(b, h, start):
            b, h = (torch.full((1, 1), i, device=queries.device) for i in (b, h))
            q, k = queries[start : start + block[0], None], keys[None]
            return lists.check_seen(rule(b, h, q, k), (q.shape[0], k.shape[1]))

        starts = range(0, lengths[0], block[0])
        rows = (row(b, h, start) for b in range(batch) for h in range(heads) for start in starts)
        return cls(lengths, block, *lists.from_rows(rows, (batch, heads), lengths, block, queries.device))

    @classmethod
    def from_blocks(
        cls,
        live: Tensor,
        S: int,
        T: int,
        *,
        block: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The BlockMask in which queries see all keys of their live blocks. `live`: bool [nQ, nK] or [Bm, Hm, nQ, nK].

        `device` is where the result lies, by default that of `live`. Raises ValueError or TypeError for a wrong shape or dtype.
        """
        lengths, block = lists.check_lengths("from_blocks", S, T), lists.check_block("from_blocks", block)
        lists.check_mask("from_blocks", "live", live, "[nQ, nK] or [Bm, Hm, nQ, nK]")
        blocks = lists.grid(lengths, block)
        if tuple(live.shape[-2:]) != blocks:
            raise ValueError(
                f"BlockMask.from_blocks: live must end in {list(blocks)}, as S, T = {lengths} holds that many blocks of {block}, "
                f"got {list(live.shape)}"
            )
        codes = (live if live.ndim == 4 else live[None, None]).to(device=device, dtype=torch.int64)
        ones = torch.ones(block, dtype=torch.bool, device=codes.device)
        ragged = ones & (torch.arange(block[1], device=codes.device) < (lengths[1] % block[1] or block[1]))
        contents = torch.stack((~ones, ones, ragged))
        last = torch.arange(blocks[1], device=codes.device) == blocks[1] - 1
        kinds = codes * (1 + last.long())
        return cls(lengths, block, *lists.from_kinds(kinds, lambda kinds: contents[kinds], lengths, block))

    @classmethod
    def local(
        cls,
        S: int,
        T: int | None = None,
        *,
        before: int = -1,
        after: int = -1,
        causal: bool = False,
        block: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Each query sees `before` keys before its own position, that one and `after` keys after it; -1 means no limit.

        As in all patterns, T is S by default, query q stands at key position q + T - S (as with attention's causal=True), and
        `causal` takes away the keys past it. The result lies on `device` (default: the CPU). Raises ValueError for bad sizes.
        """
        for name, size in (("before", before), ("after", after)):
            lists.check_integer("local", name, size, -1)

        def seen(place, key):
            near = key >= place - before if before >= 0 else torch.ones_like(key, dtype=torch.bool)
            return near & (key <= place + after) if after >= 0 else near

        return _from_places("local", seen, S, T, causal, block, device)

    @classmethod
    def strided(
        cls,
        S: int,
        T: int | None = None,
        *,
        stride: int,
        summary: int | None = None,
        causal: bool = False,
        block: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The patterns of the Sparse Transformer (Child et al. 2019, arXiv:1904.10509, section 4.3), both of its heads in one.

        `summary` None is its "strided" pattern: a query sees the keys at most `stride` away and those a multiple of `stride`
        away. A number 1 to `stride` is its "fixed" pattern: the keys are cut into segments of `stride`, a query sees its own
        segment and the last `summary` keys of every segment. The paper's are causal=True. Only
        strides of several blocks leave blocks empty. The rest is as in `local`.
        """
        lists.check_integer("strided", "stride", stride, 1)
        if summary is not None:
            lists.check_integer("strided", "summary", summary, 1, stride)

        def seen(place, key):
            if summary is None:
                return ((place - key).abs() <= stride) | ((place - key) % stride == 0)
            return (place // stride == key // stride) | (key % stride >= stride - summary)

        return _from_places("strided", seen, S, T, causal, block, device)

    @classmethod
    def longformer(
        cls,
        S: int,
        T: int | None = None,
        *,
        window: int,
        global_tokens: int | Iterable[int] = 1,
        causal: bool = False,
        block: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """A window and global tokens (Beltagy et al. 2020, arXiv:2004.05150).

        A query sees `window` keys on either side of its position (half of the paper's w) and its own; everyone sees the global
        tokens and they see everyone. `global_tokens`: how many of the first positions are global, or the key positions that
        are. The rest is as in `local`.
        """
        lists.check_integer("longformer", "window", window, 0)
        keys = lists.check_lengths("longformer", S, S if T is None else T)[1]
        chosen = range(min(global_tokens, keys)) if isinstance(global_tokens, int) else [int(i) for i in global_tokens]
        if (isinstance(global_tokens, int) and global_tokens < 0) or any(not 0 <= i < keys for i in chosen):
            raise ValueError(
                f"BlockMask.longformer: global_tokens must be a number >= 0 or positions in 0..{keys - 1}, got {global_tokens!r}"
            )
        # One more than there are keys: where queries before all keys look.
        is_global = torch.zeros(keys + 1, dtype=torch.bool, device=device)
        is_global[list(chosen)] = True

        def seen(place, key):
            from_global = is_global[place.where(place >= 0, torch.full_like(place, keys))]
            return ((place - key).abs() <= window) | is_global[key] | from_global

        return _from_places("longformer", seen, S, T, causal, block, device)

    @classmethod
    def bigbird(
        cls,
        S: int,
        T: int | None = None,
        *,
        window: int = 1,
        global_blocks: int = 1,
        random_blocks: int = 3,
        seed: int = 0,
        heads: int = 1,
        causal: bool = False,
        block: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Window, global and random blocks (Zaheer et al. 2020, arXiv:2007.14062, with its blocks of tokens).

        A block of queries sees the key blocks it stands on, `window` more on either side, the first `global_blocks` and
        `random_blocks` others, as far as there are any, drawn with `seed`, for each of `heads` anew, with `causal` only from
        those before it; a block of queries that stands on a global block sees all. The rest is as in `local`.
        """
        lengths, block = lists.check_lengths("bigbird", S, S if T is None else T), lists.check_block("bigbird", block)
        sizes = {"window": window, "global_blocks": global_blocks, "random_blocks": random_blocks, "heads": heads}
        for name, size in sizes.items():
            lists.check_integer("bigbird", name, size, int(name == "heads"))
        first, last = lists.diagonal(lengths, block)
        j = torch.arange(lists.grid(lengths, block)[1])
        live = (j >= first - window) & (j <= last + window) | (j < global_blocks)
        # Where S > T, the first blocks of queries stand before all keys, on no block.
        live = live | (first.clamp(min=0) < global_blocks) & (last >= 0)
        chance = torch.rand(heads, *live.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        chance = chance.masked_fill(live | (j > last) if causal else live, -1)
        # Where no others are left it draws blocks that are live already, or that `causal` takes away below.
        drawn = chance.sort(dim=-1, descending=True, stable=True).indices[..., :random_blocks]
        live = live | torch.zeros_like(chance, dtype=torch.bool).scatter(-1, drawn, True)
        mask = cls.from_blocks(live[None], *lengths, block=block, device="cpu" if device is None else device)
        return mask & cls.local(*lengths, causal=True, block=block, device=device) if causal else mask

    @classmethod
    @torch.no_grad()
    def top_blocks(
        cls, q: Tensor, k: Tensor, count: int, *, block: int | tuple[int, int] = 128, causal: bool = False
    ) -> BlockMask:
        """For each block of queries the `count` key blocks of the highest score: mean query times mean key, in fp32.

        q: [B, S, H, Dh], k: [B, T, H_kv, Dh] with H a multiple of H_kv, any floating dtype. The result has Bm = B and Hm = H, on
        q's device; of equal scores the lower block is taken. `causal` leaves out the blocks past the diagonal, which ends at
        the last key, and always keeps those on it, counted first; pass causal=True to attention too, for what is within
        them. No gradient. Raises ValueError or TypeError for tensors that do not fit.
        """
        lists.check_queries(q, k)
        lists.check_integer("top_blocks", "count", count, 1)
        lengths, block = (q.shape[1], k.shape[1]), lists.check_block("top_blocks", block)
        blocks = lists.grid(lengths, block)
        q, k = lists.pooled(q, block[0]), lists.pooled(k, block[1])  # [B, heads, blocks, Dh]
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
        kept = future = torch.zeros(blocks, dtype=torch.bool, device=q.device)
        if causal:
            first, last = (x.to(q.device) for x in lists.diagonal(lengths, block))
            j = torch.arange(blocks[1], device=q.device)
            kept, future = (j >= first) & (j <= last), j > last
            scores = scores.masked_fill(kept, math.inf).masked_fill(future, -math.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        live = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) | kept
        return cls.from_blocks(live & ~future, *lengths, block=block)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Sees what either mask sees. ValueError if lengths, block, device or batch and heads do not fit."""
        return _combined("|", self, other) if isinstance(other, BlockMask) else NotImplemented

    def __and__(self, other: BlockMask) -> BlockMask:
        """Sees what both masks see. Raises as `|`."""
        return _combined("&", self, other) if isinstance(other, BlockMask) else NotImplemented

    def tensors(self) -> tuple[Tensor, ...]:
        """The nine tensors in the order of the attributes."""
        return tuple(getattr(self, f.name) for f in fields(self)[2:])

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)[2:]})

    def to_dense(self) -> Tensor:
        """bool [Bm, Hm, S, T]: for tests and references, as it takes the memory that the blocks save. Does not synchronise."""
        blocks = self._contents()[self._codes()]  # [Bm, Hm, nQ, nK, block_q, block_k]
        return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., : self.lengths[0], : self.lengths[1]]

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many blocks are (full, partial, empty), over batch and heads. This and the next two synchronise a GPU."""
        live, partial = int(self.row_count.sum()), int(self.row_partial.sum())
        return live - partial, partial, self.row_count.numel() * self.column_count.shape[-1] - live

    @property
    def density(self) -> float:
        """The share of blocks that are live; 0 if there are none."""
        full, partial, empty = self.counts
        return (full + partial) / max(full + partial + empty, 1)

    @property
    def live_pairs(self) -> int:
        """How many pairs of query and key are seen, over batch and heads."""
        codes = self._codes()
        pairs = int(self._contents().sum((1, 2))[codes].sum())
        missing = -self.lengths[0] % self.block[0]  # a full block of the last row was counted with the queries past S
        return pairs - missing * self.block[1] * int((codes[..., -1:, :] == lists.FULL).sum())

    def __repr__(self) -> str:
        full, partial, empty = self.counts
        (S, T), (batch, heads) = self.lengths, self.row_count.shape[:2]
        patterns = self.patterns.shape[0] if partial else 0
        return (
            f"BlockMask(S={S}, T={T}, block={self.block}, batch={batch}, heads={heads}, density={self.density:.3f}: {full} full, "
            f"{partial} partial, {empty} empty blocks, {patterns} patterns, device={self.row_count.device})"
        )

    def _codes(self):
        """int64 [Bm, Hm, nQ, nK], the code of each block."""
        slot = torch.arange(self.row_index.shape[-1], device=self.row_index.device)
        code = torch.where(slot < self.row_partial[..., None], lists.PARTIAL + self.row_pattern, lists.FULL).long()
        blocks = self.column_count.shape[-1]
        index = torch.where(slot < self.row_count[..., None], self.row_index, blocks).long()  # unused: one past the end
        return code.new_zeros(*self.row_count.shape, blocks + 1).scatter(-1, index, code)[..., :blocks]

    def _contents(self):
        """bool [2 + P, block_q, block_k]: what a block of each code holds."""
        ones = torch.ones_like(self.patterns[:1], dtype=torch.bool)
        return torch.cat((~ones, ones, self.patterns.bool()))


def _from_places(name, seen, S, T, causal, block, device):
    """The BlockMask of seen(place, key), place being a query's key position."""
    S, T = lists.check_lengths(name, S, S if T is None else T)

    def rule(b, h, q, k):
        place = q + T - S
        return seen(place, k) & (k <= place) if causal else seen(place, k)

    return BlockMask.from_rule(rule, S, T, block=lists.check_block(name, block), device=device)


def _combined(sign, a, b):
    for name in ("lengths", "block"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"BlockMask {sign}: both masks must have one {name}, got {getattr(a, name)} and {getattr(b, name)}"
            )
    if a.row_count.device != b.row_count.device:
        raise ValueError(
            f"BlockMask {sign}: both masks must be on one device, got {a.row_count.device} and {b.row_count.device}; use .to"
        )
    ours, theirs = a.row_count.shape[:2], b.row_count.shape[:2]
    if any(m != n and 1 not in (m, n) for m, n in zip(ours, theirs)):
        raise ValueError(f"BlockMask {sign}: batch and heads must be equal or 1, got {tuple(ours)} and {tuple(theirs)}")
    in_a, in_b = a._contents(), b._contents()

    def content(pairs):
        x, y = in_a[pairs // in_b.shape[0]], in_b[pairs % in_b.shape[0]]
        return x | y if sign == "|" else x & y

    pairs = a._codes() * in_b.shape[0] + b._codes()
    return BlockMask(a.lengths, a.block, *lists.from_kinds(pairs, content, a.lengths, a.block))
