"""Loss, perplexity, bits per byte and top-1 accuracy of a language model on text.

The protocol, without which such figures say nothing: the files stand one behind the other, an end-of-text token before each and
behind the last (where the tokenizer has one); every token but the very first is a target exactly once, end-of-text included, so
that bits per byte is what coding the files with the model would cost. A window sees at most `context` tokens; with
stride == context the windows do not overlap and the first targets of each see little, a smaller stride costs more and scores
better.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.data import TokenStore, open_split, read_meta
from fastlm.errors import UserError

_LOGITS = 2**24  # logits held at once
_BLOCKS = 40


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` found. `str(result)` is a small table.

    Attributes:
        loss: nats per token. loss_low, loss_high: its 95% confidence interval, from the spread between stretches of the text;
            None where a single window holds all of it.
        perplexity: exp(loss). top1_accuracy: share of targets that were the likeliest token.
        bits_per_byte: total nats / ln 2 / bytes of UTF-8 text.
        tokens: targets scored. bytes: of the text. context, stride: in tokens. seconds: wall time.
    """

    loss: float
    loss_low: float | None
    loss_high: float | None
    perplexity: float
    bits_per_byte: float
    top1_accuracy: float
    tokens: int
    bytes: int
    context: int
    stride: int
    seconds: float

    def to_dict(self) -> dict[str, float]:
        """The fields as plain data."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The fields as one line of JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        interval = "" if self.loss_low is None else f", 95% interval {self.loss_low:.4f} to {self.loss_high:.4f}"
        rows = {
            "loss": f"{self.loss:.4f} nats/token{interval}",
            "perplexity": f"{self.perplexity:.3f}",
            "bits per byte": f"{self.bits_per_byte:.4f}",
            "top-1 accuracy": f"{self.top1_accuracy:.2%}",
            "scored": f"{self.tokens:,} tokens, {self.bytes:,} bytes, context {self.context}, in {self.seconds:.1f} s",
        }
        return "\n".join(f"  {name:<15} {value}" for name, value in rows.items())


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    files: Sequence[str | Path] = (),
    text: str | None = None,
    data: str | Path | None = None,
    split: str = "validation",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
) -> EvaluationResult:
    """Scores a model on text, by the protocol at the top of this module.

    Args:
        model: a fastlm.models.Transformer; it runs in the precision of the surrounding autocast, the loss itself in fp32.
        tokenizer: needed for files and text.
        files: UTF-8 text files, or `text`: one string, or `data`: a prepared folder, of which `split` is scored (its bytes are
            those of the cleaned text).
        context: tokens a window sees; None for the model's max_positions, at most 1024.
        stride: targets per window; None for context (no overlap).
        batch_size: windows in one forward pass.

    Raises:
        UserError: none or several of files, text and data; a file that is missing, empty or not UTF-8; numbers out of range.
    """
    began = time.perf_counter()
    if sum((bool(files), text is not None, data is not None)) != 1:
        raise UserError("evaluate: give exactly one of files, text and data")
    context = context or min(model.config.max_positions, 1024)
    stride = stride or context
    if not 1 <= stride <= context <= model.config.max_positions or batch_size < 1:
        raise UserError(
            f"evaluate: need 1 <= stride <= context <= the model's {model.config.max_positions} positions and batch_size >= 1, "
            f"got stride {stride}, context {context}, batch_size {batch_size}"
        )
    if data is not None:
        store, size = open_split(data, split), read_meta(data)["splits"][split]["bytes"]
    elif tokenizer is None:
        raise UserError("evaluate: files and text need the model's tokenizer; give tokenizer")
    else:
        texts = [text] if text is not None else [_read(Path(file)) for file in files]
        store, size = _tokens(tokenizer, texts)
    if len(store) < 2:
        raise UserError(f"evaluate: {len(store)} tokens leave nothing to predict; give more text")

    was_training = model.training
    model.eval()
    try:
        scores = [_score(model, *batch) for batch in _windows(store, context, stride, batch_size)]
    finally:
        model.train(was_training)
    nats, counts, hits = (torch.cat(part).double().cpu() for part in zip(*scores))
    total, tokens = nats.sum().item(), int(counts.sum())
    loss, half = total / tokens, _half_width(nats, counts)
    return EvaluationResult(
        loss=loss,
        loss_low=None if half is None else loss - half,
        loss_high=None if half is None else loss + half,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total / math.log(2) / size,
        top1_accuracy=hits.sum().item() / tokens,
        tokens=tokens,
        bytes=size,
        context=context,
        stride=stride,
        seconds=time.perf_counter() - began,
    )


def gzip_bits_per_byte(files: Sequence[str | Path]) -> float:
    """Bits per byte of `gzip -9` on the files one behind the other: what a general compressor needs for the same text.

    Raises UserError for a file that cannot be read, or nothing but empty files.
    """
    content = b"".join(_bytes(Path(file)) for file in files)
    if not content:
        raise UserError("evaluate: the files to compress are empty; give files with text")
    return 8 * len(gzip.compress(content, 9)) / len(content)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"evaluate: {file} cannot be read: {error.strerror or error}") from error


def _read(file: Path) -> str:
    try:
        text = _bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"evaluate: {file} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not text:
        raise UserError(f"evaluate: {file} is empty; give a file with text")
    return text


def _tokens(tokenizer: Any, texts: list[str]) -> tuple[TokenStore, int]:
    """The texts as one sequence of tokens, and the bytes its targets stand for."""
    size = sum(len(text.encode("utf-8")) for text in texts)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = list(end)
    for text in texts:
        ids += [*tokenizer.encode(text), *end]
    if not end and ids:
        size -= len(
            tokenizer.decode(ids[:1]).encode("utf-8")
        )  # nothing comes before the first token to predict it from
    return TokenStore.from_tokens(np.asarray(ids, np.int64)), max(size, 1)


def _windows(store: TokenStore, context: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (tokens, labels) int64 [B, S]: blocks of `stride` targets, each with up to `context` tokens before its last."""
    starts = range(1, len(store), stride)
    for first in range(0, len(starts), batch_size):
        blocks = starts[first : first + batch_size]
        tokens = np.zeros((len(blocks), min(context, len(store) - 1)), np.int64)
        labels = np.full_like(tokens, -100)
        for row, start in enumerate(blocks):
            stop = min(start + stride, len(store))
            begin = max(0, stop - 1 - tokens.shape[1])
            span = np.empty(stop - begin, np.int64)
            store.read(begin, stop, span)
            tokens[row, : len(span) - 1] = span[:-1]
            labels[row, start - 1 - begin : len(span) - 1] = span[start - begin :]
        yield torch.from_numpy(tokens), torch.from_numpy(labels)


@torch.no_grad()
def _score(model: Any, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per window: summed nats, targets, and how many of them were the likeliest token; [B] each."""
    weight = model.head_weight
    tokens, labels = tokens.to(weight.device), labels.to(weight.device)
    hidden = model.hidden(tokens).flatten(0, 1)
    target = labels.flatten()
    rows = max(1, _LOGITS // weight.shape[0])
    nats, hits = [], []
    for part, wanted in zip(hidden.split(rows), target.split(rows)):
        logits = F.linear(part, weight).float()
        nats.append(F.cross_entropy(logits, wanted, reduction="none", ignore_index=-100))
        hits.append(logits.argmax(-1) == wanted)
    live = target != -100
    per_window = lambda x: x.view(labels.shape).sum(1)  # noqa: E731
    return per_window(torch.cat(nats)), per_window(live), per_window(torch.cat(hits) & live)


def _half_width(nats: Tensor, counts: Tensor) -> float | None:
    """Half the 95% interval of the loss, None from one window.

    Windows near each other are of one text and alike, so at most 40 blocks of consecutive windows stand for the independent
    draws (batch means, Law and Carson 1979), with the ratio estimator (Cochran 1977, chapter 6) and Student's quantile.
    """
    blocks = min(len(nats), _BLOCKS)
    if blocks < 2:
        return None
    block = torch.arange(len(nats)) * blocks // len(nats)
    sums = torch.zeros(2, blocks, dtype=nats.dtype).index_add_(1, block, torch.stack((nats, counts)))
    spread = sums[0] - sums[0].sum() / sums[1].sum() * sums[1]
    free = blocks - 1
    quantile = (
        1.96 + 2.372 / free + 2.823 / free**2
    )  # Cornish-Fisher: within 4% of Student's from 3 degrees of freedom on
    return quantile * math.sqrt(blocks / free * spread.square().sum().item()) / sums[1].sum().item()
