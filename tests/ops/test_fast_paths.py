"""What the short ways of small CPU calls must not skip: errors of the contract, devices, values that are not there to be read."""

import pytest
import torch

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


def _rows(dtype, *shape):
    return torch.randn(shape, device="cpu").to(dtype).requires_grad_()


DEVICE_CALLS = {
    "rms_norm": lambda dtype: ops.rms_norm(_rows(dtype, 3000, 128), _rows(dtype, 128)),
    "rms_norm_residual": lambda dtype: ops.rms_norm(_rows(dtype, 4, 8), _rows(dtype, 8), residual=_rows(dtype, 4, 8))[
        0
    ],
    "layer_norm": lambda dtype: ops.layer_norm(_rows(dtype, 400, 128), _rows(dtype, 128), _rows(dtype, 128)),
    "layer_norm_bare": lambda dtype: ops.layer_norm(_rows(dtype, 4, 8)),
    "softmax": lambda dtype: ops.softmax(
        _rows(dtype, 2, 64, 64), mask=torch.ones(64, 64, dtype=torch.bool, device="cpu")
    ),
    "softmax_large": lambda dtype: ops.softmax(_rows(dtype, 1100, 256), scale=0.3),
    "cross_entropy": lambda dtype: ops.cross_entropy(
        _rows(dtype, 4, 8), torch.zeros(4, dtype=torch.int64, device="cpu")
    ),
    "kl_div": lambda dtype: ops.kl_div(_rows(dtype, 4, 8), _rows(dtype, 4, 8)),
    "kl_div_mixture": lambda dtype: ops.kl_div(_rows(dtype, 4, 8), _rows(dtype, 4, 8), beta=0.5),
    "rotary": lambda dtype: ops.rotary(
        _rows(dtype, 1, 4, 2, 8), _rows(dtype, 1, 4, 2, 8), *torch.randn(2, 4, 4, device="cpu")
    )[0],
    "mlp": lambda dtype: ops.mlp(_rows(dtype, 4, 8), _rows(dtype, 8, 8), _rows(dtype, 8, 8), recompute=True),
    "lora_linear": lambda dtype: ops.lora_linear(
        _rows(dtype, 1100, 8), _rows(dtype, 64, 8), _rows(dtype, 2, 8), _rows(dtype, 64, 2)
    ),
}


@pytest.mark.parametrize("call", DEVICE_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_device_decides_nothing(call, dtype):
    """Under `with torch.device("meta")`, as where a model is built without memory, results stay where the inputs are."""
    torch.manual_seed(0)
    want = DEVICE_CALLS[call](dtype)
    want.sum().backward()
    torch.manual_seed(0)
    with torch.device("meta"):
        got = DEVICE_CALLS[call](dtype)
        assert got.device.type == "cpu"
        total = got.sum()
        total.backward()
    with torch.no_grad(), torch.device("meta"):
        assert DEVICE_CALLS[call](dtype).device.type == "cpu"
    assert torch.equal(got, want)


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
