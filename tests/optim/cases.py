"""The optimizers and modes that the tests of fastlm.optim go through, on four parameters in two groups."""

import pytest
import torch

from fastlm import optim

# Wide enough for 8-bit codes in one weight; a scalar; a vector in fp32 beside 16-bit weights.
SHAPES = {"wide": (65, 64), "matrix": (5, 7), "scalar": (), "vector": (9,)}
CLASSES = {
    "adamw": (optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "sgd": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    "lion": (optim.Lion, {"lr": 0.02, "weight_decay": 0.1}),
}
MODES = {
    "fp32": (torch.float32, {}),
    "average": (torch.float32, {"average_decay": 0.9}),
    "8 bits": (torch.float32, {"state_bits": 8}),
    "nearest": (torch.bfloat16, {}),
    "stochastic": (torch.bfloat16, {"precision": "stochastic"}),
    "remainder": (torch.bfloat16, {"precision": "remainder", "average_decay": 0.9}),
    "master": (torch.bfloat16, {"precision": "master", "state_bits": 8}),
    "fp16 master": (torch.float16, {"precision": "master"}),
}
each_class = pytest.mark.parametrize("name", CLASSES)
each_mode = pytest.mark.parametrize("mode", MODES)


def make_params(dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    values = {k: torch.randn(s, generator=generator).to(device) for k, s in SHAPES.items()}
    return {k: torch.nn.Parameter(v.to(torch.float32 if k == "vector" else dtype)) for k, v in values.items()}


def make(name, mode="fp32", device="cpu", **options):
    """-> parameters by name, optimizer with two groups."""
    cls, hyper = CLASSES[name]
    dtype, stored = MODES[mode]
    params = make_params(dtype, device=device)
    plain = [params["scalar"], params["vector"]]
    groups = [{"params": [params["wide"], params["matrix"]]}, {"params": plain, "weight_decay": 0.0}]
    return params, cls(groups, **hyper, **stored, **options)


def set_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params.values():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p)


def run(params, optimizer, seeds, **kwargs):
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step(**kwargs)


def snapshot(params, optimizer):
    """Every weight and state, by name."""
    found = dict(params)
    for k, p in params.items():
        found |= {f"{k}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return {k: v.detach().clone() for k, v in found.items()}


def assert_bits_equal(a, b):
    assert a.keys() == b.keys()
    for k, v in a.items():
        assert v.dtype == b[k].dtype and torch.equal(v, b[k]), k
