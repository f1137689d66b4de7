"""Text cleaning, and the report that counts everything reading and cleaning met."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata

NORMALIZATIONS = ("NFC", "NFKC", "none")

# C0 and C1 controls and DEL, but not \t and \n; and halves of surrogate pairs (a JSON escape such as "\ud800" makes
# them), which UTF-8 cannot hold. Format characters such as the zero-width joiner stay: some scripts and emoji need them.
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclasses.dataclass
class CleaningReport:
    """What reading and cleaning met. `str(report)` is a small table of the counts that are not zero."""

    files_read: int = 0
    files_binary: int = 0
    files_not_utf8: int = 0
    files_unreadable: int = 0
    lines_malformed: int = 0
    lines_without_text: int = 0
    documents_empty: int = 0
    documents_duplicate: int = 0
    documents_normalized: int = 0
    line_endings_changed: int = 0
    control_characters_removed: int = 0
    documents_kept: int = 0
    bytes_kept: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def skip(self, count: str, what: str) -> None:
        """Counts one skipped thing under the field `count`; the first five are kept by name."""
        setattr(self, count, getattr(self, count) + 1)
        if len(self.examples) < 5:
            self.examples.append(what)

    def rows(self) -> list[tuple[str, int]]:
        """(label, count) for every count that is not zero."""
        return [(label, getattr(self, name)) for name, label in _LABELS.items() if getattr(self, name)]

    def skipped(self) -> str:
        """One line for error messages, such as "3 files binary, 1 line malformed"; empty when nothing was skipped."""
        return ", ".join(f"{count:,} {label}" for label, count in self.rows() if label in _SKIPPED)

    def __str__(self) -> str:
        lines = [f"  {label:<32}{count:>14,}" for label, count in self.rows()]
        return "\n".join(["reading and cleaning", *lines, *(f"  skipped: {example}" for example in self.examples)])


_LABELS = {
    "files_read": "files read",
    "files_binary": "binary files",
    "files_not_utf8": "files not UTF-8",
    "files_unreadable": "unreadable files",
    "lines_malformed": "malformed JSON lines",
    "lines_without_text": "JSON lines without text",
    "documents_empty": "empty documents",
    "documents_duplicate": "duplicate documents",
    "documents_normalized": "documents normalised",
    "line_endings_changed": "line endings changed to \\n",
    "control_characters_removed": "control characters removed",
    "documents_kept": "documents kept",
    "bytes_kept": "bytes of text kept",
}
_SKIPPED = {
    _LABELS[name]
    for name in (
        "files_binary",
        "files_not_utf8",
        "files_unreadable",
        "lines_malformed",
        "lines_without_text",
        "documents_empty",
        "documents_duplicate",
    )
}


def clean_text(text: str, report: CleaningReport, *, normalization: str = "NFC", lowercase: bool = False) -> str:
    """The cleaned text: \\r\\n and \\r to \\n, control characters (not \\n, \\t) and lone surrogates removed, unicode
    normalised ("NFC", "NFKC" or "none"), then lower-cased if asked. Cleaning twice changes nothing more.

    Changes are counted in `report`.
    """
    if "\r" in text:
        report.line_endings_changed += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text, removed = _UNWANTED.subn("", text)
    report.control_characters_removed += removed
    if normalization != "none":
        normal = unicodedata.normalize(normalization, text)
        report.documents_normalized += normal != text
        text = normal
    if lowercase:
        text = text.lower()
        if normalization != "none":  # lower-casing can leave sequences that compose
            text = unicodedata.normalize(normalization, text)
    return text


def fingerprint(text: str) -> bytes:
    """16 bytes of BLAKE2b over the text's UTF-8: equal documents are equal here."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def chance(digest: bytes, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on a document's fingerprint, the seed and the purpose alone: the same document
    gets the same draw wherever it stands in the corpus."""
    key = (seed % 2**64).to_bytes(8, "little")
    draw = hashlib.blake2b(digest, digest_size=8, key=key, person=purpose.encode()[:16]).digest()
    return (int.from_bytes(draw, "little") >> 11) / 2**53
