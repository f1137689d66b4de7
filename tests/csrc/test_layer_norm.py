"""csrc/layer_norm.cu on the host body of the device layer, against the formula and the reference of the op."""

from contextlib import nullcontext

import pytest
import torch

from tests.csrc.host_library import HostError, needs_compiler
from tests.csrc.norm_cases import Kernels, KernelTests, with_bugs

pytestmark = needs_compiler
KERNELS = Kernels("layer_norm")

BUGS = {
    "no centre": ("- centre - xhat_at(k, i) * along", "- xhat_at(k, i) * along"),
    "the last mean": ("own += (here - own) * part;", "own = here;"),
    "between the threads": ("squares += (own - mean) * (own - mean) * count;", ""),
    "one partial row": ("static_cast<int64_t>(which) * at.parts() + at.part()", "static_cast<int64_t>(which) * at.parts()"),
    "no barrier": ("block_barrier();  // a call before this one may still be read from", ""),
    "the other sum": ("row_sums[a.rows + row]", "row_sums[row]"),
    "a part is left out": ("part < parts; part += kWarps", "part < parts - 1; part += kWarps"),
    "rows beyond the last": ("return row < a.rows ? static_cast<int>(a.columns) : 0;", "return static_cast<int>(a.columns);"),
    "another vector's mask": ("drop(ds, bits >> k * VEC, a.grown)", "drop(ds, bits, a.grown)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    return with_bugs(KERNELS, BUGS, tmp_path_factory)


class TestLayerNorm(KernelTests):
    kernels = KERNELS

    @pytest.mark.parametrize("name", BUGS)
    def test_planted_bug_is_seen(self, name, with_bug):
        with pytest.raises((AssertionError, HostError)):
            self.sees(with_bug[name])

    # Of part of a warp, of several warps, of a cluster, too wide for registers, by elements.
    @pytest.mark.parametrize(
        "columns, clusters", ((40, True), (1032, True), (16392, True), (16392, False), (1231, True))
    )
    def test_a_mean_far_from_zero_costs_no_digits(self, lib, columns, clusters):
        """One pass over x and x^2 would leave nothing of a variance of 1 beside a mean of 10000."""
        x = 1e4 + torch.randn(2, columns)
        with nullcontext() if clusters else lib.without_clusters():
            _, _, mean, rstd = self.kernels.forward(lib, x)
        wanted = self.kernels.statistics(x)
        torch.testing.assert_close(mean.double(), wanted[0], rtol=3e-7, atol=0)
        torch.testing.assert_close(rstd.double(), wanted[1], rtol=1e-5, atol=0)
