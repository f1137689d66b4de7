import os
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.shards import HEADER_BYTES, ShardWriter, open_shard
from fastlm.errors import UserError


def write(folder, documents, vocab_size=1000, limit=2**28):
    writer = ShardWriter(folder, "train", vocab_size, limit)
    for document in documents:
        writer.add(np.array(document))
    return [folder / shard["name"] for shard in writer.close()]


@settings(deadline=None, max_examples=30)
@given(
    documents=st.lists(st.lists(st.integers(0, 999), max_size=20), min_size=1, max_size=8),
    vocab_size=st.sampled_from([1000, 2**16, 2**16 + 1]),
)
def test_round_trip(tmp_path_factory, documents, vocab_size):
    [path] = write(tmp_path_factory.mktemp("shard"), documents, vocab_size)
    shard = open_shard(path)
    assert shard.tokens.dtype == (np.uint16 if vocab_size <= 2**16 else np.uint32)
    assert shard.tokens.tolist() == sum(documents, [])
    assert shard.document_ends.tolist() == np.cumsum([len(d) for d in documents]).tolist()
    assert shard.vocab_size == vocab_size
    assert not shard.tokens.flags.writeable or not len(shard.tokens)


def test_layout_is_the_documented_one(tmp_path):
    [path] = write(tmp_path, [[1, 2], [513]], 1000)
    data = path.read_bytes()
    content = struct.pack("<3H", 1, 2, 513) + bytes(2) + struct.pack("<2Q", 2, 3)
    assert data[HEADER_BYTES:] == content
    head = b"fastlmTK" + struct.pack("<IIQQQI", 1, 2, 3, 2, 1000, zlib.crc32(content)) + bytes(16)
    assert data[:HEADER_BYTES] == head + struct.pack("<I", zlib.crc32(head))


def test_largest_ids_fit(tmp_path):
    [path] = write(tmp_path, [[2**16 - 1]], 2**16)
    assert open_shard(path).tokens.tolist() == [2**16 - 1]
    [path] = write(tmp_path, [[2**16]], 2**16 + 1)
    assert open_shard(path).tokens.tolist() == [2**16]


def test_several_shards_hold_whole_documents(tmp_path):
    documents = [[1] * 6, [2] * 3, [3] * 2, [4] * 25, [5]]
    paths = write(tmp_path, documents, limit=10)
    assert [path.name for path in paths] == [f"train-{n:05d}.bin" for n in range(4)]
    assert [open_shard(path).tokens.tolist() for path in paths] == [[1] * 6 + [2] * 3, [3] * 2, [4] * 25, [5]]
    assert sorted(os.listdir(tmp_path)) == [path.name for path in paths], "no temporary file is left"


def test_nothing_appears_before_the_shard_is_whole(tmp_path):
    writer = ShardWriter(tmp_path, "train", 10)
    writer.add(np.array([1, 2]))
    assert not (tmp_path / "train-00000.bin").exists()
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_every_flipped_byte_is_noticed(tmp_path):
    [path] = write(tmp_path, [[1, 2], [513]])
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(UserError, match=str(path)):
            open_shard(path)
    path.write_bytes(good)
    open_shard(path)


def test_corrupted_content_is_named_and_verification_can_be_switched_off(tmp_path):
    [path] = write(tmp_path, [[1] * 100])
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"train-00000.bin is corrupted: its checksum is \w{8}, expected \w{8}; prepare"
    ):
        open_shard(path)
    assert len(open_shard(path, verify=False).tokens) == 100


@pytest.mark.parametrize("verify", [True, False])
def test_every_truncation_is_noticed(tmp_path, verify):
    [path] = write(tmp_path, [[1, 2, 3]])
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match="truncated"):
            open_shard(path, verify=verify)
    path.write_bytes(good + b"x")
    with pytest.raises(UserError, match=r"too long: expected 80 bytes, got 81; prepare"):
        open_shard(path, verify=verify)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"something else" * 10)
    with pytest.raises(UserError, match=r"x.bin is not a token shard: it begins with b'somethin'"):
        open_shard(path)
    with pytest.raises(UserError, match="y.bin does not exist"):
        open_shard(tmp_path / "y.bin")
    head = b"fastlmTK" + struct.pack("<IIQQQI", 2, 2, 0, 0, 9, 0) + bytes(16)
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)))
    with pytest.raises(UserError, match="has version 2, this fastlm reads version 1"):
        open_shard(path)
