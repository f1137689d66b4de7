"""csrc/global_norm.cu on the host body of the device layer, alone and as the op's backend, against the reference of the op."""

import math
from ctypes import c_int32

import pytest
import torch

from fastlm.ops import _cuda
from fastlm.ops.global_norm import _PROGRAMS_PER_SM, OP, _reference, global_norm
from fastlm.testing import assert_accurate, bands_intact, guarded, poison_empty
from tests.csrc.host_library import (
    DTYPES,
    ROOT,
    Both,
    HostError,
    In,
    Out,
    library,
    needs_compiler,
    planted,
    same_in_all_orders,
)
from tests.ops.test_global_norm import _check, _exact, _tensors

pytestmark = needs_compiler
as_backend = pytest.mark.usefixtures("cuda_on_the_host")
BLOCK = 2048


@pytest.fixture(scope="module")
def lib():
    return library("csrc/global_norm.cu")


def norm(lib, tensors, programs=3, order="forward", **changed):
    """The norm, by one launch; `changed` replaces members of the launcher's struct."""
    counts = [-(-t.numel() // BLOCK) for t in tensors]
    owners = [i for i, n in enumerate(counts) for _ in range(n)]
    programs = min(programs, len(owners))
    out = torch.full((1,), float("nan"))
    lib.run("fastlm_global_norm_fwd", {
        "addresses": In(torch.tensor([t.data_ptr() for t in tensors])), "sizes": In(torch.tensor([t.numel() for t in tensors])),
        "owners": In(torch.tensor(owners, dtype=torch.int32)),
        "blocks": In(torch.tensor([b for n in counts for b in range(n)], dtype=torch.int32)), "count": len(owners),
        "dtypes": In(torch.tensor([DTYPES[t.dtype] for t in tensors], dtype=torch.int32)),
        "partial": Out(torch.full((2 * programs,), float("nan"))),
        "counter": Both(torch.tensor([77], dtype=torch.int32)), "norm": Out(out), "programs": c_int32(programs), **changed,
    }, order=order, buffers={f"tensor {i}": In(t) for i, t in enumerate(tensors)})  # fmt: skip
    return (out,)


# Three dtypes, one block and more, a tail, one that does not begin at 16 bytes; thirteen blocks for one to thirteen programs.
def tensors():
    return [
        torch.randn(6 * BLOCK + 5),  # four vectors of a thread at a time, and what is left
        torch.randn(BLOCK).bfloat16(),
        torch.randn(31).half(),
        torch.randn(2 * BLOCK + 1).bfloat16()[1:],
        torch.randn(5)[3:],
        torch.randn(9)[1:],
    ]


@pytest.mark.parametrize("programs", (1, 3, 13))
def test_against_the_reference(lib, programs):
    found = tensors()
    (value,) = same_in_all_orders(lambda order: norm(lib, found, programs, order))
    torch.testing.assert_close(value[0], _reference(found), rtol=2e-7, atol=0)


def test_every_element_counts_once_wherever_a_tensor_begins(lib):
    for dtype in DTYPES:
        for begin in range(9):
            for size in (1, 2, 7, 8, 9, 2049):
                whole = torch.full((begin + size + 8,), math.nan, dtype=dtype)
                whole[begin : begin + size] = 1
                (value,) = norm(lib, [whole[begin : begin + size]])
                torch.testing.assert_close(value[0], torch.tensor(math.sqrt(size)), rtol=2e-7, atol=0)


def test_squares_that_overflow(lib):
    large = [torch.full((3000,), 1e25), torch.ones(40)]
    torch.testing.assert_close(norm(lib, large)[0][0], _reference(large), rtol=5e-7, atol=0)
    together = [torch.full((BLOCK,), 2.5e17) for _ in range(3)]  # each share fits
    torch.testing.assert_close(norm(lib, together)[0][0], _reference(together), rtol=5e-7, atol=0)


@pytest.mark.parametrize("value", (float("inf"), float("-inf"), float("nan")))
def test_what_is_not_finite(lib, value):
    found = tensors()
    found[2][30] = value
    torch.testing.assert_close(norm(lib, found)[0][0], _reference(found), equal_nan=True)


def test_a_size_that_is_wrong_is_seen(lib):
    found = tensors()
    with pytest.raises(HostError, match=r"out of bounds: read of bytes 48 to 63 of buffer 'tensor 2' \(62 bytes\)"):
        norm(lib, found, sizes=In(torch.tensor([6 * BLOCK + 5, BLOCK, 32, 2 * BLOCK, 2, 8])))


def test_a_table_that_is_too_short_is_seen(lib):
    with pytest.raises(HostError, match="out of bounds: read of .* of buffer 'owners'"):
        norm(lib, [torch.randn(40)], count=2)


BUGS = {
    "the first block adds up": (
        "if (!is_last_block(Global<unsigned>(a.counter), grid_x())) return;",
        "if (block_x()) return;",
    ),
    "no second reading": ("if (!(sum < INFINITY)) {", "if (false) {"),
    "the tail is left out": ("if (thread_id() < count - tail)", "if (false)"),
    "the head is left out": ("if (thread_id() < head)", "if (false)"),
    "the last vectors are left out": ("for (; i < tail; i += kStep)", "for (; false;)"),
    "a share has one block less": ("whole + (block_x() < rest)", "whole"),
    "a run goes on in the next tensor": ("minimum(end - i, ceil_div", "maximum(end - i, ceil_div"),
}


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    return planted("csrc/global_norm.cu", BUGS, tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, with_bug):
    lib = with_bug[name]
    with pytest.raises((AssertionError, HostError)):
        test_against_the_reference(lib, 3)
        test_squares_that_overflow(lib)


# --- the op's backend ---------------------------------------------------------------------------------------------


@as_backend
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float16,), tuple(DTYPES)], ids=str)
def test_the_op_is_accurate(dtypes):
    draws = [_tensors("cpu", dtypes) for _ in range(3)]
    got = [global_norm(t, backend="cuda") for t in draws]
    assert all(g.dtype == torch.float32 and g.shape == () for g in got)
    plain = [torch.nn.utils.get_total_norm([x.float() for x in t]) for t in draws]
    assert_accurate(*map(torch.stack, (got, [_exact(t) for t in draws], plain)), f"global_norm {dtypes}")


@as_backend
def test_the_op_takes_tensors_wherever_they_lie_and_none():
    base, wide = torch.randn(40, 60), torch.full((40, 120), math.nan)
    views = [base.t(), wide[:, ::2].copy_(base), base[:1].expand(40, 60), base[3:, 5:], base.bfloat16().t()]
    _check(views, "cuda")
    assert global_norm([], backend="cuda").item() == 0
    empty = global_norm([torch.empty(0, 3)], backend="cuda")
    assert (empty.item(), empty.dtype, empty.shape) == (0, torch.float32, ())


@as_backend
def test_the_op_reads_only_its_tensors_and_repeats():
    pairs = [guarded(t) for t in _tensors("cpu", (torch.float32, torch.bfloat16))]
    found = [t for t, _ in pairs]
    before = [t.clone() for t in found]
    with poison_empty():
        one, two = (global_norm(found, backend="cuda") for _ in range(2))
    assert one.isfinite() and torch.equal(one, two)
    torch.testing.assert_close(one.double(), _exact(found), rtol=1e-6, atol=0)
    assert all(bands_intact(buffer) for _, buffer in pairs)
    assert all(torch.equal(a, b) for a, b in zip(found, before))


@as_backend
def test_offsets_have_64_bits():
    """A table by hand says that a tensor is the end of one of 2^32 elements and more, which begins far outside of memory."""
    t, far, found = torch.randn(3000), 1 << 32, []
    for first in (0, far // BLOCK):
        address = torch.tensor([t.data_ptr() - first * BLOCK * 4])
        sizes, blocks = torch.tensor([first * BLOCK + 3000]), torch.tensor([first, first + 1], dtype=torch.int32)
        zeros, norm = torch.zeros(2, dtype=torch.int32), torch.empty(())
        torch.ops.fastlm_host.global_norm(address, sizes, zeros, blocks, zeros[:1], torch.empty(3), norm)
        found.append(norm)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].double(), _exact([t]), rtol=1e-6, atol=0)


def test_as_many_programs_as_a_multiprocessor_runs_at_once():
    source = (ROOT / "csrc" / "global_norm.cu").read_text(encoding="utf-8")
    assert f"kResident = {_PROGRAMS_PER_SM};" in source


@as_backend
def test_the_op_in_the_dispatcher_and_compiled():
    found = [t for t in _tensors("cpu", tuple(DTYPES)) if t.numel()]
    torch.library.opcheck(OP.forward, (found, "cuda"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: global_norm(t, backend="cuda") * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(found), 2 * global_norm(found, backend="cuda"))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(global_norm(found, backend="cuda"), compiled(found) / 2)


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        global_norm([torch.ones(3).double(), torch.ones(3)], backend="cuda")
    assert "not measured" in OP._slower("cuda") and OP._slower("triton") is None


@as_backend
def test_wrong_calls_are_refused():
    call, where = torch.ops.fastlm_host.global_norm, [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    where += [torch.zeros(1, dtype=torch.int32) for _ in range(3)]
    for changed, words in (
        ({5: torch.empty(1)}, "workspace must have 2 n . 1 elements, n from 1 to 1"),
        ({5: torch.empty(5)}, "workspace must have 2 n . 1 elements, n from 1 to 1"),
        ({0: torch.zeros(2, dtype=torch.int64)}, "address must be a contiguous tensor of 1 elements"),
        ({4: torch.zeros(1)}, "dtype must be a contiguous tensor of 1 elements of the type"),
        ({3: torch.zeros(1, dtype=torch.int32, device="meta")}, "block must be a CPU tensor"),
    ):
        args = dict(enumerate([*where, torch.empty(3), torch.empty(())])) | changed
        with pytest.raises(RuntimeError, match=words):
            call(*args.values())


@pytest.mark.gpu
def test_on_a_gpu():
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    shapes = [(1 << 24,), (70, 70), (3,), (1 << 20,), ()]
    for dtypes in ((torch.float32,), (torch.bfloat16,), tuple(DTYPES)):
        found = _tensors("cuda", dtypes, shapes)
        one, two = (global_norm(found, backend="cuda") for _ in range(2))
        assert torch.equal(one, two)
        torch.testing.assert_close(one.double(), _exact(found), rtol=1e-6, atol=0)
