"""Which text trains and which validates, and how often each document stands in an epoch."""

from __future__ import annotations

from fastlm.data.clean import chance
from fastlm.data.sources import Source
from fastlm.data.spool import Piece, Spool
from fastlm.errors import UserError


def split_documents(
    spool: Spool, sources: list[Source], explicit: int, *, how: str, fraction: float, seed: int
) -> tuple[list[Piece], list[Piece]]:
    """The pieces of train and of validation.

    Documents keep the order of their sources. A training document of a source with weight w stands floor(w) times, once
    more by a seeded draw of probability w - floor(w); the copies stand a whole pass apart. Validation documents stand
    once. The draws depend on a document's text and the seed alone.

    Args:
        spool: all documents.
        sources: by the numbers in `spool.sources`.
        explicit: how many of the first sources are for validation; if any, nothing else is split off.
        how: "document" holds out whole documents, at least one; "tail" the last characters of every document.
        fraction: the share that validates; 0 for none.
        seed: of the draws.

    Raises:
        UserError: a single document split by document, or a split without text.
    """
    validation = [Piece(i) for i, source in enumerate(spool.sources) if source < explicit]
    documents = [i for i, source in enumerate(spool.sources) if source >= explicit]
    if explicit and not validation:
        raise UserError("the validation_sources hold no usable text; name other files, or leave validation_sources out")
    train = [Piece(i) for i in documents]
    if not explicit and fraction:
        if how == "tail":
            train, validation = _tails(spool, documents, fraction)
        else:
            chosen = _held_out(spool, documents, fraction, seed)
            train = [Piece(i) for i in documents if i not in chosen]
            validation = [Piece(i) for i in documents if i in chosen]
    copies = [_copies(spool, sources, piece.document, seed) for piece in train]
    train = [piece for turn in range(max(copies, default=0)) for piece, n in zip(train, copies) if n > turn]
    if not train:
        raise UserError("no training document is left; give the sources more text or a larger weight")
    return train, validation


def _held_out(spool: Spool, documents: list[int], fraction: float, seed: int) -> set[int]:
    if len(documents) < 2:
        raise UserError(
            "a single document cannot be split by document; use split: tail (its end validates), validation_sources, or "
            "validation_fraction: 0"
        )
    draws = {i: chance(spool.digests[i], seed, "split") for i in documents}
    # At least one document validates and one trains, however few there are.
    ranked = sorted(documents, key=draws.__getitem__)
    return {i for i in ranked[:-1] if draws[i] < fraction} or {ranked[0]}


def _tails(spool: Spool, documents: list[int], fraction: float) -> tuple[list[Piece], list[Piece]]:
    train, validation = [], []
    for i in documents:
        length = len(spool.read(Piece(i)))
        cut = int(length * (1 - fraction))
        train += [Piece(i, 0, cut)] if cut else []
        validation += [Piece(i, cut, length)] if cut < length else []
    return train, validation


def _copies(spool: Spool, sources: list[Source], document: int, seed: int) -> int:
    whole, part = divmod(sources[spool.sources[document]].weight, 1)
    return int(whole) + (chance(spool.digests[document], seed, "weight") < part)
