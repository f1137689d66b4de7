import copy
import io
import mmap
from pathlib import Path

import pytest
import torch

from fastlm.optim import AdamW
from fastlm.optim.huge_pages import zeros_like

LARGE = (1 << 10, (1 << 9) + 3)  # a little over one huge page in fp32
linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8))
@pytest.mark.parametrize("shape", (LARGE, (7,), (), (0, 3), (3 << 20,)))
def test_it_is_zeros_like(shape, dtype):
    for p in (torch.nn.Parameter(torch.randn(shape)), torch.randn(shape).T if len(shape) == 2 else torch.randn(shape)):
        found, want = zeros_like(p, dtype), torch.zeros_like(p, dtype=dtype)
        assert torch.equal(found, want) and found.stride() == want.stride() and found.dtype == dtype
        assert found.untyped_storage().nbytes() == want.untyped_storage().nbytes() and found.storage_offset() == 0
        assert not found.requires_grad
        found.add_(1)
        assert torch.equal(found, want + 1)


@linux
def test_large_states_lie_on_huge_pages():
    found = zeros_like(torch.empty(LARGE), torch.float32)
    assert found.data_ptr() % (2 << 20) == 0
    regions = [line.split() for line in Path("/proc/self/smaps").read_text().splitlines()]
    inside = False
    for words in regions:
        if "-" in words[0] and not words[0].endswith(":"):
            first, end = (int(x, 16) for x in words[0].split("-"))
            inside = first <= found.data_ptr() < end
        elif inside and words[0] == "VmFlags:":
            assert "hg" in words, words  # madvise(MADV_HUGEPAGE) took
            return
    raise AssertionError("the state's memory is in no mapping")


@linux
def test_a_system_without_huge_pages(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    found = zeros_like(torch.empty(LARGE), torch.float32)
    assert found.shape == LARGE and not found.any()


def test_states_are_saved_copied_and_loaded_as_others(tmp_path):
    p = torch.nn.Parameter(torch.randn(LARGE))
    optimizer = AdamW([p])
    for _ in range(2):
        p.grad = torch.randn(LARGE)
        optimizer.step()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    assert saved.getbuffer().nbytes < 2 * p.nbytes + (64 << 10)
    saved.seek(0)
    fresh = AdamW([p])
    fresh.load_state_dict(torch.load(saved))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(fresh.state[p][name], optimizer.state[p][name])
        copied = copy.deepcopy(optimizer.state[p][name])
        assert torch.equal(copied, optimizer.state[p][name])
        assert copied.data_ptr() != optimizer.state[p][name].data_ptr()


def test_memory_goes_with_the_tensor():
    found = zeros_like(torch.empty(LARGE), torch.float32)
    part = found[3:5]
    del found
    assert not part.add_(1).sub_(1).any()  # a view keeps it
