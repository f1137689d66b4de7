"""The backend "cuda" where its library or its kernels cannot be used: reasons, the same everywhere."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastlm import ops
from fastlm.ops import _cuda
from fastlm.ops._op import missing_backends

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BAD = {
    "symbols": ("int absent(); int here() { return absent(); }", "cannot be loaded with torch"),
    "stranger": ("int here() { return 0; }", "is not a library of fastlm"),
    "old": (
        f"int fastlm_library_version() {{ return {_cuda.VERSION - 1}; }}",
        f"has version {_cuda.VERSION - 1}, this",
    ),
}


@pytest.fixture
def asked_again(monkeypatch):
    """(path) -> makes it the library's place, before anybody has asked for it."""

    def place(path):
        monkeypatch.setattr(_cuda, "_asked", {})
        monkeypatch.setattr(_cuda, "PATH", Path(path))

    return place


def make(path, code):
    command = ["g++", "-x", "c++", "-shared", "-fPIC", "-", "-o", str(path)]
    subprocess.run(command, input=f'extern "C" {{ {code} }}', text=True, check=True)


def assert_reason(words):
    """The reason is the same everywhere, and no other backend minds."""
    x = torch.ones(4, 8, device="meta")
    with pytest.raises(ValueError, match=f"rms_norm: backend 'cuda' cannot serve this call: .*{words}.*reinstall"):
        ops.rms_norm(x, backend="cuda")
    assert words in missing_backends()["cuda"] and words in _cuda.unavailable()
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastlm.rms_norm(torch.ones(4, 8), None, None, None, None, 1e-6, 0.0, False, 0.0, "cuda")
    assert ops.rms_norm(torch.ones(4, 8)).shape == (4, 8)


def test_a_missing_library_is_a_reason(asked_again, tmp_path):
    asked_again(tmp_path / _cuda.NAME)
    assert_reason("installed without libfastlm_cuda.so")


@pytest.mark.parametrize("content", [b"", b"no library at all" * 100])
def test_a_file_of_something_else_is_a_reason(content, asked_again, tmp_path):
    path = tmp_path / _cuda.NAME
    path.write_bytes(content)
    asked_again(path)
    assert_reason("is damaged")


@needs_compiler
@pytest.mark.parametrize("kind", BAD)
def test_a_library_that_does_not_fit_is_a_reason(kind, asked_again, tmp_path):
    code, words = BAD[kind]
    path = tmp_path / _cuda.NAME
    make(path, code)
    if kind == "old":
        cut = tmp_path / "cut" / _cuda.NAME  # half of a file, as a full disk leaves it: to load it is a bus error
        cut.parent.mkdir()
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        asked_again(cut)
        assert_reason("is damaged")
    asked_again(path)
    assert_reason(words)


@needs_compiler
def test_a_driver_that_is_too_old_is_a_reason(tmp_path, monkeypatch):
    """A driver runs libraries of its own major version of CUDA and of older ones."""
    path = tmp_path / _cuda.NAME
    make(
        path,
        f"int driver; int fastlm_library_version() {{ return {_cuda.VERSION}; }}"
        "int fastlm_runtime_version() { return 13020; } int fastlm_driver_version() { return driver; }",
    )
    driver = ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "driver")
    for version, words in (
        (12080, "was built with CUDA 13.2 and the GPU's driver takes CUDA 12.8 at most; update the driver to one of CUDA 13"),
        (0, "the GPU's driver was not found by its CUDA runtime; update the driver to one of CUDA 13"),
        (13000, None), (13020, None), (14000, None),
    ):  # fmt: skip
        driver.value = version
        reasons = []
        for has_gpu in (True, False):
            monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
            reasons.append(_cuda._load(path))
        assert reasons == [None, None] if words is None else words in reasons[0] and "reinstall" in reasons[0]
        assert reasons[1] is None  # there it is "no CUDA GPU"


def test_what_the_kernels_do_not_take_is_a_reason(monkeypatch):
    monkeypatch.setattr(_cuda, "_asked", {"reason": None})
    x = torch.ones(4, 8, device="meta", dtype=torch.bfloat16)
    for options, words in (
        ({"x": x.double()}, "its kernels take float32, bfloat16, float16, got float64"),
        ({"x": x, "residual": x.half()}, "weight, bias and residual must have x's dtype"),
        ({"x": x, "weight": x[0], "bias": x[0].float()}, "weight and bias must have one dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.rms_norm(**options, backend="cuda")
    with pytest.raises(ValueError, match="softmax: backend 'cuda' cannot serve .* its rows are numbered in 32 bits"):
        ops.softmax(torch.ones(2**31, 1, device="meta"), backend="cuda")
    for op in (ops.rms_norm, ops.softmax):
        assert ops.explain(op, x, backend="cuda").backend == "cuda"


def test_auto_does_not_take_what_was_not_measured(monkeypatch):
    """Nor does it load the library to find out."""
    from fastlm.ops import _op

    monkeypatch.setattr(_cuda, "_asked", {})
    monkeypatch.setattr(_op, "_on_cuda", lambda *_: True)
    for op in (ops.rms_norm, ops.softmax):
        found = ops.explain(op, torch.ones(4, 8, device="meta"))
        assert found.backend != "cuda" and "not measured" in found.reasons["cuda"]
    assert _cuda._asked == {}
