"""Evaluation against models whose scores can be computed by hand."""

import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch

from fastlm.data import DataConfig, prepare
from fastlm.errors import UserError
from fastlm.evaluate import evaluate, gzip_bits_per_byte, perplexity
from fastlm.evaluate.perplexity import _half_width
from fastlm.models import Transformer, TransformerConfig

VOCABULARY = 7


class Tokens:
    """A tokenizer of one-letter tokens "a".."f" with ids 1..6; 0 ends a text."""

    def __init__(self, eos_id=0):
        self.eos_id = eos_id

    def encode(self, text):
        return [ord(c) - ord("a") + 1 for c in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 1) for i in ids)


class Successor(torch.nn.Module):
    """Says that token t is followed by t + 1 with probability `sure`, the others sharing the rest; remembers what it saw."""

    def __init__(self, sure):
        super().__init__()
        self.config = SimpleNamespace(max_positions=8)
        rest = (1 - sure) / (VOCABULARY - 1)
        table = torch.full((VOCABULARY, VOCABULARY), math.log(rest))
        for t in range(VOCABULARY):
            table[t, (t + 1) % VOCABULARY] = math.log(sure)
        self.head_weight = torch.nn.Parameter(table.T.contiguous())
        self.seen = []

    def hidden(self, tokens):
        self.seen.append(tokens)
        return torch.nn.functional.one_hot(tokens, VOCABULARY).float()


def test_uniform_model_has_loss_log_v():
    result = evaluate(Successor(1 / VOCABULARY), Tokens(), text="abcabcabcab", context=4)
    assert result.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.tokens == 12 and result.bytes == 11  # the end of the text is a target too
    assert result.bits_per_byte == pytest.approx(12 * math.log2(VOCABULARY) / 11, rel=1e-6)
    assert result.loss_high - result.loss_low == pytest.approx(0, abs=1e-5)


def test_known_transitions():
    # 0 -> a b c (each the successor), then c -> a is not, a -> end is not.
    result = evaluate(Successor(0.9), Tokens(), text="abca", context=8)
    wrong = 0.1 / (VOCABULARY - 1)
    assert result.loss == pytest.approx(-(3 * math.log(0.9) + 2 * math.log(wrong)) / 5, rel=1e-6)
    assert result.top1_accuracy == pytest.approx(3 / 5)


@pytest.mark.parametrize("context, stride", [(8, 8), (8, 3), (5, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 23])
def test_every_token_is_scored_once(context, stride, length):
    text = "abcdef" * 4
    result = evaluate(Successor(0.5), Tokens(), text=text[:length], context=context, stride=stride, batch_size=3)
    # This model looks one token back only, so the loss must not depend on the windows at all.
    whole = evaluate(Successor(0.5), Tokens(), text=text[:length], context=8, batch_size=1)
    assert result.tokens == length + 1
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)


def test_no_window_is_longer_than_the_context():
    model = Successor(0.5)
    evaluate(model, Tokens(), text="abcdef" * 4, context=5, stride=2)
    assert all(tokens.shape[1] <= 5 for tokens in model.seen)


def test_first_token_without_end_of_text_is_neither_scored_nor_weighed():
    result = evaluate(Successor(0.5), Tokens(eos_id=None), text="abcd", context=8)
    assert result.tokens == 3 and result.bytes == 3


@pytest.mark.parametrize("alike, windows", [(1, 60), (10, 800), (1, 4)])
def test_confidence_interval_covers_the_truth_about_95_percent_of_the_time(alike, windows):
    """Also where stretches of `alike` windows are equally hard, which windows taken for independent would not notice."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.full((windows,), 32.0, dtype=torch.float64)
    covered = 0
    for _ in range(400):
        hardness = torch.randn(-(-windows // alike), generator=generator, dtype=torch.float64).repeat_interleave(alike)
        nats = (2.0 + 0.5 * hardness[:windows]) * counts + torch.randn(
            windows, generator=generator, dtype=torch.float64
        )
        covered += abs((nats.sum() / counts.sum()).item() - 2.0) <= _half_width(nats, counts)
    assert 0.91 <= covered / 400 <= 0.98


def test_one_window_has_no_interval():
    result = evaluate(Successor(0.5), Tokens(), text="abc", context=8)
    assert result.loss_low is None and "interval" not in str(result)
    assert json.loads(result.to_json())["loss_high"] is None


def test_files_and_gzip(tmp_path):
    files = []
    for i, text in enumerate(("abcabc", "fedfed")):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(text)
    result = evaluate(Successor(0.5), Tokens(), files=files, context=4)
    assert result.tokens == 14 and result.bytes == 12
    assert gzip_bits_per_byte(files) == 8 * len(gzip.compress(b"abcabcfedfed", 9)) / 12


def test_mistakes(tmp_path):
    model, tokenizer = Successor(0.5), Tokens()
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_bytes(b"")
    binary.write_bytes(b"ab\xff")
    for match, settings in {
        "exactly one of": {},
        "is empty": {"files": [empty]},
        "is not UTF-8 text": {"files": [binary]},
        "cannot be read": {"files": [tmp_path / "gone"]},
        "8 positions": {"text": "abc", "context": 9},
        "exactly one": {"text": "abc", "data": "folder"},
        "stride 5": {"text": "abc", "context": 4, "stride": 5},
    }.items():
        with pytest.raises(UserError, match=match):
            evaluate(model, tokenizer, **settings)
    with pytest.raises(UserError, match="tokenizer"):
        evaluate(model, text="abc")
    with pytest.raises(UserError, match="cannot be read"):
        gzip_bits_per_byte([tmp_path / "gone"])
    with pytest.raises(UserError, match="empty"):
        gzip_bits_per_byte([empty])


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 64, "init_std": 0.3}
    return Transformer(TransformerConfig(vocab_size=VOCABULARY, **sizes)).train()


def test_agrees_with_the_models_own_loss_and_logits(transformer, monkeypatch):
    monkeypatch.setattr(perplexity, "_LOGITS", 5 * VOCABULARY)  # five rows of logits at a time
    ids = torch.tensor([[0, *Tokens().encode("abcdeffedcbabcdaddd"), 0]])
    result = evaluate(transformer, Tokens(), text="abcdeffedcbabcdaddd", context=32)
    assert transformer.training
    monkeypatch.setattr(
        transformer, "hidden", lambda tokens: pytest.fail("in training mode") if transformer.training else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        evaluate(transformer, Tokens(), text="abc")
    assert transformer.training
    monkeypatch.undo()
    assert result.loss == pytest.approx(transformer.loss(ids[:, :-1], ids[:, 1:]).item(), rel=1e-5)
    hits = transformer(ids[:, :-1]).argmax(-1) == ids[:, 1:]
    assert result.top1_accuracy == pytest.approx(hits.double().mean().item())


def test_stride_gives_left_context(transformer):
    """Each target sees at least context - stride tokens before it, as far as there are any."""
    ids = torch.tensor([0, *Tokens().encode("abcdefabdcebfdaceb"), 0])
    result = evaluate(transformer, Tokens(), text="abcdefabdcebfdaceb", context=6, stride=2)
    nats, hits = 0.0, 0
    for start in range(1, len(ids), 2):
        stop = min(start + 2, len(ids))
        seen = ids[max(0, stop - 7) : stop]
        logits = transformer(seen[None, :-1])[0, start - stop :]
        nats += torch.nn.functional.cross_entropy(logits, ids[start:stop], reduction="sum").item()
        hits += (logits.argmax(-1) == ids[start:stop]).sum().item()
    assert result.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert result.top1_accuracy == pytest.approx(hits / (len(ids) - 1))


def test_prepared_data(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdef" * 50)
    settings = {"sources": [str(text)], "output": str(tmp_path / "data"), "tokenizer": "char", "split": "tail"}
    report = prepare(DataConfig(**settings, validation_fraction=0.2))
    model = Successor(0.5)
    result = evaluate(model, data=tmp_path / "data", context=8)
    split = report.splits["validation"]
    assert result.tokens == split["tokens"] - 1 and result.bytes == split["bytes"] == 60
    with pytest.raises(UserError, match="split"):
        evaluate(model, data=tmp_path / "data", split="test")
