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
    args = tuple(torch.randn(shape, dtype=torch.float32, device=device).to(dtype) for shape in shapes)
    if "sinks" in options:
        args = tuple(x.flatten(0, 1) for x in args)
    case = Case(
        "attention",
        lambda q, k, v, backend: ops.attention(q, k, v, **options, backend=backend),
        None,
        None,
        plain=lambda q, k, v: in_plain_torch(q, k, v, **options),
    )
    check_accuracy(case, "triton", dtype, device, args)


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
