"""Batches: an endless, seeded, resumable order of samples, and a plain walk over a split for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastlm.data.store import open_split
from fastlm.data.windows import IGNORE, BestFitRows, StreamWindows
from fastlm.errors import UserError

PACKINGS = ("stream", "best_fit")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Args:
        tokens: int64 [B, S].
        labels: int64 [B, S]; labels[b, s] is the token that follows tokens[b, s], -100 where there is no target.
        index: int64 [B], the global number of each sample since the start of training; `Loader.describe` says where it
            lies in the data.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        """The batch with tokens and labels on a device; `index` stays on the CPU."""
        move = {"device": device, "non_blocking": non_blocking}
        return Batch(self.tokens.to(**move), self.labels.to(**move), self.index)


class Loader:
    """Endless iterator of training batches in a seeded order.

    Sample g of the run is sample `g % samples_per_epoch` of epoch `g // samples_per_epoch`; each epoch visits every
    sample exactly once. A step takes the next `batch_size * world_size` samples, rank r the r-th `batch_size` of them:
    the ranks' batches side by side are the batch of a single process with `batch_size * world_size`, so the global
    order does not depend on the world size.

    Args:
        data: a prepared folder, a TokenStore, or token ids (list, numpy array or torch tensor [N]).
        split: "train" or "validation", for a folder.
        batch_size: samples per batch and rank.
        context: tokens per sample, S.
        seed: of the order.
        rank, world_size: this process among those that share the samples.
        packing: "stream": windows of all documents one behind the other; "best_fit": whole documents packed into rows
            (`fastlm.data.windows` has both in detail).
        verify: check the shards' checksums on opening.

    Raises:
        UserError: no prepared folder, a damaged shard, a number out of range, or too little text for one sample.
    """

    def __init__(
        self,
        data: Any,
        split: str = "train",
        batch_size: int = 8,
        context: int = 256,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        packing: str = "stream",
        verify: bool = True,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("context", context), ("world_size", world_size)):
            _at_least_one(name, value)
        if not 0 <= rank < world_size:
            raise UserError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if packing not in PACKINGS:
            raise UserError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
        self.store = open_split(data, split, verify=verify)
        self.batch_size, self.context, self.seed = batch_size, context, seed
        self.rank, self.world_size, self.packing = rank, world_size, packing
        self._samples = (StreamWindows if packing == "stream" else BestFitRows)(self.store, context, seed)
        self._position = 0

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one epoch, over all ranks."""
        return self._samples.count

    @property
    def epoch(self) -> float:
        """Epochs done, with a fraction."""
        return self._position / self.samples_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._position + self.rank * self.batch_size
        index = np.arange(first, first + self.batch_size, dtype=np.int64)
        tokens = np.empty((self.batch_size, self.context), np.int64)
        labels = np.empty_like(tokens)
        for row, sample in enumerate(index.tolist()):
            self._samples.fill(*divmod(sample, self.samples_per_epoch), tokens[row], labels[row])
        self._position += self.batch_size * self.world_size
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(index))

    def describe(self, index: int) -> str:
        """Where the sample of this global number lies, for messages: epoch, tokens and file."""
        epoch, k = divmod(int(index), self.samples_per_epoch)
        return f"sample {int(index)} (epoch {epoch}): {self._samples.describe(epoch, k)}"

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly here, as plain data: the place in the order and what the order depends on.

        Batch size and world size are not part of it: they may change when a run is resumed.
        """
        return {"position": self._position, **self._order_depends_on()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises UserError when seed, context, packing or the data differ: the order would be another one.
        """
        for name, mine in self._order_depends_on().items():
            if state.get(name) != mine:
                raise UserError(
                    f"cannot resume the data order: {name} was {state.get(name)!r} and is now {mine!r}; go on with the "
                    f"same data and settings, or begin a new run"
                )
        self._position = int(state["position"])

    def _order_depends_on(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "context": self.context,
            "packing": self.packing,
            "data": self.store.fingerprint,
        }


def evaluation_batches(
    data: Any, context: int, batch_size: int, *, split: str = "validation", verify: bool = True
) -> Iterator[Batch]:
    """Walks a split in order, each token the target exactly once (the very first has none before it to predict it from).

    Rows are windows of `context` tokens side by side; what the last row lacks is token 0 with label -100, and the last
    batch may have fewer rows. `index` counts the rows.

    Args:
        data: a prepared folder, a TokenStore, or token ids (list, numpy array or torch tensor [N]).
        context: tokens per row, S.
        batch_size: rows per batch.
        split: which split of a folder.
        verify: check the shards' checksums on opening.

    Raises:
        UserError: as `Loader`; fewer than two tokens.
    """
    _at_least_one("context", context)
    _at_least_one("batch_size", batch_size)
    store = open_split(data, split, verify=verify)
    if len(store) < 2:
        raise UserError(f"{store.name} holds {len(store)} tokens; at least 2 are needed to evaluate")
    return _walk(store, context, batch_size)


def _walk(store: Any, context: int, batch_size: int) -> Iterator[Batch]:
    targets = len(store) - 1
    rows = -(-targets // context)
    for first in range(0, rows, batch_size):
        count = min(batch_size, rows - first)
        start, stop = first * context, min((first + count) * context, targets)
        tokens = np.zeros(count * context, np.int64)
        labels = np.full(count * context, IGNORE, np.int64)
        store.read(start, stop, tokens[: stop - start])
        store.read(start + 1, stop + 1, labels[: stop - start])
        yield Batch(
            torch.from_numpy(tokens).view(count, context),
            torch.from_numpy(labels).view(count, context),
            torch.arange(first, first + count),
        )


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be an integer of at least 1, got {value!r}")
