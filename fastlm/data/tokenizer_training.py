"""Training of tokenizers: characters, byte-level BPE, WordPiece and Unigram."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fastlm.data.tokenizer import _EVERY_CHARACTER, EOS, KINDS, UNK, Tokenizer
from fastlm.errors import UserError


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    vocab_size: int,
    *,
    eos: bool = True,
    unk: bool = False,
    special_tokens: tuple[str, ...] = (),
    lowercase: bool = False,
) -> Tokenizer:
    """Trains a tokenizer. Special tokens come first in the vocabulary.

    Args:
        kind: "char": the characters seen, the most frequent ones if they are more than `vocab_size`; "bpe": byte-level
            BPE (Sennrich et al., 2016, arXiv 1508.07909; on bytes as in GPT-2), which can express every text;
            "wordpiece" (Schuster and Nakajima, 2012); "unigram" (Kudo, 2018, arXiv 1804.10959).
        texts: documents; they are read once.
        vocab_size: the most entries the vocabulary may have, special tokens counted.
        eos: add the end-of-text token "<|endoftext|>".
        unk: char only: add "<unk>" although every character fits. The other kinds have it where they need it.
        special_tokens: more special tokens, such as "[MASK]".
        lowercase: lower-case every text before it is encoded, as the training text was.

    Raises:
        UserError: unknown kind, a vocabulary too small for the kind, or no text.
    """
    if kind not in KINDS:
        raise UserError(f"tokenizer kind must be one of {', '.join(KINDS)}, got {kind!r}")
    specials = list(dict.fromkeys([*([EOS] if eos else []), *special_tokens]))
    if kind == "char":
        backend = _characters(texts, vocab_size, specials, unk)
    else:
        backend = _subwords(kind, texts, vocab_size, specials)
    if lowercase:
        from tokenizers import normalizers

        backend.normalizer = normalizers.Lowercase()
    return Tokenizer(backend, {"eos_token": EOS} if eos else {})


def _characters(texts: Iterable[str], vocab_size: int, specials: list[str], unk: bool) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    counts = np.zeros(0x110000, np.int64)
    for text in _joined(texts):
        counts += np.bincount(np.frombuffer(text.encode("utf-32-le"), np.uint32), minlength=counts.size)
    seen = np.flatnonzero(counts)
    if not seen.size:
        raise UserError("there is no text to train the tokenizer on")
    unk = unk or seen.size + len(specials) > vocab_size
    specials = [*specials, UNK] if unk and UNK not in specials else specials
    room = vocab_size - len(specials)
    if room < 1:
        raise UserError(f"a character vocabulary needs room for characters: vocab_size {vocab_size} is too small")
    if seen.size > room:
        by_count = np.argsort(-counts[seen], kind="stable")  # ties by code point
        seen = np.sort(seen[by_count[:room]])
    vocabulary = {token: id for id, token in enumerate([*specials, *map(chr, seen.tolist())])}
    # Without "<unk>" in the vocabulary the model refuses an unknown character, which beats dropping it silently.
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_EVERY_CHARACTER), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return backend


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """The texts in strings of a million characters or more, for a table of all code points is counted per string."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size > 1_000_000:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)


def _subwords(kind: str, texts: Iterable[str], vocab_size: int, specials: list[str]) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if kind != "bpe" and UNK not in specials:
        specials = [UNK, *specials]
    smallest = len(specials) + (256 if kind == "bpe" else 1)
    if vocab_size < smallest:
        raise UserError(f"a {kind} vocabulary needs at least {smallest} entries, got vocab_size {vocab_size}")
    common = {"vocab_size": vocab_size, "special_tokens": specials, "show_progress": False}
    if kind == "bpe":
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **common)
    elif kind == "wordpiece":
        backend = Backend(models.WordPiece(unk_token=UNK))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**common)
    else:
        backend = Backend(models.Unigram())
        # By lines first: words would run over line ends otherwise. Both this and a seed of 30 candidates per entry
        # (the library takes a million) halve the training time: 101 -> 38 s on 8.5 MB of Python, for 2% more tokens.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
        )
        backend.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(unk_token=UNK, seed_size=min(30 * vocab_size, 1_000_000), **common)
    counted = _Counted(texts)
    try:
        backend.train_from_iterator(counted, trainer)
    except Exception as error:
        if not counted.characters:
            raise UserError("there is no text to train the tokenizer on") from error
        raise UserError(f"the {kind} tokenizer cannot be trained: {' '.join(str(error).split())}") from error
    if not counted.characters:
        raise UserError("there is no text to train the tokenizer on")
    return backend


class _Counted:
    """An iterator that remembers whether any text came by."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.characters = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.characters += len(text)
        return text
