"""csrc/device/wgmma.h on the host body: every kind of operand against torch, and mistakes that hardware does not report."""

import re

import pytest
import torch

from tests.csrc.host_library import ASYNC_ORDERS, ROOT, Both, HostError, In, Out, library, needs_compiler, needs_nvcc
from tests.csrc.nvcc import compiled, instructions

pytestmark = needs_compiler
SOURCE = "tests/csrc/wgmma_cases.cu"
ORDERS = [name for name, _, _ in ASYNC_ORDERS if "copies early" in name]  # there are no copies here
CASES = re.findall(r"^CASE\((\w+), (\w+), (\d+)", (ROOT / SOURCE).read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def lib():
    return library(SOURCE)


@pytest.fixture(scope="module")
def with_mistakes():
    return library("tests/csrc/wgmma_mistakes.cu")


@pytest.mark.parametrize("accumulate", (0, 1))
@pytest.mark.parametrize("name, dtype, n", CASES, ids=[name for name, _, _ in CASES])
def test_product(lib, name, dtype, n, accumulate):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    a, b, c = torch.randn(64, 128).to(dtype), torch.randn(int(n), 128).to(dtype), torch.randn(64, int(n))
    want = a.double() @ b.double().T + accumulate * c
    for order in (ORDERS[0], ORDERS[-1]):
        d = c.clone() if accumulate else torch.full_like(c, float("nan"))
        lib.run(name, In(a), In(b), Both(d), accumulate, order=order)
        torch.testing.assert_close(d.double(), want, rtol=1e-5, atol=1e-4)


def run(lib, name, order):
    """The relative error of both products."""
    torch.manual_seed(0)
    a, b, out = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.empty(2, 32, 128)
    lib.run(name, In(a), In(b), Out(out), order=order)
    t, i = torch.arange(128)[None, :], torch.arange(32)[:, None]
    row, column = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (t % 4) + i % 2
    d, e = (torch.zeros(64, 64).index_put((row, column), x) for x in out)
    want_d = a.double() @ b.double().T
    want_e = want_d.bfloat16().double() @ b.double()
    return max((found - want).abs().max() / want.abs().max() for found, want in ((d, want_d), (e, want_e)))


@pytest.mark.parametrize("order", ORDERS)
def test_products_of_registers_that_a_product_gave(with_mistakes, order):
    assert run(with_mistakes, "none", order) < 5e-3  # a sum may be rounded to the neighbouring bf16


UNKNOWN = "this thread does not know that all four warps have waited for it"
# name of the case -> what the report says; None: the numbers are wrong
MISTAKES = {
    "no_register_fence": "no wgmma_fence names the accumulator before its first product",
    "written_after_fence": "element 3 of the accumulator was written after the last wgmma_fence",
    "no_wait": "the block has ended and no wgmma_wait names the registers of this product",
    "wait_too_short": r"wgmma_wait<1> names registers that the product at .*:\d+ still uses: it is in a later group",
    "no_commit": r"wgmma_wait<0> names registers that the product at .*:\d+ still uses: it is in no committed group",
    "no_proxy_fence": "asynchronous read of bytes .* of shared memory 'dynamic_shared' .*no fence_async_shared lies between",
    "no_barrier": r"race: read of bytes .*which thread \d+ wrote at .*no barrier lies between|which nobody wrote",
    "unwritten": "read of bytes .* of shared memory 'dynamic_shared' .*, which nobody wrote",
    "wrong_swizzle": None,
    "wrong_major": "operand B begins at byte .* of .dynamic_shared. and crosses the border of a panel, 128 bytes wide",
    "overwritten": f"race: write of bytes .*, which a product of warpgroup 0 read at .*; {UNKNOWN}",
    "own_wait_alone": f"race: write of bytes .*, which a product of warpgroup 0 read at .*; {UNKNOWN}",
    "fragment_written": r"element 1 of a fragment of A was written between the product at .* and a wait for it",
    "read_early": None,
    "not_named": "the block has ended and no wgmma_wait names the registers of this product",
    "three_warps": r"(?s)every thread waits for ever:.*threads 0-95 wait in wgmma_wait at "
    r".* \(96 of its 128 threads have issued m64n64k16",
    "other_operand": "the warps of a warpgroup must issue the same products: .* K-major at (0|32), .* K-major at (32|0)",
    "inside_pattern": "operand A begins at byte 512 of 'dynamic_shared': in row 4 of the swizzle's pattern",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_seen(with_mistakes, name, order):
    if MISTAKES[name] is None:
        assert not run(with_mistakes, name, order) < 0.1
        return
    with pytest.raises(HostError) as caught:
        run(with_mistakes, name, order)
    text = str(caught.value)
    assert re.search(MISTAKES[name], text), text
    assert text.startswith(f"{name} returned 1: wgmma_mistakes.cu:") and "block (0, 0, 0)" in text, text


@needs_nvcc
def test_the_same_source_is_hgmma(tmp_path):
    """Every product is one instruction of its width, and ptxas neither serialises them (warnings C7508, C7510) nor spills."""
    report, cubin = compiled(SOURCE, "sm_90a", tmp_path)
    assert not re.search(r"C75\d\d|[1-9]\d* bytes spill", report), report
    widths = {int(n) for _, _, n in CASES}
    found = set()
    for name, code in instructions(cubin).items():
        products = [i for i in code if "HGMMA" in i]
        assert len(products) >= 8, name
        found |= {int(n) for n in re.findall(r"HGMMA\.64x(\d+)x16", " ".join(products))}
    assert found == widths
