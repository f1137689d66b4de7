"""What adamw_, sgd_ and lion_ promise in every mode: skipped steps, memory, torch.compile, DTensors, errors."""

from types import SimpleNamespace

import pytest
import torch

from fastlm import ops
from fastlm.ops._op import REGISTRY
from fastlm.ops.optimizer_lists import Lists, _shard_number
from fastlm.ops.optimizer_step import Numbers
from fastlm.testing import bands_intact, guarded, planted_bug, poison_empty
from tests.ops.optimizer_cases import BACKENDS, MODES, OPTIONS, STATES, Mode, assert_alike, bits, call, clone, make, run

each_op = pytest.mark.parametrize("op", list(STATES))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(5, 7), (2049,)]
PLAIN, RICH = Mode(), Mode("remainders", "random", True)


def _equal(one, other):
    return [name for name in one for a, b in zip(one[name], other[name]) if not torch.equal(bits(a), bits(b))]


# --- skipped steps ------------------------------------------------------------------------------------------------


def _check_skip(op, backend, device, modes):
    for mode in modes:
        lists = make(op, mode, device, SHAPES)
        lists["grads"][0].fill_(float("nan"))
        before, zero = clone(lists), torch.zeros((), device=device)
        for found in (1.0, float("nan")):
            call(op, lists, mode, backend, 2, found_inf=torch.tensor(found, device=device))
            assert _equal(lists, before) == [], f"{mode}: written in a skipped step"
        lists["grads"][0].fill_(1.0)
        want = run(op, lists, mode, backend)
        scaled = [(g * 1).to(g.dtype) for g in lists["grads"]]
        call(op, lists | {"grads": scaled}, mode, backend, 2, found_inf=zero)
        assert _equal(lists | {"grads": []}, want | {"grads": []}) == [], f"{mode}: not the step of found_inf=None"


@each_op
@each_backend
def test_found_inf_skips_everything(op, backend, device):
    _check_skip(op, backend, device, MODES[:: 1 if backend != "triton" else 4])


def test_a_skip_decided_on_the_device(device):
    """As under torch.compile or on a GPU, where reading found_inf would wait: the plain forms must take it as a tensor."""
    form = REGISTRY["adamw_"].plain_forms["reference"]
    for mode in MODES:
        lists = make("adamw_", mode, device, SHAPES)
        before = clone(lists)
        seed = torch.tensor([1, 2], device=device) if mode.weights == "stochastic" or mode.states == "random" else None
        params, grads, m, v, *rest = _flat("adamw_", lists)
        group = Lists(params, grads, *rest[:3], (m, v), tuple(rest[3:]))
        for found in (1.0, 0.0):
            numbers = Numbers(0.1, 2.0, None, torch.tensor(found, device=device), seed, 0.5, [0, 1])
            form(*group, numbers, (0.9, 0.99, 1e-8, 0.1))
            assert bool(_equal(lists, before)) == (found == 0.0)


@pytest.mark.parametrize(
    "old, new, file",
    [
        ("size = tl.where(tl.load(found_ptr) != 0, 0, size)", "size = size", "multi_tensor"),  # found_inf ignored
        ("tl.load(found_ptr) != 0", "tl.load(found_ptr) > 0", "multi_tensor"),  # NaN taken for a good step
    ],
    ids=["ignored", "nan"],
)
def test_planted_skip_bug_is_seen(old, new, file, device):
    with planted_bug("adamw_", old, new, file=file), pytest.raises(AssertionError, match="written in a skipped step"):
        _check_skip("adamw_", "triton", device, [RICH])


# --- memory -------------------------------------------------------------------------------------------------------


def _guard(op, mode, device, **options):
    lists = make(op, mode, device, SHAPES)
    # Not NaN bands: an update reads what it writes, and NaN stays NaN.
    pairs = {name: [guarded(t, band=113.0) for t in tensors] for name, tensors in lists.items()}
    inner = {name: [t for t, _ in found] for name, found in pairs.items()}
    with poison_empty():
        call(op, inner, mode, "triton", 2, **options)
    for name, found in pairs.items():
        assert all(bands_intact(buffer) for _, buffer in found), f"{mode}: wrote outside a tensor of {name}"
    assert all(torch.equal(a, b) for a, b in zip(inner["grads"], lists["grads"])), "a gradient was changed"
    want = clone(lists)
    call(op, want, mode, "reference", 2, **options)
    assert_alike(inner, want, mode, op)


@each_op
def test_guard_bands(op, device):
    for mode in MODES[::3]:
        _guard(op, mode, device)
    skip = torch.ones((), device=device)
    _guard(op, RICH, device, found_inf=skip)


@pytest.mark.parametrize(
    "old",
    ["tl.store(remainder_ptr + col, (bits - (high << 16)).to(tl.int16), mask=mask)",
     "tl.store(average_ptr + col, average.to(average_ptr.dtype.element_ty), mask=mask)",
     "tl.store(s_ptr + col, code.to(s_ptr.dtype.element_ty), mask=mask)"],
    ids=["remainder", "average", "code"],
)  # fmt: skip
def test_one_list_written_in_a_skipped_step_is_seen(old, device):
    # Between guard bands: this bug writes up to 7 elements outside a tensor.
    new = old.replace("mask=mask", "mask=(col < 8) if mask is not None else None")
    with planted_bug("adamw_", old, new, file="optimizer_state"), pytest.raises(AssertionError):
        _guard("adamw_", RICH, device, found_inf=torch.ones((), device=device))


@each_backend
@pytest.mark.parametrize("mode", [Mode("fp32", "codes", True), RICH, Mode("stochastic", "fp32")], ids=str)
def test_the_order_is_that_of_the_parameters_memory(mode, backend, device):
    """Transposed lists are updated as the matrices they are views of, block by block, whatever the gradient's strides."""
    for op in STATES:
        lists = make(op, mode, device, [(40, 60)])
        want = run(op, lists, mode, backend)
        views = {
            name: [t.clone().t() if t.ndim == 2 else t.clone() for t in tensors] for name, tensors in lists.items()
        }
        views["grads"] = [g.contiguous() for g in views["grads"]]
        strides = [t.stride() for t in views["params"]]
        call(op, views, mode, backend, 2)
        assert [t.stride() for t in views["params"]] == strides
        flat = {name: [t.t() if t.ndim == 2 else t for t in tensors] for name, tensors in views.items()}
        assert _equal(flat | {"grads": []}, want | {"grads": []}) == []


@each_backend
def test_gaps_between_elements(backend, device):
    def sliced(t):
        wide = torch.zeros((t.shape[0], 2 * t.shape[1]), dtype=t.dtype, device=device)
        return wide[:, ::2].copy_(t)

    for op, mode in (("adamw_", RICH), ("sgd_", Mode("masters")), ("lion_", Mode("fp32", "codes", True))):
        lists = make(op, mode, device, [(40, 30)])
        want = run(op, lists, mode, backend)
        views = {name: [sliced(t) if t.ndim == 2 else t.clone() for t in tensors] for name, tensors in lists.items()}
        call(op, views, mode, backend, 2)
        assert _equal(views | {"grads": []}, want | {"grads": []}) == []


@each_backend
def test_mixed_lists(backend, device):
    """fp32 and bf16 parameters in one call, each with random bits of its own place in the list."""
    p = [
        torch.ones(300, device=device),
        torch.ones(300, dtype=torch.bfloat16, device=device),
        torch.ones(0, device=device),
    ]
    g = [torch.full_like(t, 0.3) for t in p]
    ops.sgd_(p, g, lr=0.01, step=1, seed=5, backend=backend)
    alone, empty = (
        torch.ones(300, dtype=torch.bfloat16, device=device),
        torch.ones(0, dtype=torch.bfloat16, device=device),
    )
    ops.sgd_([empty, alone], [empty, g[1]], lr=0.01, step=1, seed=5, backend=backend)
    assert torch.equal(p[1], alone) and (p[0] == 1 - 0.01 * torch.tensor(0.3)).all() and len(alone.unique()) == 2


# --- the dispatcher, torch.compile, DTensors -----------------------------------------------------------------------


def _flat(op, lists):
    states = STATES[op]
    names = [
        "params",
        "grads",
        *states,
        "masters",
        "remainders",
        "averages",
        *(f"{s.removesuffix('s')}_scales" for s in states),
    ]
    return [lists.get(name, []) for name in names]


@each_op
def test_dispatcher_knows_the_mutations(op, device):
    lists = make(op, RICH, device, SHAPES)
    numbers = (
        None,
        None,
        torch.tensor(0.5, device=device),
        torch.zeros((), device=device),
        torch.tensor([1, 2], device=device),
    )
    constants = tuple(OPTIONS[op][k] for k in OPTIONS[op] if k != "lr") + ((False,) if op == "sgd_" else ())
    args = (*_flat(op, lists), *numbers, [0, 1], 0.1, 3.0, 0.0, 0.5, *constants, "triton")
    torch.library.opcheck(REGISTRY[op].forward, args)


COMPILED = [("adamw_", Mode("masters", "fp32", True), "torch"), ("adamw_", RICH, "torch")]


@pytest.mark.parametrize("op, mode, backend", [*COMPILED, *((op, RICH, "triton") for op in STATES)], ids=str)
def test_compile(op, mode, backend, device):
    lists = make(op, mode, device, [(5, 7), (20,)])
    want, got = clone(lists), clone(lists)
    found, step = torch.zeros((), device=device), torch.tensor(3.0, device=device)
    seed = {"seed": torch.tensor([3, 4], device=device)} if mode.states == "random" else {}

    def update(lists, found, step, seed):
        options = OPTIONS[op] | {"average_decay": 0.75}
        getattr(ops, op)(**lists, step=step, found_inf=found, backend=backend, **seed, **options)

    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    compiled(got, found, step, seed)
    update(want, found, step, seed)
    assert_alike(got, want, mode, op)
    before = clone(got)
    compiled(got, found + 1, step, seed)
    assert _equal(got, before) == []


@each_backend
def test_dtensor(backend, device):
    from torch import distributed as dist
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    def shard(t):  # scales are the local shard's own; not distribute_tensor: gloo knows no int16
        own = t.dtype == torch.float32 and t.ndim == 1
        return t.clone() if own else DTensor.from_local(t.clone(), mesh, [Shard(0)])

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device, (1,))
        for op in STATES:
            lists = make(op, RICH, device, [(6, 4), (300, 8)])
            want = run(op, lists, RICH, backend)
            sharded = {name: [shard(t) for t in tensors] for name, tensors in lists.items()}
            call(op, sharded, RICH, backend, 2)
            got = {n: [t.to_local() if hasattr(t, "to_local") else t for t in ts] for n, ts in sharded.items()}
            assert _equal(got | {"grads": []}, want | {"grads": []}) == []
    finally:
        dist.destroy_process_group()


def test_shards_draw_numbers_of_their_own():
    def place(sizes, ranks, kinds):
        mesh = SimpleNamespace(size=lambda d: sizes[d], get_local_rank=lambda d: ranks[d])
        return SimpleNamespace(
            placements=[SimpleNamespace(is_shard=lambda k=k: k == "s") for k in kinds], device_mesh=mesh
        )

    assert _shard_number(torch.zeros(1)) == 0
    grid = [_shard_number(place((2, 3), (a, b), "ss")) for a in range(2) for b in range(3)]
    assert sorted(grid) == list(range(6))
    # Replicas must draw equal numbers.
    assert [_shard_number(place((2, 3), (a, b), "rs")) for a in range(2) for b in range(3)] == [0, 1, 2] * 2


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_errors(device):
    def fails(error, message, mode=PLAIN, op="adamw_", options=None, **changes):
        lists = make(op, mode, device, [(300,)]) | changes
        with pytest.raises(error, match=message):
            call(op, lists, mode, "reference", 1, **(options or {}))

    f32, codes = [torch.zeros(300, device=device)], Mode("fp32", "codes")
    fails(TypeError, r"masters are for params in bfloat16 or float16, got torch.float32 in params\[0\]", masters=f32)
    fails(TypeError, r"remainders are for params in bfloat16, got torch.float32", remainders=[f32[0].to(torch.int16)])
    fails(TypeError, r"masters\[0\] must be float32, got torch.bfloat16", Mode("bf16"), masters=[f32[0].bfloat16()])
    fails(ValueError, "give masters or remainders, not both", Mode("masters"), remainders=[f32[0].to(torch.int16)])
    fails(ValueError, "average_decay must be in \\[0, 1\\] beside averages, got None", averages=f32)
    fails(ValueError, "average_decay must be", Mode(averages=True), options={"average_decay": 1.5})
    fails(
        TypeError, r"averages\[0\] must be float32, got torch.float64", Mode(averages=True), averages=[f32[0].double()]
    )
    fails(
        ValueError, r"exp_avg_scales\[0\] must be contiguous float32 \[2\], one for each 256", codes, exp_avg_scales=f32
    )
    fails(TypeError, r"exp_avg_sqs\[0\] must be uint8, got torch.int8", codes, exp_avg_sqs=[f32[0].to(torch.int8)])
    fails(TypeError, r"exp_avgs\[0\] .*8-bit codes come with exp_avg_scales", exp_avgs=[f32[0].to(torch.int8)])
    fails(
        TypeError, "float16, and only bfloat16 is rounded stochastically", params=[f32[0].half()], options={"seed": 1}
    )
    fails(ValueError, "seed must be an int or an int64 tensor", options={"seed": torch.zeros(3, device=device)})
    fails(TypeError, "found_inf must be a tensor of one element", options={"found_inf": 1.0})
    fails(TypeError, "found_inf must be", options={"found_inf": torch.zeros(2, device=device)})
    fails(ValueError, "masters must be equally long, got", Mode("masters"), masters=[])
    for op in STATES:
        lists = make(op, PLAIN, device, SHAPES)
        for i in (0, 1):
            sparse = [g.to_sparse() if i == k else g for k, g in enumerate(lists["grads"])]
            message = rf"{op}: grads\[{i}\] must be dense, got torch.sparse_coo; give grad.to_dense\(\)"
            fails(TypeError, message, PLAIN, op, **lists | {"grads": sparse})
    fails(ValueError, r"lion_: exp_avg_scales\[0\]", codes, "lion_", exp_avg_scales=f32)
    fails(ValueError, r"sgd_: momentum_buffer_scales\[0\]", codes, "sgd_", momentum_buffer_scales=f32)


@pytest.mark.gpu
def test_cuda_graph():
    """Numbers and the skip are read at every replay."""
    mode, device = RICH, "cuda"
    lists = make("adamw_", mode, device, SHAPES)
    numbers = {"step": torch.tensor(2.0, device=device), "found_inf": torch.zeros((), device=device)}
    seed = torch.tensor([11, 0], device=device)
    want = clone(lists)
    options = OPTIONS["adamw_"] | {"average_decay": 0.75, "backend": "triton"}
    ops.adamw_(**clone(lists), **numbers, seed=seed, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.adamw_(**lists, **numbers, seed=seed, **options)
    for step, found in ((2, 0), (3, 1), (4, 0)):
        numbers["step"].fill_(step), numbers["found_inf"].fill_(found)
        graph.replay()
        if not found:
            ops.adamw_(**want, step=step, seed=seed, **options)
        assert _equal(lists, want) == []
