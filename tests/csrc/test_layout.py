"""csrc/device/layout.h, element by element, against the layouts of CuTe (package nvidia-cutlass)."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from csrc.build_library import CannotBuild, find_nvcc
from tests.csrc.host_library import Both, library, needs_compiler

pytestmark = needs_compiler
SWIZZLES = {"none": 0, "128": 1, "64": 2, "32": 3}


@pytest.fixture(scope="module")
def cute():
    package = importlib.util.find_spec("cutlass_library")
    if package is None:
        pytest.skip("needs CuTe: pip install --no-deps nvidia-cutlass")
    try:
        nvcc = find_nvcc()
    except CannotBuild as missing:
        pytest.skip(f"CuTe needs the headers of CUDA: {missing}")
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    headers = [f"{Path(package.origin).parent}/source/include", *re.findall(r'"(?:-I)?(/[^"]*/include[^"]*)"', said)]
    return library("tests/csrc/cute_layouts.cpp", *[f"-isystem{path}" for path in headers], "-O0")


def tables(lib, function, count, *numbers):
    """What our functions and CuTe's fill in."""
    ours, theirs = torch.full((count,), -1, dtype=torch.int32), torch.full((count,), -2, dtype=torch.int32)
    lib.run(function, Both(ours), Both(theirs), *numbers)
    return ours, theirs


@pytest.mark.parametrize("swizzle", SWIZZLES.values(), ids=SWIZZLES)
@pytest.mark.parametrize("mn_major", (0, 1), ids=("K-major", "MN-major"))
def test_tiles_and_matrix_descriptors(cute, mn_major, swizzle):
    ours, theirs = tables(cute, "cute_operands", 128 * 128 + 8 * (2 + 128 * 16), mn_major, swizzle)
    assert torch.equal(
        ours[: 128 * 128].sort()[0], torch.arange(16384, 16384 + 2 * 128 * 128, 2).int()
    )  # a permutation
    assert torch.equal(ours[: 128 * 128], theirs[: 128 * 128])  # where elements are
    ours, theirs = ours[128 * 128 :].view(8, -1), theirs[128 * 128 :].view(8, -1)
    assert torch.equal(ours[:, :2], theirs[:, :2])  # the descriptors
    assert torch.equal(ours[:, 2:], theirs[:, 2:])  # what they are taken to mean


@pytest.mark.parametrize("n", (0, 8, 128, 256), ids=("A", "N8", "N128", "N256"))
def test_fragments(cute, n):
    columns = n or 16
    ours, theirs = tables(cute, "cute_fragment", 64 * columns, n)
    assert torch.equal(ours.sort()[0], torch.arange(64 * columns).int())  # every element once
    assert torch.equal(ours, theirs)
