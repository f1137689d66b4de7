"""The tokenizer: Hugging Face tokenizers behind a small interface, trained here or loaded from any tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.files import write_text
from fastlm.errors import UserError

KINDS = ("char", "bpe", "wordpiece", "unigram")
EOS = "<|endoftext|>"
UNK = "<unk>"
_EVERY_CHARACTER = r"[\s\S]"
# Looked for, in this order, where no tokenizer_config.json names the end of text.
_KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>")
_CHUNK = 1 << 17  # characters of one document that are encoded at once where cutting is exact


class Tokenizer:
    """Text to token ids and back.

    `eos_id`, `bos_id` and `pad_id` are None where the tokenizer has no such token. Text is taken as text: "<|endoftext|>"
    inside a document is encoded as those characters, not as the special token, unless `specials=True`.

    Made by `load_tokenizer` or `train_tokenizer`.
    """

    def __init__(self, backend: Any, settings: dict[str, Any] | None = None) -> None:
        """Wraps a `tokenizers.Tokenizer`; `settings` is the content of its tokenizer_config.json."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._with_specials: Any = None
        self._spec = json.loads(backend.to_str())
        self._settings = dict(settings or {})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.eos_id, self.bos_id, self.pad_id = (self._special(name) for name in ("eos", "bos", "pad"))
        if self.eos_id is None and "eos_token" not in self._settings:
            self.eos_id = next((vocabulary[token] for token in _KNOWN_EOS if token in vocabulary), None)
        self._table = self._character_table()

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, vocab_size={self.vocab_size}, eos_id={self.eos_id})"

    @property
    def kind(self) -> str:
        """ "char" or the model type that tokenizer.json names: "BPE", "WordPiece", "Unigram", "WordLevel"."""
        return "char" if self._table is not None else self._spec["model"].get("type") or "BPE"

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """The token ids of a text; nothing is added at either end.

        Args:
            text: any string.
            specials: read special tokens such as "<|endoftext|>" that are spelled out in the text as those tokens.

        Raises:
            UserError: a character that the vocabulary cannot express, or half a surrogate pair.
        """
        if specials:
            return self._encode_with_specials(text)
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of many texts, encoded in parallel: one int64 array per text. Raises as `encode`."""
        try:
            if self._table is not None:
                return [self._characters(text) for text in texts]
            if not self._cuts_exactly():
                return [_ids(encoding) for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
            pieces = [_cut(text, _CHUNK) for text in texts]
            flat = [piece for group in pieces for piece in group]
            encoded = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
            return [np.concatenate([_ids(next(encoded)) for _ in group]) for group in pieces]
        except UserError:
            raise
        except Exception as error:  # tokenizers raises plain Exception and, for surrogates, TypeError
            raise self._encode_error(texts, error) from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. `decode(encode(x)) == x` for byte-level BPE, and for char with known characters.

        Raises UserError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, id: int) -> str | None:
        """The vocabulary entry of an id as tokenizer.json spells it; None if there is none."""
        return self._backend.id_to_token(int(id))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers' PreTrainedTokenizerFast reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, id in (("eos_token", self.eos_id), ("bos_token", self.bos_id), ("pad_token", self.pad_id)):
            if id is not None:
                settings[name] = self.token(id)
        if isinstance(self._spec["model"].get("unk_token"), str):
            settings["unk_token"] = self._spec["model"]["unk_token"]
        write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", json.dumps({**settings, **self._settings}, indent=2) + "\n")

    def _special(self, name: str) -> int | None:
        token = self._settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(token) if isinstance(token, str) else None

    def _encode_with_specials(self, text: str) -> list[int]:
        if self._with_specials is None:
            from tokenizers import Tokenizer as Backend

            # A second object: the switch lives in the tokenizer, and threads may be encoding with the first one.
            self._with_specials = Backend.from_str(self._backend.to_str())
            self._with_specials.encode_special_tokens = False
        try:
            return self._with_specials.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise self._encode_error([text], error) from error

    def _character_table(self) -> np.ndarray | None:
        """Code point to id (-1 unknown) when the tokenizer is one of ours by characters, else None.

        A table look-up encodes 100x as fast as the library's WordLevel model, with the same ids.
        """
        spec, model = self._spec, self._spec["model"]
        split = spec.get("pre_tokenizer") or {}
        if model.get("type") != "WordLevel" or split.get("pattern") != {"Regex": _EVERY_CHARACTER}:
            return None
        if spec.get("normalizer") or not self._only_special_tokens_added():
            return None
        codes = {ord(token): id for token, id in model["vocab"].items() if len(token) == 1}
        table = np.full(max(codes, default=0) + 2, -1, np.int64)  # the last entry stands for every larger code point
        table[list(codes)] = list(codes.values())
        return table

    def _characters(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        unknown = ids < 0
        if unknown.any():
            unk = self._spec["model"]["vocab"].get(self._spec["model"].get("unk_token"))
            if unk is None:
                raise self._unknown(text[int(unknown.argmax())])
            ids[unknown] = unk
        return ids

    def _cuts_exactly(self) -> bool:
        """Whether a text may be cut before a line end that follows a letter or digit without changing its tokens.

        So for byte-level BPE with GPT-2's own pattern, which has no rule that looks across such a place.
        """
        step = self._spec.get("pre_tokenizer") or {}
        plain = step.get("type") == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space")
        return plain and not self._spec.get("normalizer") and self._only_special_tokens_added()

    def _only_special_tokens_added(self) -> bool:
        return all(token["special"] for token in self._spec.get("added_tokens", []))

    def _unknown(self, character: str) -> UserError:
        return UserError(
            f"character {character!r} is not in the vocabulary of this character tokenizer ({self.vocab_size} entries, "
            f"no {UNK}); leave it out, or prepare the data with text that has it"
        )

    def _encode_error(self, texts: Sequence[str], error: Exception) -> UserError:
        for text in texts:
            half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if half is not None:
                return UserError(
                    f"the text holds {half!r}, half of a surrogate pair; it is not valid unicode: remove it"
                )
        if self._table is not None:
            known = self._spec["model"]["vocab"]
            return self._unknown(next((c for text in texts for c in text if c not in known), ""))
        return UserError(f"the tokenizer cannot encode this text: {' '.join(str(error).split())}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.json, or a folder that holds one (special tokens from its tokenizer_config.json, else its
    special_tokens_map.json).

    Raises UserError for a missing or unreadable file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"tokenizer {path} does not exist; expected a tokenizer.json or a folder that holds one")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"tokenizer folder {path} has no tokenizer.json; make one with transformers: "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:
        raise UserError(f"tokenizer file {file} cannot be read: {' '.join(str(error).split())}") from error
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        side = file.parent / name
        if side.is_file():
            try:
                settings.update(json.loads(side.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise UserError(f"tokenizer settings {side} cannot be read: {error}") from error
    return Tokenizer(backend, settings)


def _ids(encoding: Any) -> np.ndarray:
    return np.array(encoding.ids, np.int64)


def _cut(text: str, size: int) -> list[str]:
    """The text in pieces of at least `size` characters, cut before a line end that follows a letter or digit."""
    pieces, start = [], 0
    while len(text) - start > size:
        at = text.find("\n", start + size)
        while at != -1 and not text[at - 1].isalnum():
            at = text.find("\n", at + 1)
        if at == -1:
            break
        pieces.append(text[start:at])
        start = at
    return [*pieces, text[start:]]
