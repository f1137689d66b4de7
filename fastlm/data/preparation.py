"""From sources of text to a prepared folder: token shards, a tokenizer and meta.json."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.config import option, to_dict
from fastlm.data.clean import NORMALIZATIONS, CleaningReport, clean_text, fingerprint
from fastlm.data.files import write_text
from fastlm.data.packing import permutation
from fastlm.data.shards import ShardWriter
from fastlm.data.sources import Source, expand, parse_source, read_documents
from fastlm.data.split import split_documents
from fastlm.data.spool import Piece, Spool
from fastlm.data.store import FORMAT, META
from fastlm.data.tokenizer import KINDS, Tokenizer, load_tokenizer
from fastlm.data.tokenizer_training import train_tokenizer
from fastlm.errors import UserError

Progress = Callable[[str, int, int], None]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to prepare and how."""

    sources: list[Any] = option([], "text files, folders, globs or .jsonl, each as path, path@weight or a mapping")
    validation_sources: list[Any] = option([], "sources of the validation split; without them it is split off")
    output: str = option("data/prepared", "the folder to write")
    text_field: str = option("text", "the field of a JSON line that holds the text")
    normalization: str = option("NFC", "unicode normalisation", choices=NORMALIZATIONS)
    lowercase: bool = option(False, "lower-case all text")
    deduplicate: bool = option(True, "drop documents whose cleaned text came before")
    tokenizer: str = option("bpe", f"one of {', '.join(KINDS)} to train one, or a tokenizer.json or its folder")
    vocab_size: int = option(8192, "entries of a trained tokenizer's vocabulary, at most")
    tokenizer_sample_mb: float = option(64.0, "train the tokenizer on at most this much text, in MB")
    append_eos: str = option(
        "auto",
        "end each document with the end-of-text token; auto: when there are several and a loaded tokenizer has one",
        choices=("auto", "always", "never"),
    )
    split: str = option(
        "document",
        "document: a share of the documents validates, chosen by a hash of each; tail: the end of every document does",
        choices=("document", "tail"),
    )
    validation_fraction: float = option(0.05, "the share of the text that validates; 0 makes no validation split")
    shard_tokens: int = option(2**28, "the most tokens in one shard file")
    seed: int = option(0, "of the split and of fractional weights")


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did. `str(report)` is a small table.

    `splits` maps a split's name to its documents, tokens, bytes and characters of text, and shards, as in meta.json.
    """

    folder: Path
    cleaning: CleaningReport
    splits: dict[str, dict[str, Any]]
    tokenizer: Tokenizer
    seconds: float

    def __str__(self) -> str:
        lines = [str(self.cleaning), f"prepared in {self.seconds:.1f} s: {self.folder}", f"  {self.tokenizer}"]
        for name, split in self.splits.items():
            ratio = split["bytes"] / max(split["tokens"], 1)
            lines.append(
                f"  {name:<11}{split['documents']:>10,} documents {split['bytes']:>14,} bytes "
                f"{split['tokens']:>13,} tokens {ratio:6.2f} bytes/token"
            )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the passes share: the configuration, the folder they write in, the documents and the progress callback."""

    config: DataConfig
    folder: Path
    spool: Spool
    progress: Progress


def prepare(config: DataConfig, progress: Progress | None = None) -> PrepareReport:
    """Reads, cleans, tokenizes and writes a corpus.

    The output folder gets `train-*.bin` and `validation-*.bin` (see `fastlm.data.shards`), the tokenizer, and meta.json,
    which is written last: a folder with meta.json is complete. Data prepared there before is replaced at the end;
    other files in the folder stay. The same configuration and sources give the same files.

    Args:
        config: what to do.
        progress: called as progress(stage, done, total), in bytes, with the stages "read", "tokenizer" and "encode".

    Raises:
        UserError: a source is missing, nothing usable is left, a value is out of range, or the disk is full. Files and
            documents that cannot be used are counted in the report and skipped.
    """
    began = time.perf_counter()
    _check(config)
    output = Path(config.output).expanduser()
    created = not output.exists()
    folder = output / f".prepare-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        with contextlib.closing(Spool(folder / "documents")) as spool:
            work = _Work(config, folder, spool, progress or (lambda stage, done, total: None))
            tokenizer, meta, report = _run(work, output)
        tokenizer.save(folder)
        write_text(folder / META, json.dumps(meta, indent=2) + "\n")
        _publish(folder, output, meta["splits"])
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; free some space or choose another output") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if created and output.is_dir() and not any(output.iterdir()):
            output.rmdir()
    return PrepareReport(output, report, meta["splits"], tokenizer, time.perf_counter() - began)


def tokenizer_from_sources(config: DataConfig) -> tuple[Tokenizer, CleaningReport]:
    """Trains only the tokenizer of `prepare`, with an end-of-text token, on the text of config.sources alone: what
    validates is not looked at. config.output is not touched.

    Raises:
        UserError: as `prepare`.
    """
    _check(config)
    config = dataclasses.replace(config, validation_sources=[], append_eos="always")
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Spool(Path(folder) / "documents")) as spool:
        work = _Work(config, Path(folder), spool, lambda stage, done, total: None)
        sources, _, report = _read(work, Path(folder))
        train, _ = split_documents(spool, sources, 0, how="document", fraction=0.0, seed=config.seed)
        return _tokenizer(work, train, [])[0], report


def _run(work: _Work, output: Path) -> tuple[Tokenizer, dict[str, Any], CleaningReport]:
    config, spool = work.config, work.spool
    sources, described, report = _read(work, output)
    train, validation = split_documents(
        spool,
        sources,
        len(config.validation_sources),
        how=config.split,
        fraction=config.validation_fraction,
        seed=config.seed,
    )
    tokenizer, append_eos = _tokenizer(work, train, validation)
    total = sum(spool.sizes[piece.document] for piece in train + validation)
    splits: dict[str, Any] = {}
    for name, pieces in (("train", train), ("validation", validation)):
        if pieces:
            splits[name] = _encode(work, name, pieces, tokenizer, append_eos, total)
    meta = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "append_eos": append_eos,
        "splits": splits,
        "sources": described,
        "cleaning": dataclasses.asdict(report),
        "config": to_dict(config),
    }
    return tokenizer, meta, report


def _check(config: DataConfig) -> None:
    if not config.sources:
        raise UserError("there are no sources; name text files, folders, globs or .jsonl files")
    if not 0 <= config.validation_fraction < 1:
        raise UserError(f"validation_fraction must lie in [0, 1), got {config.validation_fraction}")
    for name in ("vocab_size", "shard_tokens", "tokenizer_sample_mb"):
        if getattr(config, name) <= 0:
            raise UserError(f"{name} must be above 0, got {getattr(config, name)}")
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        if choices and getattr(config, field.name) not in choices:
            raise UserError(f"{field.name} must be one of {', '.join(choices)}, got {getattr(config, field.name)!r}")
    if config.tokenizer not in KINDS and not Path(config.tokenizer).expanduser().exists():
        raise UserError(
            f"tokenizer {config.tokenizer!r} is neither one of {', '.join(KINDS)} nor a tokenizer.json or its folder"
        )
    if Path(config.output).expanduser().is_file():
        raise UserError(f"output {config.output} is a file; expected a folder to write")


def _read(work: _Work, output: Path) -> tuple[list[Source], list[dict[str, Any]], CleaningReport]:
    """Fills the spool. Returns the sources (validation first), their description for meta.json, and the counts.

    Validation comes first so that of two equal documents it is the training copy that is dropped.
    """
    config, spool = work.config, work.spool
    splits = ["validation"] * len(config.validation_sources) + ["train"] * len(config.sources)
    sources = [parse_source(spec) for spec in [*config.validation_sources, *config.sources]]
    files = [expand(source, output.resolve()) for source in sources]
    total = sum(file.stat().st_size for group in files for file in group)
    report = CleaningReport()
    seen: set[bytes] = set()
    described = []
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        work.progress("read", done, total)

    for number, (source, group) in enumerate(zip(sources, files)):
        sha, before = hashlib.sha256(), len(spool)
        for file in group:
            for raw in read_documents(file, source.text_field or config.text_field, report, sha, advance):
                text = _cleaned(raw, file, config, report, seen)
                if text is not None:
                    spool.append(text, number)
        kept = {"documents": len(spool) - before, "bytes": sum(spool.sizes[before:]), "sha256": sha.hexdigest()}
        described.append({"split": splits[number], **dataclasses.asdict(source), "files": len(group), **kept})
    report.documents_kept, report.bytes_kept = len(spool), sum(spool.sizes)
    if not len(spool):
        raise UserError(
            f"no usable text in {sum(map(len, files)):,} files ({report.skipped() or 'they hold no lines'}); expected "
            f"UTF-8 text or JSON lines" + (f"; first: {report.examples[0]}" if report.examples else "")
        )
    return sources, described, report


def _cleaned(raw: str, file: Path, config: DataConfig, report: CleaningReport, seen: set[bytes]) -> str | None:
    """The cleaned text of a document, or None where it is empty or came before."""
    text = clean_text(raw, report, normalization=config.normalization, lowercase=config.lowercase)
    if not text.strip():
        report.skip("documents_empty", f"{file}: empty document")
        return None
    if config.deduplicate:
        digest = fingerprint(text)
        if digest in seen:
            report.skip("documents_duplicate", f"{file}: duplicate document")
            return None
        seen.add(digest)
    return text


def _tokenizer(work: _Work, train: list[Piece], validation: list[Piece]) -> tuple[Tokenizer, bool]:
    """The tokenizer, trained or loaded, and whether documents end with its end-of-text token."""
    config, spool = work.config, work.spool
    eos = config.append_eos == "always" or (config.append_eos == "auto" and len(spool) > 1)
    if config.tokenizer not in KINDS:
        tokenizer = load_tokenizer(config.tokenizer)
        if config.append_eos == "always" and tokenizer.eos_id is None:
            raise UserError(f"tokenizer {config.tokenizer} has no end-of-text token; use append_eos: never")
        return tokenizer, eos and tokenizer.eos_id is not None
    pieces = list(dict.fromkeys(train))  # a weight repeats text, not what there is to learn from it
    unk = False
    if config.tokenizer == "char":
        known = set().union(*map(set, spool.texts(pieces)))
        unk = not all(known.issuperset(text) for text in spool.texts(validation))
        texts = spool.texts(pieces)
    else:
        texts = _sample(work, pieces)
    size, lowercase = config.vocab_size, config.lowercase
    return train_tokenizer(config.tokenizer, texts, size, eos=eos, unk=unk, lowercase=lowercase), eos


def _sample(work: _Work, pieces: list[Piece]) -> Iterator[str]:
    """Documents in a seeded order until the budget for training the tokenizer is used up."""
    budget = int(work.config.tokenizer_sample_mb * 1e6)
    total = min(budget, sum(work.spool.sizes[piece.document] for piece in pieces))
    done = 0
    for at in permutation(len(pieces), work.config.seed).tolist():
        text = work.spool.read(pieces[at])[: budget - done]
        done += len(text)
        yield text
        work.progress("tokenizer", min(done, total), total)
        if done >= budget:
            return


def _encode(
    work: _Work, name: str, pieces: list[Piece], tokenizer: Tokenizer, append_eos: bool, total: int
) -> dict[str, Any]:
    """Writes the shards of one split. Returns its entry in meta.json."""
    writer = ShardWriter(work.folder, name, tokenizer.vocab_size, work.config.shard_tokens)
    entry: dict[str, Any] = {"documents": len(pieces), "tokens": 0, "bytes": 0, "characters": 0}
    end = np.array([tokenizer.eos_id] if append_eos else [], np.int64)
    done = 0 if name == "train" else total - sum(work.spool.sizes[piece.document] for piece in pieces)
    try:
        for run in work.spool.runs(pieces):
            texts = list(work.spool.texts(run))
            for text, ids in zip(texts, tokenizer.encode_batch(texts)):
                writer.add(np.concatenate([ids, end]))
                entry["tokens"] += len(ids) + len(end)
                entry["bytes"] += len(text.encode("utf-8"))
                entry["characters"] += len(text)
            done += sum(work.spool.sizes[piece.document] for piece in run)
            work.progress("encode", done, total)
        entry["shards"] = writer.close()
    finally:
        writer.abort()
    return entry


def _publish(folder: Path, output: Path, splits: dict[str, Any]) -> None:
    """Moves the finished files into the output folder; meta.json goes first and comes last."""
    (output / META).unlink(missing_ok=True)
    for old in list(output.iterdir()):
        if re.fullmatch(r"(train|validation)-\d{5}\.bin", old.name):
            old.unlink()
    shards = [shard["name"] for split in splits.values() for shard in split["shards"]]
    for name in (*shards, *_TOKENIZER_FILES, META):
        os.replace(folder / name, output / name)
