"""Chooses how Triton runs before any kernel is imported: compiled on a GPU, else in the (repaired) interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from fastlm._interpreter import repair_interpreter
    from tests.quick_interpreter import quicken_interpreter

    repair_interpreter()
    quicken_interpreter()

import pytest

from tests.gpu_guard import pytest_runtest_makereport  # noqa: F401

# Minutes each: begun last, one process would wait for the other.
LONGEST = ("test_aot.py", "test_cuda_library.py", "test_backends_train_alike.py")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device():
    """Where kernels run in this session: the GPU, or the CPU with Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
