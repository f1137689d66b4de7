"""The tables of a launch over lists of tensors, on a stand-in for a GPU: which are kept, for how long, and for which stream."""

from types import SimpleNamespace

import pytest
import torch

from fastlm.kernels import tensor_table


class _OnGpu:
    """What the tables need of a tensor on a GPU."""

    device = torch.device("cuda", 0)
    dtype = torch.bfloat16

    def __init__(self, at):
        self.at = at

    def data_ptr(self):
        return self.at

    def numel(self):
        return 5000


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose copies stay on the host. pinned: the host tensors that were pinned; copies: pairs (from, to)."""
    seen = SimpleNamespace(pinned=[], copies=[], capturing=False, stream=1)

    def pin(host):
        seen.pinned.append(host.clone())
        return seen.pinned[-1]

    def to(host, device, non_blocking=False):
        assert device.type == "cuda" and non_blocking
        seen.copies.append((host, host.clone()))
        return seen.copies[-1][1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=seen.stream))
    monkeypatch.setattr(tensor_table, "_captured", [])
    cached = (tensor_table._addresses, tensor_table._streams, tensor_table._blocks, tensor_table._formats)
    for function in cached:
        function.cache_clear()
    yield seen
    for function in cached:
        function.cache_clear()


def _tables():
    return tensor_table.table_of([[_OnGpu(4096), _OnGpu(65536)], [_OnGpu(8192), _OnGpu(131072)]], [3, 4])[0]


def test_tables_serve_the_stream_they_were_copied_on(gpu):
    first = _tables()
    assert first.address.tolist() == [[4096, 8192], [65536, 131072]]
    assert (first.owner.tolist(), first.block.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    again, copies = _tables(), len(gpu.copies)
    assert copies == 5 and all(a is b for a, b in zip(first, again))
    gpu.stream = 2  # which does not wait for the copies of stream 1
    other = _tables()
    assert len(gpu.copies) == 2 * copies and not any(a is b for a, b in zip(first, other))
    assert all(torch.equal(a, b) for a, b in zip(first, other)) and not tensor_table._captured


def test_a_captured_graph_keeps_what_its_copies_start_from(gpu):
    before, gpu.capturing = _tables(), True
    copies = len(gpu.copies)
    inside = _tables()
    kept = tensor_table._captured
    for host, there in gpu.copies[copies:]:  # every replay copies from `host` again; `there` is the graph's
        assert any(host is t for t in kept) and not any(there is t for t in kept)
    assert len(gpu.copies) == 2 * copies and not any(a is b for a, b in zip(before, inside))
    assert all(any(host is pinned for pinned in gpu.pinned) for host, _ in gpu.copies)
    gpu.capturing = False
    assert all(a is b for a, b in zip(before, _tables()))  # and not the graph's


def test_formats_are_kept_like_the_tables(gpu):
    first = tensor_table.formats_of([_OnGpu(4096), _OnGpu(65536)])
    assert first.tolist() == [1, 1] and tensor_table.formats_of([_OnGpu(0), _OnGpu(0)]) is first
    gpu.stream = 2
    assert tensor_table.formats_of([_OnGpu(0), _OnGpu(0)]) is not first
    gpu.stream, gpu.capturing = 1, True
    inside = tensor_table.formats_of([_OnGpu(0), _OnGpu(0)])
    assert inside is not first and len(tensor_table._captured) == 1
    gpu.capturing = False
    assert tensor_table.formats_of([_OnGpu(0), _OnGpu(0)]) is first
