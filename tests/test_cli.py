"""The command line as a user meets it: every verb once on tiny data, and one line with exit status 2 for each mistake."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from fastlm import cli

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Reader:\n    pass\n\n" * 40
TRAIN = (
    "--steps=4",
    "--batch-size=2",
    "--context=16",
    "--warmup=1",
    "--evaluate-every=2",
    "--evaluate-batches=1",
    "--log-every=1",
)
SIZES = ("--d-model=16", "--n-layers=1", "--n-heads=2", "--max-positions=64")


def run(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of one command."""
    monkeypatch.setattr(sys, "argv", ["fastlm", *map(str, arguments)])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of prepared data and of a finished run."""
    root = tmp_path_factory.mktemp("cli")
    for i in range(12):
        (root / f"text{i}.py").write_text(f"# file {i}\n{TEXT}", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        sources = [str(root / f"text{i}.py") for i in range(12)]
        for arguments in (
            ("data", "prepare", *sources, "--vocab-size=300", "--validation-fraction=0.3", f"--out={root / 'data'}"),
            ("train", f"--data={root / 'data'}", f"--out={root / 'run'}", *TRAIN, *SIZES),
        ):
            patch.setattr(sys, "argv", ["fastlm", *arguments])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
    return root


def test_train_leaves_everything_behind(trained):
    left = {path.name for path in (trained / "run").iterdir()}
    assert {"checkpoints", "model", "metrics.jsonl", "loss.png", "config.yaml"} <= left
    records = [json.loads(line) for line in (trained / "run/metrics.jsonl").read_text().splitlines()]
    assert any(record["kind"] == "evaluation" for record in records)


def test_saved_config_starts_the_same_run(trained, monkeypatch, capsys):
    again = trained / "again"
    status, _, err = run(monkeypatch, capsys, "train", "-c", trained / "run/config.yaml", f"--out={again}")
    assert (status, err) == (0, "")
    # Tensors, not bytes of the file: safetensors writes the keys of its metadata in no fixed order.
    first, second = (load_file(folder / "model/model.safetensors") for folder in (trained / "run", again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluate(trained, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "evaluate", trained / "run", trained / "text0.py", "--json")
    result = json.loads(out)
    assert status == 0 and result["tokens"] > 0 and result["bits_per_byte"] > 0
    status, out, _ = run(monkeypatch, capsys, "evaluate", trained / "run", f"--data={trained / 'data'}")
    assert status == 0 and "perplexity" in out


def test_generate_is_repeatable_and_begins_with_the_prompt(trained, monkeypatch, capsys):
    command = ("generate", trained / "run", "--prompt=def ", "--max-new-tokens=8", "--seed=3")
    first, second = (run(monkeypatch, capsys, *command) for _ in range(2))
    assert first == second and first[0] == 0 and first[1].startswith("def ")


def test_convert(trained, monkeypatch, capsys):
    target = trained / "bf16"
    status, out, _ = run(monkeypatch, capsys, "convert", trained / "run", target, "--dtype=bf16")
    assert status == 0 and "bfloat16" in out
    from fastlm import load

    assert load(target).embed.weight.dtype == torch.bfloat16 and (target / "tokenizer.json").is_file()


def test_tokenizer_train(trained, monkeypatch, capsys):
    target = trained / "tokenizer"
    status, out, _ = run(
        monkeypatch, capsys, "tokenizer", "train", trained / "text0.py", "--kind=char", f"--out={target}"
    )
    assert status == 0 and (target / "tokenizer.json").is_file() and "char" in out.lower()


def test_doctor_names_ops_and_reasons(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "doctor")
    assert status == 0 and "linear_cross_entropy" in out and "torch" in out
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in out


@pytest.mark.parametrize(
    "verb", ["demo", "data prepare", "tokenizer train", "train", "evaluate", "generate", "convert", "doctor"]
)
def test_help_shows_an_example(verb, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, *verb.split(), "--help")
    assert status == 0 and f"fastlm {verb}" in out.split("Example:")[1]


def _mistakes(root):
    data, model = root / "data", root / "run"
    binary = root / "binary.txt"
    binary.write_bytes(bytes(range(256)) * 8)
    bad = root / "bad.yaml"
    bad.write_text("train: {stepz: 3}\n")
    section = root / "section.yaml"
    section.write_text("trian: {steps: 3}\n")
    return {
        "no data": (("train",), "give --data"),
        "no such data": (("train", f"--data={root / 'nowhere'}"), "nowhere"),
        "no sources": (("data", "prepare"), "no sources"),
        "missing source": (("data", "prepare", str(root / "gone.txt")), "gone.txt"),
        "only binary": (("data", "prepare", str(binary), f"--out={root / 'b'}"), "no usable text"),
        "unknown key": (("train", "-c", str(bad)), "did you mean 'steps'"),
        "unknown section": (("train", "-c", str(section)), "did you mean 'train'"),
        "missing config": (("train", "-c", str(root / "gone.yaml")), "does not exist"),
        "unknown preset": (("train", f"--data={data}", "--preset=gpt3", f"--out={root / 'x'}"), "did you mean 'gpt2'"),
        "bad value": (("train", f"--data={data}", "--precision=fp8", f"--out={root / 'x'}"), "fp32, bf16"),
        "long context": (
            ("train", f"--data={data}", "--context=128", *SIZES, f"--out={root / 'x'}"),
            "more than the model's max_positions 64",
        ),
        "existing run": (("train", f"--data={data}", f"--out={model}", *TRAIN, *SIZES), "already holds a run"),
        "nothing to resume": (("train", f"--data={data}", f"--out={root / 'x'}", "--resume"), "nothing to resume"),
        "no model": (("generate", str(root / "gone"), "--prompt=a"), "does not exist"),
        "not a model": (("evaluate", str(data), str(root / "text0.py")), "no config.json"),
        "long prompt": (("generate", str(model), "--prompt=" + "a = 1\n" * 200), "64"),
        "files and data": (("evaluate", str(model)), "give text files, or --data"),
        "missing file": (("evaluate", str(model), str(root / "gone.py")), "gone.py"),
        "small vocabulary": (("train", f"--data={data}", "--vocab-size=100", f"--out={root / 'x'}"), "has 300 tokens"),
        "onto itself": (("convert", str(model), str(model / "model")), "is the source"),
    }


MISTAKES = [
    "no data", "no such data", "no sources", "missing source", "only binary", "unknown key", "unknown section",
    "missing config", "unknown preset", "bad value", "long context", "existing run", "nothing to resume", "no model",
    "not a model", "long prompt", "files and data", "missing file", "small vocabulary", "onto itself",
]  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_exit_status_2(name, trained, monkeypatch, capsys):
    arguments, expected = _mistakes(trained)[name]
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert err.startswith("fastlm: ") and err.count("\n") == 1, err
    assert expected in err


def test_every_mistake_is_listed(trained):
    assert set(_mistakes(trained)) == set(MISTAKES)


def test_truncated_weights_are_named(trained, monkeypatch, capsys, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(trained / "run/model", copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    status, _, err = run(monkeypatch, capsys, "generate", copy, "--prompt=a")
    assert status == 2 and "model.safetensors" in err and err.count("\n") == 1


def test_unknown_flag_has_exit_status_2(monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "train", "--stepz=3")
    assert status == 2 and "--stepz" in err
