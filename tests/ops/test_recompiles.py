"""Batches and sequences of many lengths share one compiled kernel: a compile costs seconds, in the middle of a training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# In a process of its own: Triton must not be interpreting. Nothing runs; launches are turned into compiles for sm_90.
SCRIPT = """
import json, torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from benchmarks import aot
from fastlm.kernels import activation, layer_norm, lora_product, mlp_epilogue, rotary

aot._keep_ptxas_log()
plain_run, compiled = JITFunction.run, {}

def run(self, *args, grid, warmup, **kwargs):
    kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled.setdefault(self.fn.__name__, set()).add(kernel.hash)
    return kernel

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

JITFunction.run = run
driver.set_active(aot._Driver(90))
table = meta(4096, 32, dtype=torch.float32)
for length in range(1, 65):
    q, k, _ = meta(3, length, 8, 64).split((4, 2, 2), 2)
    rotary.rotary_fwd(q, k, table, table, meta(3, length, dtype=torch.int64), False)
    rotary.rotary_fwd(q, k, table, table, None, False, length)
    starts, cu_seqlens = meta(length, dtype=torch.int64), meta(length + 1, dtype=torch.int32)
    rotary.rotary_fwd(q[:1], k[:1], table, table, None, False, 0, starts, cu_seqlens)
    x = meta(3, length, 256)
    for x in (x, q):  # rows at one stride, and the heads of a product at two
        w = meta(x.shape[-1])
        _, _, mean, rstd = layer_norm.layer_norm_fwd(x, w, w, None, None, 1e-5, 0.0, False, 0.0)
        layer_norm.layer_norm_bwd(x, None, x, w, w, mean, rstd, None, False, True, True, 1e-5, 0.0, 0.0)
    x, matrix, low = meta(3, length, 256), meta(256, 256), meta(16, 256)
    mlp = (matrix, matrix, matrix, None, None, None)
    mlp_epilogue.mlp_fwd(x, *mlp, 1, "silu", True)
    mlp_epilogue.mlp_bwd(x, x, meta(3, length, 2, 256), *mlp, 15, 1, "silu", True)
    lora_product.lora_linear_fwd(x, matrix, low, low.t(), None, 0.5 * length)
    activation.glu_bwd(x, *meta(3, length, 512).chunk(2, -1), "silu")
print(json.dumps({name: len(hashes) for name, hashes in compiled.items()}))
"""


def test_64_lengths_compile_once():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == {
        "_rotary_kernel": 6,  # by positions, offset, and packed with offsets: one for a few tokens, one for many
        "_norm_fwd_kernel": 2,  # one for each width
        "_norm_bwd_kernel": 2,
        "_activation_bwd_kernel": 1,
        "_mlp_hidden_kernel": 2,  # for up to 64 rows, and for more
        "_mlp_slopes_kernel": 2,
        "_lora_product_kernel": 2,
    }
