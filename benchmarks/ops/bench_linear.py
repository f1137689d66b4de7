"""linear against torch's own product: for decoding, one to eight rows of x, where reading the weight is all there is to it.

On a GPU, 85 % of the machine's copy bandwidth is the goal.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Bench, compiled, ours, plain
from fastlm import ops


def make(dtype, device, N, K, out):
    """N rows of x."""
    weight = (torch.randn(out, K, device=device) / K**0.5).to(dtype)
    return torch.randn(N, K, device=device).to(dtype).requires_grad_(), weight.requires_grad_()


def traffic(mode, x, weight):
    both = x.nbytes + x.shape[0] * weight.shape[0] * x.element_size()
    return both + weight.nbytes if mode == "forward" else 2 * (both + weight.nbytes)


BENCH = Bench(
    op="linear",
    make=make,
    reference=lambda x, weight: ops.linear(x, weight, backend="reference"),
    providers=[
        *ours("linear", lambda x, weight, backend: ops.linear(x, weight, backend=backend)),
        plain(F.linear),
        compiled(F.linear),
    ],
    sizes={
        "tiny": [{"N": 3, "K": 40, "out": 24}],
        "cpu": [{"N": 1, "K": 384, "out": 1152}, {"N": 8, "K": 1024, "out": 1024}],
        "quick": [
            {"N": N, "K": K, "out": out} for K, out in ((4096, 4096), (4096, 14336), (14336, 4096)) for N in (1, 8)
        ],
    },
    traffic=traffic,
    modes=("forward", "backward"),
)
