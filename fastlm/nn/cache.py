"""The keys and values of tokens already seen, passed to the model as an argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.errors import UserError


class KVCache:
    """Keys and values of every layer, for `model(tokens, cache=cache)`, which appends each row's tokens at its own length.

    A batch of unequal prompts is right-padded and prefilled in one call; then `set_lengths` takes the padding back, so that it
    is overwritten by the next tokens and never attended to.

    Attributes:
        k, v: per layer [B, T_max, H_kv, Dh]; row b is written up to lengths[b].
        lengths: int64 [B] on the cache's device, tokens held by each row.
        length: the rows' common length as an int, or None while they differ. Equal rows need no mask, hence the bookkeeping.
        longest: an int that no row's length exceeds.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (n_layers, batch, max_length, n_kv_heads, head_dim)
        # Zeros, not empty: masked keys get weight 0, and 0 times a stray NaN would still be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.v = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.max_length = max_length
        self.length: int | None = 0
        self.longest = 0

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.lengths.shape[0]

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Declares how many tokens each row holds (python ints, one per row): takes back padding, or rejected tokens.

        Raises UserError for another number of rows, or a length outside 0..max_length.
        """
        lengths = [int(n) for n in lengths]
        if len(lengths) != self.batch:
            raise UserError(f"cache: lengths must be {self.batch}, one for each row, got {len(lengths)}")
        if not all(0 <= n <= self.max_length for n in lengths):
            raise UserError(f"cache: lengths must lie in 0..{self.max_length}, got {lengths}")
        self.lengths.copy_(torch.tensor(lengths))
        self.longest = max(lengths, default=0)
        self.length = self.longest if len(set(lengths)) <= 1 else None

    def check_room(self, count: int) -> None:
        """Raises UserError if `count` more tokens do not fit in every row."""
        if self.longest + count > self.max_length:
            raise UserError(
                f"cache: {count} more tokens after {self.longest} do not fit in its {self.max_length} places; make a larger one"
            )

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, S, H_kv, Dh] behind each row's tokens and returns all keys and values [B, T, H_kv, Dh] so far.

        Lengths do not change (every layer writes at the same place): `advance` moves on when all layers are done. T is
        length + S where rows are equal; else longest + S, and row b's keys beyond lengths[b] + S are not to be read.
        """
        keys, values, count = self.k[layer], self.v[layer], k.shape[1]
        if self.length is not None:
            place = slice(self.length, self.length + count)
            keys[:, place], values[:, place] = k, v
        else:
            place = self.positions(count)
            keys[self.rows, place], values[self.rows, place] = k.to(keys.dtype), v.to(values.dtype)
        return keys[:, : self.longest + count], values[:, : self.longest + count]

    def positions(self, count: int) -> Tensor:
        """int64 [B, S]: the places of the next `count` tokens of each row."""
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def advance(self, count: int) -> None:
        """Counts `count` more tokens in every row."""
        self.lengths += count
        self.longest += count
        if self.length is not None:
            self.length += count
