import json
import threading

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import load_tokenizer, train_tokenizer
from fastlm.data import tokenizer as module
from fastlm.errors import UserError

TEXTS = [
    "def twice(x):\n    return x + x\n\n\nprint(twice(21))\n",
    "The quick brown fox jumps over the lazy dog. It's 42 times quicker!\n" * 5,
    "gr\u00fc\u00df dich, \u4e16\u754c \U0001f600\n",
]
valid_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "char": train_tokenizer("char", TEXTS, 8192),
        "bpe": train_tokenizer("bpe", TEXTS, 320),
        "wordpiece": train_tokenizer("wordpiece", TEXTS, 120),
        "unigram": train_tokenizer("unigram", TEXTS, 120),
    }


def test_char_vocabulary_is_the_characters_seen():
    tokenizer = train_tokenizer("char", ["ba\n", "ca"], 8192, eos=False)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("\nabc") == [0, 1, 2, 3]
    assert tokenizer.eos_id is None
    assert tokenizer.kind == "char"
    with pytest.raises(UserError, match=r"character 'z' is not in the vocabulary of this character tokenizer \(4 ent"):
        tokenizer.encode("az")
    with pytest.raises(UserError, match="character 'z' is not in"):
        tokenizer.encode("az", specials=True)


def test_char_keeps_the_frequent_ones_when_the_vocabulary_is_small():
    tokenizer = train_tokenizer("char", ["aaabbc" + "\U0001f600" * 4], 4)
    assert [tokenizer.token(id) for id in range(4)] == ["<|endoftext|>", "<unk>", "a", "\U0001f600"]
    assert tokenizer.encode("abz\U0001f601\U0001f600") == [2, 1, 1, 1, 3]


def test_char_unknown_token_on_request():
    tokenizer = train_tokenizer("char", ["ab"], 100, unk=True)
    assert tokenizer.decode(tokenizer.encode("az")) == "a<unk>"


@settings(deadline=None)
@given(text=st.text("".join(sorted(set("".join(TEXTS)))), max_size=100))
def test_char_table_gives_the_librarys_ids(tokenizers, text):
    tokenizer = tokenizers["char"]
    assert tokenizer.encode(text) == tokenizer._backend.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=valid_text)
def test_byte_level_bpe_round_trip(tokenizers, text):
    assert tokenizers["bpe"].decode(tokenizers["bpe"].encode(text)) == text


def test_wordpiece_and_unigram_round_trip(tokenizers):
    assert tokenizers["unigram"].decode(tokenizers["unigram"].encode(TEXTS[0])) == TEXTS[0]
    words = "the quick brown fox"
    assert tokenizers["wordpiece"].decode(tokenizers["wordpiece"].encode(words)) == words


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "unigram"])
def test_training_obeys_the_size_and_puts_special_tokens_first(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.vocab_size <= {"char": 8192, "bpe": 320}.get(kind, 120)
    assert tokenizer.token(tokenizer.eos_id) == "<|endoftext|>"
    assert tokenizer.eos_id in (0, 1)
    ids = tokenizer.encode_batch(TEXTS)
    assert all(i.dtype == np.int64 and i.min() >= 0 and i.max() < tokenizer.vocab_size for i in ids)
    assert [i.tolist() for i in ids] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_special_tokens_in_a_document_are_text(tokenizers, kind):
    tokenizer = train_tokenizer(kind, [*TEXTS, "<|endoftext|>"], 400)
    text = "a<|endoftext|>b"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, specials=True).count(tokenizer.eos_id) == 1
    assert tokenizer.eos_id not in tokenizer.encode(text), "the switch does not stick"
    with_eos = [*tokenizer.encode("ab"), tokenizer.eos_id]
    assert tokenizer.decode(with_eos) == "ab<|endoftext|>"
    assert tokenizer.decode(with_eos, skip_special_tokens=True) == "ab"


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(
        st.sampled_from(["a", "b1", "\n", " ", "\t", ".", "'s", "\u00e9", "x\n", "\n\n", "  y"]), max_size=60
    )
)
def test_long_documents_are_cut_without_changing_a_token(tokenizers, parts):
    tokenizer, text = tokenizers["bpe"], "".join(parts)
    chunk, module._CHUNK = module._CHUNK, 7
    try:
        pieces = module._cut(text, 7)
        cut = tokenizer.encode(text)
    finally:
        module._CHUNK = chunk
    assert "".join(pieces) == text
    assert cut == tokenizer._backend.encode(text).ids


def test_long_documents_really_are_cut():
    assert len(module._cut("word\n" * 100, 20)) > 15
    assert module._cut("-\n" * 100, 20) == ["-\n" * 100]


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "unigram"])
def test_save_and_load(tokenizers, kind, tmp_path):
    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again.kind == tokenizer.kind
        assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "unigram"])
def test_transformers_opens_the_folder(tokenizers, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_id
    if kind in ("char", "bpe"):
        assert theirs.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_special_tokens_come_from_the_settings(tokenizers, tmp_path):
    train_tokenizer("bpe", TEXTS, 320, special_tokens=("<end>", "<start>", "<pad>")).save(tmp_path)
    settings = {"eos_token": {"content": "<end>"}, "bos_token": "<start>", "pad_token": "<pad>", "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.token(i) for i in (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)] == [
        "<end>",
        "<start>",
        "<pad>",
    ]
    tokenizer.save(tmp_path / "copy")
    kept = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == "x"
    assert load_tokenizer(tmp_path / "copy").eos_id == tokenizer.eos_id
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert load_tokenizer(tmp_path).eos_id is None, "the settings say that there is none"
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_id == 0, "the known name is found"


def test_saved_truncation_and_padding_are_off(tokenizers, tmp_path):
    tokenizers["bpe"].save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]


def test_lowercase_tokenizers_lower_the_prompt_too():
    for kind in ("char", "bpe"):
        tokenizer = train_tokenizer(kind, ["some words"], 300, lowercase=True)
        assert tokenizer.decode(tokenizer.encode("SOME Words")) == "some words"


def test_two_threads_with_and_without_specials(tokenizers):
    tokenizer, wrong = tokenizers["bpe"], []

    def work(specials):
        for _ in range(300):
            if tokenizer.encode("a<|endoftext|>", specials=specials).count(tokenizer.eos_id) != specials:
                wrong.append(specials)

    threads = [threading.Thread(target=work, args=(specials,)) for specials in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "unigram"])
def test_half_a_surrogate_pair(tokenizers, kind):
    with pytest.raises(UserError, match=r"'\\ud800', half of a surrogate pair"):
        tokenizers[kind].encode("de\ud800f")


def test_decode_refuses_foreign_ids(tokenizers):
    for wrong in (-1, tokenizers["bpe"].vocab_size):
        with pytest.raises(UserError, match=f"token id {wrong} is outside"):
            tokenizers["bpe"].decode([0, wrong])


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "unigram"])
def test_no_text_to_train_on(kind):
    with pytest.raises(UserError, match="no text to train the tokenizer on"):
        train_tokenizer(kind, [], 400)


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "unigram"])
def test_tiny_texts_train(kind):
    assert train_tokenizer(kind, ["a"], 300).encode("a")


def test_training_refuses():
    with pytest.raises(UserError, match="kind must be one of char, bpe"):
        train_tokenizer("bpee", TEXTS, 300)
    with pytest.raises(UserError, match="a bpe vocabulary needs at least 257 entries, got vocab_size 256"):
        train_tokenizer("bpe", TEXTS, 256)


def test_loading_refuses(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; expected a tokenizer.json"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no tokenizer.json; make one with transformers"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)
