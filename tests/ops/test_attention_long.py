"""flash-attention's own list of lengths (tests of its Hopper kernels) for three base sets of features.

Up to 256 in the long suite, the rest on a GPU.
"""

import pytest
import torch

from fastlm import ops
from fastlm.testing import Case, check_accuracy
from tests.ops.attention_matrix import in_plain_torch

SHORT = [(1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (113, 203), (113, 128), (128, 217), (108, 256)]
LONG = [(799, 3), (384, 256), (640, 128), (1024, 1024), (1023, 1024), (1024, 1023), (4096, 4096), (4224, 4224)]
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (2, 1)}


def _sets(S, T):
    window = (min(7, T), 3)
    return {
        "causal": {"causal": True},
        "window, softcap": {"window": window, "softcap": 15.0},
        "packed, sinks": {"causal": True, "sinks": torch.tensor([0.5, -0.5, 0.0, 1.0])},
    }


def _check(S, T, heads, name, D, dtype, device):
    H, H_kv = HEADS[heads]
    options = _sets(S, T)[name]
    B = 2
    if "sinks" in options:
        options["sinks"] = options["sinks"][:H].to(device)
        for which, n in (("cu_seqlens_q", S), ("cu_seqlens_k", T)):
            options[which] = torch.tensor([0, n // 3, n // 3, n, 2 * n], device=device, dtype=torch.int32)
    shapes = [(B, S, H, D), (B, T, H_kv, D), (B, T, H_kv, D)]
    draws = [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(2)]
    if "sinks" in options:
        draws = [[x.flatten(0, 1) for x in args] for args in draws]
    # With one key the weights are 1 whatever the scores: no gradient of q and k, and no rounding error to compare theirs with.
    fixed = draws[0][:2] if T == 1 and "sinks" not in options else []

    def fn(*args, backend):
        return ops.attention(*(x.to(args[0].dtype) for x in fixed), *args, **options, backend=backend)

    def plain(*args):
        return in_plain_torch(*fixed, *args, **options)

    check_accuracy(
        Case("attention", fn, None, None, plain=plain), "triton", dtype, device, [tuple(a[len(fixed) :]) for a in draws]
    )
    if fixed:
        leaves = [x.requires_grad_() for x in draws[0]]
        grads = torch.autograd.grad(ops.attention(*leaves, **options, backend="triton").sum(), leaves[:2])
        assert max(g.abs().max().item() for g in grads) <= 64 * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "window, softcap", "packed, sinks"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("S, T", SHORT)
def test_short(S, T, heads, name, device):
    _check(S, T, heads, name, 16, torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "window, softcap", "packed, sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("S, T", SHORT + LONG)
def test_on_a_gpu(S, T, heads, D, dtype, name, device):
    _check(S, T, heads, name, D, dtype, device)
