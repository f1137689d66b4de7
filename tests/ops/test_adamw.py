import math

import pytest
import torch

from fastlm import ops
from fastlm.kernels.moment_bound import in_two
from fastlm.ops.adamw import OP
from fastlm.testing import assert_accurate, bands_intact, guarded, planted_bug, poison_empty

BACKENDS = ("reference", "torch", "triton")
SHAPES = [(5, 7), (2048,), (2, 1500), (), (0, 3), (1,)]  # below, exactly and above a block of the kernel
OPTIONS = {"lr": 1e-2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.3}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _lists(device, dtype=torch.float32, state_dtype=None, grad_dtype=None, shapes=SHAPES):
    """params, grads, exp_avgs, exp_avg_sqs of a run that has made some steps."""
    state_dtype, grad_dtype = state_dtype or dtype, grad_dtype or dtype
    make = lambda d, scale: [(scale * torch.randn(s, dtype=torch.float64)).to(d).to(device) for s in shapes]  # noqa: E731
    return make(dtype, 1.0), make(grad_dtype, 1.0), make(state_dtype, 0.3), [t.abs() for t in make(state_dtype, 0.3)]


def _steps(lists, backend, steps=3, **options):
    """The lists after some steps with other gradients each; the given ones are left alone."""
    params, grads, m, v = ([t.clone() for t in tensors] for tensors in lists)
    for step in range(1, steps + 1):
        scaled = [(g * (1 + step % 2)).to(g.dtype) for g in grads]
        assert ops.adamw_(params, scaled, m, v, step=step, backend=backend, **(OPTIONS | options)) is None
    return params, m, v


def _by_torch(lists, steps=3, grad_scale=1.0):
    params, grads, m, v = ([t.clone() for t in tensors] for tensors in lists)
    options = {"lr": OPTIONS["lr"], "betas": (OPTIONS["beta1"], OPTIONS["beta2"]), "eps": OPTIONS["eps"]}
    optimizer = torch.optim.AdamW(params, weight_decay=OPTIONS["weight_decay"], foreach=False, **options)
    for p, a, b in zip(params, m, v):
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": a, "exp_avg_sq": b}
    for step in range(1, steps + 1):
        for p, g in zip(params, grads):
            p.grad = (g * (1 + step % 2) * grad_scale).to(p.dtype)
        optimizer.step()
    return params, m, v


def _flat(lists):
    return [t for tensors in lists for t in tensors]


def _check_fp32(backend, device, **options):
    lists = _lists(device)
    got, want = _steps(lists, backend, **options), _by_torch(lists, grad_scale=options.get("grad_scale", 1.0))
    for a, b in zip(_flat(got), _flat(want)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("grad_scale", [None, 1.0, 0.5])
def test_follows_torch_in_fp32(backend, grad_scale, device):
    _check_fp32(backend, device, **({} if grad_scale is None else {"grad_scale": grad_scale}))


@each_backend
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16),
     (torch.float32, torch.float32, torch.bfloat16), (torch.float16, torch.float32, torch.float32)],
    ids=["fp32", "bf16", "bf16_with_fp32_state", "fp32_with_bf16_grads", "fp16_with_fp32_state"],
)  # fmt: skip
def test_accuracy(backend, dtypes, device):
    dtype, state_dtype, grad_dtype = dtypes
    lists = _lists(device, dtype, state_dtype, grad_dtype)
    exact = _steps([[t.double() for t in tensors] for tensors in lists], "reference", grad_scale=0.7)
    # Plain torch has no mixed dtypes; it makes its fp32 step and rounds.
    steps_in = dtype if state_dtype == grad_dtype == dtype else torch.float32
    plain = _by_torch([[t.to(steps_in) for t in tensors] for tensors in lists], grad_scale=0.7)
    plain = [[t.to(d) for t in tensors] for tensors, d in zip(plain, (dtype, state_dtype, state_dtype))]
    if dtype != state_dtype:  # stored in 16 bits after every step, as ours is
        plain[0] = _steps(lists, "reference", grad_scale=0.7)[0]
    got = _steps(lists, backend, grad_scale=0.7)
    for i, (g, e, p) in enumerate(zip(_flat(got), _flat(exact), _flat(plain))):
        assert_accurate(g, e, p, f"adamw_ {backend} {dtypes}: tensor {i}")


def test_fp64_reference_follows_torch():
    lists = _lists("cpu", torch.float64)
    for backend in ("reference", "torch"):
        for a, b in zip(_flat(_steps(lists, backend, 9)), _flat(_by_torch(lists, 9))):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_early_bias_correction_is_exact(device):
    # In fp32, 1 - 0.999 keeps four digits and 0.999 ** 1000 drifts.
    p = [torch.zeros(3, device=device)]
    for step in (1, 2, 700, 100_000):
        lists = [p, [torch.ones(3, device=device)], [torch.zeros(3, device=device)], [torch.zeros(3, device=device)]]
        want, got = ([[t.double() for t in tensors] for tensors in lists], [[t.clone() for t in ts] for ts in lists])
        ops.adamw_(*want, lr=1.0, step=step, backend="reference")
        ops.adamw_(*got, lr=1.0, step=step, backend="triton")
        torch.testing.assert_close(got[0][0].double(), want[0][0], rtol=1e-6, atol=0)


def _run(grads, backend, dtype=torch.float32, device="cpu", **options):
    """p, m and v, from 1, 0 and 0, after a step with each of the gradients."""
    p, m, v = ([torch.full((len(grads[0]),), x, dtype=dtype, device=device)] for x in (1.0, 0.0, 0.0))
    for step, g in enumerate(grads, 1):
        g = [torch.tensor(g, dtype=dtype, device=device)]
        ops.adamw_(p, g, m, v, step=step, backend=backend, **({"lr": 1e-3, "weight_decay": 0.0} | options))
    return p[0], m[0], v[0]


@each_backend
@pytest.mark.parametrize("dtype, large", [(torch.float16, 1e4), (torch.float32, 1e21)], ids=("fp16", "fp32"))
def test_an_infinite_second_moment_stops_its_weight_alone(backend, dtype, large, device):
    p, _, v = _run([[1.0, large, 1.0], [1.0] * 3, [1.0] * 3], backend, dtype, device)
    assert v.isinf().tolist() == [False, True, False]
    torch.testing.assert_close(p.double().cpu(), torch.tensor([0.997, 1.0, 0.997]).double(), rtol=0, atol=1.1e-3)
    assert p[0] == p[2] < p[1]


@pytest.mark.parametrize("backend", ("reference", "triton"))  # torch's own step makes NaN of an infinite m
def test_an_infinite_first_moment_stays_what_it_is(backend, device):
    p, m, v = (
        [torch.ones(2, device=device)],
        [torch.tensor([math.inf, 0.5], device=device)],
        [torch.ones(2, device=device)],
    )
    ops.adamw_(p, [torch.ones(2, device=device)], m, v, lr=0.1, step=2, backend=backend)
    assert m[0][0] == math.inf and p[0][0] == -math.inf and p[0][1].isfinite()


@each_backend
@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.0, 0.0), (0.0, 0.999), (1e-6, 1e-9), (0.3, 0.4)], ids=str)
def test_small_betas_forget(backend, betas, device):
    """A large gradient leaves no rounding of its own in the means of the small ones after it."""
    grads, options = [[100.0], [1e-3], [2e-3]], {"beta1": betas[0], "beta2": betas[1]}
    got, want = _run(grads, backend, device=device, **options), _run(grads, "reference", torch.float64, **options)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double().cpu(), b, rtol=2e-6, atol=0)


def test_moments_settle_at_what_gradients_are(device, backend="triton"):
    """In the kernels. With beta rounded to fp32, as torch has it, v loses half a unit in its last place in every step."""
    g = torch.linspace(1.8, 1.99, 64, device=device).sqrt()
    p, m, v = torch.zeros(64, device=device), g.clone(), g.square()
    for step in range(1, 201):
        ops.adamw_([p], [g], [m], [v], step=step, lr=0.0, beta1=0.99, beta2=0.999, backend=backend)
    torch.testing.assert_close(v, g.square(), rtol=1e-6, atol=0)
    torch.testing.assert_close(m, g, rtol=1e-6, atol=0)


def test_beta_in_two_parts():
    for beta in (
        0.999,
        0.9,
        0.5,
        0.25,
        0.95,
        0.1,
        1e-3,
        1 - 1e-9,
        math.nextafter(1.0, 0.0),
        math.nextafter(0.5, 0.0),
        1e-30,
    ):
        high, low = in_two(beta)
        assert high + low == beta and torch.tensor(high).double() == high and 0 < low <= 2.0**-23 * beta
    assert in_two(0.0) == (0.0, 0.0)


@each_backend
@pytest.mark.parametrize("beta2", (0.999, 0.99999))
def test_a_step_tensor_is_as_exact_as_a_number(backend, beta2, device):
    """1 - beta2^step where fp32 would cancel; also as a graph has it, and where a skip is decided on the device."""
    zero, one = (torch.full((3,), x, device=device) for x in (0.0, 1.0))

    def moved(step, found_inf=None):
        p = [one.clone()]
        ops.adamw_(p, [one], [zero.clone()], [zero.clone()], lr=0.5, beta2=beta2, weight_decay=0.0, step=step,
                   found_inf=found_inf, backend=backend)  # fmt: skip
        return p[0]

    torch._dynamo.reset()
    compiled = torch.compile(moved, fullgraph=True, backend="aot_eager")
    for step in (torch.tensor(1.0, device=device), torch.tensor(1, device=device)):
        found = [moved(step), moved(step, torch.zeros((), device=device)), compiled(step), compiled(step, zero.sum())]
        for p in found:  # step 1 moves by lr, whatever the gradient
            torch.testing.assert_close(p, torch.full_like(p, 0.5), rtol=1e-6, atol=0)


@each_backend
def test_numbers_may_be_tensors(backend, device):
    lists, numbers = _lists(device), {"lr": 0.02, "step": 3, "grad_scale": 0.25}
    want, got = ([[t.clone() for t in tensors] for tensors in lists] for _ in range(2))
    ops.adamw_(*want, **numbers, backend=backend)
    ops.adamw_(*got, **{k: torch.tensor(n, device=device) for k, n in numbers.items()}, backend=backend)
    for a, b in zip(_flat(got), _flat(want)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # As the kernel takes them from the device, which on the CPU happens under torch.compile only.
    if backend == "triton":
        got = [[t.clone() for t in tensors] for tensors in lists]
        tensors = [torch.tensor(numbers[k], device=device) for k in ("lr", "step", "grad_scale")]
        live = [[t for t in ts if t.numel()] for ts in got]
        OP.forward(*live, *[[]] * 5, *tensors, None, None, [], 0.0, 0.0, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.01, backend)
        for a, b in zip(_flat(got), _flat(want)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def _check_guards(device):
    lists = _lists(device)
    # Not NaN bands: an update reads what it writes, and NaN stays NaN.
    pairs = [[guarded(t, band=113.0) for t in tensors] for tensors in lists]
    inner = [[t for t, _ in tensors] for tensors in pairs]
    with poison_empty():
        ops.adamw_(*inner, step=1, backend="triton", **OPTIONS)
    assert all(bands_intact(buffer) for tensors in pairs for _, buffer in tensors), "wrote outside a tensor"
    before = _flat(lists)[len(SHAPES) : 2 * len(SHAPES)]
    for a, b in zip(inner[1], before):
        assert torch.equal(a, b), "a gradient was changed"
    scaled = [[t.clone() for t in tensors] for tensors in lists]
    ops.adamw_(*scaled, step=1, backend="reference", **OPTIONS)
    for a, b in zip(_flat([inner[0], *inner[2:]]), _flat([scaled[0], *scaled[2:]])):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_guard_bands(device):
    _check_guards(device)


@each_backend
def test_gradients_are_only_read_and_runs_repeat(backend, device):
    lists = _lists(device)
    before = [g.clone() for g in lists[1]]
    for scale in (None, 0.5):
        one, two = (_steps(lists, backend, grad_scale=scale) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(_flat(one), _flat(two)))
    copies = [[t.clone() for t in tensors] for tensors in lists]
    ops.adamw_(copies[0], lists[1], *copies[2:], lr=0.1, step=1, grad_scale=0.5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(lists[1], before))


@each_backend
def test_strides(backend, device):
    def transposed(t):
        return t.t().contiguous().t()

    def sliced(t):
        wide = torch.full((t.shape[0], 2 * t.shape[1]), float("nan"), device=device)
        return wide[:, ::2].copy_(t)

    lists = _lists(device, shapes=[(40, 60)] * 4)
    lists[1][3] = torch.randn(1, 60, device=device).expand(40, 60)
    want = _steps(lists, "reference", 1)
    views = [
        [f(t) for f, t in zip((transposed, sliced, transposed, lambda t: t.clone()), tensors)] for tensors in lists
    ]
    views[1][2] = lists[1][2].contiguous()  # other strides than its parameter
    views[1][3] = lists[1][3]
    views[1] = [2 * g if g.stride()[0] else (2 * g[:1]).expand(40, 60) for g in views[1]]  # as _steps does
    strides = [t.stride() for t in _flat(views)]
    ops.adamw_(*views, step=1, backend=backend, **OPTIONS)
    assert [t.stride() for t in _flat(views)] == strides
    for a, b in zip(_flat([views[0], *views[2:]]), _flat(want)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_backend
def test_nothing_to_do(backend, device):
    ops.adamw_([], [], [], [], lr=0.1, step=1, backend=backend)
    empty = [torch.empty(0, 4, device=device)]
    ops.adamw_(empty, empty, empty, empty, lr=0.1, step=1, backend=backend)


@each_backend
def test_leaves_that_require_grad(backend, device):
    p = torch.nn.Parameter(torch.ones(4, device=device))
    loss = (p * p).sum()  # saves p for the backward
    lists = [p], [torch.ones(4, device=device)], [torch.zeros(4, device=device)], [torch.zeros(4, device=device)]
    ops.adamw_(*lists, lr=0.1, step=1, backend=backend)
    assert p.requires_grad and p.grad_fn is None and (p < 1).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dispatcher(device):
    lists = [[t for t in tensors if t.numel()] for tensors in _lists(device)]
    scale = torch.tensor(0.5, device=device)
    numbers = (None, None, scale, None, None, [], 0.1, 3.0, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.01)
    torch.library.opcheck(OP.forward, (*lists, *[[]] * 5, *numbers, "triton"))


@each_backend
def test_compile(backend, device):
    lists = _lists(device, shapes=[(5, 7), (20,)])
    want, got = ([[t.clone() for t in tensors] for tensors in lists] for _ in range(2))
    scale, step = torch.tensor(0.5, device=device), torch.tensor(3.0, device=device)

    def update(p, g, m, v, scale, step):
        ops.adamw_(p, g, m, v, lr=0.1, step=step, grad_scale=scale, backend=backend)

    torch._dynamo.reset()
    torch.compile(update, fullgraph=True, backend="aot_eager")(*got, scale, step)
    update(*want, scale, step)
    for a, b in zip(_flat(got), _flat(want)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_backend
def test_dtensor(backend, device):
    from torch import distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    lists = _lists(device, shapes=[(6, 4), (3, 8)])
    want = _steps(lists, backend, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device, (1,))
        sharded = [[distribute_tensor(t, mesh, [Shard(0)]) for t in tensors] for tensors in lists]
        sharded[1] = [distribute_tensor(2 * t, mesh, [Shard(0)]) for t in lists[1]]
        ops.adamw_(*sharded, step=1, backend=backend, **OPTIONS)
        for a, b in zip(_flat([sharded[0], *sharded[2:]]), _flat(want)):
            assert torch.equal(a.full_tensor(), b)
        sharded[1] = [distribute_tensor(t, mesh, [Replicate()]) for t in lists[1]]
        with pytest.raises(ValueError, match=r"adamw_: grads\[0\] must be sharded like its parameter"):
            ops.adamw_(*sharded, step=1, lr=0.1, backend=backend)
    finally:
        dist.destroy_process_group()


def test_tables_are_kept(device):
    from fastlm.kernels import tensor_table as kernels

    lists = _lists(device)
    kernels._addresses.cache_clear()
    for step in (1, 2, 3):
        ops.adamw_(*lists, lr=0.1, step=step, backend="triton")
    assert kernels._addresses.cache_info().misses == 1


@pytest.mark.parametrize(
    "old, new",
    [
        ("rate = lr / _one_minus_power(log_beta1, step)", "rate = lr"),  # a bias correction forgotten
        ("root = 1.0 / tl.sqrt(_one_minus_power(log_beta2, step))", "root = 1.0"),
        ("    p -= decay * p\n", ""),
        ("m = mean(m, high1", "g += decay * p\n    m = mean(m, high1"),  # coupled decay
        ("start + tl.arange(0, BLOCK) < size,", "start + tl.arange(0, BLOCK) < size - 1,"),  # the tail not written
        ("// BLOCK\n    owner", "// BLOCK - (size > BLOCK).long()\n    owner"),  # the last block of a tensor left out
        (".to(tl.float32) * scale", ".to(tl.float32)"),  # grad_scale forgotten
    ],
    ids=["bias1", "bias2", "no_decay", "coupled", "tail", "block", "scale"],
)
def test_planted_bug_is_seen(old, new, device):
    file = "tensor_table" if "owner" in old else None
    with planted_bug("adamw_", old, new, file=file), pytest.raises(AssertionError):
        _check_fp32("triton", device, grad_scale=0.5)


def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug("adamw_", "start + tl.arange(0, BLOCK) < size,", "start + tl.arange(0, BLOCK) < size + 8,")
    with bug, pytest.raises(AssertionError, match="wrote outside"):
        _check_guards(device)


def test_explain_and_errors():
    p, g = [torch.randn(3, 4)], [torch.randn(3, 4)]
    assert ops.explain(ops.adamw_, p, g, g, g, lr=0.1, step=1).backend == "torch"
    fails = lambda message, *lists, error=ValueError, **kw: _fails(error, message, lists, **kw)  # noqa: E731
    fails("must be equally long", p, g, g, [])
    fails(r"exp_avgs\[0\] must have the shape of its parameter, \[3, 4\]", p, g, [g[0][:2]], g)
    fails("step counts from 1", p, g, g, g, step=0)
    fails(r"beta2 must be in \[0, 1\)", p, g, g, g, beta2=1.0)
    fails("lr must be a number or a tensor of one element", p, g, g, g, lr=torch.ones(2))
    fails("backend must be 'auto' or one of", p, g, g, g, backend="fast")
    fails(r"params\[0\] must be floating point", [p[0].long()], g, g, g, error=TypeError)
    fails(r"exp_avgs\[0\] must be float32, bfloat16 or its parameter's", p, g, [g[0].half()], g, error=TypeError)
    fails("all tensors must be on cpu", p, [g[0].to("meta")], g, g)
    fails("got float64", [p[0].double()], g, g, g, backend="triton")


def _fails(error, message, lists, **kwargs):
    with pytest.raises(error, match=message):
        ops.adamw_(*lists, **({"lr": 0.1, "step": 1} | kwargs))
