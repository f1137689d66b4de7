"""Who sees whom in the attention benchmark, and attention as others compute it: torch's kernels, flash-attn, xformers.

A provider that cannot serve a cell raises NotImplementedError with the reason, which becomes the text of its row.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from fastlm.ops import BlockMask

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,  # the CPU's only fused kernel too: there it is what `sdpa` takes anyway
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom. What a provider makes of it is made once, at its first call, and not timed; so are our own block lists.

    Attributes:
        S: tokens, of all sequences together where they are packed.
        window: how many keys before its own a query sees, without causal as many after it too; None for all.
        live: bool [blocks of queries, blocks of keys], which blocks of `block` x `block` scores are seen; None for all.
        lengths: of the packed sequences; None for a plain batch.
    """

    S: int
    device: str
    causal: bool = True
    window: int | None = None
    live: torch.Tensor | None = None
    block: int = 128
    lengths: tuple[int, ...] | None = None

    @property
    def band(self) -> tuple[int, int]:
        """flash-attention's (left, right)."""
        left = -1 if self.window is None else self.window
        return left, 0 if self.causal else left

    @property
    def pairs(self) -> int:
        """Pairs of query and key that are seen, over one batch entry and head."""
        if self.live is not None:
            return int(self.live.sum()) * self.block**2
        return sum(self._pairs(n) for n in self.lengths or (self.S,))

    def _pairs(self, n):
        if self.window is None:
            return n * n // (2 if self.causal else 1)
        near = min(self.window + 1, n)
        before = near * (near + 1) // 2 + (n - near) * near  # with its own
        return before if self.causal else 2 * before - n

    @cached_property
    def cu_seqlens(self):
        return torch.tensor((0, *self.lengths), device=self.device).cumsum(0).int()

    @cached_property
    def blocks(self):
        """Our BlockMask, or None."""
        return None if self.live is None else BlockMask.from_blocks(self.live, self.S, self.S, block=self.block)

    @cached_property
    def dense(self):
        """Boolean mask for SDPA, or None where its is_causal says it all. Packed: for the padded batch."""
        if self.live is not None:
            return self.blocks.to_dense()
        at = torch.arange(max(self.lengths or (self.S,)), device=self.device)
        if self.window is not None:
            distance = at[:, None] - at
            return (distance <= self.window) & (distance >= (0 if self.causal else -self.window))
        if self.lengths is None or self.causal:  # the padding comes last, so that causal queries do not see it
            return None
        return (at < torch.tensor(self.lengths, device=self.device)[:, None])[:, None, None]

    @cached_property
    def flex(self):
        """FlexAttention's own block mask, or None where everybody sees everything."""
        from torch.nn.attention.flex_attention import create_block_mask

        left, right = self.band
        if (left, right) == (-1, -1) and self.live is None and self.lengths is None:
            return None
        live, block = self.live, self.block
        owner = None
        if self.lengths is not None:
            owner = torch.arange(len(self.lengths), device=self.device)
            owner = owner.repeat_interleave(torch.tensor(self.lengths, device=self.device))

        def seen(b, h, q, k):
            found = (q - k <= left) if left >= 0 else (q >= 0)
            if right >= 0:
                found = found & (k - q <= right)
            if live is not None:
                found = found & live[q // block, k // block]
            return found if owner is None else found & (owner[q] == owner[k])

        return create_block_mask(seen, None, None, self.S, self.S, device=self.device, BLOCK_SIZE=max(block, 128))


def by_sdpa(q, k, v, mask):
    """Packed sequences as a padded batch: padding and cutting are part of the call, as of every user's."""
    if mask.lengths is not None:
        q, k, v = (pad_sequence(x.split(mask.lengths), batch_first=True) for x in (q, k, v))
    seen, grouped = mask.dense, q.shape[2] != k.shape[2]
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=seen, is_causal=mask.causal and seen is None, enable_gqa=grouped,
    ).transpose(1, 2)  # fmt: skip
    return o if mask.lengths is None else torch.cat([row[:n] for row, n in zip(o, mask.lengths)])


def with_kernel(kernel):
    """SDPA with one of its kernels; where torch refuses, the error holds torch's own reasons."""

    def call(*args):
        with sdpa_kernel(kernel):
            try:
                return by_sdpa(*args)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                try:
                    return by_sdpa(*args)
                except RuntimeError as error:
                    said = [str(note.message).split(" (Triggered")[0] for note in notes]
                    # torch also lists the kernels that were switched off here.
                    why = [text for text in said if "disabled" not in text and "kernel not used because" not in text]
                    raise NotImplementedError("; ".join(why) or str(error)) from None

    def build():
        if not torch.cuda.is_available():
            raise ImportError("torch has this kernel for CUDA only")
        return call

    return build


def by_flex(flex_attention):
    def call(q, k, v, mask):
        packed, grouped = mask.lengths is not None, q.shape[-2] != k.shape[-2]
        q, k, v = ((x[None] if packed else x).transpose(1, 2) for x in (q, k, v))
        o = flex_attention(q, k, v, block_mask=mask.flex, enable_gqa=grouped).transpose(1, 2)
        return o[0] if packed else o

    return call


def with_flex():
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.cuda.is_available():
        raise ImportError("FlexAttention has no backward on the CPU")
    return by_flex(torch.compile(flex_attention, dynamic=False))


def with_varlen():
    """torch's own entry for packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    if not torch.cuda.is_available():
        raise ImportError("torch has this kernel for CUDA only")

    def call(q, k, v, mask):
        if mask.lengths is None:
            raise NotImplementedError("for packed sequences only: on a batch it is sdpa:flash")
        grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        sizes = (mask.cu_seqlens, mask.cu_seqlens, max(mask.lengths), max(mask.lengths))
        return varlen_attn(q, k, v, *sizes, window_size=mask.band, **grouped)

    return call


def with_flash_attn(module):
    """flash_attn is FlashAttention 2, flash_attn_interface FlashAttention 3."""

    def build():
        found = __import__(module)

        def call(q, k, v, mask):
            if mask.live is not None:
                raise NotImplementedError(f"{module} has no block masks")
            options = {"causal": mask.causal, "window_size": mask.band if mask.window is not None else (-1, -1)}
            if mask.lengths is None:
                o = found.flash_attn_func(q, k, v, **options)
            else:
                sizes = (mask.cu_seqlens, mask.cu_seqlens, max(mask.lengths), max(mask.lengths))
                o = found.flash_attn_varlen_func(q, k, v, *sizes, **options)
            return o[0] if isinstance(o, tuple) else o  # some versions return the log-sum-exp too

        return call

    return build


def with_xformers():
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    biases = {}  # by Mask, which is compared by identity

    def bias_of(mask):
        if mask.window is not None and not mask.causal:
            raise NotImplementedError("not written: a window on both sides with xformers")
        if mask.lengths is None:
            bias = attn_bias.LowerTriangularMask() if mask.causal else None
        else:
            bias = attn_bias.BlockDiagonalMask.from_seqlens(mask.lengths)
            bias = bias.make_causal() if mask.causal else bias
        # Its window counts the query's own key.
        return bias if mask.window is None else bias.make_local_attention(mask.window + 1)

    def call(q, k, v, mask):
        if mask.live is not None:
            raise NotImplementedError("xformers has no block masks of this form")
        if q.shape[-2] != k.shape[-2]:
            raise NotImplementedError("xformers has no backward for grouped heads")
        if mask not in biases:
            biases[mask] = bias_of(mask)
        packed = mask.lengths is not None
        q, k, v = (x[None] if packed else x for x in (q, k, v))
        o = memory_efficient_attention(q, k, v, attn_bias=biases[mask])
        return o[0] if packed else o

    return call
