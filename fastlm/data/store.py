"""The tokens of one split as one sequence, whether they lie in shards or in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.shards import open_shard
from fastlm.errors import UserError

META = "meta.json"
FORMAT = "fastlm tokens 1"


class TokenStore:
    """All tokens of a split, shards one behind the other.

    `len(store)` is the token count; `vocab_size` bounds the ids; `document_ends` is int64 [documents], counted in tokens
    from the start of the split; `fingerprint` is a string that differs when the tokens differ; `name` is for messages.
    """

    def __init__(self, parts: Sequence[np.ndarray], document_ends: np.ndarray, vocab_size: int, name: str, key: str):
        self._parts = list(parts)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])]).astype(np.int64)
        self.document_ends = document_ends
        self.vocab_size = vocab_size
        self.name = name
        self.fingerprint = key

    @classmethod
    def from_tokens(cls, tokens: Any, document_ends: Any = None) -> TokenStore:
        """A store over ids in memory: a list, numpy array or torch tensor [N]; one document unless ends are given."""
        tokens = np.ascontiguousarray(tokens)
        if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
            raise UserError(f"tokens must be integers in one dimension, got {tokens.dtype} of shape {tokens.shape}")
        ends = np.asarray([tokens.size] if document_ends is None else document_ends, np.int64)
        key = hashlib.blake2b(tokens.tobytes() + ends.tobytes(), digest_size=8).hexdigest()
        return cls([tokens], ends, int(tokens.max()) + 1 if tokens.size else 0, "tokens in memory", key)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copies tokens start..stop-1 into `out`, int64 [stop - start]. Both ends must lie inside the split."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        part = int(np.searchsorted(self._starts, start, "right")) - 1
        done = 0
        while done < stop - start:
            piece = self._parts[part][start + done - self._starts[part] : stop - self._starts[part]]
            out[done : done + len(piece)] = piece
            done += len(piece)
            part += 1


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The meta.json of a prepared folder. Raises UserError where the folder is not one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"prepared data folder {folder} does not exist; make it with `fastlm data prepare`")
    path = folder / META
    if not path.is_file():
        raise UserError(f"folder {folder} holds no prepared data (no {META}); make it with `fastlm data prepare`")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise UserError(f"{path}: expected format {FORMAT!r}, got {meta['format']!r}; prepare the data again")
        return meta
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error!r}); prepare the data again") from error


def open_split(data: Any, split: str = "train", *, verify: bool = True) -> TokenStore:
    """Opens a split of a prepared folder; a TokenStore comes back as it is and a sequence of ids becomes one.

    Args:
        data: folder, TokenStore, or token ids (list, numpy array or torch tensor [N]).
        split: "train" or "validation"; only for folders.
        verify: check every shard's checksum.

    Raises:
        UserError: no prepared folder, no such split, or a missing, truncated or corrupted shard.
    """
    if isinstance(data, TokenStore):
        return data
    if not isinstance(data, (str, Path)):
        return TokenStore.from_tokens(data)
    folder = Path(data)
    meta = read_meta(folder)
    if split not in meta["splits"]:
        raise UserError(
            f"{folder} has no {split!r} split, only {', '.join(meta['splits'])}; prepare it with a validation_fraction "
            f"above 0 or with validation_sources"
        )
    parts, ends, total = [], [], 0
    key = hashlib.blake2b(digest_size=8)
    for entry in meta["splits"][split]["shards"]:
        shard = open_shard(folder / entry["name"], verify=verify)
        if f"{shard.checksum:08x}" != entry["checksum"] or len(shard.tokens) != entry["tokens"]:
            raise UserError(f"token shard {shard.path} is not the one {folder / META} lists; prepare the data again")
        parts.append(shard.tokens)
        ends.append(shard.document_ends.astype(np.int64) + total)
        total += len(shard.tokens)
        key.update(f"{entry['tokens']} {entry['checksum']};".encode())
    return TokenStore(parts, np.concatenate(ends), meta["vocab_size"], f"{folder} ({split})", key.hexdigest())
