"""Mistakes that hardware does not report, each planted in a kernel, and the report that the host body makes of it."""

import re

import pytest
import torch

from tests.csrc.host_library import ROOT, Both, HostError, In, Out, library, needs_compiler, same_in_all_orders

pytestmark = needs_compiler
SOURCE = "tests/csrc/planted_bugs.cu"
ORDERS = ("forward", "backward", "random")
# name of the launcher -> what the report says
BUGS = {
    "missing_barrier": r"read of bytes \d+ to \d+ of shared memory 'tile' \(256 bytes\), which nobody wrote",
    "missing_second_barrier": r"race: read of bytes .* of shared memory 'tile' .*, which thread \d+ wrote at .*no barrier lies",
    "shuffle_is_no_barrier": "race: read of bytes .* of shared memory 'tile'",
    "wrong_mask": "shuffle_xor: lane (16|31|[12][0-9]) is not in its own mask 0x0000ffff",
    "lane_outside_mask": r"shuffle_down: lane \d+ reads lane \d+, which is not in the mask 0x0000ffff",
    "divergent_shuffle": r"(?s)every thread waits for ever:.*threads 20-31 wait in block_barrier"
    ".*threads 0-19 wait in shuffle_xor at .* for lanes 0-31",
    "two_shuffles": "shuffle_xor for lanes 0-31, while lanes .* are in shuffle_xor at .* for the same",
    "barrier_not_by_all": r"(?s)every thread waits for ever:.*threads 40-63 have returned.* \(barrier 0: 32 of 64 have come\)"
    r"|shuffle_xor: the mask 0xffffffff names lane \d+, which has returned",
    "barrier_skipped": r"(?s)every thread waits for ever:.*threads 32-63 have returned"
    r".*block_barrier at .* \(barrier 0: 32 of 64 have come\)",
    "barrier_in_branches": "block_barrier in divergent code: the lanes of warp 1 came from .* and ",
    "half_a_warp": "named_barrier: only 16 lanes of warp [0-3] are among the threads that met",
    "barrier_count": r"named_barrier\(1\): expects (32|64) threads, but thread \d+, waiting at .*, expects (32|64)"
    r"|(?s:every thread waits for ever:.*threads 0-31 wait in .* \(barrier 1: 32 of 64 have come\))",
    "unwritten_shared": r"read of bytes 252 to 255 of shared memory 'tile' \(256 bytes\), which nobody wrote",
    "read_past_the_end": r"thread 63: out of bounds: read of bytes 256 to 259 of buffer 'argument 0' \(256 bytes\)",
    "write_past_the_end": r"thread 63: out of bounds: write of bytes 256 to 259 of buffer 'argument 1' \(256 bytes\)",
    "before_the_start": "thread 0: out of bounds: read of bytes -4 to -1 of buffer 'argument 0'",
    "shared_past_the_end": r"thread 63: out of bounds: write of bytes 252 to 255 of shared memory 'tile' \(252 bytes\)",
    "misaligned": r"misaligned read: 16 bytes at an address that is not a multiple of 16 \(4 past one\)",
    "dynamic_size": r"thread 63: out of bounds: write of bytes 252 to 255 of shared memory 'dynamic_shared' \(252 bytes\)",
    "static_size": "'tile' takes static shared memory to 49156 bytes",
    "both_sizes": "'tile' takes static shared memory to 1028 bytes and the block's to 233472; there are 49152 and 232448",
    "one_address": r"race: write of bytes 0 to 3 of shared memory 'top' \(4 bytes\), which thread \d+ wrote at",
    "one_place_of_two_blocks": "race: write of bytes .* of buffer 'argument 1' .*, which block [01], thread .* wrote at",
    "input_written": "write of bytes .* of buffer 'argument 0' .*, which is an input",
    "null_pointer": "read through a null pointer",
}


@pytest.fixture(scope="module")
def lib():
    return library(SOURCE)


def line_of(name: str) -> int:
    lines = (ROOT / SOURCE).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"// BUG {name}"))


def report(lib, function: str, *values, order="forward") -> str:
    with pytest.raises(HostError) as caught:
        lib.run(function, *values, order=order)
    return str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_it_is_reported_with_its_line(lib, name, order):
    y = torch.zeros(128 if name == "half_a_warp" else 64)
    text = report(lib, name, In(torch.rand(y.numel()) + 1), Out(y), order=order)
    assert re.search(BUGS[name], text), text
    assert text.startswith(f"{name} returned 1: planted_bugs.cu:"), text
    assert re.search(rf"planted_bugs\.cu:{line_of(name)}\b", text) and "block (0, 0, 0)" in text.replace(
        "(1,", "(0,"
    ), text


def counter():
    return Both(torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("order", ORDERS)
def test_tickets(lib, order):
    x = torch.ones(4)
    text = report(lib, "ticket_without_fence", In(x), Out(torch.zeros(5)), counter(), order=order)
    assert re.search(
        rf"cu:{line_of('ticket')}: .*race: read of .*, which block \d, thread 0 wrote at .*no fence", text
    ), text
    text = report(lib, "ticket_count", In(x), Out(torch.zeros(5)), counter(), -1, order=order)  # one block too early
    assert re.search(rf"cu:{line_of('ticket')}: .* of buffer 'argument 1' .*, which nobody wrote", text), text
    text = report(lib, "ticket_count", In(x), Out(torch.zeros(5)), counter(), 1, order=order)  # never
    assert "left 4 bytes of an output unwritten" in text
    y = torch.zeros(5)
    lib.run("ticket_count", In(x), Out(y), counter(), 0, order=order)
    assert y[4] == 4


def test_a_result_that_depends_on_the_order_is_seen(lib):
    x = torch.arange(128.0)

    def run(order):
        y = torch.zeros(128)
        lib.run("order_dependent", In(x), Out(y), counter(), order=order)
        return (y,)

    with pytest.raises(AssertionError, match="order backward gives other bits than forward"):
        same_in_all_orders(run)


@pytest.mark.parametrize("threads, shared", ((48, 0), (0, 0), (2048, 0), (64, 228 * 1024), (64, -4)))
def test_a_launch_that_cannot_be(lib, threads, shared):
    text = report(lib, "launch_sizes", In(torch.ones(64)), Out(torch.zeros(64)), threads, shared)
    assert f"of {threads} threads with {shared} bytes of shared memory: sizes are" in text
