"""`python -m benchmarks aot`: what the compiler makes of every Triton kernel, on a machine without a GPU.

The launchers themselves are called on meta tensors, with a stand-in for Triton's driver and every launch turned into a
compile, for sm_80, sm_90 and sm_100. A row is one kernel of one call: registers and spilled bytes as Triton's own
`ptxas -v` reports them (cuobjdump says 0 local bytes for kernels that do spill), shared memory, tensor-core products, and
how wide the accesses to global memory are. Rows are compared with benchmarks/results/aot.json, which is committed.

A benchmark file lists its calls as `AOT = [Aot("module:launcher", *args), ...]`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.run import load, ops_with_benchmarks

BASELINE = Path(__file__).parent / "results" / "aot.json"
ARCHS = (80, 90, 100)
# The tensor-core instruction that a product should become on each generation.
_PRODUCTS = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}
_ACCESS = re.compile(r"\b(?:ld|st)\.global(?:\.[A-Za-z_0-9:]+)*?(?:\.v([248]))?\.[busf](8|16|32|64|128)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)\s*[,;]")


def accesses(ptx: str) -> dict[int, int]:
    """Width in bytes -> number of instructions in the PTX text that read or write global memory that wide."""
    widths: dict[int, int] = {}
    found = [int(lanes or 1) * int(bits) // 8 for lanes, bits in _ACCESS.findall(ptx)]
    for width in found + [int(size, 0) for size in _COPY.findall(ptx)]:
        widths[width] = widths.get(width, 0) + 1
    return dict(sorted(widths.items()))


def wide_share(widths: dict[int, int]) -> float:
    """Share of the bytes moved by accesses of 16 bytes or more."""
    total = sum(width * count for width, count in widths.items())
    return sum(width * count for width, count in widths.items() if width >= 16) / total if total else 1.0


def ptxas_report(log: str) -> dict:
    """Registers and spilled bytes (stores + loads) from the text of `ptxas -v`."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas -v said neither registers nor spills:\n{log}")
    return {"registers": max(registers), "spills": sum(int(a) + int(b) for a, b in spills)}


class _Driver:
    """Stands in for Triton's CUDA driver: says which GPU to compile for, and can do nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # compiled kernels are kept per device: one device per architecture

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind):
        return kind


def _keep_ptxas_log() -> None:
    """Lets Triton's last stage keep what `ptxas -v` said in place of the binary, which nobody runs here.

    The results go to a cache of their own: Triton must never find these as kernels.
    """
    import subprocess
    import tempfile

    import triton
    from triton.backends.nvidia import compiler

    def make_cubin(self, src, metadata, opt, capability):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_text(src)
            flags = [] if opt.enable_fp_fusion else ["--fmad=false"]
            target = f"--gpu-name={compiler.sm_arch_from_capability(capability)}"
            command = [compiler.get_ptxas(self.target.arch).path, "-lineinfo", *flags, "-v", target, str(path)]
            done = subprocess.run([*command, "-o", f"{path}.o"], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"ptxas failed: {done.stderr}")
        return done.stderr.encode()

    compiler.CUDABackend.make_cubin = make_cubin
    triton.knobs.cache.dir = triton.knobs.cache.get_triton_dir("fastlm_aot")


def compile_case(stem: str, index: int, arch: int) -> dict[str, dict]:
    """The rows of one AOT case on one architecture, by key. Must run in a process without TRITON_INTERPRET."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
        raise RuntimeError("benchmarks.aot: TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if not getattr(JITFunction, "_fastlm_plain_run", None):
        _keep_ptxas_log()
        JITFunction._fastlm_plain_run = JITFunction.run
    plain_run, compiled = JITFunction._fastlm_plain_run, []

    def run(self, *args, grid, warmup, **kwargs):
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = run
    driver.set_active(_Driver(arch))
    case = load(stem).AOT[index]
    module, function = case.launcher.split(":")
    getattr(importlib.import_module(f"fastlm.kernels.{module}"), function)(*case.args)
    if not compiled:
        raise RuntimeError(f"benchmarks.aot: {case} launched no kernel")
    rows: dict[str, dict] = {}
    for name, kernel in compiled:
        key, twin = f"{stem} | {name} | sm_{arch} | {case}", 2
        while key in rows:
            key, twin = f"{stem} | {name} #{twin} | sm_{arch} | {case}", twin + 1
        rows[key] = _row(kernel, arch)
    return rows


def _row(kernel, arch: int) -> dict:
    ptx, log = kernel.asm["ptx"], kernel.asm["cubin"].decode()
    widths = accesses(ptx)
    return {
        **ptxas_report(log),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "products": len(re.findall(_PRODUCTS[arch], ptx)),
        "wide": round(wide_share(widths), 3),
        "accesses": {str(width): count for width, count in widths.items()},
    }


def compile_all(stems: list[str], workers: int) -> dict[str, dict]:
    """The rows of every case of these ops on every architecture."""
    cases = [(s, i, case) for s in stems for i, case in enumerate(getattr(load(s), "AOT", []))]
    tasks = [(s, i, arch) for s, i, case in cases for arch in case.archs or ARCHS]
    os.environ.pop("TRITON_INTERPRET", None)  # the workers start afresh and read it anew
    rows: dict[str, dict] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compile_case, *zip(*tasks)) if tasks else ():
            rows |= found
    return rows


def compare(rows: dict[str, dict], baseline: dict[str, dict], stems: list[str]) -> list[str]:
    """What got worse than the baseline, in words; rows that only one side has count too."""
    problems = []
    for key, row in rows.items():
        old = baseline.get(key)
        if old is None:
            problems.append(f"{key}: not in the baseline")
            continue
        if row["spills"] > old["spills"]:
            problems.append(f"{key}: spills {row['spills']} bytes, {old['spills']} before")
        if row["wide"] < old["wide"] - 0.01:
            problems.append(f"{key}: {row['wide']:.0%} of bytes in accesses of 16 bytes, {old['wide']:.0%} before")
        if row["products"] < old["products"]:
            problems.append(f"{key}: {row['products']} tensor-core products, {old['products']} before")
    gone = [key for key in baseline if key.split(" | ")[0] in stems and key not in rows]
    return problems + [f"{key}: in the baseline, but no longer compiled" for key in gone]


def table(rows: dict[str, dict]) -> str:
    """The rows as aligned text."""
    head = f"{'kernel':32} {'arch':6} {'regs':>4} {'spill':>6} {'shared':>7} {'warps':>5} {'mma':>4} {'16 B':>5}  call"
    lines = [head]
    for key, r in rows.items():
        _, kernel, arch, call = key.split(" | ", 3)
        lines.append(
            f"{kernel:32} {arch:6} {r['registers']:4} {r['spills']:6} {r['shared']:7} {r['warps']:5} {r['products']:4} "
            f"{r['wide']:5.0%}  {call}"
        )
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__}


def read_baseline() -> dict:
    """The committed baseline: {"versions": ..., "rows": key -> row}; empty where there is none."""
    return json.loads(BASELINE.read_text()) if BASELINE.exists() else {"versions": {}, "rows": {}}


def write_baseline(rows: dict[str, dict]) -> None:
    """Writes one line per row, so that a diff shows which kernel changed."""
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    BASELINE.write_text(f'{{"versions": {json.dumps(_versions())}, "rows": {{\n{body}\n}}}}\n')


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 1 worse than the baseline, 2 the baseline is of another Triton."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=ops_with_benchmarks(), help="default all")
    parser.add_argument("--write", action="store_true", help="make what was found the new baseline")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="parallel processes")
    options = parser.parse_args(argv)
    start, stems = time.monotonic(), options.op or ops_with_benchmarks()
    rows, baseline = compile_all(stems, options.workers), read_baseline()
    print(table(rows))
    print(f"{len(rows)} kernels in {time.monotonic() - start:.0f} s")
    if options.write:
        kept = {k: r for k, r in baseline["rows"].items() if k.split(" | ")[0] not in stems and options.op}
        write_baseline(kept | rows)
        print(f"baseline written: {BASELINE}")
        return 0
    if baseline["versions"] != _versions():
        print(f"the baseline is of {baseline['versions']}, this is {_versions()}: nothing compared", file=sys.stderr)
        return 2
    problems = compare(rows, baseline["rows"], stems)
    for problem in problems:
        print(f"worse: {problem}", file=sys.stderr)
    if problems:
        print("If this is meant: python -m benchmarks aot --write, and say why in the commit.", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
