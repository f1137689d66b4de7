"""Builds libfastlm_cuda.so, which holds every CUDA kernel. Needs nvcc and any build of torch, but no GPU.

What CUDA 13 builds needs a driver of CUDA 13 or newer, and so on: the CUDA runtime is linked in. fastlm/ops/_cuda.py checks it.

`FASTLM_CUDA=1 pip install .` and `make wheel` come here through setup.py. By hand: `python csrc/build_library.py [file]`.

Each source becomes one object, several at a time, kept in build/cuda under a name that is a hash of all that goes into it: a
second build compiles what has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "libfastlm_cuda.so"
# GPUs: sm_80 (also 8.6, 8.9), sm_90a (Hopper), sm_100 (Blackwell); later ones compile the PTX of compute_100 on first use.
ARCHITECTURES = {"80": "sm_80", "90a": "sm_90a", "100": "[sm_100,compute_100]"}
OLDEST = (12, 8)  # release of nvcc that knows sm_100
FLAGS = [
    "-std=c++20", "-O3", "-cudart", "static", "-Xfatbin", "-compress-all",
    # Hidden: it is loaded beside torch's own CUDA runtime, neither may see the other's functions.
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11
]  # fmt: skip


class CannotBuild(Exception):
    """Something a build needs is not on this machine."""


def sources() -> list[Path]:
    """What the library is compiled from: the kernels and the bindings, one file per op each."""
    return [*sorted(HERE.glob("*.cu")), *sorted(HERE.glob("bindings/*.cpp"))]


def included(source: Path, skip: str = "") -> list[Path]:
    """The source and every file of csrc that it includes, directly or not; without those whose path contains `skip`."""
    found, queue = [], [source]
    while queue:
        path = queue.pop()
        if path in found or (skip and skip in str(path.relative_to(HERE))):
            continue
        found.append(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.M):
            queue += [near for near in (path.parent / name, HERE / name) if near.exists()][:1]
    return [source, *sorted(set(found) - {source})]


def find_nvcc() -> str:
    """nvcc of CUDA_HOME, else of PATH, else of /usr/local/cuda. Raises CannotBuild where there is none, or only an old one."""
    home = os.environ.get("CUDA_HOME")
    found = [os.path.join(home, "bin", "nvcc")] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in found:
        if nvcc and os.access(nvcc, os.X_OK):
            release = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]))
            if release is None or tuple(map(int, release.groups())) < OLDEST:
                wanted = ".".join(map(str, OLDEST))
                raise CannotBuild(f"{nvcc} is {release[0] if release else 'no nvcc'}; {wanted} or newer is needed")
            return nvcc
    raise CannotBuild("nvcc was not found in " + (f"CUDA_HOME={home}" if home else "PATH or /usr/local/cuda"))


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")  # found, not imported: that takes seconds
    if spec is None or not spec.origin:
        raise CannotBuild("torch is not installed where the build runs; install it first, then --no-build-isolation")
    return Path(spec.origin).parent


def check() -> None:
    """Raises CannotBuild if nvcc or torch is missing."""
    find_nvcc()
    _torch()


def _gencode() -> list[str]:
    return [f"-gencode=arch=compute_{a},code={code}" for a, code in ARCHITECTURES.items()]


def _key(nvcc: str, torch: Path, source: Path, flags: list[str]) -> str:
    """A hash of all that an object is made from."""
    key = hashlib.sha256(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    key.update((torch / "version.py").read_bytes())
    key.update(repr(flags).encode())
    for path in included(source, skip="host"):  # of the device layer the CUDA body alone
        key.update(str(path.relative_to(HERE)).encode() + path.read_bytes())
    return key.hexdigest()[:16]


def _compile(nvcc: str, torch: Path, objects: Path, threads: int, source: Path) -> Path:
    """The object of a source, with ptxas's report of registers and spills beside it (.log)."""
    flags = FLAGS + (_gencode() + ["-Xptxas", "-v"] if source.suffix == ".cu" else [])
    name = "-".join(source.relative_to(HERE).with_suffix("").parts)
    out = objects / f"{name}-{_key(nvcc, torch, source, flags)}.o"
    if out.exists() and out.with_suffix(".log").exists():
        return out
    for old in objects.glob(f"{name}-{'?' * 16}.*"):
        old.unlink(missing_ok=True)
    partly = out.with_suffix(f".{os.getpid()}.o")  # renamed when it is whole: builds may run at once
    include = torch / "include"
    # Called where the sources are, by their names: the text of an error shows no folder of the machine that built.
    command = [nvcc, *flags, "--threads", str(threads), "-I", ".", "-isystem", str(include),
               "-Xcompiler", f"-fmacro-prefix-map={include}=.", "-c", str(source.relative_to(HERE)),
               "-o", str(partly.resolve())]  # fmt: skip
    out.with_suffix(".log").write_text(_run(command, HERE))
    partly.rename(out)
    return out


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def build(library: str | Path, objects: str | Path = HERE.parent / "build" / "cuda") -> list[Path]:
    """Builds the library file; returns the objects it was linked from.

    Raises CannotBuild if nvcc or torch is missing, RuntimeError with nvcc's output if it fails.
    """
    nvcc, torch = find_nvcc(), _torch()
    library, objects = Path(library), Path(objects)
    for folder in (library.parent, objects):
        folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    files = sources()
    threads = max(1, min(len(ARCHITECTURES), cores // len(files)))  # of each nvcc, over the architectures
    with ThreadPoolExecutor(min(cores, len(files))) as pool:
        made = list(pool.map(partial(_compile, nvcc, torch, objects, threads), files))
    # Of torch only libtorch_cpu is named, which every build of torch has; the bindings look for libtorch_cuda at run time.
    partly = library.with_suffix(f".{os.getpid()}.so")
    _run([nvcc, "-shared", "--no-device-link", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", *map(str, made),
          "-L", str(torch / "lib"), "-ltorch_cpu", "-o", str(partly)])  # fmt: skip
    partly.rename(library)
    return made


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "fastlm" / NAME
    try:
        build(target)
    except (CannotBuild, RuntimeError) as error:
        sys.exit(f"fastlm: {NAME} was not built: {error}")
    print(target)
