"""Launches of csrc/device/cuda.h from several threads and on several devices, and tensor maps of cuda_async.h on a thread
without a context, with the CUDA runtime's part played on the CPU."""

import subprocess

from tests.csrc.host_library import CSRC, needs_nvcc


@needs_nvcc
def test_launches_and_tensor_maps(tmp_path):
    program = tmp_path / "launch_cases"
    command = ["nvcc", "-std=c++20", "-arch=sm_90a", "-Xlinker", "--allow-multiple-definition", f"-I{CSRC}"]
    done = subprocess.run(
        [*command, "-o", str(program), str(CSRC.parent / "tests/csrc/launch_cases.cu")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and not ran.stdout, ran.stdout + ran.stderr
