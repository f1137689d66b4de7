"""The asynchronous part of the device layer on the host body: each feature in all orders of threads and copies."""

import ctypes
import re
import subprocess

import pytest
import torch

from tests.csrc.host_library import (
    COPY_ORDERS,
    CSRC,
    ROOT,
    Both,
    HostError,
    In,
    Out,
    library,
    needs_compiler,
    needs_nvcc,
    same_in_all_orders,
)

SOURCE = "tests/csrc/async_cases.cu"
INSTRUCTIONS = [
    "mbarrier.init.shared::cta.b64", "mbarrier.inval.shared::cta.b64", "mbarrier.arrive.shared::cta.b64",
    "mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.expect_tx.relaxed.cta.shared::cta.b64",
    "mbarrier.try_wait.parity.shared::cta.b64", "fence.mbarrier_init.release.cluster", "fence.proxy.async.shared::cta",
    "fence.proxy.async.global", "prefetch.tensormap", "elect.sync", "setmaxnreg.inc.sync.aligned.u32 240",
    "setmaxnreg.dec.sync.aligned.u32 24", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group 0",
    "cp.async.bulk.wait_group.read 0", "cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group 1",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", "cp.async.bulk.global.shared::cta.bulk_group",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16", "cp.async.ca.shared.global",
    "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group",
    "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group",
    *(f"cp.async.bulk.tensor.{n}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes" for n in range(1, 6)),
]  # fmt: skip
SM_80 = ("cp.async.cg.shared.global", "cp.async.ca.shared.global", "cp.async.commit_group", "cp.async.wait_group 1")
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def lib():
    return library(SOURCE)


def outputs(lib, function, *values):
    """What the case writes to its Outs and Boths, the same in all orders of threads and copies."""

    def run(order):
        own = [type(v)(v.tensor.clone()) if isinstance(v, (Out, Both)) else v for v in values]
        lib.run(function, *own, order=order)
        return tuple(v.tensor for v in own if isinstance(v, (Out, Both)))

    return same_in_all_orders(run, COPY_ORDERS)


@pytest.mark.parametrize(
    "rows, columns, stride, blocks", ((77, 133, 136, 1), (50, 64, 64, 3), (5, 8, 192, 1), (33, 200, 208, 4))
)
def test_a_pipeline_of_tiles(lib, rows, columns, stride, blocks):
    x = torch.randn(rows, stride).bfloat16()
    y = torch.full((rows, stride), -7, dtype=torch.bfloat16)
    (found,) = outputs(lib, "pipeline", In(x), Both(y), rows, columns, stride, blocks)
    y[:, :columns] = 2 * x[:, :columns]
    assert torch.equal(found, y)


# name, sizes, strides and box innermost first, corner
BOXES = (
    ("bf16", (40,), (), (16,), (-8,)),
    ("bf16", (100, 9), (104,), (64, 8), (64, 3)),
    ("bf16", (100, 9), (104,), (64, 8), (-3, -2)),
    ("bf16", (64, 9), (64,), (64, 8), (200, 0)),  # none of it within
    ("float", (40, 5, 3), (40, 240), (32, 4, 2), (12, 2, 2)),
    ("float", (20, 3, 2, 2), (20, 64, 256), (16, 2, 2, 2), (8, -1, 1, 0)),
    ("bf16", (24, 3, 2, 2, 3), (24, 72, 160, 320), (16, 2, 1, 2, 2), (8, 1, 1, 0, -1)),
)


@pytest.mark.parametrize("swizzle", range(4))
@pytest.mark.parametrize("name, sizes, strides, box, corner", BOXES)
def test_boxes_of_every_rank_and_swizzle(lib, name, sizes, strides, box, corner, swizzle):
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    if swizzle:  # a row has exactly the swizzle's bytes
        box = (16 * 2**swizzle // dtype.itemsize, *box[1:])
    rank = len(sizes)
    last = sum((n - 1) * s for n, s in zip(sizes, (1, *strides)))
    x = torch.randn(last + 1).to(dtype)
    shaped = x.as_strided(sizes[::-1], (1, *strides)[::-1])
    want = torch.zeros(box[::-1], dtype=dtype)
    for at in range(want.numel()):
        index, rest = [], at
        for n in box:
            index.append(rest % n)
            rest //= n
        where = [c + i for c, i in zip(corner, index)]
        if all(0 <= w < n for w, n in zip(where, sizes)):
            want[tuple(index[::-1])] = shaped[tuple(where[::-1])]
    want = want.flatten()
    if swizzle:  # 16-byte pieces of a row change places
        piece, span = 16 // dtype.itemsize, 2**swizzle
        pieces = want.view(-1, piece)
        number = torch.arange(len(pieces))
        row = number * 16 // 128
        moved = torch.empty_like(pieces)
        moved[number ^ (row % span)] = pieces
        want = moved.flatten()

    def five(values, n):
        return (ctypes.c_int64 * n)(*values)

    (found,) = outputs(
        lib, f"box_{name}", In(x), In(torch.tensor(corner, dtype=torch.int32)), Out(torch.empty_like(want)), rank, swizzle,
        five(sizes, 5), five(strides, 4), five(box, 5),
    )  # fmt: skip
    assert torch.equal(found, want)


@pytest.mark.parametrize("name, dtype", (("float", torch.float32), ("bf16", torch.bfloat16), ("int", torch.int32)))
def test_the_memory_adds(lib, name, dtype):
    x = torch.randint(-9, 9, (43, 104)).to(dtype)  # sums that every order of additions gives exactly
    start = torch.randint(-9, 9, (8, 104)).to(dtype)
    (found,) = outputs(lib, f"add_{name}", In(x), Both(start), 43, 100, 104)
    want = start.double()
    for i in range(43):
        want[i % 8, :100] += x[i, :100].double()
    assert torch.equal(found.double(), want)


@pytest.mark.parametrize("name, dtype", (("float", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)))
def test_bulk_copies(lib, name, dtype):
    x = torch.randint(-9, 9, (5, 32)).to(dtype)
    y, total = outputs(lib, f"bulk_{name}", In(x), Out(torch.empty_like(x)), Both(torch.ones(32, dtype=dtype)), 5)
    assert torch.equal(y, x)
    assert torch.equal(total, 1 + x.sum(0))


@pytest.mark.parametrize("wide", (1, 2, 4))
@pytest.mark.parametrize("n", (0, 1, 255, 256, 1030))
def test_copies_ahead(lib, n, wide):
    x = torch.randn(max(n, 1))
    pieces = -(-n // 256)
    (y,) = outputs(lib, "ahead", In(x), Out(torch.empty(pieces * 256)), n, wide)
    padded = torch.zeros(pieces * 256)
    padded[:n] = x[:n]
    assert torch.equal(y, padded.view(-1, 256).flip(1).flatten())


def test_barriers_between_threads_and_their_memory_afterwards(lib):
    (y,) = outputs(lib, "threads", Out(torch.empty(5 * 32 + 4, dtype=torch.int32)), 5)
    want = 2 * (100 * torch.arange(5)[:, None] + torch.arange(32))
    assert torch.equal(y.long(), torch.cat([want.flatten(), torch.arange(4)]))


def test_global_memory_from_threads_to_a_copy_of_another_block(lib):
    counter = torch.zeros(1, dtype=torch.int32)
    _, y, _ = outputs(lib, "relay", Out(torch.empty(128)), Out(torch.empty(128)), Both(counter))
    assert torch.equal(y, torch.arange(128.0))


@pytest.mark.parametrize("fence", (0, 1, 2))
def test_shared_memory_that_another_block_wrote(lib, fence):
    def run():
        return outputs(lib, "pass_on", Out(torch.empty(6, 32)), fence)

    if fence < 2:
        with pytest.raises(
            HostError, match="asynchronous read of .*'tile' .*, which block 2, thread 0 wrote .* no fence_async_shared"
        ):
            run()
        return
    sender = torch.tensor([2, 0, 1, 5, 3, 4])
    assert torch.equal(run()[0], 100.0 * sender[:, None] + torch.arange(32))


def test_warpgroups(lib):
    (y,) = outputs(lib, "groups", Out(torch.empty(384, dtype=torch.int32)))
    t = torch.arange(384)
    assert torch.equal(y.long(), 1000 * (t // 128) + t % 128)


@needs_nvcc
@pytest.mark.parametrize("architecture", ("80", "90a", "100"))
def test_the_same_source_is_cuda(tmp_path, architecture):
    """And each name is the instruction it says. Before sm_90 most of them only stop the kernel."""
    command = ["nvcc", "-std=c++20", f"-arch=sm_{architecture}", f"-I{CSRC}", "-cubin", "-Xptxas", "-v"]
    kept = ["--keep", f"--keep-dir={tmp_path}", f"-o={tmp_path / 'cases.cubin'}"]
    done = subprocess.run([*command, *kept, str(ROOT / SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    assert not re.search(r"[1-9]\d* bytes spill|C75\d\d|warning", done.stderr), done.stderr
    code = (tmp_path / "async_cases.ptx").read_text(encoding="utf-8")
    for instruction in INSTRUCTIONS:
        known = architecture != "80" or instruction in SM_80
        if instruction.startswith("setmaxnreg"):
            known = architecture == "90a"
        assert (instruction in code) == known, instruction
