"""Token shards: memory-mapped files of token ids with a header, document boundaries and a checksum.

A shard, all little-endian:

    offset  bytes
         0      8  magic b"fastlmTK"
         8      4  version (1)
        12      4  bytes per token: 2 (uint16) or 4 (uint32)
        16      8  token count
        24      8  document count
        32      8  vocabulary size
        40      4  CRC-32 of everything behind the header
        44     16  zero
        60      4  CRC-32 of the 60 bytes before it
        64         the tokens, then zeros up to a multiple of 8 bytes
                   the end of each document, counted in tokens from the start of the shard, 8 bytes each
"""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from fastlm.errors import UserError

MAGIC = b"fastlmTK"
VERSION = 1
HEADER_BYTES = 64
_HEADER = struct.Struct("<8sIIQQQI16x")
_BLOCK = 1 << 22
_REMEDY = "prepare the data again with `fastlm data prepare`"


@dataclasses.dataclass(frozen=True)
class Shard:
    """An open shard.

    Args:
        path: the file.
        tokens: uint16 or uint32 [N], read-only memory map.
        document_ends: uint64 [documents], the end of each document in tokens.
        vocab_size: every token id is below it.
        checksum: CRC-32 of the content.
    """

    path: Path
    tokens: np.ndarray
    document_ends: np.ndarray
    vocab_size: int
    checksum: int


class ShardWriter:
    """Writes the shards of one split: `<split>-00000.bin`, `<split>-00001.bin`, ...

    Documents stay whole: a new shard begins when the next document would pass the limit, so only a document longer than
    the limit makes a longer shard. Each shard is written to a temporary name and renamed when it is complete.

    Args:
        folder: where the shards go; it must exist.
        split: "train" or "validation".
        vocab_size: above 65,536 tokens are stored as uint32, else as uint16.
        shard_tokens: the most tokens in a shard.
    """

    def __init__(self, folder: str | Path, split: str, vocab_size: int, shard_tokens: int = 2**28) -> None:
        self._folder, self._split = Path(folder), split
        self._vocab_size, self._limit = vocab_size, shard_tokens
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._file = None
        self.shards: list[dict] = []

    def add(self, tokens: np.ndarray) -> None:
        """Appends one document: integer ids [N], each below the vocabulary size."""
        assert not len(tokens) or (np.min(tokens) >= 0 and np.max(tokens) < self._vocab_size), "id outside vocabulary"
        if self._file is not None and self._tokens + len(tokens) > self._limit:
            self._finish()
        if self._file is None:
            self._begin()
        self._write(np.asarray(tokens).astype(self._dtype).tobytes())
        self._tokens += len(tokens)
        self._ends.append(self._tokens)

    def close(self) -> list[dict]:
        """Completes the last shard. Returns name, tokens, documents and checksum of each shard, for meta.json."""
        if self._file is not None:
            self._finish()
        return self.shards

    def abort(self) -> None:
        """Drops the shard under way; the completed ones stay."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._temporary.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._name = f"{self._split}-{len(self.shards):05d}.bin"
        self._temporary = self._folder / f".{self._name}.tmp-{os.getpid()}"
        self._file = open(self._temporary, "wb")  # noqa: SIM115, closed by _finish or abort
        self._file.write(bytes(HEADER_BYTES))
        self._tokens, self._checksum = 0, 0
        self._ends: list[int] = []

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)

    def _finish(self) -> None:
        self._write(bytes(-self._tokens * self._dtype.itemsize % 8))
        self._write(np.array(self._ends, "<u8").tobytes())
        counts = (self._tokens, len(self._ends), self._vocab_size, self._checksum)
        head = _HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, *counts)
        self._file.seek(0)
        self._file.write(head + struct.pack("<I", zlib.crc32(head)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(self._temporary, self._folder / self._name)
        self.shards.append(
            {"name": self._name, "tokens": counts[0], "documents": counts[1], "checksum": f"{counts[3]:08x}"}
        )


def open_shard(path: str | Path, *, verify: bool = True) -> Shard:
    """Opens a shard: magic, version, sizes and the header's checksum always, the content's checksum if `verify`.

    Verifying reads the file once (about 1 GB/s where it is in memory).

    Raises:
        UserError: the file is missing, is no shard, is truncated or is corrupted.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            width, tokens, documents, vocab_size, checksum = _parse_header(path, head)
            index = HEADER_BYTES + -(-tokens * width // 8) * 8
            expected = index + 8 * documents
            if size != expected:
                what = "truncated" if size < expected else "too long"
                raise UserError(f"token shard {path} is {what}: expected {expected:,} bytes, got {size:,}; {_REMEDY}")
            if verify:
                found = 0
                while block := file.read(_BLOCK):
                    found = zlib.crc32(block, found)
                if found != checksum:
                    raise UserError(
                        f"token shard {path} is corrupted: its checksum is {found:08x}, expected {checksum:08x}; {_REMEDY}"
                    )
    except FileNotFoundError as error:
        raise UserError(f"token shard {path} does not exist; {_REMEDY}") from error
    except OSError as error:
        raise UserError(f"token shard {path} cannot be read: {error.strerror or error}") from error
    dtype = np.dtype("<u2" if width == 2 else "<u4")
    ids = np.memmap(path, dtype, "r", HEADER_BYTES, (tokens,)) if tokens else np.zeros(0, dtype)
    ends = np.fromfile(path, "<u8", documents, offset=index)
    return Shard(path, ids, ends, vocab_size, checksum)


def _parse_header(path: Path, head: bytes) -> tuple[int, int, int, int, int]:
    if len(head) < HEADER_BYTES:
        raise UserError(f"token shard {path} is truncated: {len(head)} bytes, less than its header; {_REMEDY}")
    magic, version, width, tokens, documents, vocab_size, checksum = _HEADER.unpack_from(head)
    if magic != MAGIC:
        raise UserError(f"{path} is not a token shard: it begins with {magic!r}, expected {MAGIC!r}; {_REMEDY}")
    if struct.unpack_from("<I", head, HEADER_BYTES - 4)[0] != zlib.crc32(head[: HEADER_BYTES - 4]):
        raise UserError(f"token shard {path} is corrupted: the checksum of its header does not match; {_REMEDY}")
    if version != VERSION or width not in (2, 4):
        raise UserError(f"token shard {path} has version {version}, this fastlm reads version {VERSION}; {_REMEDY}")
    return width, tokens, documents, vocab_size, checksum
