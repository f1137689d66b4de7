"""Tokens to text while they come: only characters that later tokens cannot change, and never a stop string."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastlm.errors import UserError

_UNFINISHED = "\ufffd"  # what decoders put for bytes that are not (yet) a character
_CONTEXT = 4  # prompt tokens decoded with the first new one: some tokenizers drop a space at the start of a text


class TextStream:
    """Text of one growing sequence of tokens.

    Held back until it is settled: bytes of an unfinished character (a token of a byte-level tokenizer may end inside one), and
    whatever may turn out to be the beginning of a stop string. The pieces one behind the other are
    `tokenizer.decode(tokens)` up to, and without, the first stop string. (A token costs two decodings of a few tokens,
    however long the text.)

    Attributes:
        text: all settled text.
        stopped: a stop string came.

    Args:
        tokenizer: with `decode(ids) -> str`.
        write: called with each new piece of settled text, if not empty.
        stop_strings: the earliest in the text wins; of several at one place, the text ends there all the same.
        prompt: ids that come before the first token; not part of the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], None] | None = None,
        stop_strings: str | Iterable[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._stops = check_stop_strings(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._ids = [int(token) for token in prompt[-_CONTEXT:]]
        # Tokens before _done are final. The window decoded begins at _start, one settled group earlier, because decoders
        # treat the start of a text differently; _shown characters of the window are in _final.
        self._start, self._done = 0, len(self._ids)
        self._shown = len(tokenizer.decode(self._ids)) if self._ids else 0
        self._final = ""  # all characters that later tokens cannot change
        self._lengths: list[int] = []  # of _final after each token
        self.text = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """Takes the next token. Returns the text that it settled, "" if none."""
        if self.stopped:
            return ""
        self._ids.append(int(token))
        window = self._tokenizer.decode(self._ids[self._start :])
        tail = len(window) - len(window.rstrip(_UNFINISHED))
        # A character has at most 4 bytes, of which up to 3 can wait for the last.
        self._take(window[: len(window) - min(tail, 3)])
        self._lengths.append(len(self._final))
        if not tail:
            self._start, self._done = self._done, len(self._ids)
            self._shown = len(self._tokenizer.decode(self._ids[self._start :]))
        return self._settle(hold=True)

    def end(self) -> str:
        """No token follows: settles what was held back and returns it."""
        if self.stopped:
            return ""
        self._take(self._tokenizer.decode(self._ids[self._start :]))
        return self._settle(hold=False)

    def tokens_before_stop(self) -> int:
        """How many tokens hold the text before the stop string; the last may also hold the stop string's beginning."""
        if not self.text:
            return 0
        return min(bisect.bisect_left(self._lengths, len(self.text)) + 1, len(self._lengths))

    def _take(self, window: str) -> None:
        """Makes the characters of decode(ids[_start:]) final up to the end of `window`."""
        self._final += window[self._shown :]
        self._shown = max(self._shown, len(window))

    def _settle(self, hold: bool) -> str:
        known = len(self.text)
        places = [at for at in (self._final.find(stop, known) for stop in self._stops) if at >= 0]
        if places:
            self.stopped = True
            end = min(places)
        else:
            end = len(self._final) - (self._held() if hold else 0)
        piece = self._final[known:end]
        self.text += piece
        if piece and self._write is not None:
            self._write(piece)
        return piece

    def _held(self) -> int:
        """Characters at the end that a stop string begins with."""
        for size in range(min(self._longest - 1, len(self._final) - len(self.text)), 0, -1):
            if any(stop.startswith(self._final[-size:]) for stop in self._stops):
                return size
        return 0


def check_stop_strings(stop_strings: str | Iterable[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; one string counts as one. Raises UserError for an empty one or what is no string."""
    stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UserError(f"generate: stop_strings must be strings of at least one character, got {stop!r}")
    return stops


def print_piece(piece: str) -> None:
    """Writes a piece of text to the terminal at once; characters that its encoding lacks become "?"."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
