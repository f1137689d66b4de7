"""libfastlm_cuda.so: built here, loaded by a clean process, shipped in the wheel. tests/ops/test_cuda.py has what is said
where it cannot be used."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from fastlm.ops import _cuda
from tests.wheels import ROOT, build_library, build_wheel, copy_checkout, install, run

OBJECTS = ROOT / "build" / "cuda"  # compiled once: kept between runs under a hash of what they are made from
try:
    build_library.check()
    WHY_NOT = ""
except build_library.CannotBuild as error:
    WHY_NOT = str(error)
needs_nvcc = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def objects():
    """What the library is linked from."""
    return build_library.build(OBJECTS / "test" / build_library.NAME, OBJECTS)


@pytest.fixture(scope="module")
def library(objects):
    return OBJECTS / "test" / build_library.NAME


def library_or_installed(request):
    """The installed package's file if it can be used, else `library`, which takes minutes to build."""
    return _cuda.PATH if _cuda.unavailable() is None else request.getfixturevalue("library")


def test_an_installed_library_is_not_built_again(monkeypatch):
    monkeypatch.setattr(_cuda, "unavailable", lambda: None)
    assert library_or_installed(None) == _cuda.PATH


def _tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- the file -----------------------------------------------------------------------------------------------------


@needs_nvcc
def test_it_needs_no_gpu_library_and_only_torch_s_stable_abi(library):
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", _tool("readelf", "-d", library)))
    assert "libtorch_cpu.so" in needed
    assert needed <= {"libtorch_cpu.so"} | {n for n in needed if re.match(r"lib(stdc\+\+|gcc_s|c|m)\.so|ld-linux", n)}
    undefined = {line.split()[-1] for line in _tool("nm", "-D", "--undefined-only", library).splitlines()}
    of_torch = {name for name in undefined if re.search(r"torch|_ZNK?2at|_ZNK?3c10", name)}
    assert of_torch and all(re.match(r"(aoti_)?torch_\w+$", name) for name in of_torch), of_torch
    # torch brings a CUDA runtime of its own: neither may see the other's functions.
    defined = {line.split()[-1] for line in _tool("nm", "-D", "--defined-only", library).splitlines()}
    assert {f"fastlm_{name}_version" for name in ("library", "runtime", "driver")} <= defined and not [
        n for n in defined if re.match("cuda|cu[A-Z]|__cuda|fastlm_rms", n)
    ]
    assert str(ROOT).encode() not in library.read_bytes(), "it names the folder in which it was built"


def spills(log: str) -> list[str]:
    """(kernel, GPU, bytes) of ptxas's reports that tell of spills or stack, as text; raises if it is no such report."""
    found = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'\n(?:.*\n)*?\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads", log)  # fmt: skip
    gpus = {gpu for _, gpu, *_ in found}
    assert gpus == {"sm_80", "sm_90a", "sm_100"} and len(found) == log.count("Compiling entry function"), gpus
    return [f"{name} {gpu}: stack {a}, spills {b} {c}" for name, gpu, a, b, c in found if a + b + c != "000"]


@needs_nvcc
def test_no_kernel_spills(objects):
    kernels = [path for path in objects if not path.name.startswith("bindings-")]
    assert len(kernels) == len(list((ROOT / "csrc").glob("*.cu")))
    for path in kernels:
        assert spills(path.with_suffix(".log").read_text()) == []


def test_a_spill_is_seen():
    log = "".join(
        f"ptxas info    : Compiling entry function 'f' for '{gpu}'\nptxas info    : Function properties for f\n"
        f"    0 bytes stack frame, {n} bytes spill stores, 0 bytes spill loads\nptxas info    : Used 255 registers\n"
        for gpu, n in (("sm_80", 0), ("sm_90a", 8), ("sm_100", 0))
    )
    assert spills(log) == ["f sm_90a: stack 0, spills 8 0"]


@needs_nvcc
@pytest.mark.parametrize("op, statistics", [("rms_norm", 1), ("layer_norm", 2)])
def test_rows_of_norms_move_in_16_bytes(op, statistics, tmp_path):
    ptx = tmp_path / f"{op}.ptx"
    _tool(build_library.find_nvcc(), "-std=c++20", "-O3", "-I", ROOT / "csrc", "-arch=sm_90a", "-ptx",
          ROOT / "csrc" / f"{op}.cu", "-o", ptx)  # fmt: skip
    kernels = [text.split("(", 1) for text in re.split(r"\.entry ", ptx.read_text())[1:]]
    vectors = [
        (re.search(r"\dnorm_(\w+?)_kernel", name)[1], text)
        for name, text in kernels
        if "I" in name and "Any" not in name
    ]
    assert len(kernels) == 21 and len(vectors) == 17
    # What moves by 4 bytes: statistics of rows (rstd, mean), and in the backward their two sums.
    read = {"fwd": 0, "fwd_wide": 0, "bwd": statistics, "bwd_sums": statistics, "bwd_columns": 2 * statistics}
    # Blocks of a cluster tell each other as many sums.
    written = {"fwd": 2 * statistics, "fwd_wide": statistics, "bwd_sums": statistics, "bwd_columns": 0}
    for kind, text in vectors:
        loads, stores = (re.findall(rf"\b{word}(?:\.global)?((?:\.v\d)?\.[a-z]\d+)", text) for word in ("ld", "st"))
        times = (1, 2) if kind == "bwd" else (1,)  # twice those of the next row: before the loop, and in it
        assert loads.count(".f32") in [n * read[kind] for n in times] and ".v4" in "".join(loads), (kind, loads)
        assert set(loads) <= {".v4.f32", ".v4.u32", ".f32", ".u64", ".u32"}, (
            kind,
            loads,
        )  # seed and offset have 8 and 4
        assert ".v2.u64" in stores or kind == "bwd_sums", (kind, stores)
        if kind == "bwd":  # the partial rows of blocks of several rows
            assert set(stores) <= {".v2.u64", ".f32", ".u32"}, (kind, stores)
        else:
            assert stores.count(".f32") == written[kind] and set(stores) <= {".v2.u64", ".f32"}, (kind, stores)


@needs_nvcc
def test_what_has_not_changed_is_not_compiled_again(objects, tmp_path):
    times = [path.stat().st_mtime_ns for path in objects]
    assert build_library.build(tmp_path / "again.so", OBJECTS) == objects
    assert [path.stat().st_mtime_ns for path in objects] == times


def test_the_version_is_one_number():
    header = (ROOT / "csrc" / "fastlm.h").read_text(encoding="utf-8")
    assert int(re.search(r"#define FASTLM_LIBRARY_VERSION (\d+)", header).group(1)) == _cuda.VERSION
    assert build_library.NAME == _cuda.NAME


# --- loading it ---------------------------------------------------------------------------------------------------

ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
op = torch.ops.fastlm_cuda.rms_norm_fwd
for x in (torch.ones(2, 3), torch.ones(2, 3, device="meta")):
    try:
        op(x, None, None, None, None, 1e-6, 0.0, False, 0.0)
    except RuntimeError as error:
        print(error)
"""


@needs_nvcc
def test_torch_alone_loads_it_and_other_tensors_are_refused(library, tmp_path):
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, str(library)]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rms_norm: x must be a CUDA tensor") == 2, done.stdout


DRIVER = """
#include <string.h>
int version(int* v) { *v = VERSION; return 0; }
int begin(unsigned flags) { return 0; }
int nothing(void) { return 100; }  // no device
int cuGetProcAddress_v2(const char* name, void** found, int since, unsigned long long flags, int* result) {
  *found = strcmp(name, "cuDriverGetVersion") == 0 ? (void*)version
         : strcmp(name, "cuInit") == 0 ? (void*)begin
         : strncmp(name, "cuGetProcAddress", 16) == 0 ? (void*)cuGetProcAddress_v2 : (void*)nothing;
  if (result) *result = 0;
  return 0;
}
int cuGetProcAddress(const char* name, void** found, int since, unsigned long long flags) {
  return cuGetProcAddress_v2(name, found, since, flags, 0);
}
"""
VERSIONS = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
print(library.fastlm_runtime_version(), library.fastlm_driver_version())
"""


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver of its own")
def test_it_tells_the_driver_that_it_finds(library, tmp_path):
    """Its CUDA runtime tells an older driver's version too, though it refuses every other call then."""
    release = re.search(r"release (\d+)\.(\d+)", _tool(build_library.find_nvcc(), "--version"))
    runtime = 1000 * int(release[1]) + 10 * int(release[2])
    assert run([sys.executable, "-c", VERSIONS, library], tmp_path).split() == [str(runtime), "0"]
    command = ["gcc", "-x", "c", "-shared", "-fPIC", "-DVERSION=12080", "-", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    found = run([sys.executable, "-c", VERSIONS, library], tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    assert found.split() == [str(runtime), "12080"]


INSTALLED = """
import sys
from pathlib import Path
# An editable install of the checkout answers for whatever is missing here.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import torch
from fastlm import doctor, ops
from fastlm.ops import _cuda
from fastlm.ops._op import REGISTRY, missing_backends
assert Path(_cuda.__file__).resolve().is_relative_to(Path(sys.argv[1]).resolve()), _cuda.__file__
x = torch.ones(4, 8)
ops.rms_norm(x)
try:
    ops.rms_norm(x, backend="cuda")
except ValueError as error:
    assert "it needs CUDA tensors, got cpu" in str(error), error
assert not _cuda._asked and "libfastlm_cuda" not in Path("/proc/self/maps").read_text(), "loaded before it was needed"
assert _cuda.unavailable() is None, _cuda.unavailable()
assert "libfastlm_cuda" in Path("/proc/self/maps").read_text()
if not torch.cuda.is_available():
    assert missing_backends()["cuda"] == "no CUDA GPU"
assert "version" in doctor.report()["library"]

# The library's functions take what the ops hand them, and give what the fakes say.
for op in REGISTRY.values():
    for entry, name in zip((op.forward, op.backward), op.kernels.get("cuda", ())):
        if isinstance(name, str):  # else torch's own products, or nothing
            ours, theirs = entry._schema, _cuda.function(name)._schema
            assert [(a.name, str(a.type)) for a in ours.arguments][:-1] == [(a.name, str(a.type)) for a in theirs.arguments]
            assert [str(r.type) for r in ours.returns] == [str(r.type) for r in theirs.returns], op.name

meta = torch.ones(4, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
ops.softmax(meta, backend="cuda").sum().backward()
assert meta.grad.shape == meta.shape and meta.grad.dtype == meta.dtype
meta = meta.detach()
def call(x, residual):
    return ops.rms_norm(x, residual=residual, backend="cuda")
eager, compiled = call(meta, meta.float()), torch.compile(call, fullgraph=True, backend="eager")(meta, meta.float())
for y, residual_out in (eager, compiled):
    assert y.shape == residual_out.shape == (4, 8) and y.dtype == torch.bfloat16 and residual_out.dtype == torch.float32
print("all well")
"""


@needs_nvcc
def test_the_wheel_brings_it(objects, tmp_path):
    pytest.importorskip("wheel")
    (tmp_path / "checkout").mkdir()
    checkout = copy_checkout(tmp_path / "checkout")
    shutil.copytree(OBJECTS, checkout / "build" / "cuda", ignore=shutil.ignore_patterns("test"))
    no_host = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}  # fastlm._host: tests/test_packaging.py builds it
    wheel = build_wheel(checkout, tmp_path / "wheel", FASTLM_CUDA="1", **no_host)
    with zipfile.ZipFile(wheel) as archive:
        assert "fastlm/libfastlm_cuda.so" in archive.namelist() and "-cp310-abi3-" in wheel.name
    install(wheel, tmp_path / "target", tmp_path)
    target = str(tmp_path / "target")
    out = run([sys.executable, "-c", INSTALLED, target], tmp_path, PYTHONPATH=target, TRITON_INTERPRET="1")
    assert out.splitlines()[-1] == "all well"
    # What the build before this one left behind is not in a wheel that was not asked for it.
    assert list(checkout.glob("build/lib*/fastlm/libfastlm_cuda.so"))
    plain = build_wheel(checkout, tmp_path / "plain", **no_host)
    with zipfile.ZipFile(plain) as archive:
        assert "fastlm/libfastlm_cuda.so" not in archive.namelist()


@pytest.mark.parametrize(
    "environment, words",
    [
        ({}, "is not built; set FASTLM_CUDA=1"),
        (
            {"FASTLM_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "although FASTLM_CUDA=1 is set: nvcc was not found in CUDA_HOME",
        ),
    ],
)
def test_a_build_without_it_says_so(environment, words):
    assert words in run([sys.executable, "setup.py", "--name"], ROOT, PYTHONDONTWRITEBYTECODE="1", **environment)


def test_an_old_nvcc_is_told_from_one_that_can(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for release, fits in (("12.4", False), ("12.8", True), ("13.0", True)):
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.131'\n")
        nvcc.chmod(0o755)
        if fits:
            build_library.check()
        else:
            with pytest.raises(build_library.CannotBuild, match="is release 12.4; 12.8 or newer is needed"):
                build_library.check()


@pytest.mark.gpu
@pytest.mark.skipif(bool(WHY_NOT) and not _cuda.PATH.exists(), reason=WHY_NOT)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(request):
    """The numbers, on a second stream: here the host body stands in (tests/csrc)."""
    code = """
import os, sys, torch
from pathlib import Path
from fastlm import ops
from fastlm.ops import _cuda
from fastlm.testing import assert_accurate
_cuda.PATH = Path(sys.argv[1])
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((7, 40), (3, 37), (5, 4096), (2, 40000)):
        x, residual = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape, device="cuda").to(dtype)
        weight = torch.randn(shape[1:], device="cuda").to(dtype)
        torch.cuda.synchronize()
        seeded, llama = {"dropout_p": 0.3, "seed": 11}, {"casting": "llama", "weight_offset": 1.0}
        for norm in (ops.rms_norm, ops.layer_norm):
            for options in ({}, {"residual": residual}, seeded, llama):
                runs = []
                for backend, kind in (("cuda", dtype), ("reference", torch.float64), ("reference", dtype)):
                    inputs = [t.detach().to(kind).requires_grad_() for t in (x, weight)]
                    extra = {k: t.to(kind) if k == "residual" else t for k, t in options.items()}
                    torch.cuda.synchronize()
                    with torch.cuda.stream(torch.cuda.Stream()):
                        out = norm(*inputs, backend=backend, **extra)
                        outs = out if isinstance(out, tuple) else (out,)
                        gradients = torch.autograd.grad(outs, inputs, [residual.to(kind)] * len(outs))
                    torch.cuda.synchronize()
                    runs.append((*outs, *gradients))
                for found, exact, plain in zip(*runs):
                    assert_accurate(found, exact, plain)
        with torch.cuda.stream(torch.cuda.Stream()):
            y = ops.softmax(x, scale=0.5, backend="cuda")
            (dx,) = torch.autograd.grad(ops.softmax(residual.requires_grad_(), backend="cuda"), residual, x)
        torch.cuda.synchronize()
        torch.testing.assert_close(y, torch.softmax(x.float() * 0.5, -1).to(dtype))
        s = torch.softmax(residual.detach().float(), -1).to(dtype).float()
        torch.testing.assert_close(dx, (s * (x.float() - (x.float() * s).sum(-1, keepdim=True))).to(dtype))
"""
    run([sys.executable, "-c", code, library_or_installed(request)], ROOT, PYTHONPATH=os.fspath(ROOT))
