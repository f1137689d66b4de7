"""What the launchers of attention make of their arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .attention_common import Rule, unit_rows


class Arguments(NamedTuple):
    """The arguments of a launcher, in the order of its op (fastlm.ops.attention_reference.Call, without defaults)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_lengths: Any
    bias: Any
    distances: Any
    sinks: Any
    extras: Any
    align: int
    left: int
    right: int
    scale: float
    softcap: float
    dropout: float

    @classmethod
    def of(cls, q, k, v, key_lengths, bias, distances, sinks, extras, *rest) -> Arguments:
        """With unit strides where the kernels want them."""
        named = Extras(*(None if x is None else x.contiguous() for x in extras))
        rows = (unit_rows(x) for x in (q, k, v))
        vectors = (None if x is None else x.contiguous() for x in (distances, sinks))
        lengths = None if key_lengths is None else key_lengths.contiguous()
        return cls(*rows, lengths, bias, *vectors, named, *rest)

    @property
    def packed(self) -> bool:
        """Whether several sequences lie one behind the other in the rows of q, k and v."""
        return self.extras.cu_q is not None

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return self.extras.cu_q.shape[0] - 1 if self.packed else self.q.shape[0]

    @property
    def extra_tiles(self) -> int:
        """Tiles a packed grid has beyond cdiv(total, BLOCK): every sequence may end in the middle of one."""
        return self.sequences if self.packed else 0

    @property
    def masked_blocks(self) -> bool:
        """Whether full blocks of a block mask still need a mask."""
        e = self.extras
        others = (self.key_lengths, e.key_starts, e.prefix_lengths, e.documents_q, e.cu_q)
        return self.left >= 0 or self.right >= 0 or any(x is not None for x in others)

    def strides(self) -> tuple[int, ...]:
        """Strides of batch, row and head of q, k and v."""
        return *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]


class Extras(NamedTuple):
    """Arguments.extras, named as in Rule; the order of fastlm.ops.attention_reference.Extras."""

    alibi: Any = None
    cu_q: Any = None
    cu_k: Any = None
    key_starts: Any = None
    prefix_lengths: Any = None
    documents_q: Any = None
    documents_k: Any = None
    seed: Any = None
    row_count: Any = None
    row_partial: Any = None
    row_index: Any = None
    row_pattern: Any = None
    column_count: Any = None
    column_partial: Any = None
    column_index: Any = None
    column_pattern: Any = None
    patterns: Any = None


def settings_class(a: Arguments) -> str:
    """'hot' (causal, window, GQA, packed, lengths, softcap, sinks: must not spill), 'blocks' (a block mask besides), or 'heavy'
    for bias, distances, ALiBi, dropout and documents."""
    e = a.extras
    if any(x is not None for x in (a.bias, a.distances, e.alibi, e.seed, e.documents_q)):
        return "heavy"
    return "hot" if e.row_count is None else "blocks"


def rule_of(a: Arguments, lines: str) -> Rule:
    """The kernels' Rule, with the block lists of "rows" (forward, dQ) or of "columns" (dK dV)."""
    e = a.extras
    rule = Rule(
        align_seen=1 if a.align == 1 else None,
        align_end=1 if a.align == 2 else None,
        left=a.left if a.left >= 0 else None,
        right=a.right if a.right >= 0 else None,
        key_lengths=a.key_lengths,
        key_starts=e.key_starts,
        prefix_lengths=e.prefix_lengths if a.left >= 0 or a.right >= 0 else None,  # else it changes nothing
        documents_q=e.documents_q,
        documents_k=e.documents_k,
        cu_q=e.cu_q,
        cu_k=e.cu_k,
        segments=a.sequences if a.packed else None,
        softcap=a.softcap or None,
        alibi=e.alibi,
        sinks=a.sinks,
    )
    if a.distances is not None:
        rule = rule._replace(distances=a.distances, reach=a.distances.shape[1] // 2)
    if a.bias is not None:
        strides = [0 if size == 1 else stride for size, stride in zip(a.bias.shape, a.bias.stride())]
        rows, columns = (size if size > 1 else 2**31 - 1 for size in a.bias.shape[2:])
        rule = rule._replace(
            bias=a.bias, bias_b=strides[0], bias_h=strides[1], bias_q=strides[2], bias_k=strides[3],
            bias_rows=rows, bias_columns=columns,
        )  # fmt: skip
    if a.dropout:
        rule = rule._replace(seed=e.seed, threshold=int(a.dropout * 2**32), grown=1 / (1 - a.dropout))
    if e.row_count is not None:
        start = Extras._fields.index("row_count" if lines == "rows" else "column_count")
        count, partial, index, pattern = e[start : start + 4]
        B, H, line_count = count.shape
        rule = rule._replace(
            blocks=count, blocks_partial=partial, blocks_index=index, blocks_pattern=pattern,
            blocks_b=H * line_count if B > 1 else 0, blocks_h=line_count if H > 1 else 0,
            blocks_width=index.shape[3], blocks_lines=line_count,
            patterns=e.patterns, block_q=e.patterns.shape[1], block_k=e.patterns.shape[2],
        )  # fmt: skip
    return rule
