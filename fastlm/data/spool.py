"""Cleaned documents on disk between the passes of `prepare`, so that memory holds an index and not the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastlm.data.clean import fingerprint


class Piece(NamedTuple):
    """A document, or a part of it: characters start..stop of document number `document`."""

    document: int
    start: int = 0
    stop: int | None = None


class Spool:
    """Documents in one temporary file: append first, then read in any order.

    `digests[i]` is the fingerprint of document i, `sources[i]` the number of the source it came from and `sizes[i]` its
    bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "w+b")  # noqa: SIM115, closed by close
        self._offsets: list[int] = []
        self._end = 0
        self.sizes: list[int] = []
        self.digests: list[bytes] = []
        self.sources: list[int] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def append(self, text: str, source: int) -> None:
        """Adds a document."""
        data = text.encode("utf-8")
        self._file.write(data)
        self._offsets.append(self._end)
        self._end += len(data)
        self.sizes.append(len(data))
        self.digests.append(fingerprint(text))
        self.sources.append(source)

    def read(self, piece: Piece) -> str:
        """The text of a piece."""
        self._file.seek(self._offsets[piece.document])
        text = self._file.read(self.sizes[piece.document]).decode("utf-8")
        return text[piece.start : piece.stop]

    def texts(self, pieces: Iterable[Piece]) -> Iterator[str]:
        """The texts of pieces, one after the other."""
        return map(self.read, pieces)

    def runs(self, pieces: list[Piece], size: int = 1 << 22) -> Iterator[list[Piece]]:
        """The pieces in runs whose documents have about `size` bytes of text together."""
        run, held = [], 0
        for piece in pieces:
            run.append(piece)
            held += self.sizes[piece.document]
            if held >= size:
                yield run
                run, held = [], 0
        if run:
            yield run

    def close(self) -> None:
        """Closes and removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)
