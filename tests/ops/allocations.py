"""What a call allocates, as torch's dispatcher sees it: a mode that writes it down, and a stand-in for a Triton kernel."""

import torch
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
