"""The backend "cuda" on a machine without a GPU."""

import functools

import pytest
import torch

from fastlm.ops import _cuda, _op
from tests.csrc.host_library import link
from tests.wheels import build_library


@functools.cache
def load() -> None:
    """Once in a process: a second library, of sources that were edited since, would define the same functions."""
    torch.ops.load_library(str(link(build_library.sources())))


@pytest.fixture
def cuda_on_the_host(monkeypatch):
    """The backend "cuda" takes CPU tensors and calls the functions of bindings/, compiled for the host body with the kernels.
    Dtypes that its kernels lack stay a reason against it."""
    load()
    reason = _op._kernel_reason

    def on_the_host(backend, dtypes, tensors):
        if backend != "cuda":
            return reason(backend, dtypes, tensors)
        floats = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
        wrong = [t for t in floats if t.dtype not in dtypes]
        return reason(backend, dtypes, wrong) if wrong else None

    monkeypatch.setattr(_cuda, "function", lambda name: getattr(torch.ops.fastlm_host, name).default)
    monkeypatch.setattr(_op, "_kernel_reason", on_the_host)
    loaded = [(op, op._loaded) for op in _op.REGISTRY.values()]
    for op, _ in loaded:
        op._loaded = {}
    yield
    for op, before in loaded:
        op._loaded = before
