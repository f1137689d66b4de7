"""Clusters (csrc/device/cluster.h) on the host body, and that the same source is CUDA."""

import re
import subprocess

import pytest
import torch

from tests.csrc.host_library import (
    CSRC,
    ROOT,
    Both,
    HostError,
    In,
    Out,
    library,
    needs_compiler,
    needs_nvcc,
    outputs,
)  # fmt: skip

SOURCE = "tests/csrc/cluster_cases.cu"
ORDERS = ("forward", "backward", "random")


@pytest.fixture(scope="module")
def lib():
    return library(SOURCE)


@needs_compiler
@pytest.mark.parametrize("cluster", (1, 2, 8))
def test_ranks(lib, cluster):
    found = outputs(lib, "ranks", Out, cluster, shape=(3, 8, 64, 3), dtype=torch.int32)
    block = torch.arange(8, dtype=torch.int32)[:, None].expand(3, 8, 64)
    assert torch.equal(found, torch.stack([block % cluster, torch.full_like(block, cluster), block], -1))


@needs_compiler
@pytest.mark.parametrize("blocks, cluster", ((2, 1), (4, 2), (9, 3), (16, 16)))
def test_shared_memory_of_other_blocks(lib, blocks, cluster):
    x = torch.randn(blocks, 64)
    want = x.view(-1, cluster, 64)
    for _ in range(3):
        want = want.roll(-1, 1).flip(2)
    assert torch.equal(outputs(lib, "ring", In(x), Out, blocks, cluster, shape=x.shape), want.reshape(blocks, 64))


@needs_compiler
def test_arriving_and_waiting(lib):
    x = torch.randint(-8, 8, (8, 64)).float()
    found = outputs(lib, "halves", In(x), Out, 8, 4, shape=x.shape)
    assert torch.equal(found, x.sum(1, keepdim=True) + x.view(2, 4, 64).flip(1).view(8, 64))


@needs_compiler
@pytest.mark.parametrize("blocks, cluster, threads", ((2, 1, 32), (3, 1, 256), (4, 2, 96), (8, 8, 160), (16, 16, 64)))
def test_reductions(lib, blocks, cluster, threads):
    x = torch.randint(-8, 8, (blocks // cluster, cluster * threads)).float()
    found = outputs(lib, "sums", In(x), Out, blocks, cluster, threads, shape=(blocks // cluster, cluster, 4, threads))
    lanes = torch.full((blocks // cluster,), float(cluster * threads * (threads - 1) // 2))
    want = torch.stack([x.sum(1), x.amax(1), x.square().sum(1), lanes], 1)
    assert torch.equal(found, want[:, None, :, None].expand_as(found))
    noise = outputs(lib, "sums", In(torch.randn_like(x)), Out, blocks, cluster, threads, shape=found.shape)
    assert torch.equal(noise, noise[:, :1, :, :1].expand_as(noise))  # not a bit differs within a cluster


@needs_compiler
def test_atomics_in_another_block(lib):
    x = torch.randint(0, 8, (3, 2 * 64), dtype=torch.int32)
    found = outputs(lib, "counts", In(x), Out, 6, 2, shape=(3, 2, 8), dtype=torch.int32)
    want = torch.stack([torch.bincount(row.long(), minlength=8) for row in x]).int()
    assert torch.equal(found, want[:, None].expand(3, 2, 8))


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
def test_a_fence_hands_on_what_a_cluster_barrier_told(lib, order):
    x = torch.randn(6)

    def run(name):
        partial, total = torch.zeros(6), torch.zeros(1)
        lib.run(name, In(x), Out(partial), Both(torch.zeros(1, dtype=torch.int32)), Out(total), order=order)
        return total

    torch.testing.assert_close(run("ticket")[0], 2 * x.sum())
    for name in ("ticket_without_fence", "ticket_without_barrier"):
        with pytest.raises(
            HostError, match=r"cluster_cases.cu:\d+: .*(race: read of .* block \d, thread 3|nobody wrote)"
        ):
            run(name)


TILE = r"block \d's shared memory 'tile' \(256 bytes\)"
RACE = rf"race: read of bytes .* of {TILE}, which block \d, thread \d+ wrote at .*; no cluster barrier lies between"
BUGS = {
    "missing_barrier": rf"{RACE}|read of bytes .* of {TILE}, which nobody wrote",
    "missing_second_barrier": rf"{RACE}|race: write of bytes .* of shared memory 'tile' .*, which block \d, thread \d+ read at",
    "returns_too_early": rf"read of bytes .* of {TILE}(: that block has returned|, which has returned meanwhile: no cluster)",
    "wrong_rank": "cluster_pointer: rank 4 of a cluster of 4 blocks",
    "not_begun": rf"write of bytes .* of {TILE} before the first cluster barrier: that block may not have begun",
    "missing_wait": rf"{RACE}|read of bytes .* of {TILE}, which nobody wrote",
    "after_the_arrival": rf"{RACE}|read of bytes .* of {TILE}, which nobody wrote",
    "relaxed": RACE,
    "past_the_end": rf"thread 63: out of bounds: read of bytes 256 to 259 of {TILE}",
    "of_another": "cluster_pointer: of a pointer that is not into this block's own shared memory",
    "one_place": r"race: write of bytes 0 to 3 of .*shared memory 'top' \(4 bytes\), which block \d, thread 0 wrote at",
    "one_block_skips": r"(?s)every thread waits for ever:.*threads 0-63 wait in cluster_barrier at .* \(cluster barrier: 192 of",
    "one_warp_skips": r"(?s)every thread waits for ever:.*cluster_barrier at .* \(cluster barrier: 128 of 256 have come\)",
    "branches": "cluster_barrier in divergent code: the lanes of warp [01] came from .* and ",
    "arrives_twice": "cluster_barrier: this thread has arrived before and not waited since",
    "never_arrived": "cluster_wait: this thread has not arrived at the barrier",
    "through_global": r"race: read of bytes .* of buffer 'argument 1' .*, which block \d, thread \d+ wrote at|which nobody wrote",
}  # fmt: skip


def line_of(name):
    lines = (ROOT / SOURCE).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"// BUG {name}"))


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_reported_with_its_line(lib, name, order):
    with pytest.raises(HostError) as caught:
        lib.run(name, In(torch.randn(4, 64)), Out(torch.zeros(4, 64)), order=order)
    text = str(caught.value)
    assert re.search(BUGS[name], text), text
    assert re.search(rf"cluster_cases\.cu:{line_of(name)}\b", text), text
    y = torch.zeros(2, 64)
    lib.run("ring", In(y), Out(y.clone()), 2, 2)  # threads left behind are reused


@needs_compiler
@pytest.mark.parametrize("blocks, cluster", ((4, 3), (4, 0), (17, 17), (1, 2)))
def test_a_launch_that_cannot_be(lib, blocks, cluster):
    x = torch.ones(blocks, 64)
    with pytest.raises(
        HostError, match=rf"launch of a grid \({blocks}, 1, 1\) in clusters of {cluster} blocks: a cluster has 1"
    ):
        lib.run("ring", In(x), Out(torch.zeros(blocks, 64)), blocks, cluster)


@needs_compiler
def test_a_gpu_without_clusters(lib):
    x, y = torch.ones(2, 64), torch.zeros(2, 64)
    with lib.without_clusters():
        lib.run("ring", In(x), Out(y), 2, 1)
        with pytest.raises(HostError, match="the GPU must have clusters"):
            lib.run("ring", In(x), Out(y), 2, 2)
    lib.run("ring", In(x), Out(y), 2, 2)


@needs_nvcc
def test_the_same_source_is_cuda(tmp_path):
    """For sm_80 too, where a cluster is a block."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")]
    command = ["nvcc", "-std=c++20", "-O3", *targets, "-Xptxas", "-v", "-c", f"-I{CSRC}", str(ROOT / SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "cases.o")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    kernels = done.stderr.count("Compiling entry function")
    assert kernels == 3 * 25 == done.stderr.count(" 0 bytes spill stores, 0 bytes spill loads")
