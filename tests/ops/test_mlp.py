"""The ops `mlp` and `gated_mlp`, which share the stem `mlp`."""

import sys

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.testing import (
    Case,
    check_accuracy,
    check_autocast,
    check_compile,
    check_guards,
    check_op,
    check_reference,
    check_safety,
    check_strides,
    check_transforms,
    planted_bug,
)
from fastlm.testing.accuracy import outputs_and_gradients

mlp_module = sys.modules["fastlm.ops.mlp"]  # the name fastlm.ops.mlp is the function's
PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}
KINDS = pytest.mark.parametrize("kind", PLAIN)
BACKENDS = ("torch", "triton")


def _make(bias, layers, sizes=(7, 19, 21, 13)):
    """x [2, S, D], `layers` matrices [F, D] (2.5: one of [2 F, D]) and one [D_out, F], and their biases."""

    def make(dtype, device):
        S, D, hidden, D_out = sizes
        rows = [hidden] * layers if layers in (1, 2) else [2 * hidden]
        shapes = [(2, S, D), *((n, D) for n in rows), (D_out, hidden)]
        shapes += [(n,) for n in (*rows, D_out)] if bias else []
        return tuple(
            (torch.randn(s, dtype=torch.float64) * (1 if i == 0 or len(s) == 1 else 1.5 * s[-1] ** -0.5))
            .to(dtype)
            .to(device)
            for i, s in enumerate(shapes)
        )

    return make


def _case(kind, layers=1, bias=False, recompute=False):
    act = PLAIN[kind]

    def fn(x, *rest, backend):
        options = {"activation": kind, "recompute": recompute, "backend": backend}
        if layers == 1:
            return ops.mlp(x, *rest, **options)
        if layers == 2:
            return ops.gated_mlp(x, *rest, **options)
        return ops.gated_mlp(x, rest[0], None, rest[1], *(rest[2:] and (rest[2], None, rest[3])), **options)

    def plain(x, *rest):
        weights, biases = (rest[: len(rest) // 2], rest[len(rest) // 2 :]) if bias else (rest, [None] * len(rest))
        pre = [F.linear(x, w, b) for w, b in zip(weights[:-1], biases[:-1])]
        pre = pre[0].chunk(2, -1) if layers == "packed" else pre
        return F.linear(act(pre[0]) if layers == 1 else act(pre[0]) * pre[1], weights[-1], biases[-1])

    return Case(
        "mlp" if layers == 1 else "gated_mlp",
        fn,
        _make(bias, layers),
        _make(bias, layers, (2, 3, 2, 2)),
        plain=plain,
        autocast="cast",
        empty=_make(bias, layers, (0, 5, 4, 3)),
    )


CASES = {
    "mlp": _case("gelu_tanh", bias=True),
    "mlp-recompute": _case("relu2", recompute=True),
    "gated": _case("silu", 2, bias=True),
    "gated-recompute": _case("silu", 2, recompute=True),
    "packed": _case("silu", "packed"),
    "packed-recompute": _case("gelu", "packed", bias=True, recompute=True),
}
ALL = pytest.mark.parametrize("name", CASES)


@ALL
def test_reference(name):
    check_reference(CASES[name])


@ALL
def test_contract_of_torch(name, device):
    case = CASES[name]
    if "recompute" in name or device == "cuda":
        return check_op(case, "torch", device)
    for check in (check_safety, check_guards, check_strides, check_autocast, check_transforms, check_compile):
        check(case, "torch", device)  # its derivatives of any order are torch's own
    return None


@pytest.mark.parametrize("name", ["mlp", "gated", "packed-recompute"])
def test_contract_of_triton(name, device):
    check_op(CASES[name], "triton", device)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(name, backend, dtype, device):
    check_accuracy(CASES[name], backend, dtype, device)


@KINDS
@pytest.mark.parametrize("layers", [1, "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_activation(kind, layers, backend, device):
    check_accuracy(_case(kind, layers, recompute=True), backend, torch.float32, device)


def test_errors():
    x, w, d = torch.randn(3, 8), torch.randn(12, 8), torch.randn(5, 12)
    with pytest.raises(
        ValueError, match="mlp: the activation must be one of gelu, gelu_tanh, silu, relu, relu2, got 'swish'"
    ):
        ops.mlp(x, w, d, activation="swish")
    with pytest.raises(ValueError, match=r"mlp: up_weight must be \[., 8\] like x's last dimension, got \[12, 7\]"):
        ops.mlp(x, w[:, :7], d)
    with pytest.raises(ValueError, match=r"mlp: down_weight must be \[., 12\] like up_weight's rows, got \[5, 11\]"):
        ops.mlp(x, w, d[:, :11])
    with pytest.raises(ValueError, match=r"mlp: up_bias must be \[12\] like up_weight's rows, got \[5\]"):
        ops.mlp(x, w, d, torch.randn(5))
    with pytest.raises(ValueError, match=r"gated_mlp: down_weight must be \[., 6\] like gate_weight's rows"):
        ops.gated_mlp(x, w, None, d)
    with pytest.raises(ValueError, match=r"gated_mlp: up_weight must be \[12, 8\] like gate_weight, got \[11, 8\]"):
        ops.gated_mlp(x, w, w[:11], d)
    with pytest.raises(ValueError, match=r"gated_mlp: without up_weight gate_weight must be \[2 F, D\], got \[11, 8\]"):
        ops.gated_mlp(x, w[:11], None, d)
    with pytest.raises(ValueError, match="gated_mlp: up_bias must be None without up_weight"):
        ops.gated_mlp(x, w, None, d[:, :6], None, torch.randn(6))
    with pytest.raises(TypeError, match="mlp: x must be floating point, got torch.int64"):
        ops.mlp(torch.ones(3, 8, dtype=torch.int64), w, d)
    with pytest.raises(TypeError, match="mlp: down_bias must be floating point, got torch.int64"):
        ops.mlp(x, w, d, None, torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="mlp: x must be .* got a single number"):
        ops.mlp(torch.tensor(1.0), w, d)


def _saved_bytes(fn, args, parameters):
    """Bytes saved for the backward in tensors that are not parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fn(*args)
    return sum(seen.values()), y


@pytest.mark.parametrize("layers", [1, 2, "packed"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_are_x_and_the_pre_activation(backend, recompute, layers, device):
    case = _case("silu", layers, recompute=recompute)
    args = tuple(t.requires_grad_() for t in case.make(torch.float32, device))
    x, hidden = args[0], args[-1].shape[1]
    pre = 0 if recompute else x.shape[0] * x.shape[1] * hidden * (1 if layers == 1 else 2) * 4
    found, y = _saved_bytes(lambda *a: case.fn(*a, backend=backend), args, args[1:])
    if backend == "torch" and device == "cpu" and not recompute:
        assert found > x.nbytes + pre  # as plain PyTorch does: the contract says so
    else:
        assert found == x.nbytes + pre
    y.sum().backward()
    with torch.no_grad():
        assert _saved_bytes(lambda *a: case.fn(*a, backend=backend), args, args[1:])[0] == 0


@pytest.mark.parametrize("layers", [1, 2, "packed"])
def test_recomputing_changes_no_bit(layers, device):
    args = _make(True, layers)(torch.bfloat16, device)
    runs = [
        outputs_and_gradients(lambda *a, r=r: _case("gelu", layers, True, r).fn(*a, backend="triton"), args)
        for r in (False, True)
    ]
    for kept, again in zip(*(outs + grads for outs, grads in runs)):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("layers", [1, 2, "packed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_torchs_products_with_our_element_wise_kernels(layers, recompute, device, monkeypatch):
    # What the torch backend is on a GPU; here its kernels run in the interpreter.
    from fastlm.kernels import mlp as steps
    from fastlm.kernels import mlp_epilogue

    monkeypatch.setattr(steps, "library_form", lambda x: mlp_epilogue.ELEMENTWISE)
    monkeypatch.setattr(mlp_module, "_direct", lambda x, recompute: False)
    case = _case("silu", layers, True, recompute)
    check_guards(case, "torch", device)
    check_strides(case, "torch", device)
    for dtype in (torch.float32, torch.bfloat16):
        check_accuracy(case, "torch", dtype, device)


@pytest.mark.parametrize("name", ["mlp", "gated", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_tensors_get_no_gradient_and_cost_no_product(name, backend, device, monkeypatch):
    from fastlm.kernels import mlp as steps

    asked = []
    real = steps.weight_grad
    monkeypatch.setattr(steps, "weight_grad", lambda *args: asked.append(args[2].shape) or real(*args))
    case = CASES[name]
    for live in range(len(case.make(torch.float32, device))):
        torch.manual_seed(0)
        args = tuple(t.requires_grad_(i == live) for i, t in enumerate(case.make(torch.float32, device)))
        asked.clear()
        y = case.fn(*args, backend=backend)
        y.sum().backward()
        assert [t.grad is not None for t in args] == [i == live for i in range(len(args))]
        assert len(asked) <= 1
        full = tuple(t.detach().requires_grad_() for t in args)
        case.fn(*full, backend="reference").sum().backward()
        torch.testing.assert_close(args[live].grad, full[live].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_matrix_of_another_dtype_and_memory_order(backend, recompute, device):
    x, up, down = _make(False, 1)(torch.float32, device)
    x = x.bfloat16()
    results = []
    for order in (lambda w: w, lambda w: w.t().contiguous().t()):  # the second as GPT-2's Conv1D hands it over
        weights = [order(w.clone()).requires_grad_() for w in (up, down)]
        y = ops.mlp(x, *weights, recompute=recompute, backend=backend)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().square().sum(), weights)
        for grad, weight in zip(grads, weights):
            assert grad.dtype == torch.float32 and grad.stride() == weight.stride()
        results.append((y, *grads))
    bias = torch.zeros(up.shape[0], dtype=torch.float64, device=device)
    results.append((ops.mlp(x, up.to(x.dtype), down, bias, recompute=recompute, backend="torch"), *results[0][1:]))
    for one, other, third in zip(*results):
        torch.testing.assert_close(one, third)
        torch.testing.assert_close(one, other)


def test_auto_passes_over_what_was_not_measured_to_be_faster(monkeypatch):
    from fastlm.kernels import mlp as steps

    x = torch.randn(5, 8)
    assert "not measured to be faster" in steps.why_not_epilogue(x, True)
    monkeypatch.setitem(steps.EPILOGUE_WINS, (0, True), (4, 64))
    assert steps.why_not_epilogue(x, True) is None
    assert steps.why_not_epilogue(x, False) is not None and steps.why_not_epilogue(x[:3], True) is not None


BUGS = {
    "gate_for_up": ("mlp_epilogue", "gated", "acc, acc2 = add_two", "acc2, acc = add_two"),
    "bias": ("mlp_epilogue", "mlp", "bias_ptr + col)", "bias_ptr + 0 * col)"),
    "slope": ("mlp_epilogue", "gated", "(dh * slope)", "dh"),
    "gate_gradient": ("mlp_epilogue", "gated", "        dh *= tl.load(", "        tl.load("),
    "value": ("mlp_epilogue", "gated", "(dh * value)", "dh"),
    "hidden_tail": ("mlp_epilogue", "mlp", "(row < M)[:, None] & (col", "(row < M - 1)[:, None] & (col"),
    "inner_tail": ("products", "mlp", "k[None, :] < K - start", "k[None, :] < K - start - 1"),
    "inner_step": ("products", "mlp", "a_tile += BLOCK_K\n        b_tile +=", "b_tile +="),
    "second_part_of_dx": ("mlp", "gated", "dx.addmm_(parts[1], w2)", "dx"),
    "grid": ("products", "mlp", "rest // height", "0 * rest // height"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    file, name, old, new = BUGS[bug]
    case = CASES[name]
    with (
        planted_bug(case.op, old, new, file=file),
        pytest.raises(AssertionError, match="max error|unwritten|NaN or inf"),
    ):
        check_accuracy(case, "triton", torch.float32, device)
        check_guards(case, "triton", device)  # an unwritten element may by chance hold what was right


@pytest.mark.parametrize("sizes", [(40, 40, 70, 33), (1, 33, 1, 1), (3, 64, 32, 16)], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_several_tiles_and_single_elements(sizes, layers, device):
    args = _make(True, layers, sizes)(torch.float32, device)
    check_accuracy(_case("silu", layers, True), "triton", torch.float32, device, args)


def test_fp32_products_follow_torchs_precision(device):
    from fastlm.kernels.attention_common import dot_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.float32) == "tf32" and dot_precision(torch.bfloat16) == "ieee"
        x, up, down = _make(False, 1)(torch.float32, device)
        torch.testing.assert_close(ops.mlp(x, up, down, backend="triton"), ops.mlp(x, up, down), rtol=1e-2, atol=1e-2)
    finally:
        torch.set_float32_matmul_precision(before)


@KINDS
@pytest.mark.parametrize("layers", [1, 2, "packed"])
def test_without_gradients_the_activation_is_in_place_and_nothing_else(kind, layers, monkeypatch):
    monkeypatch.setattr(mlp_module, "_LARGE", 0)
    args = _make(True, layers)(torch.float32, "cpu")
    before = [a.clone() for a in args]
    case = _case(kind, layers, True)
    with torch.no_grad():
        torch.testing.assert_close(case.fn(*args, backend="torch"), case.plain(*args))
    for now, then in zip(args, before):
        assert torch.equal(now, then)


@pytest.mark.parametrize("layers", [1, 2, "packed"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wide", ["x", "parameter"])
def test_fp64_under_autocast(layers, recompute, wide):
    # Autocast leaves fp64 as it is: x in fp64 asks for products in it, a parameter in fp64 is cast as any other.
    case = _case("silu", layers, True, recompute)
    args = [t.requires_grad_() for t in case.make(torch.float32, "cpu")]
    for i in (0,) if wide == "x" else (1, len(args) - 1):
        args[i] = args[i].detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.fn(*args, backend="torch")
    assert y.dtype == (torch.float64 if wide == "x" else torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in args]
    want = case.plain(*exact)
    close = {"rtol": 1e-6, "atol": 1e-6} if wide == "x" else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(y.double(), want, **close)
    y.sum().backward()
    want.sum().backward()
    for t, e in zip(args, exact):
        assert t.grad.dtype == t.dtype
        scale = e.grad.abs().max().item()
        torch.testing.assert_close(t.grad.double() / scale, e.grad / scale, **close)


def test_a_bias_of_higher_precision_gets_its_gradient_so(device):
    dy = torch.rand(512, 8, device=device).bfloat16()
    x = torch.randn(512, 4, device=device).bfloat16()
    for backend in BACKENDS:
        up, down = (torch.randn(s, device=device).bfloat16() for s in ((6, 4), (8, 6)))
        bias = torch.zeros(8, device=device, requires_grad=True)
        ops.mlp(x, up, down, None, bias, recompute=True, backend=backend).backward(dy)
        torch.testing.assert_close(bias.grad.double(), dy.double().sum(0), rtol=1e-5, atol=0)


def test_gradients_of_fp32_matrices_in_the_librarys_own_rounding():
    # out_dtype is for 16-bit inputs alone; a fake device, as no CPU product has it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fastlm.kernels import matmul

    with FakeTensorMode():
        weight = torch.empty(6, 4, device="cuda")
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            x, dy = (torch.empty(3, width, dtype=dtype, device="cuda") for width in (4, 6))
            grad = matmul.weight_grad(dy, x, weight)
            assert grad.dtype == torch.float32 and grad.shape == weight.shape
