"""A plugin of sessions on a GPU: a test that breaks the GPU's context ends its process.

After an illegal access every later CUDA call of the process fails: the tests after it would fail too, and hide the one that did
it. pytest-xdist names the test whose process ended, and begins another one.
"""

import os
import sys

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    yield
    torch = sys.modules["torch"]
    if call.excinfo is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first = (str(error).strip() or "no text").splitlines()[0]
        words = f"{item.nodeid} broke the GPU's context, so its process ends: {first}\n{call.excinfo.exconly()[:2000]}"
        if not hasattr(item.config, "workerinput"):  # no process of pytest-xdist's
            pytest.exit(words, returncode=3)
        os.write(2, f"{words}\n".encode())
        os._exit(1)
