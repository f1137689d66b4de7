"""cross_entropy from logits against F.cross_entropy on fp32 logits, and Liger's."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, V, label_smoothing=0.0):
    logits = torch.randn(M, V, device=device).to(dtype).requires_grad_()
    return logits, torch.randint(0, V, (M,), device=device), label_smoothing


def by_hand(logits, target, label_smoothing):
    return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)


def op(logits, target, label_smoothing, backend):
    return ops.cross_entropy(logits, target, label_smoothing=label_smoothing, backend=backend)


def liger():
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It overwrites its input: what is timed includes the copy that a caller who needs the logits must make.
    return lambda logits, target, label_smoothing: liger_cross_entropy(
        logits.clone(), target, label_smoothing=label_smoothing
    )


def traffic(mode, logits, target, label_smoothing):
    return {"forward": 1, "backward": 2}[mode] * logits.nbytes


def quack():
    from quack.cross_entropy import cross_entropy

    def step(logits, target, label_smoothing):
        if label_smoothing:
            raise NotImplementedError("QuACK has no label smoothing")
        return cross_entropy(logits, target)

    return step


BENCH = Bench(
    op="cross_entropy",
    make=make,
    reference=lambda *args: op(*args, backend="reference"),
    providers=[
        *ours("cross_entropy", op),
        plain(by_hand),
        compiled(by_hand),
        Provider("liger", liger),
        Provider("quack", quack),
    ],
    sizes={
        "tiny": [{"M": 8, "V": 48}],
        "cpu": [{"M": 512, "V": 8192}, {"M": 256, "V": 1024, "label_smoothing": 0.1}, {"M": 8, "V": 64}],
        "quick": [
            {"M": 8192, "V": 32000},
            {"M": 8192, "V": 50257},
            {"M": 4096, "V": 128256},
            {"M": 4096, "V": 128256, "label_smoothing": 0.1},
            {"M": 2048, "V": 262144},
        ],
    },
    traffic=traffic,
    gate_size=lambda size: size | {"M": min(size["M"], 1024)},
)


def _aot(V, label_smoothing=0.0, softcap=None, weight=None, shifted=False):
    logits, target = meta(4096, V), meta(4096, dtype=torch.int64)
    if shifted:
        logits, target = meta(4, 1025, V)[:, :-1], target.view(4, 1024)
    options = -100, label_smoothing, 0.0, 1.0, softcap
    losses, statistics = meta(*target.shape, dtype=torch.float32), meta(2, 4096, dtype=torch.float32)
    return [
        Aot("cross_entropy:cross_entropy_fwd", logits, target, weight, *options),
        Aot("cross_entropy:cross_entropy_bwd", losses, logits, target, weight, statistics, *options),
    ]


AOT = [
    *_aot(128256),
    *_aot(50257),
    *_aot(128256, shifted=True),
    *_aot(50257, shifted=True),
    *_aot(128256, 0.1, 30.0, meta(128256, dtype=torch.float32)),
]
