"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, no worse than the committed baseline (no GPU needed)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import aot

ROOT = Path(__file__).parents[1]
PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b32 { %r5, %r6 }, [ %rd1 + 0 ];
    st.global.b32 [ %rd2 + 0 ], { %r7 };
    ld.global.v8.b32 { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 }, [ %rd1 ];
    ld.global.nc.u16 %rs1, [%rd3];
    @%p2 st.global.v2.b64 [ %rd4 ], { %rd5, %rd6 };
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r9;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4, 4;
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r8 ];
"""


def test_access_widths_from_ptx():
    assert aot.accesses(PTX) == {2: 1, 4: 2, 8: 1, 16: 3, 32: 1}
    assert aot.wide_share({16: 3, 4: 4}) == 0.75


def test_ptxas_report():
    log = "ptxas info : 0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\nptxas info : Used 40 registers"
    assert aot.ptxas_report(log) == {"registers": 40, "spills": 20}
    with pytest.raises(RuntimeError, match="neither registers nor spills"):
        aot.ptxas_report("")


@pytest.mark.parametrize(
    "change, word",
    [({"spills": 8}, "spills 8 bytes, 0 before"), ({"wide": 0.5}, "50% of bytes"), ({"products": 1}, "1 tensor-core")],
)
def test_compare_sees_what_got_worse(change, word):
    key, row = "op | _kernel | sm_90 | call", {"spills": 0, "wide": 1.0, "products": 2}
    assert aot.compare({key: row}, {key: row}, ["op"]) == []
    (problem,) = aot.compare({key: row | change}, {key: row}, ["op"])
    assert word in problem and key in problem
    assert aot.compare({key: row}, {key: row | change}, ["op"]) == []  # better is no problem
    assert "not in the baseline" in aot.compare({key: row}, {}, ["op"])[0]
    assert "no longer compiled" in aot.compare({}, {key: row}, ["op"])[0]
    assert aot.compare({}, {key: row}, ["other"]) == []


def test_every_launcher_has_a_case():
    import fastlm.ops  # noqa: F401 - fills the registry
    from benchmarks.run import load, ops_with_benchmarks
    from fastlm.ops._op import REGISTRY

    listed = {case.launcher for stem in ops_with_benchmarks() for case in getattr(load(stem), "AOT", [])}
    # A function in place of a name calls torch's own products: nothing to compile.
    names = {name for op in REGISTRY.values() for name in op.kernels.get("triton", ()) if isinstance(name, str)}
    missing = names - listed
    assert not missing, f"no Aot case in benchmarks/ops/bench_*.py for {sorted(missing)}"


def test_code_is_no_worse_than_the_baseline():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "aot"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode == 2 and "nothing compared" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"\n{done.stderr}"  # the table is not repeated here


BAD_KERNEL = """
import torch, triton
import triton.language as tl

@triton.jit
def _greedy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    # Far more live values than registers, and a mask that forbids wide accesses.
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    total = tl.sum(x)
    tl.store(y_ptr + offsets, x * total, mask=offsets < n)

def launch(x):
    _greedy_kernel[(1,)](x, torch.empty_like(x), 16001, BLOCK=16384, num_warps=1)
"""
SCRIPT = """
import json, sys
import fastlm.kernels
from types import SimpleNamespace
from benchmarks import aot
from benchmarks.harness import Aot, meta
fastlm.kernels.__path__.append(sys.argv[1])
aot.load = lambda stem: SimpleNamespace(AOT=[Aot("greedy:launch", meta(16384))])
print(json.dumps(aot.compile_case("greedy", 0, 90)))
"""


def test_spills_and_narrow_accesses_are_seen(tmp_path):
    (tmp_path / "greedy.py").write_text(BAD_KERNEL)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ((key, row),) = json.loads(done.stdout).items()
    assert key == "greedy | _greedy_kernel | sm_90 | launch bf16[16384]"
    assert row["spills"] > 0 and row["registers"] == 255, row
    assert row["wide"] < 0.1, row


def test_it_refuses_to_run_interpreted():
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        patch.setenv("TRITON_INTERPRET", "1")
        aot.compile_case("rms_norm", 0, 90)
