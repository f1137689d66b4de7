"""linear_kl_div against the calls that hold all logits of both models, and Liger's fused linear Jensen-Shannon loss."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, D, D_t, V, beta):
    student, teacher = (torch.randn(M, d, device=device).to(dtype) for d in (D, D_t))
    w, tw = ((torch.randn(V, d, device=device) / d**0.5).to(dtype) for d in (D, D_t))
    return student.requires_grad_(), w.requires_grad_(), teacher, tw, beta


def by_hand(h, w, th, tw, beta):
    log_q, log_p = F.linear(h, w).float().log_softmax(-1), F.linear(th, tw).float().log_softmax(-1)
    to = lambda left, right: F.kl_div(right, left, reduction="batchmean", log_target=True)  # noqa: E731
    if beta == 0:
        return to(log_p, log_q)
    b = torch.tensor(beta, device=h.device)
    log_m = torch.logsumexp(torch.stack((log_q + torch.log1p(-b), log_p + torch.log(b))), 0)
    return beta * to(log_p, log_m) + (1 - beta) * to(log_q, log_m)


def liger():
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return lambda h, w, th, tw, beta: liger_fused_linear_jsd(h, w, th, tw, None, beta)


def flops(mode, h, w, th, tw, beta):
    student = 2 * h.numel() * w.shape[0]
    return student + 2 * th.numel() * w.shape[0] if mode == "forward" else 2 * student


BENCH = Bench(
    op="linear_kl_div",
    make=make,
    reference=lambda *args: ops.linear_kl_div(*(a for a in args[:4]), beta=args[4], backend="reference"),
    providers=[
        *ours("linear_kl_div", lambda *args, backend: ops.linear_kl_div(*args[:4], beta=args[4], backend=backend)),
        plain(by_hand),
        compiled(by_hand),
        Provider("liger", liger),
    ],
    sizes={
        "tiny": [{"M": 8, "D": 16, "D_t": 24, "V": 48, "beta": 0.0}],
        "cpu": [{"M": 512, "D": 192, "D_t": 384, "V": 8192, "beta": beta} for beta in (0.0, 0.5)],
        "quick": [
            {"M": 8192, "D": 2048, "D_t": 4096, "V": 128256, "beta": 0.0},
            {"M": 8192, "D": 2048, "D_t": 4096, "V": 128256, "beta": 0.5},
            {"M": 8192, "D": 768, "D_t": 1600, "V": 50257, "beta": 0.0},
        ],
    },
    flops=flops,
    # Where the gradients come out of the forward, a backward alone says nothing.
    modes=("forward", "both"),
    gate_size=lambda size: size | {"M": min(size["M"], 128)},
)

ROWS, WIDTH, TEACHER_WIDTH = 1024, 2048, 4096


def _aot(beta, reduction, V, mask=None, softcaps=(None, None)):
    teacher = meta(ROWS, TEACHER_WIDTH), meta(V, TEACHER_WIDTH), None
    count = None if reduction == "none" else meta(dtype=torch.float32)
    tensors = meta(ROWS, WIDTH), meta(V, WIDTH), None, *teacher, mask, None, count
    options = beta, 1.0, 1.0, softcaps[0], 1.0, softcaps[1], reduction, None, True, True, False
    saved = meta(ROWS, WIDTH), meta(V, WIDTH), meta(0), meta(dtype=torch.float32)
    if reduction != "none":
        return Aot("linear_kl_div:linear_kl_div_fwd", *tensors, *options)
    return Aot("linear_kl_div:linear_kl_div_bwd", meta(ROWS, dtype=torch.float32), *tensors, *saved, *options)


AOT = [
    _aot(0.0, "mean", 128256),
    _aot(1.0, "mean", 128256),
    _aot(0.5, "mean", 128256, meta(ROWS, dtype=torch.bool)),
    _aot(0.5, "mean", 256000, None, (30.0, 30.0)),
    _aot(0.0, "none", 50257),
]
