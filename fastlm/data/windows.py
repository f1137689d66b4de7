"""Which tokens make up sample k of epoch e: windows of the stream, or rows packed with whole documents."""

from __future__ import annotations

import numpy as np

from fastlm.data.packing import best_fit, mix_seed, permutation
from fastlm.data.store import TokenStore
from fastlm.errors import UserError

IGNORE = -100
_OFFSET, _ORDER, _ROWS = 1, 2, 3  # purposes: each draws from a seed of its own


class StreamWindows:
    """Documents one behind the other, cut into windows of `context` + 1 tokens that overlap by the last one.

    Every epoch shifts the windows by a seeded offset below `context` and visits them in a seeded order, so that no
    position is a target twice in an epoch; fewer than 2 * context tokens at the two ends are left out of an epoch.
    """

    def __init__(self, store: TokenStore, context: int, seed: int) -> None:
        if len(store) < context + 1:
            raise UserError(
                f"{store.name} holds {len(store):,} tokens, too few for one sample of context {context}; use more text "
                f"or a context of at most {max(len(store) - 1, 0)}"
            )
        self._store, self._context, self._seed = store, context, seed
        self.count = max(1, (len(store) - context) // context)
        self._epoch = -1

    def fill(self, epoch: int, k: int, tokens: np.ndarray, labels: np.ndarray) -> None:
        """Writes sample k of an epoch: tokens and labels are int64 [context]."""
        start = self._start(epoch, k)
        window = np.empty(self._context + 1, np.int64)
        self._store.read(start, start + self._context + 1, window)
        tokens[:], labels[:] = window[:-1], window[1:]

    def describe(self, epoch: int, k: int) -> str:
        """Where sample k of an epoch lies."""
        start = self._start(epoch, k)
        return f"tokens {start:,} to {start + self._context:,} of {self._store.name}"

    def _start(self, epoch: int, k: int) -> int:
        if epoch != self._epoch:
            room = len(self._store) - self.count * self._context  # offsets 0..room-1 fit
            self._offset = mix_seed(self._seed, epoch, _OFFSET) % min(self._context, room)
            self._order = permutation(self.count, mix_seed(self._seed, epoch, _ORDER))
            self._epoch = epoch
        return self._offset + int(self._order[k]) * self._context


class BestFitRows:
    """Rows of `context` tokens packed with whole documents by best fit; longer documents are cut into pieces first.

    Labels are the next token of the same document; the last token of a document and the padding (token 0) have -100. A
    document's pieces lose no target: the last label of a piece is the first token of the next one. Every epoch packs
    and orders anew by the seed; the number of rows stays.
    """

    def __init__(self, store: TokenStore, context: int, seed: int) -> None:
        self._store, self._context, self._seed = store, context, seed
        ends = store.document_ends
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        pieces = -(-(ends - starts) // context)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = np.repeat(starts, pieces) + (np.arange(pieces.sum()) - first) * context
        self._ends = np.repeat(ends, pieces)  # of the document
        live = self._ends - self._starts > 1  # a last token alone has no target
        self._starts, self._ends = self._starts[live], self._ends[live]
        self._lengths = np.minimum(self._ends - self._starts, context)
        if not self._lengths.size:
            raise UserError(f"{store.name} holds no document of two tokens or more; use more text")
        self.count = 0
        self._epoch = -1
        self._pack(0)

    def fill(self, epoch: int, k: int, tokens: np.ndarray, labels: np.ndarray) -> None:
        """Writes sample k of an epoch: tokens and labels are int64 [context]."""
        tokens[:], labels[:] = 0, IGNORE
        at = 0
        for piece in self._row(epoch, k):
            start, length = int(self._starts[piece]), int(self._lengths[piece])
            targets = min(length, int(self._ends[piece]) - start - 1)
            self._store.read(start, start + length, tokens[at : at + length])
            self._store.read(start + 1, start + 1 + targets, labels[at : at + targets])
            at += length

    def describe(self, epoch: int, k: int) -> str:
        """Where the documents of sample k of an epoch lie."""
        starts = ", ".join(f"{int(self._starts[piece]):,}" for piece in self._row(epoch, k))
        return f"documents at tokens {starts} of {self._store.name}"

    def _row(self, epoch: int, k: int) -> np.ndarray:
        if epoch != self._epoch:
            self._pack(epoch)
        row = self._order[k]
        return self._pieces[self._row_starts[row] : self._row_starts[row + 1]]

    def _pack(self, epoch: int) -> None:
        shuffled = permutation(len(self._lengths), mix_seed(self._seed, epoch, _ROWS))
        rows, offsets = best_fit(self._lengths[shuffled], self._context)
        self.count = int(rows.max()) + 1
        self._pieces = shuffled[np.lexsort((offsets, rows))]
        self._row_starts = np.searchsorted(np.sort(rows), np.arange(self.count + 1))
        self._order = permutation(self.count, mix_seed(self._seed, epoch, _ORDER))
        self._epoch = epoch
