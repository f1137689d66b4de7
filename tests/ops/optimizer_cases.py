"""What the tests of the optimizer ops share: lists of tensors in every mode, one call, and comparisons."""

from dataclasses import dataclass

import torch

from fastlm import ops
from fastlm.ops.block_quantize import block_quantize
from fastlm.ops.master_weights import join_master, split_master

BACKENDS = ("reference", "torch", "triton")
SHAPES = [(5, 7), (2048,), (3, 700)]  # below, exactly and above a block of the kernel
STATES = {"adamw_": ("exp_avgs", "exp_avg_sqs"), "sgd_": ("momentum_buffers",), "lion_": ("exp_avgs",)}
OPTIONS = {
    "adamw_": {"lr": 1e-2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.3},
    "sgd_": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3},
    "lion_": {"lr": 1e-2, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.3},
}


@dataclass(frozen=True)
class Mode:
    """weights: fp32, bf16, masters, remainders or stochastic; states: fp32, bf16, codes or random (codes)."""

    weights: str = "fp32"
    states: str = "fp32"
    averages: bool = False

    def __str__(self):
        return f"{self.weights}-{self.states}" + ("-averages" if self.averages else "")


# Every pair of values of the three fields comes at least once; a seed for the codes is one for bf16 weights too.
MODES = [
    Mode("fp32", "fp32"), Mode("fp32", "codes", True), Mode("fp32", "random"), Mode("fp32", "bf16", True),
    Mode("bf16", "bf16"), Mode("bf16", "codes", True), Mode("bf16", "fp32", True),
    Mode("masters", "fp32"), Mode("masters", "bf16", True), Mode("masters", "random", True), Mode("masters", "codes"),
    Mode("remainders", "fp32", True), Mode("remainders", "random"), Mode("remainders", "bf16"),
    Mode("remainders", "codes", True),
    Mode("stochastic", "fp32"), Mode("stochastic", "random", True), Mode("stochastic", "bf16", True),
]  # fmt: skip


def make(op, mode, device, shapes=SHAPES):
    """All lists of a run that has made some steps, by name, and the seed where the mode has one."""
    weights = [torch.randn(s) for s in shapes]
    dtype = torch.float32 if mode.weights == "fp32" else torch.bfloat16
    found = {"params": [w.to(dtype) for w in weights], "grads": [torch.randn(s).to(dtype) for s in shapes]}
    for k, name in enumerate(STATES[op]):
        values = [0.3 * torch.randn(s) for s in shapes]
        values = [v.square() for v in values] if k else values
        if mode.states in ("codes", "random"):
            codes = [block_quantize(v, k == 0) for v in values]
            found[name], found[f"{name.removesuffix('s')}_scales"] = [c for c, _ in codes], [s for _, s in codes]
        else:
            found[name] = [v.to(torch.bfloat16 if mode.states == "bf16" else torch.float32) for v in values]
    if mode.weights == "masters":
        found["masters"] = weights
    if mode.weights == "remainders":
        found["params"], found["remainders"] = map(list, zip(*map(split_master, weights)))
    if mode.averages:
        found["averages"] = [torch.randn(s) for s in shapes]
    return {name: [t.to(device) for t in tensors] for name, tensors in found.items()}


def call(op, lists, mode, backend, step=1, **options):
    options = OPTIONS[op] | options
    if mode.averages:
        options.setdefault("average_decay", 0.75)
    if mode.weights == "stochastic" or mode.states == "random":
        options.setdefault("seed", 11)
    assert getattr(ops, op)(**lists, step=step, backend=backend, **options) is None


def clone(lists):
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def run(op, lists, mode, backend, steps=1, first=2, **options):
    """Copies of the lists after some steps, of which `first` is the number of the first, with other gradients each."""
    lists = clone(lists)
    for step in range(first, first + steps):
        scaled = [(g * (1 + step % 2)).to(g.dtype) for g in lists["grads"]]
        call(op, lists | {"grads": scaled}, mode, backend, step, **options)
    return lists


def bits(t):
    """The tensor's bits as integers: equal ones are the same to the last bit, -0.0 and NaN included."""
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(one, other):
    return all(torch.equal(bits(a), bits(b)) for name in one for a, b in zip(one[name], other[name]))


def assert_alike(got, want, mode, op):
    """Equal to fp32 rounding; what is rounded to fewer bits then is the same but where it lay between two values."""
    if mode.weights == "remainders":
        got, want = (
            d | {"remainders": [join_master(*p) for p in zip(d["params"], d["remainders"])]} for d in (got, want)
        )
    for name in want:
        for a, b in zip(got[name], want[name]):
            assert a.dtype == b.dtype and a.shape == b.shape
            apart = (a.double() - b.double()).abs()
            # A sign of almost 0 may be either: 1 in 2000 of Lion's updates of 16-bit numbers.
            few = 1 + 0.002 * a.numel() if op == "lion_" else 0
            if a.dtype == torch.float32:
                assert (apart > 2e-6 + 1e-5 * b.double().abs()).sum() <= few, f"{name}: {apart.max()}"
                continue
            ulp = 1 if a.element_size() == 1 else 2.0**-7 * b.double().abs() + 1e-6
            assert (apart > ulp).sum() <= few, f"{name}: {(apart / ulp).max()} units apart"
            assert (apart > (0 if a.element_size() == 1 else 1e-7)).sum() <= 1 + 0.01 * a.numel(), (
                f"{name}: too many differ"
            )
