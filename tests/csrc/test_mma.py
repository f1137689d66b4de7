"""csrc/device/mma.h on the host body. The same on a GPU: tests/csrc/conformance.py."""

import pytest
import torch

from tests.csrc.host_library import Both, In, Out, library, needs_compiler

pytestmark = needs_compiler
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# CuTe's MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>: shapes and strides over (lane % 4, lane / 4, values), of places
# counted along M (or N) first.
A = (4, 8, 2, 2, 2), (32, 1, 16, 8, 128)
B = (4, 8, 2, 2), (16, 1, 8, 64)
D = (4, 8, 2, 2), (32, 1, 16, 8)


def places(layout):
    """[32, values]: the place of each value of each lane."""
    shape, strides = layout
    grids = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    place = sum(g * s for g, s in zip(grids, strides))
    order = [1, 0, *range(len(shape) - 1, 1, -1)]  # lanes and values count their first digit fastest
    return place.permute(order).reshape(32, -1)


@pytest.fixture(scope="module")
def lib():
    return library("tests/csrc/mma_cases.cu")


@pytest.mark.parametrize("order", ("forward", "backward", "random"))
@pytest.mark.parametrize("name", TYPES)
def test_fragments_are_those_of_cute(lib, name, order):
    """Small integers: sums are exact. The case multiplies twice."""
    warps = 4
    a, b, d = (torch.randint(-8, 9, (warps, *s)).float() for s in ((16, 16), (8, 16), (16, 8)))
    lanes = [t.transpose(1, 2).reshape(warps, -1)[:, places(at)] for t, at in ((a, A), (b, B), (d, D))]
    left, right = (t.to(TYPES[name]).contiguous().view(torch.int32) for t in lanes[:2])
    found = lanes[2].contiguous()
    lib.run(f"mma_{name}", In(left), In(right), Both(found), warps // 2, order=order)
    want = (d + 2 * a @ b.transpose(1, 2)).transpose(1, 2).reshape(warps, -1)[:, places(D)]
    assert torch.equal(found, want)


@pytest.mark.parametrize("name", TYPES)
def test_halves_of_registers(lib, name):
    a, b = (torch.randint(-(2**31), 2**31, (64,)).int() for _ in range(2))
    c, out = torch.randint(0, 2**16, (64,)).int(), torch.empty(3, 64, dtype=torch.int32)
    lib.run(f"pairs_{name}", In(a), In(b), In(c), Out(out), 1)
    x, y = (t.view(TYPES[name]) for t in (a, b))
    torch.testing.assert_close(out[0].view(TYPES[name]), x - y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[1].view(torch.int16), a.view(torch.int16).view(64, 2).flip(1).reshape(-1))
    both = torch.cat((a.view(64, 1), b.view(64, 1)), 1).view(torch.uint8)
    chosen = torch.stack([both.gather(1, (c.view(64, 1).long() >> 4 * i) & 7) for i in range(4)], 1)
    assert torch.equal(out[2].view(torch.uint8), chosen.view(-1))


def test_bitwise(lib):
    a, b, c = (torch.randint(-(2**31), 2**31, (64,)).int() for _ in range(3))
    out = torch.empty(4, 64, dtype=torch.int32)
    lib.run("bitwise_of", In(a), In(b), In(c), Out(out), 1)
    two = (a & b & ~c) | (a & ~b & c) | (~a & b & c)
    for got, want in zip(out, ((a & b) | (a & c) | (b & c), (a & b) | (~a & c), two, a ^ b ^ c)):
        assert torch.equal(got, want)
