import gzip
import json

import pytest

from fastlm.data.clean import CleaningReport
from fastlm.data.sources import Source, expand, parse_source, read_documents
from fastlm.errors import UserError


def read(path, field="text"):
    report = CleaningReport()
    return list(read_documents(path, field, report)), report


def test_parse_source(tmp_path):
    assert parse_source("a/b.txt") == Source("a/b.txt")
    assert parse_source("a/b.txt@0.5") == Source("a/b.txt", 0.5)
    assert parse_source("me@home/b.txt") == Source("me@home/b.txt")
    assert parse_source({"path": "x", "weight": 2, "text_field": "body"}) == Source("x", 2, "body")
    assert parse_source(tmp_path) == Source(str(tmp_path))
    odd = tmp_path / "file@3"
    odd.write_text("x")
    assert parse_source(str(odd)) == Source(str(odd)), "an existing path wins over a weight"


@pytest.mark.parametrize("spec", [{"path": "x", "wieght": 2}, {"weight": 1.0}, 7])
def test_parse_source_refuses(spec):
    with pytest.raises(UserError, match="path"):
        parse_source(spec)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "2", True])
def test_weight_must_be_a_positive_number(weight):
    with pytest.raises(UserError, match="weight must be a positive number"):
        parse_source({"path": "x", "weight": weight})


def test_expand(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.md", ".git/config", ".hidden", "__pycache__/x.pyc", "out/meta.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")

    def names(spec, skip=None):
        return [file.relative_to(tmp_path).as_posix() for file in expand(Source(str(spec)), skip)]

    assert names(tmp_path) == ["a.txt", "b.txt", "out/meta.json", "sub/c.md"]
    assert names(tmp_path, tmp_path / "out") == ["a.txt", "b.txt", "sub/c.md"]
    assert names(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert names(tmp_path / "**" / "*.md") == ["sub/c.md"]
    assert sorted(names(tmp_path / "**")) == ["a.txt", "b.txt", "out/meta.json", "sub/c.md"]
    assert sorted(names(tmp_path / "**", tmp_path / "out")) == ["a.txt", "b.txt", "sub/c.md"]
    assert names(tmp_path / ".hidden") == [".hidden"], "a file that is named is read"


def test_expand_refuses(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt does not exist; expected a file, a folder or a glob"):
        expand(Source(str(tmp_path / "nowhere.txt")))
    with pytest.raises(UserError, match="the pattern matches no file"):
        expand(Source(str(tmp_path / "*.txt")))
    with pytest.raises(UserError, match="holds no files"):
        expand(Source(str(tmp_path)))


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9f\r\n")
    assert read(path)[0] == ["gr\u00fc\u00df\r\n"]
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"packed", mtime=0))
    assert read(packed)[0] == ["packed"]


@pytest.mark.parametrize(
    "name, data, count",
    [
        ("a.png", b"\x89PNG\0\0", "files_binary"),
        ("utf16.txt", "hello".encode("utf-16"), "files_binary"),
        ("latin.txt", b"caf\xe9", "files_not_utf8"),
        ("broken.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "files_unreadable"),
        ("no.gz", b"not packed", "files_unreadable"),
    ],
)
def test_bad_files_are_counted(tmp_path, name, data, count):
    path = tmp_path / name
    path.write_bytes(data)
    documents, report = read(path)
    assert documents == []
    assert getattr(report, count) == 1
    assert name in report.examples[0]
    assert report.files_read == 0


def test_file_that_vanishes_is_counted(tmp_path):
    assert read(tmp_path / "gone.txt")[1].files_unreadable == 1


@pytest.mark.parametrize("pack", [False, True])
def test_json_lines(tmp_path, pack):
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        b"",
        b'{"text": "second", "more": 1}',
        b'{"text": ',
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'{"body": "x"}',
        b'{"text": 3}',
        b'["text"]',
        b'{"text": "last\\ud800"}',
    ]
    path = tmp_path / ("d.jsonl.gz" if pack else "d.jsonl")
    data = b"\n".join(lines)
    path.write_bytes(gzip.compress(data, mtime=0) if pack else data)
    documents, report = read(path)
    assert documents == ["first", "second", "last\ud800"]
    assert report.lines_malformed == 3
    assert report.lines_without_text == 3
    assert any(example.startswith(f"{path}:4: ") for example in report.examples)


def test_json_lines_with_another_field(tmp_path):
    path = tmp_path / "d.ndjson"
    path.write_text(json.dumps({"body": "x"}))
    assert read(path, "body")[0] == ["x"]


def test_truncated_packed_json_lines_keep_what_was_read(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    data = b"".join(json.dumps({"text": f"{n} {n**7}"}).encode() + b"\n" for n in range(5000))
    path.write_bytes(gzip.compress(data, mtime=0)[:-2000])
    documents, report = read(path)
    assert 100 < len(documents) < 5000
    assert report.files_unreadable == 1
