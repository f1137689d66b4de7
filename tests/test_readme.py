"""The README's code blocks run: Python as it stands, commands on a tiny corpus with small sizes."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from fastlm import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
SMALL = ["--steps=2", "--batch-size=2", "--context=32", "--log-every=1", "--evaluate-batches=1"]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_commands_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for i in range(1, 21):
        text = f"Chapter {i}. " + "It was the best of times, it was the worst of times. " * 30
        (tmp_path / f"books/chapter{i}.txt").write_text(text, encoding="utf-8")
    assert len(COMMANDS) >= 6
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[0] == "fastlm"
        words += SMALL if words[1] == "train" and "--resume" not in words else []
        words += ["--max-new-tokens=4"] if words[1] == "generate" else []
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, line
