import contextlib
import hashlib
import json
import resource
import signal

import numpy as np
import pytest

from fastlm.config import build
from fastlm.data import (
    DataConfig,
    Loader,
    load_tokenizer,
    open_split,
    prepare,
    read_meta,
    tokenizer_from_sources,
    train_tokenizer,
)
from fastlm.errors import UserError

WORDS = ["tree", "house", "river", "stone", "cloud", "paper", "light", "green", "seven", "winter"]


def document(n):
    """Sentence number n: no two are equal."""
    return f"{n} " + " ".join(WORDS[(n * 7 + k * k) % 10] for k in range(12)) + ".\n"


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n:02d}.txt").write_text(document(n))
    return folder


def run(tmp_path, sources, **options):
    defaults = {"output": str(tmp_path / "out"), "tokenizer": "char"}
    sources = [sources] if isinstance(sources, (str, dict)) else sources
    return prepare(DataConfig(sources=sources, **{**defaults, **options}))


def documents(folder, split):
    """The texts of a prepared split, end-of-text tokens removed."""
    store, tokenizer = open_split(folder, split), load_tokenizer(folder)
    ids = np.empty(len(store), np.int64)
    store.read(0, len(store), ids)
    starts = [0, *store.document_ends[:-1]]
    return [tokenizer.decode(ids[a:b], skip_special_tokens=True) for a, b in zip(starts, store.document_ends)]


@pytest.mark.parametrize("tokenizer", ["char", "bpe", "unigram"])
def test_every_document_arrives_once_and_whole(tmp_path, texts, tokenizer):
    report = run(tmp_path, str(texts), tokenizer=tokenizer, vocab_size=300, validation_fraction=0.2)
    train, validation = (documents(report.folder, split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(document(n) for n in range(40))
    assert 1 <= len(validation) <= 20
    assert train == sorted(train, key=lambda text: int(text.split()[0])), "the order of the sources"
    meta = read_meta(report.folder)
    for split, held in (("train", train), ("validation", validation)):
        entry = meta["splits"][split]
        assert entry["documents"] == len(held)
        assert entry["bytes"] == entry["characters"] == sum(map(len, held))
        assert entry["tokens"] == len(open_split(report.folder, split))
    assert meta["vocab_size"] == report.tokenizer.vocab_size == load_tokenizer(report.folder).vocab_size
    assert report.splits == meta["splits"]
    assert "documents kept" in str(report) and "validation" in str(report)


def test_bytes_and_characters_differ_where_they_should(tmp_path):
    (tmp_path / "a.txt").write_text("\u00e9" * 10, encoding="utf-8")
    report = run(tmp_path, str(tmp_path / "a.txt"), validation_fraction=0.0)
    assert (report.splits["train"]["bytes"], report.splits["train"]["characters"]) == (20, 10)
    assert list(report.splits) == ["train"]


def test_end_of_text_tokens(tmp_path, texts):
    def ends(**options):
        report = run(tmp_path, str(texts), **options)
        store = open_split(report.folder)
        ids = np.empty(len(store), np.int64)
        store.read(0, len(store), ids)
        return report.tokenizer.eos_id, ids, store.document_ends

    eos, ids, stops = ends()
    assert (ids[stops - 1] == eos).all()
    assert (ids == eos).sum() == len(stops)
    assert ends(append_eos="never")[0] is None
    train_tokenizer("bpe", ["some text"], 300, eos=False).save(tmp_path / "t")
    assert ends(tokenizer=str(tmp_path / "t"))[0] is None
    with pytest.raises(UserError, match="has no end-of-text token; use append_eos: never"):
        ends(tokenizer=str(tmp_path / "t"), append_eos="always")


def test_tail_split_of_one_document(tmp_path):
    text = "".join(document(n) for n in range(30))
    (tmp_path / "a.txt").write_text(text)
    report = run(tmp_path, str(tmp_path / "a.txt"), split="tail", validation_fraction=0.1)
    cut = int(len(text) * 0.9)
    assert documents(report.folder, "train") == [text[:cut]]
    assert documents(report.folder, "validation") == [text[cut:]]
    assert report.tokenizer.vocab_size == len(set(text)), "one document needs no end-of-text token"


def test_unknown_token_only_where_validation_needs_it(tmp_path):
    path = tmp_path / "a.txt"
    for last, expected in (("a", 2), ("z", 3)):
        path.write_text("ab" * 50 + last)
        report = run(tmp_path, str(path), split="tail", validation_fraction=0.05)
        assert report.tokenizer.vocab_size == expected
    out = np.empty(1, np.int64)
    store = open_split(report.folder, "validation")
    store.read(len(store) - 1, len(store), out)
    assert report.tokenizer.token(out[0]) == "<unk>"


def test_duplicates_are_dropped_and_counted(tmp_path, texts):
    (texts / "copy.txt").write_text(document(3))
    (texts / "copy-crlf.txt").write_bytes(document(4).replace("\n", "\r\n").encode())
    report = run(tmp_path, str(texts))
    assert report.cleaning.documents_duplicate == 2
    assert report.cleaning.documents_kept == 40
    kept = run(tmp_path, str(texts), deduplicate=False)
    assert kept.cleaning.documents_kept == 42
    held = set(documents(kept.folder, "validation"))
    assert not held & set(documents(kept.folder, "train")), "equal documents go to the same split"


def test_validation_sources_win_over_equal_training_documents(tmp_path, texts):
    (tmp_path / "held.txt").write_text(document(5))
    report = run(tmp_path, str(texts), validation_sources=[str(tmp_path / "held.txt")])
    assert documents(report.folder, "validation") == [document(5)]
    assert sorted(documents(report.folder, "train")) == sorted(document(n) for n in range(40) if n != 5)
    assert [source["split"] for source in read_meta(report.folder)["sources"]] == ["validation", "train"]


def test_weights(tmp_path, texts):
    (tmp_path / "other.txt").write_text("other\n")
    report = run(tmp_path, [{"path": str(texts), "weight": 2.5}, str(tmp_path / "other.txt")], validation_fraction=0.2)
    held = documents(report.folder, "validation")
    assert len(held) == len(set(held)), "validation documents stand once"
    train = documents(report.folder, "train")
    times = {text: train.count(text) for text in set(train)}
    assert times.pop("other\n", 1) == 1
    assert set(times.values()) == {2, 3}
    assert 0.2 < sum(n == 3 for n in times.values()) / len(times) < 0.8
    first_pass = train[: len(set(train))]
    assert len(set(first_pass)) == len(first_pass), "copies stand a whole pass apart"
    again = run(tmp_path, [{"path": str(texts), "weight": 0.5}], validation_fraction=0.2)
    half = documents(again.folder, "train")
    assert set(half) == {text for text, n in times.items() if n == 3}, "the draw is the document's own"
    with pytest.raises(UserError, match="no training document is left"):
        run(tmp_path, [f"{texts}@0.0000001"])


def test_the_split_is_seeded_and_stable_when_documents_are_added(tmp_path, texts):
    def held(**options):
        return set(documents(run(tmp_path, str(texts), validation_fraction=0.3, **options).folder, "validation"))

    first = held()
    assert held() == first
    assert held(seed=1) != first
    for n in range(40, 60):
        (texts / f"{n}.txt").write_text(document(n))
    assert held() & {document(n) for n in range(40)} == first


def test_a_few_documents_still_give_both_splits(tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.txt").write_text(document(n))
    for fraction in (0.0001, 0.9999):
        report = run(tmp_path, str(tmp_path / "*.txt"), validation_fraction=fraction)
        assert [entry["documents"] for entry in report.splits.values()] == [1, 1]


def test_same_input_same_files(tmp_path, texts):
    digests = []
    for name in ("one", "two"):
        folder = run(tmp_path, str(texts), tokenizer="bpe", vocab_size=300, output=str(tmp_path / name)).folder
        files = sorted(file for file in folder.iterdir() if file.name != "meta.json")
        digests.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert digests[0] == digests[1]
    names = ["tokenizer.json", "tokenizer_config.json", "train-00000.bin", "validation-00000.bin"]
    assert [name for name, _ in digests[0]] == names


def test_preparing_again_replaces_our_files_only(tmp_path, texts):
    first = run(tmp_path, str(texts), shard_tokens=300)
    assert len(first.splits["train"]["shards"]) > 3
    (first.folder / "notes.txt").write_text("mine")
    second = run(tmp_path, str(texts), validation_fraction=0.0)
    names = sorted(file.name for file in second.folder.iterdir())
    assert names == ["meta.json", "notes.txt", "tokenizer.json", "tokenizer_config.json", "train-00000.bin"]


def test_several_shards_read_as_one(tmp_path, texts):
    one = run(tmp_path, str(texts), output=str(tmp_path / "one"))
    many = run(tmp_path, str(texts), output=str(tmp_path / "many"), shard_tokens=200)
    for packing in ("stream", "best_fit"):
        loaders = [Loader(report.folder, "train", 4, 50, seed=3, packing=packing) for report in (one, many)]
        for _ in range(20):
            ours, theirs = map(next, loaders)
            assert ours.tokens.equal(theirs.tokens) and ours.labels.equal(theirs.labels)


def test_output_inside_the_source_is_not_read(tmp_path, texts):
    report = run(tmp_path, str(texts), output=str(texts / "prepared"))
    again = run(tmp_path, str(texts), output=str(texts / "prepared"))
    assert again.cleaning.files_read == report.cleaning.files_read == 40


def test_meta_names_config_and_sources(tmp_path, texts):
    report = run(tmp_path, f"{texts}@2")
    meta = read_meta(report.folder)
    assert meta["config"]["tokenizer"] == "char"
    [source] = meta["sources"]
    content = b"".join((texts / f"{n:02d}.txt").read_bytes() for n in range(40))
    assert source["sha256"] == hashlib.sha256(content).hexdigest()
    assert (source["weight"], source["files"], source["documents"]) == (2.0, 40, 40)
    assert build(DataConfig, meta["config"]) == DataConfig(**meta["config"])


def test_progress_reaches_the_end_of_every_stage(tmp_path, texts):
    seen = {}
    config = DataConfig(sources=[str(texts)], output=str(tmp_path / "out"), vocab_size=300)

    def progress(stage, done, total):
        assert seen.get(stage, (0, 0))[0] <= done <= total
        seen[stage] = (done, total)

    prepare(config, progress)
    assert list(seen) == ["read", "tokenizer", "encode"]
    assert all(done == total for done, total in seen.values())


def test_tokenizer_sample_is_bounded(tmp_path, texts):
    (texts / "zz.txt").write_text("qqqqqqqq " * 2000)
    small = run(tmp_path, str(texts), tokenizer="bpe", vocab_size=400, tokenizer_sample_mb=0.0003)
    assert small.tokenizer.vocab_size < 350, "300 characters hold few merges"


def test_tokenizer_alone(tmp_path, texts):
    (tmp_path / "held.txt").write_text("zebra quartz")
    config = DataConfig(
        sources=[str(texts / "00.txt")], validation_sources=[str(tmp_path / "held.txt")], tokenizer="char"
    )
    tokenizer, report = tokenizer_from_sources(config)
    assert tokenizer.vocab_size == len(set(document(0))) + 1, "the characters of the sources and the end of text"
    assert tokenizer.eos_id == 0
    assert report.documents_kept == 1


def test_bad_input_is_counted_and_the_rest_is_used(tmp_path, texts):
    (texts / "a.png").write_bytes(b"\x89PNG\0")
    (texts / "b.txt").write_bytes(b"caf\xe9")
    (texts / "c.txt").write_text(" \n\x01\n")
    (texts / "d.jsonl").write_text('{"text": "one more"}\n{"text": \n{"no": 1}\n')
    report = run(tmp_path, str(texts))
    cleaning = report.cleaning
    assert (cleaning.files_binary, cleaning.files_not_utf8, cleaning.documents_empty) == (1, 1, 1)
    assert (cleaning.lines_malformed, cleaning.lines_without_text, cleaning.documents_kept) == (1, 1, 41)
    assert "a.png: binary" in str(report)
    assert read_meta(report.folder)["cleaning"]["files_binary"] == 1


BAD = {
    "nothing.txt": (b"", "no usable text in 1 files \\(1 empty documents\\); expected UTF-8 .*nothing.txt: empty"),
    "picture.png": (b"\0\1", "no usable text in 1 files \\(1 binary files\\).*picture.png: binary"),
    "latin.txt": (b"\xe9", "no usable text in 1 files \\(1 files not UTF-8\\).*latin.txt: not UTF-8 \\(byte 0xe9 at 0"),
    "lines.jsonl": (b"{\n[]\n", "\\(1 malformed JSON lines, 1 JSON lines without text\\).*lines.jsonl:1: "),
    "none.jsonl": (b"", "no usable text in 1 files \\(they hold no lines\\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_all_bad_is_one_line(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as raised:
        run(tmp_path, str(tmp_path / name))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sources": []}, "there are no sources; name text files"),
        ({"sources": ["nowhere/x.txt"]}, "source nowhere/x.txt does not exist; expected"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\), got 1.0"),
        ({"shard_tokens": 0}, "shard_tokens must be above 0, got 0"),
        ({"tokenizer": "bep"}, "tokenizer 'bep' is neither one of char, bpe, wordpiece, unigram nor"),
        ({"split": "random"}, "split must be one of document, tail, got 'random'"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "a bpe vocabulary needs at least 257 entries, got vocab_size 100"),
        ({"validation_sources": ["{texts}/nothing"]}, "the validation_sources hold no usable text"),
        ({"sources": ["{texts}/00.txt"]}, "a single document cannot be split by document; use split: tail"),
        ({"output": "{texts}/00.txt"}, "00.txt is a file; expected a folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, texts, options, message):
    (texts / "nothing").write_text("")

    def place(value):
        return [place(v) for v in value] if isinstance(value, list) else str(value).replace("{texts}", str(texts))

    options = {k: place(v) if isinstance(v, (str, list)) else v for k, v in options.items()}
    config = {"sources": [str(texts)], "output": str(tmp_path / "out"), "tokenizer": "char", **options}
    with pytest.raises(UserError, match=message) as raised:
        prepare(DataConfig(**config))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def largest_file(size):
    """Writes past `size` bytes fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [1000, 4500])
def test_a_full_disk_keeps_what_was_prepared_before(tmp_path, texts, room):
    before = run(tmp_path, str(texts))
    held = documents(before.folder, "train")
    (texts / "long.txt").write_text("".join(document(n) for n in range(100, 1000 if room < 2000 else 104)))
    with largest_file(room), pytest.raises(UserError, match=r"cannot write .*out: .*; free some space"):
        run(tmp_path, str(texts), tokenizer="char")
    assert documents(before.folder, "train") == held
    assert not [file for file in before.folder.iterdir() if file.name.startswith(".")]


def test_an_interrupt_leaves_no_temporary_files(tmp_path, texts):
    def progress(stage, done, total):
        if stage == "encode":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(DataConfig(sources=[str(texts)], output=str(tmp_path / "out"), tokenizer="char"), progress)
    assert not (tmp_path / "out").exists()


def test_opening_what_is_not_prepared(tmp_path, texts):
    with pytest.raises(UserError, match="nowhere does not exist; make it with `fastlm data prepare`"):
        open_split(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no prepared data \(no meta.json\)"):
        open_split(texts)
    folder = run(tmp_path, str(texts), validation_fraction=0.0).folder
    with pytest.raises(UserError, match="has no 'validation' split, only train; prepare it with a validation_fraction"):
        open_split(folder, "validation")
    shard = folder / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="train-00000.bin is corrupted"):
        Loader(folder)
    shard.unlink()
    with pytest.raises(UserError, match="train-00000.bin does not exist"):
        open_split(folder)
    for text in ("{", "[]", json.dumps({"format": "x"})):
        (folder / "meta.json").write_text(text)
        with pytest.raises(UserError, match=r"meta.json.*prepare the data again"):
            open_split(folder)


def test_a_shard_of_another_preparation_is_noticed(tmp_path, texts):
    one = run(tmp_path, str(texts), output=str(tmp_path / "one")).folder
    two = run(tmp_path, str(texts), output=str(tmp_path / "two"), seed=9).folder
    (one / "train-00000.bin").write_bytes((two / "train-00000.bin").read_bytes())
    with pytest.raises(UserError, match="train-00000.bin is not the one .*meta.json lists"):
        open_split(one)
