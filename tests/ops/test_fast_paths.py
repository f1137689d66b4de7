"""What the short ways of small CPU calls must not skip: errors of the contract, devices, values that are not there to be read."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastlm import ops


def _targets(*shape):
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.complex128], ids=str)
def test_cross_entropy_of_no_floating_point(dtype):
    for shape in ((4, 8), (2, 4, 8)):
        with pytest.raises(TypeError, match="cross_entropy: input must be floating point, got"):
            ops.cross_entropy(torch.ones(shape, dtype=dtype), _targets(*shape[:-1]))


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((4, 8), {"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\], got -0.1"),
        ((4, 8), {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ((4, 8), {"label_smoothing": float("nan")}, r"label_smoothing must be in \[0, 1\], got nan"),
        ((), {}, r"input must be \[..., V\]"),
        ((0,), {}, r"input must be \[..., V\]"),
        ((4, 0), {}, r"input must be \[..., V\]"),
        ((0, 0), {}, r"input must be \[..., V\]"),
        ((2, 4, 0), {}, r"input must be \[..., V\]"),
        ((4, 8), {"ignore_index": 2**70}, "ignore_index must be a 64-bit integer like the targets, got 1180"),
        ((4, 8), {"ignore_index": -(2**63) - 1}, "ignore_index must be a 64-bit integer"),
    ],
)
def test_cross_entropy_out_of_range(shape, options, message):
    for grad in (False, True):
        with pytest.raises(ValueError, match=f"cross_entropy: {message}"):
            ops.cross_entropy(torch.ones(shape, requires_grad=grad), _targets(*shape[:-1]), **options)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("grad", [False, True])
def test_norms_of_a_single_number(op, grad):
    x = torch.tensor(1.0, requires_grad=grad)
    for weight in (None, torch.tensor(1.0)):
        with pytest.raises(ValueError, match=f"{op}: x must have at least one dimension, got a scalar"):
            getattr(ops, op)(x, weight)


def _mlp_tensors(gated):
    tensors = {name: torch.ones(8, 8) for name in ("up_weight", "down_weight")}
    tensors |= {name: torch.ones(8) for name in ("up_bias", "down_bias")}
    return tensors | ({"gate_weight": torch.ones(8, 8), "gate_bias": torch.ones(8)} if gated else {})


WITH_TENSORS = {
    "rms_norm": {"weight": torch.ones(8), "bias": torch.ones(8), "residual": torch.ones(4, 8)},
    "layer_norm": {"weight": torch.ones(8), "bias": torch.ones(8), "residual": torch.ones(4, 8)},
    "softmax": {"mask": torch.ones(4, 8, dtype=torch.bool)},
    "lora_linear": {name: torch.ones(8, 8) for name in ("weight", "a", "b")} | {"bias": torch.ones(8)},
    "mlp": _mlp_tensors(False),
    "gated_mlp": _mlp_tensors(True),
}


@pytest.mark.parametrize("op", WITH_TENSORS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_tensor_on_another_device(op, grad, backend):
    """torch's own products and in-place calls take no notice of a meta tensor and go on without it."""
    tensors, x = WITH_TENSORS[op], torch.ones(4, 8, requires_grad=grad)
    options = [{}, {"recompute": True}] if "mlp" in op else [{}]
    needed = {"rms_norm": (), "layer_norm": (), "softmax": (), "lora_linear": ("weight", "a", "b")}
    for name, t in tensors.items():
        others = {k: v for k, v in tensors.items() if k in needed.get(op, tensors)}
        for option in options:
            with pytest.raises(ValueError, match=f"{op}: {name} must be on x's device cpu, got meta"):
                getattr(ops, op)(x, **{**others, name: t.to("meta")}, **option, backend=backend)


DEVICE_CALLS = {
    "rms_norm": lambda rows: ops.rms_norm(rows(3000, 128), rows(128)),
    "rms_norm_residual": lambda rows: ops.rms_norm(rows(4, 8), rows(8), residual=rows(4, 8))[0],
    "layer_norm": lambda rows: ops.layer_norm(rows(400, 128), rows(128), rows(128)),
    "layer_norm_bare": lambda rows: ops.layer_norm(rows(4, 8)),
    "softmax": lambda rows: ops.softmax(rows(8, 64, 64), mask=torch.ones(64, 64, dtype=torch.bool, device="cpu")),
    "softmax_large": lambda rows: ops.softmax(rows(1100, 256), scale=0.3),
    "cross_entropy": lambda rows: ops.cross_entropy(rows(4, 8), torch.zeros(4, dtype=torch.int64, device="cpu")),
    "kl_div": lambda rows: ops.kl_div(rows(4, 8), rows(4, 8)),
    "kl_div_mixture": lambda rows: ops.kl_div(rows(4, 8), rows(4, 8), beta=0.5),
    "rotary": lambda rows: ops.rotary(rows(1, 4, 2, 8), rows(1, 4, 2, 8), *torch.randn(2, 4, 4, device="cpu"))[0],
    "mlp": lambda rows: ops.mlp(rows(4, 8), rows(8, 8), rows(8, 8), recompute=True),
    "lora_linear": lambda rows: ops.lora_linear(rows(1100, 8), rows(64, 8), rows(2, 8), rows(64, 2)),
}


@pytest.mark.parametrize("call", DEVICE_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_device_decides_nothing(call, dtype):
    """Under `with torch.device("meta")`, as where a model is built without memory, results stay where the inputs are."""

    def run():
        torch.manual_seed(0)
        leaves = []

        def rows(*shape):
            leaves.append(torch.randn(shape, device="cpu").to(dtype).requires_grad_())
            return leaves[-1]

        y = DEVICE_CALLS[call](rows)
        y.square().sum().backward()
        with torch.no_grad():
            values = DEVICE_CALLS[call](rows)
        return [y.detach(), values, *(t.grad for t in leaves if t.grad is not None)]

    want = run()
    with torch.device("meta"):
        got = run()
    assert [t.device.type for t in got] == ["cpu"] * len(want)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("tokens", [3, 400], ids=["few", "many"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_rotary_of_one_that_needs_a_gradient(tokens, backend, device):
    if backend == "triton" and tokens > 3:
        tokens = 40
    cos, sin = torch.randn(2, tokens, 16, device=device)
    for who in (0, 1):
        pair = [torch.randn(1, tokens, 2, 32, device=device) for _ in "qk"]
        pair[who].requires_grad_()
        out = ops.rotary(*pair, cos, sin, backend=backend)
        assert [t.requires_grad for t in out] == [who == 0, who == 1]
        pair_of_both = [t.detach().requires_grad_() for t in pair]
        both = ops.rotary(*pair_of_both, cos, sin, backend=backend)
        for got, want in zip(out, both, strict=True):
            torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(out[who].sin().sum(), pair[who])
        (want,) = torch.autograd.grad(both[who].sin().sum(), pair_of_both[who])
        torch.testing.assert_close(grad, want)


def _hidden(x):
    return torch.arange(x.shape[-1]) < 5


VALUE_CALLS = {
    "softmax": lambda x, t: ops.softmax(x, mask=_hidden(x)),
    "softmax_added": lambda x, t: ops.softmax(x, mask=torch.zeros(x.shape[-1])),
    "cross_entropy": lambda x, t: ops.cross_entropy(x, t),
    "cross_entropy_none": lambda x, t: ops.cross_entropy(x, t, reduction="none"),
    "kl_div": lambda x, t: ops.kl_div(x, x * 0.5),
    "kl_div_none": lambda x, t: ops.kl_div(x, x * 0.5, reduction="none", beta=1.0),
    "kl_div_mixture": lambda x, t: ops.kl_div(x, x * 0.5, beta=0.5),
    "rotary": lambda x, t: ops.rotary(
        x[None, :, None], x[None, :, None], torch.ones(8, 4), torch.zeros(8, 4), positions=t.abs() % 8
    )[0],
    "rotary_packed": lambda x, t: ops.rotary(
        x[:, None], x[:, None], torch.ones(8, 4), torch.zeros(8, 4), cu_seqlens=torch.tensor([0, 2, 4])
    )[0],
    "rms_norm": lambda x, t: ops.rms_norm(x, torch.ones(8)),
    "layer_norm": lambda x, t: ops.layer_norm(x, torch.ones(8)),
}


def _values(seed):
    """Rows and targets; those of seed 0 count all."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([1, 2, 3, 4]) if seed == 0 else torch.tensor([0, -100, 5, 7])


@pytest.mark.parametrize("call", VALUE_CALLS)
@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors_have_no_values(call, grad):
    with FakeTensorMode():
        x = torch.randn(4, 8, requires_grad=grad)
        y = VALUE_CALLS[call](x, torch.zeros(4, dtype=torch.int64))
        assert isinstance(y, FakeTensor) and y.requires_grad == grad
        if grad:
            y.sum().backward()
            assert x.grad.shape == x.shape


@pytest.mark.parametrize("call", VALUE_CALLS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("way", ["make_fx", "jit"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*is deprecated")
def test_what_is_recorded_depends_on_no_value(call, grad, way):
    """A recording made with one input gives what the call gives for another."""

    def fn(x, t):
        y = VALUE_CALLS[call](x, t)
        return torch.autograd.grad(y.square().sum(), x)[0] if grad and way == "make_fx" else y

    first, (x, t) = _values(0), _values(1)
    recorded = make_fx(fn) if way == "make_fx" else functools.partial(torch.jit.trace, fn)
    recorded = recorded(first[0].requires_grad_(grad), first[1]) if way == "make_fx" else recorded(first)
    if way == "make_fx":
        reads = [n for n in recorded.graph.nodes if n.target == torch.ops.aten._local_scalar_dense.default]
        assert not reads
    with torch.no_grad():
        got = recorded(x, t)
    torch.testing.assert_close(got, fn(x.requires_grad_(grad), t))


def test_a_mode_that_only_looks_on_changes_nothing():
    """Counting modes see the calls that run without them: errors that need values too."""
    with FlopCounterMode(display=False), pytest.raises(ValueError, match=r"cross_entropy: target must be in \[0, 8\)"):
        ops.cross_entropy(torch.ones(4, 8), torch.full((4,), 9))
