"""Mistakes in asynchronous work, each planted in a kernel, and the report that the host body makes of it."""

import re

import pytest
import torch

from tests.csrc.host_library import COPY_ORDERS, ROOT, Both, HostError, In, Out, library, needs_compiler

pytestmark = needs_compiler
SOURCE = "tests/csrc/async_bugs.cu"
SHARED = "of bytes .* of shared memory 'dynamic_shared' .*, which"
IN_FLIGHT = rf"race: (read|write) {SHARED} a copy on the mbarrier at byte \d+ of 'full' wrote at async_bugs.cu:\d+; this thread "
IN_FLIGHT += "has not waited for it"
UNWRITTEN = f"read {SHARED} nobody wrote"
OVERWRITTEN = rf"race: write {SHARED} thread \d+ read at .*; no barrier lies between"
FOR_EVER = "(?s:every thread waits for ever:.*mbarrier at byte .*arrivals have come.*)"
REUSED = f"race: write {SHARED} a copy of thread 32 read at .*this thread has not waited"
# Bug of async_bugs.cu -> what the report says
RING = {
    "MissingWait": f"{IN_FLIGHT}|{UNWRITTEN}|{OVERWRITTEN}",
    "FreedEarly": f"{IN_FLIGHT}|{OVERWRITTEN}",
    "TooFewBytes": "1024 bytes more have come than phase 0 of the mbarrier at byte (0|8) of 'full' announces",
    "TooManyBytes": r"(?s)every thread waits for ever:.*threads 32-95 wait in mbarrier_wait for parity 0 at .* \(the mbarrier at "
    r"byte 0 of 'full': phase 0, 1 of 1 arrivals have come, 2048 bytes have not",
    "ConsumerParity": f"{IN_FLIGHT}|{UNWRITTEN}|{OVERWRITTEN}|{FOR_EVER}",
    "ProducerParity": r"(?s)every thread waits for ever:.*threads 0 wait in mbarrier_wait for parity 0 at .* \(the mbarrier at "
    r"byte 0 of 'empty': phase 0, 0 of 2 arrivals have come\)",
    "MissingExpect": f"{IN_FLIGHT}|{UNWRITTEN}",
    "ExpectTwice": "mbarrier_arrive_expect: one arrival too many at the mbarrier at byte 0 of 'full': all 1 of phase 0 have "
    "come, and 2048 bytes have not",
    "ArriveTwice": f"{IN_FLIGHT}|{OVERWRITTEN}|{FOR_EVER}",
    "Uninitialised": r"mbarrier_wait: nobody has initialised an mbarrier at bytes 0 to 7 of shared memory 'empty'",
    "InitialisedTwice": "mbarrier_init: the mbarrier at byte 0 of 'full' is one already, initialised at",
    "NoBarrierAfterInit": "mbarrier_wait: nobody has initialised|race: mbarrier_wait of the mbarrier at byte . of "
    "'(full|empty)', which thread 0 initialised at",
    "NoInitFence": "tensor_load: fence_mbarrier_init is missing between mbarrier_init of the mbarrier at byte 0 of 'full', at",
    "OutOfSharedMemory": r"out of bounds: write of bytes 6144 to 8191 of shared memory 'dynamic_shared' \(6144 bytes\)",
    "Misaligned": "tensor_load: misaligned: dynamic_shared is 128 bytes past a multiple of 1024",
    "OneLaneWaits": f"{IN_FLIGHT}|{UNWRITTEN}",
    "NoProxyFence": r"asynchronous read of bytes .*, which thread \d+ wrote at .*; no fence_async_shared lies between",
    "FenceAfterBarrier": r"asynchronous read of bytes .*, which thread \d+ wrote at .*; no fence_async_shared lies between",
    "NoWaitBeforeReuse": REUSED,
    "WrongThreadWaits": REUSED,
    "NoCommit": REUSED,
    "NoWaitAtTheEnd": "the block has ended and this thread has not waited until the copy has read shared memory",
    "OneTileTooMany": "the block has ended and nobody has waited for this copy on the mbarrier at byte 8 of 'full'",
    "ReadBeforeWritten": "race: read of bytes 128 to 129 of buffer 'argument 1' .*, which a copy of thread 32 wrote at",
    "BarrierOverwritten": "race: write of bytes 0 to 3 of shared memory 'full' .*, which an mbarrier that lies there wrote at",
    "WrittenBeforeLoad": r"asynchronous write of bytes .*, which thread \d+ wrote at .*; no fence_async_shared lies between",
    "StoreRace": f"race: write of bytes .* of buffer 'argument 1' .*, which a copy of thread 32 wrote at|{REUSED}",
}
SMALL = {
    "static_tile": "tensor_load: 'tile' must be aligned to 1024 bytes, and static shared memory is to 16 only",
    "coordinates": "tensor_load: 3 coordinates for a tensor map of 2 dimensions",
    "not_a_multiple": "bulk_store: the bytes must be a multiple of 16, not 24",
    "global_fence": "asynchronous read of bytes 0 to 63 of buffer .*, which thread 0 wrote at .*; no fence_async_global lies",
    "invalidated": "mbarrier_arrive: nobody has initialised an mbarrier at bytes 0 to 7 of shared memory 'full'",
    "barrier_address": "misaligned write: 8 bytes at an address that is not a multiple of 8",
    "no_arrivals": r"mbarrier_init: arrivals are 1 to 2\^20 - 1, not 0",
    "phase_as_parity": "mbarrier_wait: the parity is 0 or 1, not 2",
    "divergent_elect": "(?s)every thread waits for ever:.*threads 4-31 have returned.*threads 0-3 wait in elect_one at"
    r"|elect_one: the mask 0xffffffff names lane \d+, which has returned",
    "elected_waits": r"race: write of bytes .* of shared memory 'tile' .*, which a copy of thread (0|31) read at",
    "other_block": "mbarrier_arrive: the mbarrier at byte 0 of 'full' belongs to another block: arrivals and copies there",
    "copy_async_wait": r"race: read of bytes .* of shared memory 'tile' .*, which a copy of thread \d+ wrote at .*has not waited",
    "copy_async_barrier": r"read of bytes .* of shared memory 'tile' .*, which ((a copy of )?thread \d+ wrote at|nobody wrote)",
    "registers": r"setmaxnreg_inc<256>: .*for ever|setmaxnreg_dec<232>: the warp has 200 registers a thread \(at most 248 at the "
    "launch of 256 threads",
    "registers_for_ever": r"(?s)every thread waits for ever:.*wait in setmaxnreg_inc at .* \(\d+ registers .* are free\)",
    "one_warp": "setmaxnreg must be executed by all four warps of a warpgroup, and was not by all of warps 0 to 3",
}
NAMES = [order[0] for order in COPY_ORDERS]


@pytest.fixture(scope="module")
def lib():
    return library(SOURCE)


def numbers() -> dict[str, int]:
    body = re.search(r"enum Bug \{(.*?)\}", (ROOT / SOURCE).read_text(), re.S)[1]
    return {name: i for i, name in enumerate(re.findall(r"k(\w+),", body))}


def lines_of(name: str) -> list[int]:
    lines = (ROOT / SOURCE).read_text().splitlines()
    return [i for i, line in enumerate(lines, 1) if name in line.partition("// BUG ")[2].split()]


def check(text: str, name: str, pattern: str):
    assert re.search(pattern, text), text
    assert re.search(rf"async_bugs\.cu:({'|'.join(map(str, lines_of(name)))})\b", text), (lines_of(name), text)
    assert re.search(r"block \([01], 0, 0\)", text), text


def ring(lib, bug: int, order: str):
    x, y = torch.randn(5 * 16, 64).bfloat16(), torch.zeros(5 * 16, 64, dtype=torch.bfloat16)
    lib.run("ring", In(x), Out(y), 5, bug, order=order)
    return x, y


@pytest.mark.parametrize("order", NAMES)
def test_without_a_mistake(lib, order):
    x, y = ring(lib, 0, order)
    worker = torch.arange(64)
    piece = 2 * worker ^ worker // 4 % 8  # the 16 bytes that thread finds under the swizzle
    pieces, want = x.view(5, 128, 8), torch.empty(5, 128, 8, dtype=torch.bfloat16)
    want[:, piece] = pieces[:, piece, :1].expand(5, 64, 8)
    want[:, piece ^ 1] = want[:, piece]
    assert torch.equal(y.view(5, 128, 8), want)


@pytest.mark.parametrize("order", NAMES)
@pytest.mark.parametrize("name", RING)
def test_a_ring_with_a_mistake(lib, name, order):
    with pytest.raises(HostError) as caught:
        ring(lib, numbers()[name], order)
    check(str(caught.value), name, RING[name])


@pytest.mark.parametrize("order", NAMES)
@pytest.mark.parametrize("name", SMALL)
def test_a_small_mistake(lib, name, order):
    with pytest.raises(HostError) as caught:
        lib.run(name, Both(torch.zeros(16, 64, dtype=torch.bfloat16)), order=order)
    check(str(caught.value), name, SMALL[name])


@pytest.mark.parametrize("order", NAMES)
def test_no_proxy_fence_between_blocks(lib, order):
    with pytest.raises(HostError) as caught:
        lib.run("relay", Both(torch.zeros(128)), Both(torch.zeros(1, dtype=torch.int32)), order=order)
    pattern = (
        r"asynchronous read of bytes 0 to 511 of buffer .*, which (block \d, )?thread \d+ wrote at .*; no fence_async"
    )
    check(re.sub(r"block \(\d,", "block (0,", str(caught.value)), "relay", pattern)


def test_every_mistake_is_in_the_list():
    assert set(numbers()) == {"None", *RING}


@pytest.mark.parametrize(
    "values, says",
    (
        ((1, 64, 64, 64, 16, 0), "the tensor's address must be a multiple of 16 bytes"),
        ((0, 64, 60, 64, 16, 0), "stride 1 must be a multiple of 16 bytes below 2\\^40, not 120 bytes"),
        ((0, 64, 0, 64, 16, 0), "stride 1 must be a multiple of 16 bytes below 2\\^40, not 0 bytes"),
        ((0, 64, 64, 264, 16, 0), "box size 0 must be 1 to 256, not 264"),
        ((0, 64, 64, 64, 257, 0), "box size 1 must be 1 to 256, not 257"),
        ((0, 64, 64, 20, 16, 0), "a row of the box must be a multiple of 16 bytes, not 40"),
        ((0, 64, 64, 128, 16, 3), "a row of the box must have the 128 bytes of the swizzle, not 256"),
        ((0, 0, 64, 64, 16, 0), "size 0 must be 1 to 2\\^32, not 0"),
    ),
)
def test_a_tensor_map_that_cannot_be(lib, values, says):
    with pytest.raises(HostError, match=f"async_bugs.cu:\\d+: make_tensor_map: {says}"):
        lib.run("map_of", Both(torch.zeros(16, 64, dtype=torch.bfloat16)), *values)
