"""Each feature of the device layer on the host body, and that the same source is CUDA."""

import math
import re
import resource
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastlm.ops.random_bits import philox
from tests.csrc import host_library
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

SOURCE = "tests/csrc/layer_cases.cu"
LANE = torch.arange(32, dtype=torch.int32)


def raw_names(source: str) -> list[str]:
    """What only one of the two bodies knows, outside comments."""
    code = re.sub(r"//.*|/\*(?s:.*?)\*/", "", source)
    return re.findall(
        r"\b(?:threadIdx|blockIdx|blockDim|gridDim|asm|__\w+__|__(?:sync|shfl|thread|ld|st|ballot)\w*|atomic[A-Z]\w*)\b",
        code,
    )


@pytest.fixture(scope="module")
def lib():
    return library(SOURCE)


@needs_compiler
def test_indices(lib):
    found = outputs(lib, "indices", Out, shape=(2, 3, 2, 64, 9), dtype=torch.int32)
    z, y, x, t = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 2, 64)), indexing="ij")
    want = torch.stack(
        [x, y, z, t, t % 32, t // 32, torch.full_like(t, 64), torch.full_like(t, 2), torch.full_like(t, 2)], -1
    )
    assert torch.equal(found.long(), want)


@needs_compiler
def test_shared_memory_static_and_dynamic(lib):
    x, positive = torch.randn(5, 128), torch.zeros(5, dtype=torch.int32)
    y = outputs(lib, "reverse", In(x), Out, Out(positive), 5, shape=(5, 128))
    assert torch.equal(y, (2 * x + 1) + x) and torch.equal(positive.long(), (x > 0).sum(1))


@needs_compiler
def test_named_barriers(lib):
    found = outputs(lib, "named", Out, shape=(3, 2, 32), dtype=torch.int32)
    assert torch.equal(found, 2 * (100 * torch.arange(3)[:, None, None] + LANE).expand(3, 2, 32).int())


@needs_compiler
def test_warp_barrier_orders_shared_memory(lib):
    found = outputs(lib, "warp_ring", Out, shape=(2, 32), dtype=torch.int32)
    assert torch.equal(found, torch.stack([(LANE + 3) % 32, 32 + (LANE + 3) % 32]))


@needs_compiler
def test_shuffles_and_votes(lib):
    x = torch.randint(0, 7, (32,), dtype=torch.int32)
    found = outputs(lib, "shuffles", In(x), Out, shape=(14, 32), dtype=torch.int32)
    l = LANE.long()
    from_lanes = [
        torch.full_like(l, 5), l // 8 * 8 + (l + 9) % 8, (l - 3).where(l >= 3, l), (l - 3).where(l % 16 >= 3, l),
        (l + 20).where(l < 12, l), (l + 1).where(l % 4 < 3, l), l ^ 17, (l ^ 16).where(l >= 16, l),
    ]  # fmt: skip
    for i, lanes in enumerate(from_lanes):
        assert torch.equal(found[i], x[lanes]), f"shuffle {i}"
    votes = sum(1 << i for i in range(32) if x[i] % 2)
    assert (found[8].long() & 0xFFFFFFFF == votes).all() and (found[9] == 0).all() and (found[10] == 0).all()
    assert torch.equal(found[11], x[l ^ 3])
    assert torch.equal(found[12], torch.where(l >= 16, x[(l + 1).where(l < 31, l)], -1).int())
    assert torch.equal(found[13], x[l ^ 1])
    found = outputs(lib, "shuffles", In(torch.full_like(x, 7)), Out, shape=(14, 32), dtype=torch.int32)
    assert (found[9] == 1).all() and (found[10] == 1).all()


@needs_compiler
@pytest.mark.parametrize("threads", (32, 96, 256))
def test_reductions(lib, threads):
    x = torch.randint(-8, 8, (threads,)).float()
    found = outputs(lib, "reductions", In(x), Out, threads, shape=(6, threads))
    assert torch.equal(found[0].view(-1, 32), x.view(-1, 32).sum(1, keepdim=True).expand(-1, 32))
    assert torch.equal(found[1].view(-1, 8), x.view(-1, 8).sum(1, keepdim=True).expand(-1, 8))
    assert torch.equal(found[2].view(-1, 4), x.view(-1, 4).amax(1, keepdim=True).expand(-1, 4))
    assert (found[3] == x.max()).all() and (found[4] == x.sum() + x.square().sum()).all()
    assert (found[5] == threads * (threads - 1) / 2).all()
    x[3] = float("nan")
    assert outputs(lib, "reductions", In(x), Out, threads, shape=(6, threads))[3].isnan().all()


@needs_compiler
def test_vectors_of_every_width(lib):
    x = torch.randn(480).bfloat16()
    assert torch.equal(outputs(lib, "vectors", In(x), Out, shape=(480,), dtype=torch.bfloat16), x)


@needs_compiler
@pytest.mark.parametrize("name, dtype", (("bf16", torch.bfloat16), ("fp16", torch.float16)))
def test_conversions_are_torchs_bit_for_bit(lib, name, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = outputs(lib, f"to_float_{name}", In(every), Out, every.numel(), shape=every.shape)
    assert torch.equal(wide.nan_to_num(7.5, math.inf, -math.inf), every.float().nan_to_num(7.5, math.inf, -math.inf))
    assert torch.equal(wide.view(torch.int32) < 0, every.view(torch.int16) < 0)  # the sign of zero
    # every value, those a step of fp32 and a half to either side (ties), and anything
    steps = wide[wide.isfinite()].view(torch.int32)
    half = {"bf16": 1 << 15, "fp16": 1 << 12}[name]
    bits = torch.cat(
        [steps + d for d in (0, 1, -1, half, half + 1, half - 1)] + [torch.randint(-(2**31), 2**31, (2000,)).int()]
    )
    ties = torch.arange(2048).float() * 2**-25  # between denormals of fp16
    x = torch.cat([bits.int().view(torch.float32), ties, torch.tensor([65519.99, 65520.0, -65520.0, 3.4e38])])
    found, want = outputs(lib, f"from_float_{name}", In(x), Out, x.numel(), shape=x.shape, dtype=dtype), x.to(dtype)
    assert torch.equal(found.isnan(), want.isnan())
    assert (found[found.isnan()].view(torch.int16) == 0x7FFF).all()  # the hardware's NaN, not torch's
    live = ~want.isnan()
    assert torch.equal(found[live].view(torch.int16), want[live].view(torch.int16))


@needs_compiler
def test_approximate_functions_are_the_exact_ones_rounded(lib):
    x = torch.cat([torch.linspace(0.01, 90, 500), torch.tensor([0.0, math.inf, 1e-40])])
    found = outputs(lib, "functions", In(x), Out, x.numel(), shape=(5, x.numel()))
    flushed = x.double() * (x > 1e-38)
    want = torch.stack([x.double().exp2(), flushed.log2(), flushed.rsqrt(), 1 / flushed, x.double().tanh()]).float()
    assert torch.equal(found, want)
    low = outputs(lib, "functions", In(torch.tensor([-125.5, -127.0, -200.0])), Out, 3, shape=(5, 3))
    assert torch.equal(low[0], torch.tensor([2.0**-125.5, 0, 0], dtype=torch.float64).float())  # denormals are flushed


@needs_compiler
def test_philox_is_that_of_the_ops(lib):
    seed = torch.tensor([-1234567890123456789])
    found = outputs(lib, "random_words", In(seed), Out, shape=(2, 32, 4), dtype=torch.int64)
    block, lane = torch.meshgrid(torch.arange(2), torch.arange(32), indexing="ij")
    want = philox(seed, lane, torch.tensor(7), torch.tensor(0xFFFFFFF0), block)
    assert torch.equal(found, torch.stack(want, -1))


@needs_compiler
def test_atomics(lib):
    for order in ("forward", "backward", "random"):
        p = torch.zeros(5, dtype=torch.int32)
        lib.run("atomics", Both(p), order=order)
        total = 192 * 191 // 2
        assert p[:4].tolist() == [total, 3 * 191, 192 % 10, total] and 1 <= p[4] <= 192


@needs_compiler
@pytest.mark.parametrize("blocks", (1, 2, 5))
def test_the_last_block_sees_what_the_others_wrote(lib, blocks):
    x, counter = torch.randn(blocks, 64), torch.zeros(1, dtype=torch.int32)
    partial = Out(torch.zeros(blocks, 64))
    found = outputs(lib, "last_block", In(x), partial, Both(counter), Out, blocks, shape=(64,))
    torch.testing.assert_close(found, 2 * x.sum(0))
    assert counter.item() == 0  # ready for the next launch


@needs_compiler
def test_blocks_that_wait_for_each_other(lib):
    x = torch.arange(4, dtype=torch.int32)
    want = x
    for _ in range(3):
        want = want.roll(1) + want.roll(-1)
    for order in ("forward", "backward", "random"):
        y, state = torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        lib.run("cooperative", Both(x.clone()), Both(y), Both(state), 4, order=order)
        assert torch.equal(y, want)
    with pytest.raises(HostError, match=r"(?s)every thread waits for ever.*spin_pause at .*2 blocks have not begun"):
        lib.run("not_cooperative", Both(x), Both(y), Both(torch.zeros(2, dtype=torch.int32)), 4)
    lib.run(
        "cooperative", Both(x), Both(y), Both(torch.zeros(2, dtype=torch.int32)), 4
    )  # threads left behind are reused


@needs_compiler
def test_fill_zero(lib):
    p = torch.ones(4)
    lib.run("zeroed", Out(p), 4)
    assert (p == 0).all()
    with pytest.raises(HostError, match="fill_zero of 20 bytes: not within one registered buffer"):
        lib.run("zeroed", Both(p), 5)
    with pytest.raises(HostError, match="fill_zero"):
        lib.run("zeroed", In(p), 4)


@needs_compiler
def test_a_launch_takes_milliseconds(lib):
    x, sum_, partial = torch.randn(4, 64), torch.zeros(64), torch.zeros(4, 64)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        lib.run("last_block", In(x), Out(partial), Both(torch.zeros(1, dtype=torch.int32)), Out(sum_), 4)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02  # 0.6 ms where it was measured


def stacks() -> int:
    """How many mappings of this process are as large as a thread's stack (a guard page lies below each)."""
    sizes = [
        [int(n, 16) for n in line.split()[0].split("-")] for line in Path("/proc/self/maps").read_text().splitlines()
    ]
    return sum(end - start == (128 << 10) - 4096 for start, end in sizes)


def together(lib, blocks: int) -> None:
    """A launch with all threads of all blocks, of 32 each, alive at once."""
    numbers, states = torch.zeros(2, blocks, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    lib.run("cooperative", Both(numbers[0]), Both(numbers[1]), Both(states), blocks)


@needs_compiler
def test_stacks_do_not_pile_up(lib):
    # Two mappings each, and Linux allows a process 65,530: the libraries of one test session came to more.
    other = library("tests/csrc/cluster_cases.cu")
    other.run("ranks", Out(torch.zeros(3, 8, 64, 3, dtype=torch.int32)), 2)
    before = stacks()
    together(lib, 160)
    assert before + 3000 < stacks() < before + 4500  # of 5,120
    other.run("ranks", Out(torch.zeros(3, 8, 64, 3, dtype=torch.int32)), 2)
    assert stacks() < before + 500


@needs_compiler
def test_no_memory_for_a_stack_is_a_report(lib):
    together(lib, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        with pytest.raises(HostError, match="no memory for the stack of a thread"):
            together(lib, 1024)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    together(lib, 2)


def test_what_several_want_at_once_is_made_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(host_library, "BUILT", tmp_path)
    command = ["sh", "-c", f'echo made >> {tmp_path / "log"}; sleep 0.2; : > "$2"', "sh"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: host_library._made(tmp_path / "x.o", command), range(4)))
    assert (tmp_path / "log").read_text() == "made\n" and (tmp_path / "x.o").exists()


@needs_compiler
def test_the_kernel_of_the_readme(tmp_path):
    text = (CSRC / "README.md").read_text()
    source = tmp_path / "normalize.cu"
    source.write_text(text.split("```cpp\n")[1].split("```")[0])
    x, y = torch.rand(5, 300).bfloat16(), torch.empty(5, 300, dtype=torch.bfloat16)
    library(str(source)).run("normalize", In(x), Out(y), 5, 300, order="random")
    torch.testing.assert_close(y, x / x.sum(1, keepdim=True), rtol=1e-2, atol=0)


@pytest.mark.parametrize("path", sorted(CSRC.glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_use_the_names_of_the_layer_alone(path):
    assert raw_names(path.read_text()) == []


def test_a_raw_name_is_seen():
    assert raw_names("int i = threadIdx.x; __syncthreads();  // __shared__\n/* asm */") == [
        "threadIdx",
        "__syncthreads",
    ]


@needs_nvcc
def test_the_same_source_is_cuda(tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")]
    command = ["nvcc", "-std=c++20", "-O3", *targets, "-Xptxas", "-v", "-c", f"-I{CSRC}", str(ROOT / SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "cases.o")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    kernels = done.stderr.count("Compiling entry function")
    assert kernels == 3 * 16 == done.stderr.count(" 0 bytes spill stores, 0 bytes spill loads")
