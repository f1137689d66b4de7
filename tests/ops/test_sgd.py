"""sgd_ against torch.optim.SGD. Its modes are in test_optimizer_modes.py, its contract in test_optimizer_contract.py."""

import pytest
import torch

from fastlm import ops
from fastlm.testing import assert_accurate, planted_bug
from tests.ops.optimizer_cases import BACKENDS, SHAPES, bits

each_backend = pytest.mark.parametrize("backend", BACKENDS)
FORMS = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
]


def _lists(device, dtype=torch.float32, momentum=0.9):
    make = lambda: [torch.randn(s, dtype=torch.float64).to(dtype).to(device) for s in SHAPES]  # noqa: E731
    # The first step writes the buffers, whatever they hold.
    return make(), make(), [torch.full_like(p, float("nan")) for p in make()] if momentum else None


def _steps(lists, backend, steps=3, decay=0.1, scale=None, **form):
    params, grads, buffers = ([t.clone() for t in tensors] if tensors else None for tensors in lists)
    for step in range(1, steps + 1):
        scaled = [(g * (1 + step % 2)).to(g.dtype) for g in grads]
        found = ops.sgd_(
            params, scaled, buffers, lr=0.05, weight_decay=decay, step=step, grad_scale=scale, backend=backend, **form
        )
        assert found is None
    return params, buffers or []


def _by_torch(lists, steps=3, decay=0.1, scale=1.0, **form):
    params, grads, _ = lists
    params = [p.clone() for p in params]
    optimizer = torch.optim.SGD(params, lr=0.05, weight_decay=decay, foreach=False, **form)
    for step in range(1, steps + 1):
        for p, g in zip(params, grads):
            p.grad = (g * (1 + step % 2) * scale).to(p.dtype)
        optimizer.step()
    return params, [optimizer.state[p]["momentum_buffer"] for p in params] if form["momentum"] else []


def _check(backend, device, form, decay=0.1):
    lists = _lists(device, momentum=form["momentum"])
    got, want = _steps(lists, backend, decay=decay, scale=0.5, **form), _by_torch(lists, decay=decay, scale=0.5, **form)
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()))
def test_follows_torch_in_fp32(backend, form, device):
    _check(backend, device, form)
    _check(backend, device, form, decay=0.0)


@each_backend
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(backend, form, dtype, device):
    lists = _lists(device, dtype, form["momentum"])
    exact = _steps([[t.double() for t in tensors] if tensors else None for tensors in lists], "reference", **form)
    plain = _by_torch(lists, **form)
    got = _steps(lists, backend, **form)
    for g, e, p in zip(got[0] + got[1], exact[0] + exact[1], plain[0] + plain[1]):
        assert_accurate(g, e, p, f"sgd_ {backend} {dtype}")


def test_fp64_reference_follows_torch():
    lists = _lists("cpu", torch.float64)
    for backend in ("reference", "torch"):
        for form in FORMS:
            form = {"dampening": 0.0, "nesterov": False} | form
            lists = _lists("cpu", torch.float64, form["momentum"])
            got, want = _steps(lists, backend, **form), _by_torch(lists, **form)
            for a, b in zip(got[0] + got[1], want[0] + want[1]):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize("step", [1, 2])
def test_numbers_may_be_tensors(backend, step, device):
    params, grads, buffers = _lists(device)
    buffers = [torch.randn_like(p) for p in params]
    numbers = {"lr": 0.05, "step": step, "grad_scale": 0.5}
    two = [[[t.clone() for t in tensors] for tensors in (params, buffers)] for _ in range(2)]
    ops.sgd_(two[0][0], grads, two[0][1], momentum=0.9, **numbers, backend=backend)
    tensors = {k: torch.tensor(float(n), device=device) for k, n in numbers.items()}
    if (
        backend == "triton"
    ):  # as the kernel takes them from the device, which on the CPU happens under torch.compile only
        from fastlm.ops.sgd import OP

        OP.forward(two[1][0], grads, two[1][1], *[[]] * 4, *[tensors[k] for k in ("lr", "step", "grad_scale")], None, None, [],
                   0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, False, backend)  # fmt: skip
    else:
        ops.sgd_(two[1][0], grads, two[1][1], momentum=0.9, **tensors, backend=backend)
    for a, b in zip(two[0][0] + two[0][1], two[1][0] + two[1][1]):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize(
    "old, new",
    [
        ("b = tl.where(first, g, b)", "b = tl.where(first, rest * g, b)"),  # dampening in the first step
        ("p -= lr * (g + momentum * b)", "p -= lr * b"),
        ("b = momentum * read_state", "b = read_state"),
        ("g + weight_decay * p, g)", "g, g)"),
        ("1 - dampening, weight_decay", "1.0, weight_decay"),
        ("(tl.float32) * scale", "(tl.float32)"),
    ],
    ids=["first", "nesterov", "momentum", "decay", "dampening", "scale"],
)
def test_planted_bug_is_seen(old, new, device):
    form = FORMS[3] if "lr" in old else FORMS[2]
    with planted_bug("sgd_", old, new), pytest.raises(AssertionError):
        _check("triton", device, form)


def test_explain_and_errors():
    p, g = [torch.randn(3, 4)], [torch.randn(3, 4)]
    assert ops.explain(ops.sgd_, p, g, lr=0.1, step=1).backend == "torch"
    for message, lists, options in [
        ("sgd_: momentum needs momentum_buffers", (p, g), {"momentum": 0.9}),
        ("sgd_: momentum needs momentum_buffers, and no momentum none", (p, g, g), {}),
        (
            "sgd_: nesterov needs momentum > 0 and dampening 0",
            (p, g, g),
            {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
        ),
        ("sgd_: momentum must be >= 0, got -0.5", (p, g, g), {"momentum": -0.5}),
        ("sgd_: step counts from 1", (p, g), {"step": 0}),
        ("params, grads, momentum_buffers must be equally long", (p, g, []), {"momentum": 0.9}),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.sgd_(*lists, **({"lr": 0.1, "step": 1} | options))
