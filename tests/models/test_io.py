"""Hugging Face folders: round trips bit by bit, shards, and what is wrong with a folder said in one line."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model

import fastlm
from fastlm.errors import UserError
from fastlm.models import Transformer, TransformerConfig, io, preset
from tests.models.families import LLAMA3, NAMES, make_theirs, pair, tokens


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_identical(name, dtype, tmp_path):
    theirs, ours = pair(name, tmp_path / "theirs", dtype)
    ours.save_pretrained(tmp_path / "ours")
    assert same_bits(load_file(tmp_path / "theirs" / io.WEIGHTS), load_file(tmp_path / "ours" / io.WEIGHTS))
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert same_bits(theirs.state_dict(), opened.state_dict())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")  # its buffers were cast with the weights
    batch = tokens(1, 120)
    with torch.no_grad():
        assert torch.equal(opened(batch).logits, theirs(batch).logits), "config.json changed on the way"
    again = fastlm.load(tmp_path / "ours")
    assert again.config == ours.config
    assert same_bits(again.state_dict(), ours.state_dict())


def test_shards(tmp_path):
    theirs, ours = pair("llama3-rope", tmp_path / "whole")
    ours.save_pretrained(tmp_path / "shards", max_shard_bytes=50_000)
    files = sorted(p.name for p in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "shards" / name).stat().st_size < 60_000 for name in files)
    assert same_bits(fastlm.load(tmp_path / "shards").state_dict(), ours.state_dict())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert same_bits(theirs.state_dict(), opened.state_dict())
    theirs.save_pretrained(tmp_path / "their-shards", max_shard_size="40KB")
    assert (tmp_path / "their-shards" / io.INDEX).exists()
    assert same_bits(fastlm.load(tmp_path / "their-shards").state_dict(), ours.state_dict())

    ours.save_pretrained(tmp_path / "shards")  # one file now: the shards must not stay behind
    assert sorted(p.name for p in (tmp_path / "shards").glob("model*")) == [io.WEIGHTS]


def test_dtype_and_device(tmp_path):
    _, ours = pair("llama", tmp_path)
    half = fastlm.load(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.embed.weight, ours.embed.weight.bfloat16())
    assert not ours.training
    assert all(p.requires_grad for p in ours.parameters())


def test_weights_do_not_follow_the_file(tmp_path):
    _, ours = pair("gpt2", tmp_path)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with open(tmp_path / io.WEIGHTS, "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    assert same_bits(ours.state_dict(), before)


def test_base_model_without_prefix_and_old_masks(tmp_path):
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(vocab_size=61, n_embd=32, n_head=4, n_layer=2, n_positions=64))
    base.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / io.WEIGHTS)
    assert "wte.weight" in tensors
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, tmp_path / io.WEIGHTS, metadata={"format": "pt"})
    ours = fastlm.load(tmp_path)
    batch = tokens(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours.hidden(batch), base.eval()(batch).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert ours.config.eos_ids == ()  # 50256 is no token of this vocabulary


def test_config_of_no_family_is_kept_under_our_own_names(tmp_path):
    config = TransformerConfig(61, 32, 2, 4, norm="layer", position="rotary", gated=False, activation="relu2")
    model = Transformer(config)
    model.save_pretrained(tmp_path)
    again = fastlm.load(tmp_path)
    assert again.config == config
    assert same_bits(again.state_dict(), model.state_dict())


def test_ids_and_rope_survive(tmp_path):
    config = preset("llama-4x192", bos_id=1, eos_ids=(2, 5), pad_id=0, rope_scaling="llama3", rope_factor=4.0)
    Transformer(config).save_pretrained(tmp_path)
    assert fastlm.load(tmp_path).config == config
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == [2, 5]
    assert theirs.config.rope_parameters["rope_type"] == "llama3"
    assert theirs.generation_config.eos_token_id == [2, 5]


def test_saving_into_a_folder_keeps_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "other.bin").write_text("no")

    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer_config.json").write_text("{}")

    model = Transformer(preset("llama-4x192", n_layers=1))
    model.save_pretrained(tmp_path, tokenizer=source)
    model.save_pretrained(tmp_path, tokenizer=Tokenizer())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
        "source",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / io.WEIGHTS).stat().st_mode & 0o777 == (tmp_path / "notes.txt").stat().st_mode & 0o777


@pytest.mark.parametrize("stage", ["weights", "config"])
def test_full_disk_leaves_the_old_model(stage, tmp_path, monkeypatch):
    _, ours = pair("llama", tmp_path / "source")
    ours.save_pretrained(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "_write_tensors" if stage == "weights" else "_write_json", refuse)
    with torch.no_grad():
        ours.embed.weight.add_(1)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        ours.save_pretrained(tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_real_full_disk(tmp_path):
    if not shutil.os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left"):
        (tmp_path / "x").symlink_to("/dev/full")
        io._write_json(tmp_path / "x", {"a": 1})


# --- broken folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    _, ours = pair("llama-gqa-tied", tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / io.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / io.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / io.WEIGHTS, metadata={"format": "pt"})


def refuses(folder, *words):
    with pytest.raises(UserError) as caught:
        fastlm.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_things(folder, tmp_path):
    refuses(tmp_path / "nowhere", "nowhere does not exist", "Hugging Face's format")
    refuses(tmp_path, "has no config.json")
    (folder / io.WEIGHTS).rename(folder / "pytorch_model.bin")
    refuses(folder, "has no model.safetensors", "pytorch_model.bin is a pickle")


@pytest.mark.parametrize("keep", [0, 5, 400, -1000, -1])
def test_truncated(folder, keep):
    path = folder / io.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refuses(folder, str(path), "truncated or corrupted", "again")


def test_flipped_bit(folder):
    path = folder / io.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    refuses(folder, str(path), "does not have its checksum", "model.norm.weight")


def test_missing_unexpected_and_misshapen_tensors(folder, tmp_path):
    for name, change, words in (
        ("missing", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ["mlp.up_proj.weight is missing"]),
        ("extra", lambda t: t.update(score=torch.ones(2)), ["model.score" if False else "score", "has no place"]),
        (
            "shape",
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            ["model.norm.weight is [3]", "asks for [48]"],
        ),
        ("int", lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), ["is torch.int8"]),
    ):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        edit_tensors(copy, change)
        refuses(copy, *words)


def test_another_config(folder):
    edit_config(folder, num_hidden_layers=4)
    refuses(folder, "model.layers.3.", "(and 8 more) is missing")
    edit_config(folder, num_hidden_layers=2)
    refuses(folder, "model.layers.2.", "has no place")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, ["model_type 'mamba' is not supported, only gpt2, llama are"]),
        ({"model_type": None}, ["model_type None"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope scaling 'yarn' is not supported", "llama3"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope scaling 'dynamic' is not supported"]),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}}, ["lacks high_freq_factor"]),
        ({"hidden_act": "xielu"}, ["hidden_act 'xielu'"]),
        ({"hidden_size": None}, ["config.json"]),
        ({"quantization_config": {"bits": 4}}, ["quantized"]),
        ({"num_key_value_heads": 3}, ["multiple of n_kv_heads"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ],
)
def test_unsupported_configs(folder, changes, words):
    edit_config(folder, **changes)
    refuses(folder, str(folder / io.CONFIG), *words)


@pytest.mark.parametrize("key", ["add_cross_attention", "scale_attn_by_inverse_layer_idx"])
def test_unsupported_gpt2(key, tmp_path):
    make_theirs("gpt2").save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: True})
    refuses(tmp_path, f"{key} = True is not supported")


def test_broken_json_and_index(folder, tmp_path):
    model = fastlm.load(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_bytes=50_000)
    first = tmp_path / "shards" / "model-00001-of-00002.safetensors"
    first = first if first.exists() else next((tmp_path / "shards").glob("model-00001-*"))
    kept = first.read_bytes()
    first.unlink()
    refuses(tmp_path / "shards", first.name, "is missing")
    first.write_bytes(kept)
    index = tmp_path / "shards" / io.INDEX
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../model/model.safetensors"  # outside the folder, though it is there
    index.write_text(json.dumps(data))
    refuses(tmp_path / "shards", "is missing, which model.safetensors.index.json names")
    index.write_text("[1]")
    refuses(tmp_path / "shards", "must hold an object")
    (folder / io.CONFIG).write_text('{"model_type": ')
    refuses(folder, str(folder / io.CONFIG), "cannot be read")


def test_a_quantised_model_is_not_saved_as_if_it_were_whole(tmp_path):
    model = Transformer(preset("llama-4x192"))
    report = fastlm.nn.quantize_(model)
    with pytest.raises(UserError, match=r"save: the model has no blocks\.0\.attention\.out\.weight .*report\.undo\(\)"):
        model.save_pretrained(tmp_path)
    report.undo()
    model.save_pretrained(tmp_path)
