"""linear_logprobs: log probability, log-sum-exp and entropy of a vocabulary projection, hidden size and vocabulary of small
models up to Llama 3's. Nobody else's op gives all three; plain torch holds all logits in fp32."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, D, V):
    input = torch.randn(M, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    return input, weight, torch.randint(0, V, (M,), device=device)


def by_hand(input, weight, target):
    z = F.linear(input, weight).float()
    logp = z.log_softmax(-1)
    return logp.gather(-1, target.unsqueeze(-1)).squeeze(-1), z.logsumexp(-1), -(logp.exp() * logp).sum(-1)


def ours_without_hit(*args, **kwargs):
    return tuple(ops.linear_logprobs(*args, **kwargs)[:3])


def flops(mode, input, weight, target):
    # The backward makes the logits anew: three products.
    return {"forward": 2, "backward": 6}[mode] * input.numel() * weight.shape[0]


BENCH = Bench(
    op="linear_logprobs",
    make=make,
    reference=lambda *args: ours_without_hit(*args, backend="reference"),
    providers=[*ours("linear_logprobs", ours_without_hit), plain(by_hand), compiled(by_hand)],
    sizes={
        "tiny": [{"M": 8, "D": 16, "V": 48}],
        "cpu": [{"M": 512, "D": 384, "V": 8192}, {"M": 2048, "D": 192, "V": 1024}],
        "quick": [
            {"M": 8192, "D": 768, "V": 50257},
            {"M": 8192, "D": 2048, "V": 128256},
            {"M": 8192, "D": 4096, "V": 128256},
        ],
    },
    flops=flops,
    gate_size=lambda size: size | {"M": min(size["M"], 256)},
)

# One chunk: in more the same kernels come again. These also serve linear_cross_entropy over a group.
ROWS, WIDTH = 1024, 4096


def _aot(classes, softcap=None):
    fp32 = {"dtype": torch.float32}
    inputs = meta(ROWS, WIDTH), meta(classes, WIDTH), None, meta(ROWS, dtype=torch.int64)
    options = -100, 1.0, softcap, None
    up = [meta(ROWS, **fp32)] * 3
    kernels = "linear_logprobs:linear_logprobs_"
    return [
        Aot(kernels + "fwd", *inputs, *options),
        Aot(kernels + "bwd", *up, *inputs, meta(ROWS, **fp32), meta(2, ROWS, **fp32), *options, True, True, False),
    ]


def _aot_of_a_part(classes):
    """The kernels as linear_cross_entropy over a group calls them, with smoothing and class weights."""
    fp32 = {"dtype": torch.float32}
    logits, target, weight = meta(ROWS, classes), meta(ROWS, dtype=torch.int64), meta(classes, **fp32)
    return [
        Aot("linear_logprobs:statistics", logits, target, meta(5, ROWS, **fp32), weight, 1.0, 30.0),
        Aot(
            "linear_logprobs:gradient",
            logits,
            target,
            meta(7, ROWS, **fp32),
            weight,
            True,
            False,
            -100,
            1.0,
            30.0,
        ),
    ]


AOT = [*_aot(128256), *_aot(128256, 30.0), *_aot(50257), *_aot(50257, 30.0), *_aot(151936), *_aot_of_a_part(64128)]
