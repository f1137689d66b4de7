"""What nvcc makes of a kernel file for one architecture: ptxas's report and the machine code."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.host_library import CSRC, ROOT


def compiled(source: str, arch: str, folder: Path, *flags: str) -> tuple[str, Path]:
    """(the report of ptxas -v with its warnings, the cubin) of a file, a path from the repository's root."""
    cubin = folder / f"{Path(source).stem}.{arch}.cubin"
    command = [
        "nvcc",
        "-std=c++20",
        "-O3",
        f"-arch={arch}",
        "-Xptxas",
        "-v",
        *flags,
        f"-I{CSRC}",
        "-cubin",
        str(ROOT / source),
    ]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stderr, cubin


def instructions(cubin: Path) -> dict[str, list[str]]:
    """kernel -> its machine instructions in order. Skips the test where neither CUDA nor Triton has cuobjdump."""
    tool = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if tool is None and triton is not None:
        tool = next(map(str, Path(triton.origin).parent.glob("backends/nvidia/bin/cuobjdump")), None)
    if tool is None:
        pytest.skip("needs cuobjdump, of CUDA or of Triton")
    path = f"{Path(tool).parent}:/usr/bin:/bin"  # nvdisasm lies beside it
    text = subprocess.run(
        [tool, "-sass", str(cubin)], capture_output=True, text=True, check=True, env={"PATH": path}
    ).stdout
    kernels = re.split(r"^\s*Function : (\S+)", text, flags=re.MULTILINE)[1:]
    return {
        name: re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?) ;", body, re.MULTILINE)
        for name, body in zip(kernels[::2], kernels[1::2])
    }
