"""csrc/global_norm.cu on the host body of the device layer, against the reference of the op."""

from ctypes import c_int32

import pytest
import torch

from fastlm.ops.global_norm import _reference
from tests.csrc.host_library import (
    DTYPES,
    Both,
    HostError,
    In,
    Out,
    library,
    needs_compiler,
    planted,
    same_in_all_orders,
)

pytestmark = needs_compiler
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
        "dtypes": In(torch.tensor([DTYPES[t.dtype] for t in tensors], dtype=torch.int32)),
        "owners": In(torch.tensor(owners, dtype=torch.int32)),
        "blocks": In(torch.tensor([b for n in counts for b in range(n)], dtype=torch.int32)),
        "partial": Out(torch.full((2 * programs,), float("nan"))),
        "counter": Both(torch.tensor([77], dtype=torch.int32)), "norm": Out(out),
        "count": len(owners), "programs": c_int32(programs), **changed,
    }, order=order, buffers={f"tensor {i}": In(t) for i, t in enumerate(tensors)})  # fmt: skip
    return (out,)


# Three dtypes, one block and more, a tail, one that does not begin at 16 bytes; seven blocks for one to seven programs.
def tensors():
    return [
        torch.randn(5000),
        torch.randn(BLOCK).bfloat16(),
        torch.randn(31).half(),
        torch.randn(2 * BLOCK + 1).bfloat16()[1:],
    ]


@pytest.mark.parametrize("programs", (1, 3, 7))
def test_against_the_reference(lib, programs):
    found = tensors()
    (value,) = same_in_all_orders(lambda order: norm(lib, found, programs, order))
    torch.testing.assert_close(value[0], _reference(found), rtol=2e-7, atol=0)


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
    with pytest.raises(HostError, match=r"out of bounds: read of bytes 62 to 63 of buffer 'tensor 2' \(62 bytes\)"):
        norm(lib, found, sizes=In(torch.tensor([5000, BLOCK, 32, 2 * BLOCK])))


def test_a_table_that_is_too_short_is_seen(lib):
    with pytest.raises(HostError, match="out of bounds: read of .* of buffer 'owners'"):
        norm(lib, [torch.randn(40)], count=2)


BUGS = {
    "the first block adds up": (
        "if (!is_last_block(Global<unsigned>(a.counter), grid_x())) return;",
        "if (block_x()) return;",
    ),
    "no second reading": ("if (!(sum < INFINITY)) {", "if (false) {"),
    "the tail is taken for a block": ("if (aligned && count >= kBlock) {", "if (aligned) {"),
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
