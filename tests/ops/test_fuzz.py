"""Random calls of every op: odd, empty and single sizes, permuted, sliced and expanded tensors, every dtype.

The reference must equal plain torch in fp64; the Triton kernels must keep the accuracy rule. The draws are the same in every
run.
"""

import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlm.kernels import chunked_loss
from fastlm.ops._op import REGISTRY
from fastlm.testing import assert_accurate
from tests.ops.fuzz import LAYOUTS, laid_out, outputs_and_gradients, tensors_of
from tests.ops.fuzz_plans import PLANS

OPS = pytest.mark.parametrize("op", sorted(PLANS))
# Of values, for the yardstick: the error of plain torch on a handful of numbers may be small by chance.
DRAWS, DRAWS_OF_FEW, FEW = 4, 32, 500


def _each(examples, check, op, *args):
    """check(op, draw, *args) on that many random draws."""

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck), print_blob=False)  # fmt: skip
    @given(st.data())
    def run(data):
        check(op, data.draw, *args)

    run()


def _planned(op, draw):
    plan = PLANS[op](draw)
    layouts = {name: draw(st.sampled_from(LAYOUTS), label=f"layout of {name}") for name in plan.shapes}
    return plan, layouts, draw(st.sampled_from(LAYOUTS), label="layout of the gradients"), draw(st.integers(0, 1000))


def _check_plain_form(op, draw, backend):
    plan, layouts, incoming, seed = _planned(op, draw)
    tensors = tensors_of(plan, layouts, seed, torch.float64, "cpu")
    got = outputs_and_gradients(lambda **t: plan.call(backend, **t), tensors, incoming)
    dense = {
        name: t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for name, t in tensors.items()
    }
    # The same values, not strides, of the cotangents: laid out, then dense.
    want = outputs_and_gradients(plan.plain, dense, incoming)
    _same(plan, got, want)


def _same(plan, got, want):
    assert len(got) == len(want), plan
    for i, (g, w) in enumerate(zip(got, want)):
        if w is None or g is None:
            assert (g is None or not g.any()) and (w is None or not w.any()), f"{plan}: result {i} on one side only"
        else:
            torch.testing.assert_close(
                g, w.to(g.dtype), rtol=1e-6, atol=1e-6, msg=lambda m, i=i: f"{plan}: result {i}: {m}"
            )


def _check_kernel(op, draw, device):
    plan, layouts, incoming, seed = _planned(op, draw)
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    few = sum(torch.Size(shape).numel() for shape in plan.shapes.values()) <= FEW
    draws = [tensors_of(plan, layouts, seed + i, dtype, device) for i in range(DRAWS_OF_FEW if few else DRAWS)]
    base = [outputs_and_gradients(plan.plain, t, incoming) for t in draws]
    wide = {name: t.detach().double().requires_grad_() for name, t in draws[0].items()}
    exact = outputs_and_gradients(lambda **t: plan.call("reference", **t), wide, incoming)
    errors = [
        outputs_and_gradients(
            lambda **t: plan.call("reference", **t),
            {n: x.detach().double().requires_grad_() for n, x in t.items()},
            incoming,
        )
        for t in draws[1:]
    ]
    found = outputs_and_gradients(lambda **t: plan.call("triton", **t), draws[0], incoming)
    for i, (g, e) in enumerate(zip(found, exact)):
        if e is None or g is None:
            continue
        # The yardstick: this draw's plain result, moved away by the largest error of any draw.
        worst = max(
            (b[i].double() - x[i]).abs().nan_to_num().max().item() if x[i].numel() else 0.0
            for b, x in zip(base, [exact, *errors])
        )
        assert_accurate(g, e, e + worst, f"{op} {plan} {dtype}: result {i}")


@OPS
def test_reference(op):
    _each(200, _check_plain_form, op, "reference")


@OPS
def test_torch_form(op):
    if "torch" not in REGISTRY[op].backends:
        pytest.skip(f"{op} has no torch form")
    _each(100, _check_plain_form, op, "torch")


# What is left to torch's own calls, for these small draws too in the form that large tensors take.
SWITCHES = [
    ("kl_div", "_SMALL"), ("linear_cross_entropy", "_SMALL"), ("lora_linear", "_SMALL"), ("norm_torch", "_FEW"),
    ("norm_torch", "_BLOCK"), ("rotary", "_FEW"), ("softmax", "_FEW"),
]  # fmt: skip


@OPS
def test_torch_form_of_large_tensors(op, monkeypatch):
    if "torch" not in REGISTRY[op].backends:
        pytest.skip(f"{op} has no torch form")
    for module, name in SWITCHES:
        monkeypatch.setattr(sys.modules[f"fastlm.ops.{module}"], name, 0)
    monkeypatch.setitem(chunked_loss.LOGITS_BYTES, "cpu", 500)
    _each(100, _check_plain_form, op, "torch")


@OPS
def test_triton(op, device):
    if "triton" not in REGISTRY[op].backends:
        pytest.skip(f"{op} has no Triton kernels")
    _each(25, _check_kernel, op, device)


@pytest.mark.slow
@OPS
def test_triton_at_length(op, device):
    _each(200, _check_kernel, op, device)


def test_layouts_are_what_they_say():
    values = torch.arange(24.0).view(2, 3, 4)
    for layout in LAYOUTS[:-1]:
        assert torch.equal(laid_out(values, layout), values)
    strides = {layout: laid_out(values, layout).stride() for layout in LAYOUTS}
    assert strides["expanded"][0] == 0 and strides["steps"][-1] == 2 and strides["rows_apart"] == (21, 7, 1)
    assert strides["permuted"] == (1, 2, 6) and laid_out(values, "offset").storage_offset() == 1


def test_every_op_with_a_gradient_is_drawn():
    assert {name for name, op in REGISTRY.items() if op.backward is not None} <= set(PLANS)
