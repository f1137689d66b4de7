import sysconfig
from pathlib import Path

import pytest

from fastlm.data import DataConfig, prepare, standard_library_sources
from fastlm.errors import UserError


def test_standard_library():
    split = standard_library_sources()
    assert split == standard_library_sources()
    assert not set(split.train) & set(split.validation)
    assert split.train == sorted(split.train)
    every = split.train + split.validation
    root = sysconfig.get_path("stdlib")
    assert str(Path(root, "ast.py")) in every
    parts = {part for path in every for part in Path(path).relative_to(root).parts[:-1]}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
    sizes = [sum(Path(path).stat().st_size for path in paths) for paths in split]
    assert sizes[0] > 5e6
    assert 0.01 < sizes[1] / sizes[0] < 0.15


def test_a_library_without_source_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="the source of Python's standard library is not in"):
        standard_library_sources()


def test_prepare_a_part_of_it(tmp_path):
    split = standard_library_sources()
    report = prepare(
        DataConfig(
            sources=split.train[:12],
            validation_sources=split.validation[:2],
            output=str(tmp_path / "out"),
            vocab_size=300,
        )
    )
    assert report.splits["validation"]["documents"] == 2
    assert report.tokenizer.eos_id is not None
