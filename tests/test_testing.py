"""The checks of fastlm.testing can fail: each meets a function with the very fault it is there to find."""

import pytest
import torch

from fastlm import ops, testing
from fastlm.ops._op import REGISTRY, Op
from fastlm.testing import Case, assert_accurate, bands_intact, guarded, planted_bug, poison_empty


def _args(dtype, device):
    return torch.randn(3, 5, dtype=torch.float64).to(dtype).to(device), torch.randn(5, dtype=torch.float64).to(
        dtype
    ).to(device)


def _right(x, w, backend="reference"):
    return torch.tanh(x) * w


def _case(fn, op="rms_norm", **options):
    return Case(op, fn, _args, _args, plain=_right, **options)


class _Function(torch.autograd.Function):
    """_right with its gradients by hand; the subclasses below break it."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.tanh(x) * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        y = torch.tanh(x)
        return dy * w * (1 - y * y), (dy * y).sum(0)


class _SpoilsSaved(_Function):
    @staticmethod
    def backward(ctx, dy):
        grads = _Function.backward(ctx, dy)
        ctx.saved_tensors[0].data.mul_(2)
        return grads


class _WrongGradient(_Function):
    @staticmethod
    def backward(ctx, dy):
        dx, dw = _Function.backward(ctx, dy)
        return dx * 1.05, dw


class _OnceOnly(_Function):
    @staticmethod
    def backward(ctx, dy):
        return tuple(g.detach() for g in _Function.backward(ctx, dy))


class _WrongForZeroStrides(_Function):
    @staticmethod
    def backward(ctx, dy):
        # Takes the memory for granted: an expanded cotangent has a single element.
        return _Function.backward(ctx, dy if dy.is_contiguous() else dy * 2)


def _in_place(x, w, backend):
    y = _right(x, w)
    x.data.add_(1)
    return y


def _noisy(x, w, backend):
    return _right(x, w) + 1e-3 * torch.randn_like(x)


def _reads_outside(x, w, backend):
    shifted = x.as_strided(x.shape, x.stride(), x.storage_offset() + 1) if x.storage_offset() else x
    return _right(x, w) + 0 * shifted.detach()


def _unwritten(x, w, backend):
    y = torch.empty(x.shape)
    y[:-1] = _right(x, w)[:-1]
    return y


def _writes_outside(x, w, backend):
    y = torch.empty(x.shape)
    y.copy_(_right(x, w))
    if y._base is not None or y.storage_offset():  # only where there is a band behind it
        y.detach().as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(2.0)
    return y


def _writes_into_input_band(x, w, backend):
    if x.storage_offset():
        x.detach().as_strided((1,), (1,), x.storage_offset() - 1).fill_(2.0)
    return _right(x, w)


def _ignores_strides(x, w, backend):
    return _right(x.as_strided(x.shape, (x.shape[-1], 1), x.storage_offset()), w)


@pytest.mark.parametrize(
    "check, fn, message",
    [
        ("check_safety", _in_place, "an input was changed"),
        ("check_safety", _noisy, "two runs differ"),
        ("check_safety", lambda x, w, backend: _SpoilsSaved.apply(x, w), "a second backward gave other gradients"),
        ("check_guards", _reads_outside, "a read outside a tensor"),
        ("check_guards", _unwritten, "unwritten elements"),
        ("check_guards", _writes_outside, "wrote outside a buffer"),
        ("check_guards", _writes_into_input_band, "wrote outside an input"),
        ("check_strides", _ignores_strides, "inputs"),
        ("check_strides", lambda x, w, backend: _WrongForZeroStrides.apply(x, w), "zero-stride cotangent"),
        ("check_autocast", lambda x, w, backend: _right(x, w).bfloat16(), "under autocast"),
        ("check_transforms", lambda x, w, backend: _right(x, w) * (1 + x.flatten()[0].item()), "item"),
        ("check_compile", lambda x, w, backend: _right(x, w) * (1.0 if x.sum().item() > 0 else 2.0), "item|Unsupported"),
        ("check_compile", lambda x, w, backend: _right(x, w) * (1 + torch.compiler.is_compiling()), "under torch.compile"),
        ("check_double_backward", lambda x, w, backend: (_OnceOnly if backend == "triton" else _Function).apply(x, w),
         "double backward|does not require grad"),
    ],
)  # fmt: skip
def test_a_check_finds_its_fault(check, fn, message):
    check = getattr(testing, check)
    check(_case(_right), "triton", "cpu")
    with pytest.raises(Exception, match=message):
        check(_case(fn), "triton", "cpu")


def test_check_accuracy_finds_wrong_values_gradients_and_missing_ones():
    device, check = "cpu", testing.check_accuracy
    for dtype in (torch.float32, torch.bfloat16):
        check(_case(_right), "triton", dtype, device)
        for fn, message in [
            (lambda x, w, backend: _right(x, w) * (1 if backend == "reference" else 1.02), "output 0: max error"),
            (
                lambda x, w, backend: (_Function if backend == "reference" else _WrongGradient).apply(x, w),
                "gradient 0: max",
            ),
            (lambda x, w, backend: _right(x, w if backend == "reference" else w.detach()), "gradient 1 is missing"),
            (lambda x, w, backend: _right(x, w)[: None if backend == "reference" else 2], "shape"),
        ]:
            with pytest.raises(AssertionError, match=message):
                check(_case(fn), "triton", dtype, device)


def test_check_reference_finds_wrong_derivatives():
    testing.check_reference(_case(lambda x, w, backend: _Function.apply(x, w)))
    for function in (_WrongGradient, _OnceOnly):
        with pytest.raises(Exception, match="Jacobian|gradient"):
            testing.check_reference(_case(lambda x, w, backend, f=function: f.apply(x, w)))


@pytest.fixture
def toy():
    """Registers a throw-away op with a kernel; undone afterwards but for torch's own (unique) entry."""
    made = []

    def make(name, fake, kernel):
        op = Op(name, "(Tensor x, str backend) -> Tensor", reference=lambda x: x * 2, kernels={"triton": (kernel, None)},
                dtypes=(torch.float32,))  # fmt: skip
        op.fake(fake)
        made.append(name)

        def public(x, w, backend):
            return x * 2 if backend == "reference" else op.forward(x, backend)

        return Case(name, public, _args, _args)

    yield make
    for name in made:
        del REGISTRY[name]


@pytest.mark.parametrize(
    "name, fake, kernel",
    [
        ("toy_dtype", lambda x, b: torch.empty(x.shape, dtype=torch.float64), lambda x: x * 2),
        ("toy_shape", lambda x, b: x.new_empty(x.shape[0]), lambda x: x * 2),
        ("toy_strides", lambda x, b: x.new_empty(x.shape), lambda x: (x * 2).t().contiguous().t()),
        ("toy_alias", lambda x, b: x.new_empty(x.shape), lambda x: x.mul_(2)),
    ],
)
def test_check_dispatcher_finds_wrong_fakes_and_aliases(toy, name, fake, kernel, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda self, *_: self)  # the toy has no autograd
    good = toy(f"{name}_right", lambda x, b: x.new_empty(x.shape), lambda x: x * 2)
    testing.check_dispatcher(good, "triton", "cpu")
    with pytest.raises(Exception, match="opcheck|mismatch|alias|modif|mutat"):
        testing.check_dispatcher(toy(name, fake, kernel), "triton", "cpu")


def test_assert_accurate():
    exact = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    plain = (exact + torch.tensor([0.0, 1e-4, 0.0])).float()
    assert_accurate((exact + 1.9e-4).float(), exact, plain)
    with pytest.raises(
        AssertionError, match=r"(?s)logits: max error 0.0003 > allowed 0.0002.* \(1 of 3 .*\(2,\): -2.9997"
    ):
        assert_accurate((exact + torch.tensor([0, 0, 3e-4])).float(), exact, plain, "logits")
    with pytest.raises(AssertionError, match="NaN or inf where the reference is finite"):
        assert_accurate(torch.tensor([1.0, float("nan"), -3.0]), exact, plain)
    infinite = torch.tensor([float("inf"), 0.0, float("nan")])
    assert_accurate(infinite, infinite, infinite)
    with pytest.raises(AssertionError, match="inf patterns differ"):
        assert_accurate(-infinite, infinite, infinite)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(exact[:2], exact, exact)
    # A plain form that overflows is no licence to be wrong.
    with pytest.raises(AssertionError, match="max error"):
        assert_accurate((exact + 1).float(), exact, torch.full((3,), float("nan")))


def test_guard_bands():
    for t in (torch.randn(3, 4), torch.arange(12).view(3, 4), torch.tensor(3.0)):
        inner, buffer = guarded(t)
        assert torch.equal(inner, t) and bands_intact(buffer)
        inner.fill_(5)
        assert bands_intact(buffer)
        buffer[inner.storage_offset() + inner.numel()] = 5
        assert not bands_intact(buffer)


def test_poison_is_seen_and_removed():
    before = torch.empty
    with poison_empty():
        assert torch.empty(3, 4).isnan().all() and torch.empty((2,), dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(torch.ones(3)).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) != 0).all()
        assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.empty is before
    with pytest.raises(AssertionError, match="wrote outside a buffer of 3 elements"), poison_empty():
        t = torch.empty(3)
        t.as_strided((1,), (1,), t.storage_offset() + 3).zero_()
    with pytest.raises(ZeroDivisionError), poison_empty():
        raise ZeroDivisionError  # the block's own error is not hidden
    assert torch.empty is before


def test_planted_bug_is_gone_afterwards(device):
    x = torch.randn(3, 20, device=device)
    want = ops.rms_norm(x, backend="reference")
    with planted_bug("rms_norm", "y = x * rstd[:, None]", "y = x", file="norm_rows"):
        assert not torch.allclose(ops.rms_norm(x, backend="triton"), want)
    torch.testing.assert_close(ops.rms_norm(x, backend="triton"), want)
    with (
        pytest.raises(ValueError, match="'no such text' is not in kernels/rms_norm.py"),
        planted_bug("rms_norm", "no such text", ""),
    ):
        pass
