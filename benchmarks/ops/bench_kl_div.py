"""kl_div from logits against what a distillation trainer writes (TRL's generalised Jensen-Shannon loss), and Liger's."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops


def make(dtype, device, M, V, beta):
    student, teacher = (torch.randn(M, V, device=device).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher, beta


def by_hand(student, teacher, beta):
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    to = lambda left, right: F.kl_div(right, left, reduction="batchmean", log_target=True)  # noqa: E731
    if beta == 0:
        return to(log_p, log_q)
    if beta == 1:
        return to(log_q, log_p)
    b = torch.tensor(beta, device=student.device)
    log_m = torch.logsumexp(torch.stack((log_q + torch.log1p(-b), log_p + torch.log(b))), 0)
    return beta * to(log_p, log_m) + (1 - beta) * to(log_q, log_m)


def reference(student, teacher, beta):
    return ops.kl_div(student, teacher.to(student.dtype), beta=beta, backend="reference")


def liger():
    from liger_kernel.ops.jsd import LigerJSDFunction

    # It takes log-probabilities; its beta means the same.
    return lambda student, teacher, beta: LigerJSDFunction.apply(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), None, beta
    )


def traffic(mode, student, teacher, beta):
    passes = 1 if beta in (0, 1) or mode == "backward" else 2
    return passes * (student.nbytes + teacher.nbytes) + (student.nbytes if mode == "backward" else 0)


BENCH = Bench(
    op="kl_div",
    make=make,
    reference=reference,
    providers=[
        *ours("kl_div", lambda s, t, beta, backend: ops.kl_div(s, t, beta=beta, backend=backend)),
        plain(by_hand),
        compiled(by_hand),
        Provider("liger", liger),
    ],
    sizes={
        "tiny": [{"M": 8, "V": 48, "beta": 0.0}, {"M": 8, "V": 48, "beta": 0.5}],
        "cpu": [{"M": 512, "V": 8192, "beta": beta} for beta in (0.0, 0.5, 1.0)] + [{"M": 256, "V": 1024, "beta": 0.0}],
        "quick": [
            *({"M": 8192, "V": 32000, "beta": beta} for beta in (0.0, 0.5, 1.0)),
            {"M": 4096, "V": 128256, "beta": 0.0},
            {"M": 4096, "V": 50257, "beta": 0.0},
        ],
    },
    traffic=traffic,
    gate_size=lambda size: size | {"M": min(size["M"], 128)},
)


def _aot(beta, V, mask=None, shifted=False):
    logits, losses = meta(4096, V), meta(4096, dtype=torch.float32)
    if shifted:
        logits, losses = meta(4, 1025, V)[:, :-1], losses.view(4, 1024)
    statistics = meta(5, 4096, dtype=torch.float32)
    return [
        Aot("kl_div:kl_div_fwd", logits, logits, mask, beta, 2.0),
        Aot("kl_div:kl_div_bwd", losses, logits, logits, mask, statistics, beta, 2.0),
    ]


AOT = [
    *_aot(0.0, 128256),
    *_aot(1.0, 128256),
    *_aot(0.5, 128256, meta(4096, dtype=torch.bool)),
    *_aot(0.0, 50257),
    *_aot(0.5, 50257),
    *_aot(0.0, 50257, shifted=True),
]
