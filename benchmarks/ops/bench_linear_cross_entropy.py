"""linear_cross_entropy against the two calls that hold all logits, torch's own chunked form, Liger, CCE, QuACK."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, D, V):
    hidden = torch.randn(M, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (M,), device=device)


def by_hand(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def torch_chunked():
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError("F.linear_cross_entropy in chunks needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)


def on_a_gpu(**options):
    """Our op with options for less memory, which say something on a GPU only."""

    def build():
        if not torch.cuda.is_available():
            raise ImportError("no CUDA GPU")
        return lambda *args: ops.linear_cross_entropy(*args, backend="triton", **options)

    return build


def liger():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def cut():
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def flops(mode, hidden, weight, target):
    return {"forward": 2, "backward": 4}[mode] * hidden.numel() * weight.shape[0]


BENCH = Bench(
    op="linear_cross_entropy",
    make=make,
    reference=lambda *args: ops.linear_cross_entropy(*args, backend="reference"),
    providers=[
        *ours("linear_cross_entropy", ops.linear_cross_entropy),
        Provider("fastlm:triton bf16 sum", on_a_gpu(weight_grad_dtype=torch.bfloat16)),
        Provider("fastlm:triton low memory", on_a_gpu(weight_grad_dtype=torch.bfloat16, logits_bytes=64 << 20)),
        plain(by_hand),
        compiled(by_hand),
        Provider("torch chunked", torch_chunked),
        Provider("liger", liger),
        Provider("cut-cross-entropy", cut),
        Provider("quack", quack),
    ],
    sizes={
        "tiny": [{"M": 8, "D": 16, "V": 48}],
        "cpu": [{"M": 1024, "D": 384, "V": 8192}, {"M": 2048, "D": 192, "V": 1024}],
        "quick": [
            {"M": 8192, "D": 768, "V": 50257},
            {"M": 8192, "D": 2048, "V": 128256},
            {"M": 8192, "D": 4096, "V": 128256},
        ],
    },
    flops=flops,
    # Where the gradients come out of the forward, a backward alone says nothing.
    modes=("forward", "both"),
    gate_size=lambda size: size | {"M": min(size["M"], 256)},
)

# One chunk: in more the same kernels come again.
ROWS, WIDTH, CLASSES = 1024, 4096, 128256


def _aot(classes=CLASSES, label_smoothing=0.0, softcap=None, reduction="mean", weights=False):
    fp32 = {"dtype": torch.float32}
    inputs = meta(ROWS, WIDTH), meta(classes, WIDTH), None, meta(ROWS, dtype=torch.int64)
    constants = meta(ROWS, **fp32) if weights else None, meta(classes, **fp32) if weights else None
    denominator = meta(**fp32) if reduction == "mean" else None
    tensors = *inputs, *constants, denominator
    options = -100, label_smoothing, 0.0, 1.0, softcap, reduction, False, None, True, True, False
    saved = meta(ROWS, WIDTH), meta(classes, WIDTH), meta(0), meta(**fp32)
    dloss = meta(*([ROWS] if reduction == "none" else []), **fp32)
    kernels = "linear_cross_entropy:linear_cross_entropy_"
    return [Aot(kernels + "fwd", *tensors, *options), Aot(kernels + "bwd", dloss, *tensors, *saved, *options)]


# Backward: of "none" the rows kernel again, with gradients only there; of "mean" copies scaled under torch.compile.
AOT = [
    *_aot(),
    *_aot(label_smoothing=0.1, softcap=30.0, reduction="none"),
    _aot(label_smoothing=0.1, softcap=30.0, weights=True)[0],
    _aot(50257)[0],
    _aot(50257, label_smoothing=0.1, softcap=30.0, weights=True)[0],
    _aot(151936)[0],
    _aot(151936, label_smoothing=0.1, softcap=30.0, weights=True)[0],
    Aot("linear_cross_entropy:scale_", meta(CLASSES, WIDTH), meta(dtype=torch.float32)),
]
