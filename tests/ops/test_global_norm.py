import math

import pytest
import torch

from fastlm import ops
from fastlm.ops.global_norm import OP, global_norm
from fastlm.testing import assert_accurate, bands_intact, guarded, planted_bug, poison_empty

BACKENDS = ("torch", "triton")
SHAPES = [(70, 70), (3,), (), (0, 4), (2, 3, 5), (2048,), (1,)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _tensors(device, dtypes=(torch.float32,), shapes=SHAPES):
    return [torch.randn(s, device=device).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]


def _exact(tensors):
    return torch.cat([t.double().flatten() for t in tensors]).square().sum().sqrt()


@each_backend
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,),
        (torch.bfloat16,),
        (torch.float16,),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.bfloat16),
    ],
    ids=["fp32", "bf16", "fp16", "bf16+fp32", "all"],
)
def test_accuracy(backend, dtypes, device):
    draws = [_tensors(device, dtypes) for _ in range(3)]
    got = [global_norm(t, backend=backend) for t in draws]
    assert all(g.dtype == torch.float32 and g.shape == () for g in got)
    plain = [torch.nn.utils.get_total_norm([x.float() for x in t]) for t in draws]
    assert_accurate(*map(torch.stack, (got, [_exact(t) for t in draws], plain)), f"global_norm {backend}")


def _check(tensors, backend, rtol=1e-6):
    torch.testing.assert_close(global_norm(tensors, backend=backend).double(), _exact(tensors), rtol=rtol, atol=0)


def test_reference(device):
    _check(_tensors(device), "reference")
    doubles = _tensors(device, (torch.float64,))
    for backend in ("reference", "torch"):
        assert global_norm(doubles, backend=backend).dtype == torch.float64
        torch.testing.assert_close(global_norm(doubles, backend=backend), _exact(doubles), rtol=1e-14, atol=0)
    assert global_norm([doubles[0], doubles[0].float()], backend="torch").dtype == torch.float32
    torch.testing.assert_close(global_norm(doubles), torch.nn.utils.get_total_norm(doubles))


def test_more_blocks_than_programs(device):
    """Each program takes several blocks, the last of them partly filled."""
    from fastlm.kernels import global_norm as kernels
    from fastlm.kernels.common import num_sms

    programs = kernels._PROGRAMS_PER_SM * num_sms(torch.device(device))
    size = 2 * programs * kernels.BLOCK + 77
    tensors = [torch.randn(size, device=device), torch.randn(5, device=device)]
    _check(tensors, "triton")


def test_the_torch_form_of_large_tensors_is_more_exact_than_one_sum():
    for g in (torch.randn(1 << 24), torch.randn(1 << 22).bfloat16()):
        exact = _exact([g])
        error, plain = ((n.double() - exact).abs() for n in (global_norm([g]), torch.linalg.vector_norm(g.float())))
        assert error < plain / 4


@each_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("value", (1e15, 1e18, 1e20, 1e30, 1e36))
def test_squares_may_overflow(backend, dtype, value, device):
    large = torch.full((2100,), value, device=device, dtype=dtype)
    _check([large], backend, rtol=1e-5)  # torch sums 2100 equal numbers so exactly
    _check([torch.ones(3, device=device), large[:1], torch.full((4,), value / 7, device=device)], backend)
    spread = [torch.full((1,), 1.5e19 * k, device=device) for k in (1.0, 0.9, 0.8)]  # none overflows, their sum does
    _check(spread, backend)


@each_backend
@pytest.mark.parametrize("place", ("first", "last", "tiny", "bf16"))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_one_bad_number_shows(backend, place, bad, device):
    tensors = [*_tensors(device), torch.randn(2100, device=device).bfloat16(), torch.randn(3, device=device)]
    where = {"first": (0, 0), "last": (0, 4899), "tiny": (2, 0), "bf16": (7, 2099)}
    index, element = where[place]
    tensors[index].view(-1)[element] = bad
    norm = global_norm(tensors, backend=backend).item()
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    tensors[4][0] = 1e25  # beside numbers whose squares overflow, too
    norm = global_norm(tensors, backend=backend).item()
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


@each_backend
def test_inputs_are_only_read_and_runs_repeat(backend, device):
    tensors = _tensors(device, (torch.float32, torch.bfloat16))
    before = [t.clone() for t in tensors]
    one, two = (global_norm(tensors, backend=backend) for _ in range(2))
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def _check_guards(device):
    pairs = [guarded(t) for t in _tensors(device, (torch.float32, torch.bfloat16))]
    tensors = [t for t, _ in pairs]
    with poison_empty():
        norm = global_norm(tensors, backend="triton")
    assert norm.isfinite(), "read outside a tensor, or a sum that was not written"
    torch.testing.assert_close(norm.double(), _exact(tensors), rtol=1e-6, atol=0)
    assert all(bands_intact(buffer) for _, buffer in pairs)


def test_guard_bands(device):
    _check_guards(device)


@each_backend
def test_strides(backend, device):
    base = torch.randn(40, 60, device=device)
    wide = torch.full((40, 120), math.nan, device=device)
    views = [base.t(), wide[:, ::2].copy_(base), base[:1].expand(40, 60), base[3:, 5:], base.bfloat16().t()]
    _check(views, backend)
    _check([base.flatten()[1:]], backend)  # not aligned to 16 bytes


@each_backend
def test_nothing_to_sum(backend, device):
    assert global_norm([], backend=backend).item() == 0
    empty = global_norm([torch.empty(0, 3, device=device)], backend=backend)
    assert (empty.item(), empty.dtype, empty.device.type) == (0, torch.float32, device)


@each_backend
def test_no_gradient_flows(backend, device):
    leaf = torch.randn(5, device=device, requires_grad=True)
    assert not global_norm([leaf * 2], backend=backend).requires_grad


def test_generators_and_autocast(device):
    tensors = _tensors(device)
    want = global_norm(tensors)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(global_norm(t for t in tensors), want)


def test_dispatcher(device):
    torch.library.opcheck(OP.forward, ([t for t in _tensors(device) if t.numel()], "triton"))


@each_backend
def test_compile(backend, device):
    tensors = _tensors(device, (torch.float32, torch.bfloat16), SHAPES[:3])
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: global_norm(t, backend=backend) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), 2 * global_norm(tensors, backend=backend))


@each_backend
def test_dtensor(backend, device):
    from torch import distributed as dist
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    tensors = _tensors(device, shapes=[(6, 4), (3, 8), (5,)])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device, (1,))
        placed = [distribute_tensor(tensors[0], mesh, [Shard(0)]), distribute_tensor(tensors[1], mesh, [Replicate()])]
        placed.append(DTensor.from_local(tensors[2], mesh, [Partial()]))
        for some in (placed, placed[:1], [*placed, tensors[0]]):
            whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in some]
            got = global_norm(some, backend=backend)
            assert type(got) is torch.Tensor
            torch.testing.assert_close(got.double(), _exact(whole), rtol=1e-6, atol=0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "old, new",
    [
        ("mask=start + col < size, other=0.0)", "mask=start + col < size - 1, other=0.0)"),  # the tail left out
        ("tl.program_id(0), blocks, tl.num_programs(0)", "tl.program_id(0), blocks - 1, tl.num_programs(0)"),
        ("        begin += programs\n", ""),  # a dtype's sums overwritten
        ("            total += x * x\n        else", "            total += x\n        else"),
    ],
    ids=["tail", "last_block", "dtype", "square"],
)
def test_planted_bug_is_seen(old, new, device):
    tensors = _tensors(device, (torch.float32, torch.bfloat16))
    tensors.append(torch.full((300,), 5.0, device=device))
    with planted_bug("global_norm", old, new), pytest.raises(AssertionError):
        _check(tensors, "triton")


@pytest.mark.parametrize(
    "old, new",
    [
        ('if not total < float("inf"):', "if total != total:"),  # no second reading
        ("scaled += extra + plain * tiny * tiny", "scaled += extra"),  # sums that overflow together
    ],
    ids=["scaled", "together"],
)
def test_planted_overflow_is_seen(old, new, device):
    large = [torch.full((1,), 1.5e19 * k, device=device) for k in (1.0, 0.9, 0.8)]
    large += [torch.full((2100,), 1e25, device=device)] if "total" in old else []
    with planted_bug("global_norm", old, new), pytest.raises(AssertionError):
        _check(large, "triton")


def test_read_outside_a_tensor_is_seen(device):
    bug = planted_bug("global_norm", "mask=start + col < size, other=0.0)", "mask=start + col < size + 4, other=0.0)")
    with bug, pytest.raises(AssertionError, match="read outside"):
        _check_guards(device)


def test_explain_and_errors():
    x = [torch.randn(3)]
    assert ops.explain(global_norm, x).backend == "torch"
    with pytest.raises(
        TypeError, match=r"global_norm: tensors\[1\] must be dense and real floating point, got torch.int64"
    ):
        global_norm([x[0], torch.ones(3).long()])
    with pytest.raises(TypeError, match=r"tensors\[0\] must be dense .* got torch.sparse_coo; give its to_dense"):
        global_norm([torch.eye(3).to_sparse()])
    with pytest.raises(TypeError, match="got torch.complex64"):
        global_norm([torch.ones(3, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        global_norm(x, backend="fast")
    with pytest.raises(ValueError, match="got float64"):
        global_norm([x[0].double()], backend="triton")
