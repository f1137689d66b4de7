"""Numbers that no call can mean raise; out of a kernel they would come as NaN, or as nothing at all."""

import pytest
import torch

from fastlm import ops
from fastlm.ops import loss_checks

NAN, INF = float("nan"), float("inf")
BEYOND = (NAN, INF, -INF, 1e39, True, torch.ones(()))  # of any number that fp32 holds
BELOW = (*BEYOND, -1.0)  # of one >= 0
DIVISOR = (*BELOW, 0.0, 1e-39)  # 0 in fp32
BACKENDS = pytest.mark.parametrize("backend", ("auto", "reference", "torch", "triton"))


def _calls(backend):
    """(call(**one number), its name, numbers that it must refuse)."""
    x, y, weight, target = torch.randn(3, 8), torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, 1, 2])
    q, lengths = torch.randn(1, 2, 2, 16), torch.tensor([2])
    a, b = torch.randn(2, 8), torch.randn(11, 2)
    of = lambda op, *args: lambda **kw: op(*args, **kw, backend=backend)  # noqa: E731
    two = of(ops.cross_entropy, x, target), of(ops.linear_cross_entropy, x, weight, target)
    divergences = of(ops.kl_div, x, y), of(ops.linear_kl_div, x, weight, y, weight)
    for call in (*two, of(ops.linear_logprobs, x, weight, target)):
        yield call, "scale", BEYOND
        yield call, "softcap", DIVISOR
    for call in two:
        yield call, "z_loss", BELOW
        yield call, "label_smoothing", (*BELOW, 1.5)
        yield call, "denominator", (*BELOW[:5], 1e-39)  # 0 gives 0, and a 0-d tensor is one
    for call in divergences:
        yield call, "beta", (*BELOW, 1.5)
        yield call, "temperature", DIVISOR
        yield call, "denominator", (*BELOW[:5], -1.0, 0.0, 1e-39)
    for who in ("student", "teacher"):
        yield divergences[1], f"{who}_scale", BEYOND
        yield divergences[1], f"{who}_softcap", DIVISOR
    for call in (of(ops.attention, q, q, q), of(ops.decode_attention, q, q, q, lengths)):
        yield call, "scale", BEYOND
        yield call, "softcap", (*DIVISOR, 3e38)
    for call in (of(ops.rms_norm, x, x[0]), of(ops.layer_norm, x, x[0])):
        yield call, "eps", BELOW
        yield call, "weight_offset", BEYOND
    yield of(ops.softmax, x), "scale", BEYOND
    yield of(ops.lora_linear, x, weight, a, b), "scale", BEYOND


@BACKENDS
def test_numbers_that_no_call_can_mean(backend):
    for call, name, values in _calls(backend):
        for value in values:
            with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name} must be "):
                call(**{name: value})


def test_the_smallest_softcaps_and_temperatures(device):
    """What the checks let through gives numbers."""
    q, x = torch.randn(1, 2, 2, 16, device=device), torch.randn(3, 8, device=device)
    target = torch.tensor([0, 1, 2], device=device)
    for backend in ("reference", "triton"):
        for softcap in (1e-37, 1e-30, 1e38):
            q[0, 0] = 0
            assert ops.attention(q, q, q, softcap=softcap, backend=backend).isfinite().all(), (backend, softcap)
            loss = ops.cross_entropy(x.requires_grad_(), target, softcap=softcap, backend=backend)
            assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all(), (backend, softcap)
    with pytest.raises(ValueError, match="softcap must be at least 1e-37 times scale 10"):
        ops.attention(q, q, q, softcap=1.2e-37, scale=10.0)


@pytest.mark.parametrize("backend", ("reference", "torch", "triton"))
@pytest.mark.parametrize("wrong", [-1, 11, 2**62])
def test_targets_out_of_range(backend, wrong, device, monkeypatch):
    """Where values are read (the CPU, or check=True) an error names the place; where nobody looks the loss is NaN."""
    where = device if backend == "triton" else "cpu"
    x, weight, class_weight = (torch.rand(shape, device=where) for shape in ((2, 3, 8), (11, 8), (11,)))
    target = torch.tensor([[0, 1, 2], [-100, wrong, wrong]], device=where)

    def calls(**options):
        linear = {"backend": backend, **options}
        yield lambda: ops.cross_entropy(x @ weight.T, target, reduction="none", **linear)
        yield lambda: ops.cross_entropy(x @ weight.T, target, class_weight, **linear)
        yield lambda: ops.linear_cross_entropy(x, weight, target, z_loss=0.1, weight=class_weight, **linear)
        yield lambda: ops.linear_cross_entropy(x, weight, target, reduction="none", **linear)
        yield lambda: ops.linear_logprobs(x, weight, target, **linear).logp

    said = rf"^\w+: target must be in \[0, 11\) or ignore_index=-100, got {wrong} at \[1, 1\], 2 such of 6; put ignore_index"
    for call in calls(check=where != "cpu"):
        with pytest.raises(ValueError, match=said):
            call()
    # As on a GPU, where no value is read: torch's own functions, which look, are not called there.
    monkeypatch.setattr(loss_checks, "can_read", lambda t: False)
    for call in calls(check=True):
        with pytest.raises(ValueError, match=said):
            call()
    monkeypatch.setitem(ops.cross_entropy.__globals__, "can_read", lambda t: False)
    monkeypatch.setitem(ops.linear_cross_entropy.__globals__, "_SMALL", -1)
    for call in calls():
        loss = call()
        assert loss[1, 1].isnan() and loss[0].isfinite().all() and loss[1, 0] == 0 if loss.ndim else loss.isnan()
