"""`pytest benchmarks`: a short list for pytest-benchmark: every op at its first size, fp32 on a CPU and bf16 on a GPU.

For comparisons with others there is `python -m benchmarks run`; this is for `pytest-benchmark compare` between commits.
"""

import pytest
import torch

from benchmarks.harness import OURS, prepare
from benchmarks.run import benches, ops_with_benchmarks

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN = f"{OURS}{'triton' if DEVICE == 'cuda' else 'torch'}"


@pytest.mark.parametrize("stem", ops_with_benchmarks())
def test_speed(stem, benchmark):
    bench = benches(stem)[0]
    provider = next((p for p in bench.providers if p.name == OWN), None)
    if provider is None:
        pytest.skip(f"{bench.op} has no {OWN}")
    torch.manual_seed(0)
    args = bench.make(bench.dtypes[DEVICE][0], DEVICE, **bench.sizes_of("quick", DEVICE)[0])
    call = prepare(provider.build(), args, "both" if "both" in bench.modes else "forward")

    def finished():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    finished()
    benchmark(finished)
