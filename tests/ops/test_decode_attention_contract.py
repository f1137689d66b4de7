"""What decode_attention promises beside its numbers: no stray access, transforms, compiled code, messages; and planted bugs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import ops
from fastlm.ops.decode_attention import OP, decode_attention
from fastlm.testing import bands_intact, guarded, planted_bug, poison_empty
from tests.ops import decode_cases as cases

BACKENDS = ("reference", "torch", "triton")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _check_guards(device, backend="triton", **options):
    for page, splits in ((0, 1), (6, 2)):
        args = cases.inputs(device, page, S=3, lengths=(5, 37))
        pairs = [guarded(t) for t in args if t is not None]
        inner = [t for t, _ in pairs]

        def call(q, k, v, n, table=None, splits=splits):
            kept = {"splits": splits, "return_lse": True, "backend": backend}
            return decode_attention(q, k, v, n, page_table=table, **kept, **options)

        with poison_empty():
            got = call(*inner)
        assert all(bands_intact(buffer) for _, buffer in pairs), "wrote outside an input"
        assert all(torch.equal(a, b) for a, b in zip(got, call(*args))), "unwritten elements or a read outside a tensor"
        want = decode_attention(*args[:4], page_table=args[4], return_lse=True, backend="reference", **options)
        torch.testing.assert_close(got, want)


def test_guard_bands(device):
    _check_guards(device)
    _check_guards(
        device, window=5, **cases.options("sinks", 4, device), **cases.options("key_starts", 4, device, (0, 20))
    )


def test_dispatcher(device):
    for page, splits in ((0, 1), (4, 2)):
        q, k, v, lengths, table = cases.inputs(device, page, S=2, garbage=False)
        starts, sinks = torch.zeros_like(lengths), torch.randn(4, device=device)
        args = (
            q,
            k,
            v,
            lengths,
            table,
            starts,
            sinks.abs(),
            torch.randn(4, 5, device=device),
            sinks,
            7,
            0.3,
            2.0,
            splits,
        )
        torch.library.opcheck(OP.forward, (*args, "triton"))
        torch.library.opcheck(OP.forward, (q, k, v, lengths, table, *[None] * 4, -1, 0.3, 0.0, splits, "triton"))


@pytest.mark.parametrize("page, backend", [(0, "triton"), (4, "triton"), (4, "torch")])
def test_compile(page, backend, device):
    torch._dynamo.reset()
    fn = lambda q, k, v, n, table: decode_attention(q, k, v, n, page_table=table, window=9, backend=backend)  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ({"T": 37}, {"T": 20, "lengths": (7, 20)}):
        args = cases.inputs(device, page, S=2, garbage=False, **sizes)
        torch.testing.assert_close(compiled(*args), fn(*args))


@each_backend
def test_autocast_follows_the_cache(backend, device):
    q, k, v, lengths, _ = cases.inputs(device, dtype=torch.bfloat16)
    want = decode_attention(q, k, v, lengths, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = decode_attention(q.float(), k, v, lengths, backend=backend)
        assert decode_attention(q, k.float(), v.float(), lengths, backend=backend).dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """No wait for the GPU, and a captured step follows lengths that change."""
    args = cases.inputs("cuda", 16, T=600, lengths=(600, 599, 13), garbage=False, dtype=torch.bfloat16)
    call = lambda: decode_attention(*args[:4], page_table=args[4], backend="triton")  # noqa: E731
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for change in (0, -5):
        args[3].add_(change)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, call())


BUGS = {
    "no scale": ("scores = scores * (scale * LOG2E)", "scores = scores * LOG2E"),
    "sum not shrunk": ("total = total * shrink + tl.sum(probs, 1)", "total = total + tl.sum(probs, 1)"),
    "mask forgotten": ("visible(rule, place, query[:, None], key[None, :])", "key[None, :] < hi + query[:, None]"),
    "another head's keys": ("k_base = k_ptr + h_kv.to(tl.int64) * stride_kh", "k_base = k_ptr + 0 * h_kv.to(tl.int64)"),
    "another row's pages": ("table_row = table_ptr + b64 * stride_table", "table_row = table_ptr + 0 * b64"),
    "pages a tile late": ("        page = next_page\n", ""),
    "slot": ("((start + n).to(tl.uint32) % PAGE).to(tl.int64) * stride_slot", "0 * n"),
    "query": ("query = row // GROUP", "query = row // GROUP * 0"),
    "garbage loaded": ("live = (key >= place.start) & (key < hi)", "live = key >= 0"),
    "a share forgotten": ("lo += tl.program_id(1) * share", "lo += (tl.program_id(1) + 1) * share"),
    "shares overlap": ("hi = tl.minimum(hi, lo + share)", "hi = tl.minimum(hi, lo + share + BLOCK_N)"),
    "shares not weighed": ("acc = acc * shrink + tl.sum(o * weights[:, None], 0)", "acc = acc + tl.sum(o, 0)"),
    "sum of shares": ("total = total * shrink + tl.sum(totals * weights, 0)", "total = total + tl.sum(totals, 0)"),
    "tail unwritten": ("    live = row < S * GROUP\n    query", "    live = row < S * GROUP - 1\n    query"),
    "sink forgotten": ("total = total * shrink + tl.exp2(sink - new_top)", "total = total * shrink"),
    "edge tiles skipped": ("gap_at, gap, 0)\n        next_start", "gap_at, gap + BLOCK_N, 0)\n        next_start"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    with planted_bug("decode_attention", *BUGS[bug]), pytest.raises(AssertionError):
        _check_guards(device, **cases.options("sinks", 4, device), **cases.options("key_starts", 4, device, (0, 20)))
        _check_guards(device, window=5)
        _check_guards(device)


def test_write_outside_a_tensor_is_seen(device):
    # Only under guard bands: without them this bug corrupts the process.
    bug = planted_bug(
        "decode_attention", "mask=mask & (total > 0.0)[:, None])", "mask=(dv < DV + 4)[None, :] & live[:, None])"
    )
    with bug, pytest.raises(AssertionError, match="wrote outside|not close|unwritten"):
        _check_guards(device)


# In a process of its own: Triton must not be interpreting. Nothing runs; launches are turned into compiles, as far as the
# loops that are looked at: LLVM and ptxas see these kernels in tests/test_aot.py.
SCRIPT = """
import json, re, sys, torch, triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from benchmarks import aot
from fastlm.kernels.decode_attention import decode_attention

nothing = dict.fromkeys(("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
nothing |= {"name": "kernel", "global_scratch_align": 1, "profile_scratch_align": 1}
CUDABackend.make_llir = lambda self, module, metadata, *_: metadata.update(nothing) or "-"
CUDABackend.make_ptx = CUDABackend.make_cubin = lambda self, text, *_: text
triton.knobs.cache.dir = triton.knobs.cache.get_triton_dir("fastlm_loops")  # Triton must never take these for kernels
plain_run, compiled = JITFunction.run, {}

def run(self, *args, grid, warmup, **kwargs):
    kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled.setdefault(self.fn.__name__, {})[kernel.hash] = kernel
    return kernel

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def launch(B, T, page, S=1, left=-1, heavy=False):
    cache = meta(*((B * T // page, page) if page else (B, T)), 2, 128)
    table = meta(B, T // page, dtype=torch.int32) if page else None
    slopes = meta(8, dtype=torch.float32) if heavy else None
    distances = meta(8, 257) if heavy else None
    decode_attention(meta(B, S, 8, 128), cache, cache, meta(B, dtype=torch.int64), table, None, slopes, distances, None, left,
                     0.1, 0.0, 0)

JITFunction.run = run
driver.set_active(aot._Driver(90))
for B in [*range(1, 40), 528]:  # the last one fills 132 SMs without a cut
    for T in (1000, 1008, 65536):
        launch(B, T, 8)
counts = {name: len(kernels) for name, kernels in compiled.items()}
loops, ahead = 0, 0
for arch in (80, 90):
    driver.set_active(aot._Driver(arch))
    for page in (0, 1, 64):
        for options in ({}, {"left": 2048}, {"heavy": True}):
            compiled.clear()
            launch(8, 65536, page, **options)
            for kernel in compiled["_decode_attention_kernel"].values():
                lines = kernel.asm["ttgir"].splitlines()
                for i, line in enumerate(lines):
                    if "scf.for" in line:
                        depth = len(line) - len(line.lstrip())
                        end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(" " * depth + "}"))
                        body = "\\n".join(lines[i:end])
                        loops += 1
                        ahead += body.count("async_copy_global_to_local") == 2 and "tt.load %k" not in body
print(json.dumps([counts, loops, ahead]))
"""


def test_compiled_code():
    """Batches and lengths of all sizes share their code, and every loop loads its keys and values ahead."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    counts, loops, ahead = json.loads(done.stdout.splitlines()[-1])
    assert counts == {"_decode_attention_kernel": 2, "_combine_kernel": 1}  # in shares and in one piece
    assert loops == ahead == 2 * 3 * 3 * 2


def test_explain_and_errors(device):
    q, k, v, lengths, table = cases.inputs("cpu", 4, lengths=(37, 18), garbage=False)
    args = {"q": q, "k_cache": k, "v_cache": v, "lengths": lengths, "page_table": table}
    assert ops.explain(decode_attention, **args).backend == "torch"
    found = ops.explain(decode_attention, **args, sinks=torch.randn(4))
    assert found.backend == "reference" and "sinks" in found.reasons["torch"]
    for error, message, change in [
        (ValueError, r"q must be floating point \[B, S, H, Dh\], got torch.float32 \[1, 4, 20\]", {"q": q[0]}),
        (ValueError, "q has 17 new tokens, at most 16; for more use ops.attention", {"q": q.expand(2, 17, 4, 20)}),
        (ValueError, r"k_cache must have q's width 19, at least 1, got", {"q": q[..., :19]}),
        (ValueError, "q's 3 heads must be a multiple of k_cache's 2", {"q": q[:, :, :3]}),
        (TypeError, "q must have the cache's dtype torch.float32, got torch.bfloat16; cast it", {"q": q.bfloat16()}),
        (ValueError, r"v_cache must be \[23, 4, 2, Dv\] like k_cache", {"v_cache": v[:, :3]}),
        (ValueError, "k_cache must have 2 rows .* a paged cache needs page_table", {"page_table": None}),
        (ValueError, r"page_table must be \[2, max_pages\]", {"page_table": table[0]}),
        (ValueError, "page_table must name pages 0..22 where a row has tokens, got 23 at", {"page_table": table * 0 + 23}),
        (ValueError, r"lengths must lie in 0..40, the places of a row, got \[37, 41\]", {"lengths": torch.tensor([37, 41])}),
        (TypeError, "lengths must be int32 or int64, got torch.bool", {"lengths": lengths > 0}),
        (ValueError, r"lengths must be \[2\], one for each row, got \[1\]", {"lengths": lengths[:1]}),
        (ValueError, r"key_starts must lie in 0..40, .* got \[0, -1\]", {"key_starts": torch.tensor([0, -1])}),
        (ValueError, r"key_starts must be \[2\]", {"key_starts": torch.tensor(3)}),
        (ValueError, "window must be the number of keys seen before .* got -2", {"window": -2}),
        (ValueError, r"window must be .* got \(1, 2, 3\)", {"window": (1, 2, 3)}),
        (ValueError, r"window must be .* got 'all'", {"window": "all"}),
        (ValueError, "softcap must be > 0 or None.*got 0", {"softcap": 0.0}),
        (ValueError, "splits must lie in 1..65535, or be None to choose, got 0", {"splits": 0}),
        (ValueError, r"sinks must be \[4\], one for each query head, got \[2\]", {"sinks": torch.randn(2)}),
        (TypeError, "alibi_slopes must be floating point, got torch.int64", {"alibi_slopes": torch.arange(4)}),
        (ValueError, r"relative_bias must be a RelativeBias or a tensor \[4, 2 R \+ 1\], .* got \[4, 8\]",
         {"relative_bias": torch.randn(4, 8)}),
        (ValueError, "sinks must be on q's device cpu, got meta", {"sinks": torch.randn(4, device="meta")}),
        (ValueError, "it has no gradient, and q requires one; use ops.attention, or torch.no_grad",
         {"q": q.clone().requires_grad_()}),
        (ValueError, "backend 'torch' cannot serve this call: torch's attention has no softcap",
         {"softcap": 1.0, "backend": "torch"}),
    ]:  # fmt: skip
        with pytest.raises(error, match="decode_attention: " + message):
            decode_attention(**{**args, **change})
    with torch.no_grad():
        decode_attention(**{**args, "q": q.clone().requires_grad_()})
    wide = torch.randn(1, 1, 1, 264, device=device)
    with pytest.raises(ValueError, match="its heads are at most 256 wide, got 264"):
        decode_attention(wide, wide, wide, torch.ones(1, dtype=torch.int64, device=device), backend="triton")
