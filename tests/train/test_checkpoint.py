import errno
import json
import os
import random
import resource
import shutil
import stat

import pytest
import torch

from fastlm.errors import UserError
from fastlm.optim import AdamW
from fastlm.train import checkpoint, latest_valid, metrics, read_metrics, train
from tests.train.tiny import TinyLoader, TinyModel, losses, make_model, settings

FILES = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run's folder with checkpoints of steps 4 and 8."""
    out = tmp_path_factory.mktemp("run")
    train(make_model(), settings(out, steps=8, checkpoint_every=4), TinyLoader(), TinyLoader(seed=1))
    return out


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The losses of a run of 14 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    train(make_model(), settings(out, steps=14), TinyLoader(), TinyLoader(seed=1))
    return losses(out)


@pytest.fixture
def run(two_checkpoints, tmp_path):
    return shutil.copytree(two_checkpoints, tmp_path / "run")


def test_a_checkpoint_gives_everything_back(tmp_path):
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=0.1)
    model.loss(*next_pair()).backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, 7, model, optimizer, {"position": [1, 2.5, "x"]})
    expected_random = torch.rand(5)

    other = make_model(seed=9)
    other_optimizer = AdamW(other.parameters(), lr=0.1)
    assert checkpoint.load(path, other, other_optimizer) == {"position": [1, 2.5, "x"]}
    assert torch.equal(torch.rand(5), expected_random)
    assert other.head.weight is other.embedding.weight
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other_optimizer.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], other_optimizer.state[q][key]) for key in optimizer.state[p])


def next_pair():
    batch = next(TinyLoader())
    return batch.tokens, batch.labels


def test_no_pickle_and_readable_as_the_umask_says(run):
    files = [p for p in run.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl", ".png"}
    plain = run / "plain"
    plain.touch()
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {stat.S_IMODE(plain.stat().st_mode)}


def damage(path, how, rng):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: rng.randrange(1, len(content))])
    elif how == "one bit":
        content[rng.randrange(len(content) - 1)] ^= 1 << rng.randrange(7)
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "one bit"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_noticed_and_the_one_before_taken(run, name, how):
    rng = random.Random(name + how)
    newest, older = checkpoint.checkpoints(run / "checkpoints")
    whole = (newest / name).read_bytes()
    for _ in range(20 if how in ("truncated", "one bit") else 1):
        damage(newest / name, how, rng)
        found, skipped = latest_valid(run / "checkpoints")
        assert found == older
        assert [path for path, _ in skipped] == [newest]
        assert name in skipped[0][1]
        (newest / name).write_bytes(whole)
    assert latest_valid(run / "checkpoints") == (newest, [])


def test_resuming_says_what_it_skipped_and_sets_it_aside(run, capsys):
    damage(run / "checkpoints" / "step-00000008" / checkpoint.MODEL, "one bit", random.Random(0))
    train(make_model(), settings(run, steps=12, checkpoint_every=4, resume=True), TinyLoader(), TinyLoader(seed=1))
    said = capsys.readouterr().out
    assert "step-00000008: model.safetensors does not match its checksum" in said
    assert f"resumed from {run / 'checkpoints' / 'step-00000004'}" in said
    assert "steps was 8, is 12" in said
    assert list(losses(run)[0]) == list(range(1, 13))
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == ["damaged-step-00000008", "step-00000008", "step-00000012"]


def test_no_valid_checkpoint_left(run):
    for path in checkpoint.checkpoints(run / "checkpoints"):
        (path / checkpoint.STATE).unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is valid"):
        train(make_model(), settings(run, resume=True), TinyLoader())


def test_a_checkpoint_of_another_model_is_refused_untouched(run):
    path, _ = latest_valid(run / "checkpoints")
    wide = TinyModel(width=24)
    before = wide.up.weight.detach().clone()
    with pytest.raises(UserError, match=r"another model: embedding.weight is \[31, 16\] in the checkpoint, \[31, 24\]"):
        checkpoint.load(path, wide, AdamW(wide.parameters()))
    more = make_model()
    more.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="extra.bias: the checkpoint lacks it"):
        checkpoint.load(path, more, AdamW(more.parameters()))
    assert torch.equal(wide.up.weight, before)


def test_a_newer_format_is_named(run):
    path, _ = latest_valid(run / "checkpoints")
    content = json.loads((path / checkpoint.STATE).read_text())
    del content["sha256"]
    content["format"] = 2
    checkpoint.write_json(path / checkpoint.STATE, {**content, "sha256": checkpoint._json_sha256(content)})
    assert "format 2" in checkpoint.find_fault(path)


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    model = make_model()
    optimizer = AdamW(model.parameters())
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, optimizer, {}, keep=2)
    (tmp_path / ".writing-step-00000009").mkdir()  # left by a kill
    real = os.replace

    def replace(source, target):
        assert len(checkpoint.checkpoints(tmp_path)) == 2
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save(tmp_path, 3, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


WRITES = [
    (checkpoint, "write_tensors"),
    (checkpoint, "write_json"),
    (checkpoint, "_flush"),
    (checkpoint.os, "replace"),
    (metrics.MetricsLog, "write"),
]


@pytest.mark.parametrize(("owner", "name"), WRITES, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("late", [0, 1], ids=["first", "second"])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, whole_run, owner, name, late):
    out, real, calls = tmp_path / "run", getattr(owner, name), []

    def fill_up(*args, **kwargs):
        if (out / "checkpoints" / "step-00000004").exists():
            calls.append(args)
            if len(calls) > late:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fill_up)
    with pytest.raises(UserError, match="no space left in .*free some space and resume") as caught:
        train(make_model(), settings(out, steps=14, checkpoint_every=4), TinyLoader(), TinyLoader(seed=1))
    monkeypatch.setattr(owner, name, real)
    assert not list(out.rglob(".writing*"))  # what was half written has given its space back
    # The second write_json is the first of the third checkpoint.
    last = out / "checkpoints" / ("step-00000008" if (name, late) == ("write_json", 1) else "step-00000004")
    assert latest_valid(out / "checkpoints") == (last, [])
    assert f"the last good checkpoint is {last};" in str(caught.value)

    train(make_model(seed=3), settings(out, steps=14, resume=True), TinyLoader(), TinyLoader(seed=1))
    assert losses(out) == whole_run


def test_a_full_disk_met_by_save_pretrained_is_told_apart(tmp_path):
    class Hub(TinyModel):
        def save_pretrained(self, folder):
            try:
                raise OSError(errno.ENOSPC, "full")
            except OSError as error:
                raise UserError("save: cannot be written") from error

    with pytest.raises(UserError, match="no space left .* no checkpoint had been written yet"):
        train(Hub(), settings(tmp_path, steps=1, evaluate_every=1), TinyLoader(), TinyLoader(seed=1))


@pytest.fixture
def small_files():
    """Makes the operating system refuse, as a full disk does, what would make a file longer than 50,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_operating_systems_refusal_comes_through_safetensors(tmp_path, small_files):
    with pytest.raises(OSError) as caught:
        checkpoint.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(100_000)})
    assert checkpoint.is_full_disk(caught.value)


def test_a_metrics_line_that_does_not_fit_is_an_error_once(tmp_path, small_files):
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    with pytest.raises(OSError):
        log.write({"step": 2, "text": "x" * 60_000})
    log.close()  # must not raise again and hide the first error
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_half_written_metrics_line_is_dropped_on_resume(run):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "step": 9, "lo')
    train(make_model(), settings(run, steps=9, resume=True), TinyLoader(), TinyLoader(seed=1))
    assert [r["step"] for r in read_metrics(path) if r["kind"] == "train"] == list(range(1, 10))
    assert all(json.loads(line) for line in path.read_text().splitlines())
