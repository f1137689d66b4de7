"""csrc/rms_norm.cu on the host body of the device layer, against the formula and the reference of the op."""

import pytest

from tests.csrc.host_library import HostError, needs_compiler
from tests.csrc.norm_cases import Kernels, KernelTests, with_bugs

pytestmark = needs_compiler
KERNELS = Kernels("rms_norm")

BUGS = {
    "strides": ("r / inner * at.outer_stride", "r / inner * at.inner_stride"),
    "dropped rows": ("static_cast<uint32_t>(row), 0,", "0, 0,"),
    "tail": ("if (column(k) < columns) write(row_of<X>(a.y", "if (column(k) + VEC < columns) write(row_of<X>(a.y"),
    "reread": ("read(Global<const R>(row_of<R>(a.residual_out,", "read(Global<const R>(row_of<R>(a.residual,"),
    "alignment": ("aligned(a.x, a.x_rows, width) && aligned(a.residual,", "aligned(a.residual,"),
    "one table": ("partial + turn * N * kTable", "partial + 0 * turn"),
    "no barrier": ("block_barrier(at);\n  const int warps", "const int warps"),
    "no cluster barrier": ("cluster_barrier(at);", ""),
    "a block that has not begun": ("if (first) cluster_wait(at);", ""),
    "its own table": ("cluster_pointer(here, lane_id(), at)", "cluster_pointer(here, cluster_rank(), at)"),
}


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    return with_bugs(KERNELS, BUGS, tmp_path_factory)


class TestRmsNorm(KernelTests):
    kernels = KERNELS

    @pytest.mark.parametrize("name", BUGS)
    def test_planted_bug_is_seen(self, name, with_bug):
        with pytest.raises((AssertionError, HostError)):
            self.sees(with_bug[name])
