"""What a call allocates: as torch's dispatcher sees it, with a stand-in for a Triton kernel, and as its CPU allocator does."""

import itertools

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """`elements`: the number of elements of every tensor with memory of its own that torch calls make within the block."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        before = {t.untyped_storage().data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in before:
                self.elements.append(t.numel())
        return out


class NoLaunch:
    """In a kernel's place, as the interpreter allocates on its behalf. The keywords of each launch go into `launches`."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(options)


def peak_bytes(fn):
    """The most memory fn() holds at once beyond what was there before, as torch's CPU allocator reports it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        fn()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))
