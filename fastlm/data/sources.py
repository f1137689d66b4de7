"""Where text comes from: files, folders, globs and JSON lines, read into documents. Bad input is counted, not raised."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastlm.data.clean import CleaningReport
from fastlm.errors import UserError

_SNIFF = 8192
_UNREADABLE = (OSError, EOFError, zlib.error)


@dataclasses.dataclass(frozen=True)
class Source:
    """One place that text comes from.

    Args:
        path: a text file, a folder (read recursively; hidden entries are passed over), a glob (`**` too), or JSON lines
            (.jsonl, .ndjson). Each may end in .gz. A text file is one document, a JSON line is one document.
        weight: how often each training document of this source stands in one epoch. 2 writes it twice; the fractional
            part adds one more copy of that share of the documents, chosen by a hash of text and seed: 0.25 keeps a
            quarter of them, 1.5 repeats half of them. Validation documents stand once whatever the weight.
        text_field: the field of a JSON line that holds the text; None takes the configuration's.
    """

    path: str
    weight: float = 1.0
    text_field: str | None = None


def parse_source(spec: Any) -> Source:
    """A Source from a Source, a path, "path@weight" or a mapping with the keys path, weight and text_field.

    Raises UserError for anything else, an unknown key, or a weight that is not a positive number.
    """
    if isinstance(spec, Source):
        source = spec
    elif isinstance(spec, (str, os.PathLike)):
        source = _source_from_text(os.fspath(spec))
    elif isinstance(spec, dict):
        unknown = set(spec) - {"path", "weight", "text_field"}
        if unknown or not isinstance(spec.get("path"), str):
            raise UserError(f"source {spec!r}: expected the keys path and, at will, weight and text_field")
        source = Source(**spec)
    else:
        raise UserError(f"source must be a path or a mapping with a path, got {spec!r}")
    weight = source.weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise UserError(f"source {source.path}: weight must be a positive number, got {weight!r}")
    return source


def _source_from_text(text: str) -> Source:
    path, _, weight = text.rpartition("@")
    if path and not os.path.exists(text):
        with contextlib.suppress(ValueError):
            return Source(path, float(weight))
    return Source(text)


def expand(source: Source, skip: Path | None = None) -> list[Path]:
    """The files of a source, sorted by path. `skip` is a folder to pass over (the output, when it lies inside).

    Raises UserError when the path does not exist, a glob matches nothing or a folder holds no file.
    """
    path = Path(source.path).expanduser()
    if path.exists():
        starts = [path]
    elif glob.has_magic(source.path):
        starts = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        starts = [start for start in starts if "__pycache__" not in start.parts and not _inside(start, skip)]
        if not starts:
            raise UserError(f"source {source.path}: the pattern matches no file; check it, and quote it in the shell")
    else:
        raise UserError(f"source {source.path} does not exist; expected a file, a folder or a glob pattern")
    files: dict[Path, None] = {}  # a dict, for `**` lists a folder and then its files again
    for start in starts:
        for file in _walk(start, skip) if start.is_dir() else [start]:
            files[file] = None
    if not files:
        raise UserError(f"source {source.path} holds no files; expected text files or .jsonl")
    return list(files)


def _inside(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.resolve().is_relative_to(folder)


def _walk(folder: Path, skip: Path | None) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and not _inside(here / name, skip)
        )
        found += [here / name for name in sorted(names) if not name.startswith(".") and (here / name).is_file()]
    return found


def read_documents(
    file: Path,
    text_field: str,
    report: CleaningReport,
    sha: Any = None,
    progress: Callable[[int], None] = lambda size: None,
) -> Iterator[str]:
    """The raw documents of one file. What cannot be used is counted in `report` and passed over.

    Args:
        file: a text file or JSON lines, perhaps with .gz behind.
        text_field: the field that holds the text of a JSON line.
        report: gets the counts.
        sha: a hashlib object that is fed the (unpacked) bytes read.
        progress: called with the size of the file in bytes once it is done.
    """
    sha = sha or hashlib.sha256()
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2 if packed else -1 :][:1]
    size = 0
    try:
        size = file.stat().st_size
        with gzip.open(file, "rb") if packed else open(file, "rb") as stream:
            read = _json_lines if kind in ([".jsonl"], [".ndjson"]) else _whole_text
            yield from read(stream, file, text_field, report, sha)
    except _UNREADABLE as error:
        report.skip("files_unreadable", f"{file}: {error}")
    progress(size)


def _whole_text(stream: Any, file: Path, text_field: str, report: CleaningReport, sha: Any) -> Iterator[str]:
    head = stream.read(_SNIFF)
    if b"\0" in head:
        return report.skip("files_binary", f"{file}: binary (it holds zero bytes)")
    data = head + stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return report.skip("files_not_utf8", f"{file}: not UTF-8 (byte {data[error.start]:#04x} at {error.start:,})")
    sha.update(data)
    report.files_read += 1
    yield text


def _json_lines(stream: Any, file: Path, text_field: str, report: CleaningReport, sha: Any) -> Iterator[str]:
    report.files_read += 1
    for number, line in enumerate(stream, 1):
        sha.update(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            report.skip("lines_malformed", f"{file}:{number}: {' '.join(str(error).split())}")
            continue
        text = record.get(text_field) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield text
        else:
            report.skip("lines_without_text", f"{file}:{number}: no text under {text_field!r}")
