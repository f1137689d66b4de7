"""The cuda backend as a whole on the CPU: bindings/ and the kernels compiled for the host body, called through the ops."""

import pytest
import torch

from fastlm import ops
from fastlm.ops.norm_reference import kept
from fastlm.testing import assert_accurate, check_accuracy, check_guards, check_op
from fastlm.testing.guards import bands_intact, guarded, poison_empty
from tests.csrc.host_library import needs_compiler
from tests.ops.test_softmax import _case as softmax_case

pytestmark = [needs_compiler, pytest.mark.usefixtures("cuda_on_the_host")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_softmax_keeps_the_contract():
    check_op(softmax_case("none"), "cuda", "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((2, 3, 4, 20), (2, 3, 123), (2, 1030), (7,)))
def test_softmax_is_accurate(dtype, shape):
    check_accuracy(softmax_case("none", shape), "cuda", dtype, "cpu")
    check_guards(softmax_case("none", shape), "cuda", "cpu")


def _views(x):
    """The same values, lying otherwise."""
    yield x
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield x.movedim(0, -2).contiguous().movedim(-2, 0)
    yield torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    yield torch.stack([x, x], -1)[..., 0]
    yield x.flip(0).flip(0)[:, :1].expand(x.shape) if x.ndim > 1 else x


OPTIONS = {
    "plain": {}, "llama": {"casting": "llama", "weight_offset": 1.0}, "dropout": {"dropout_p": 0.3, "seed": 11},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_residual", (False, True))
def test_rms_norm_wherever_its_tensors_lie(dtype, options, with_residual):
    shape = (2, 3, 2, 40)
    values, added = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    weight, bias = torch.randn(40).to(dtype), torch.randn(40).to(dtype)
    for x, residual in zip(_views(values), reversed([*_views(added)])):
        extra = {"bias": bias, **options} | ({"residual": residual} if with_residual else {})
        wide = {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in extra.items()}
        with poison_empty():
            found = ops.rms_norm(x, weight, backend="cuda", **extra)
        exact = ops.rms_norm(x.double(), weight.double(), backend="reference", **wide)
        plain = ops.rms_norm(x, weight, backend="reference", **extra)
        for got, want, by_hand in zip(*(t if with_residual else (t,) for t in (found, exact, plain))):
            assert_accurate(got, want, by_hand)


def test_rms_norm_shapes():
    for shape in ((0, 8), (3, 0), (8,), (1, 1, 1), (2, 0, 3)):
        x = torch.randn(shape)
        y, residual_out = ops.rms_norm(x, residual=x, backend="cuda")
        want, total = ops.rms_norm(x, residual=x, backend="reference")
        torch.testing.assert_close((y, residual_out), (want, total))


def test_rms_norm_drops_what_the_reference_drops():
    x, seed = torch.ones(5, 37), torch.tensor([3, 9])
    y = ops.rms_norm(x, dropout_p=0.4, seed=seed, backend="cuda")
    assert torch.equal(y != 0, kept(x, seed, 0.4))


def test_rms_norm_touches_nothing_else():
    x, x_buffer = guarded(torch.randn(5, 37))
    weight, weight_buffer = guarded(torch.randn(37))
    before = x.clone(), weight.clone()
    with poison_empty():
        one, two = (ops.rms_norm(x, weight, backend="cuda") for _ in range(2))
    assert one.isfinite().all() and torch.equal(one, two)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
    assert bands_intact(x_buffer) and bands_intact(weight_buffer)


def test_rms_norm_compiled():
    def call(x, weight):
        return ops.rms_norm(x, weight, backend="cuda")

    x, weight = torch.randn(4, 40), torch.randn(40)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x, weight), call(x, weight))
    schema = torch.ops.fastlm.rms_norm.default
    torch.library.opcheck(schema, (x, weight, None, x, None, 1e-6, 0.0, False, 0.0, "cuda"))


def test_wrong_calls_are_refused_before_memory_is_touched():
    x, call = torch.randn(2, 8), torch.ops.fastlm_host.rms_norm_fwd
    rest = (None, 1e-6, 0.0, False, 0.0)
    for args, words in (
        ((x.double(), None, None, None, *rest), "x must be float32, bfloat16 or float16"),
        ((x, torch.ones(7), None, None, *rest), r"weight must be \[8\]"),
        ((x, None, None, torch.ones(3, 8), *rest), "residual must have x's shape"),
        ((x, torch.ones(8), torch.ones(8).half(), None, *rest), "weight and bias must have one dtype"),
        ((x, torch.ones(8).half(), None, None, *rest), "the kernel was not started"),
        (
            (x, None, None, None, torch.ones(3, dtype=torch.int64), *rest[1:]),
            r"seed must be a contiguous int64 tensor \[2\]",
        ),
        ((x.to("meta"), None, None, None, *rest), "x must be a CPU tensor"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(*args)
