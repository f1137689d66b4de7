import random

import pytest

from fastlm.errors import UserError
from fastlm.generate import TextStream


class Bytes:
    """A byte-level tokenizer: token i is the byte i; incomplete characters decode to U+FFFD, as in `tokenizers`."""

    vocab_size, eos_id, bos_id = 256, None, None

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class Words:
    """Joins words by a space, like WordPiece: the text of a token depends on whether it is the first."""

    words = ["a", "stop", "sign", "is", "red"]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def run(tokenizer, ids, **options):
    pieces = []
    stream = TextStream(tokenizer, pieces.append, **options)
    for id in ids:
        stream.put(id)
    stream.end()
    assert "".join(pieces) == stream.text
    return stream, pieces


@pytest.mark.parametrize(
    "text", ["plain", "naïve 中文 😀👩‍👩‍👧 ¡ñ!", "a\ufffdb\ufffd", "\ufffd\ufffd\ufffd\ufffd\ufffd中"]
)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(text):
    stream, pieces = run(Bytes(), Bytes().encode(text))
    assert stream.text == text
    assert all(piece in text for piece in pieces)


def test_any_bytes_join_to_what_decode_says():
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.choice([rng.randrange(256), 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 65]) for _ in range(rng.randrange(12))]
        assert run(Bytes(), ids)[0].text == Bytes().decode(ids)


def test_characters_come_as_soon_as_they_are_whole():
    stream = TextStream(Bytes())
    assert [stream.put(b) for b in "é中".encode()] == ["", "é", "", "", "中"]
    assert stream.put(0xE4) == ""
    assert stream.end() == "\ufffd"


def test_decoders_that_treat_the_first_token_differently():
    assert run(Words(), [0, 1, 2, 3, 4])[1] == ["a", " stop", " sign", " is", " red"]
    assert run(Words(), [3, 4], prompt=[0, 1, 2])[0].text == " is red"


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one END two", ["END"], "one "),
        ("one EN END", ["END"], "one EN "),
        ("aab", ["ab"], "a"),
        ("one END", ["ONE", "END", " E"], "one"),
        ("no stop EN", ["END"], "no stop EN"),
        ("END", "END", ""),
        ("中文。再", ["。"], "中文"),
    ],
)
def test_stop_strings(text, stops, expected):
    ids = Bytes().encode(text)
    stream, pieces = run(Bytes(), ids, stop_strings=stops)
    assert stream.text == expected
    assert stream.stopped == (expected != text)
    if stream.stopped:
        assert Bytes().decode(ids[: stream.tokens_before_stop()]) == expected
    assert stream.put(65) == "" or not stream.stopped


def test_a_stop_string_that_begins_inside_a_token():
    stream, _ = run(Words(), [0, 1, 2, 3], stop_strings=["top si"])
    assert stream.text == "a s"
    assert stream.tokens_before_stop() == 2
    assert run(Words(), [0, 1, 2], stop_strings=["p", "to", "op"])[0].text == "a s"


def test_bad_stop_strings():
    for bad in ([""], [3]):
        with pytest.raises(UserError, match="stop_strings"):
            TextStream(Bytes(), stop_strings=bad)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "char"])
def test_trained_tokenizers(kind):
    from fastlm.data import train_tokenizer

    text = "the cat – naïve, 中文 😀 – sat on the mat. " * 20
    tokenizer = train_tokenizer(kind, [text], 300)
    ids = list(tokenizer.encode(text[:60]))
    assert run(tokenizer, ids)[0].text == tokenizer.decode(ids)
    split = len(ids) // 2
    rest = run(tokenizer, ids[split:], prompt=ids[:split])[0].text
    assert tokenizer.decode(ids[:split]) + rest == tokenizer.decode(ids)
