import pytest

from tests.ops.norm_cases import Norm, NormTests


class TestLayerNorm(NormTests):
    norm = Norm("layer_norm")

    @pytest.mark.parametrize(
        "old, new",
        [
            ("x = tl.where(live, x - mean[:, None], 0.0)", "x = x - mean[:, None]"),  # the padding in the variance
            ("x = tl.where(live, x - mean[:, None], 0.0)", "x = tl.where(live, x, 0.0)"),  # not centred
            ("g -= centre", "g -= 0.0"),  # the mean of the gradient forgotten
            ("dweight += dy * xhat", "dweight = dy * xhat"),  # only the last block of rows counted
            ("mask=live)\n    partial", "mask=live & (row < M - 1)[:, None])\n    partial"),  # the last row of dx not written
        ],
        ids=["padding", "centre", "mean", "dweight", "dx_tail"],
    )  # fmt: skip
    def test_planted_bug_is_seen(self, old, new, device):
        self.sees(old, new, device, kind="r", shape=(2100, 6) if "dweight" in old else None)

    @pytest.mark.parametrize(
        "old, new",
        [
            ("(here - mean) * (here - mean) * (count * start / (start + count))", "0.0"),  # between the blocks
            ("mean += (here - mean) * (count / (start + count))", "mean = here"),
            ("tl.minimum(N - start, BLOCK_N)", "tl.minimum(BLOCK_N, BLOCK_N)"),  # the last block taken for a whole one
            ("tl.store(centre_ptr + row, tl.sum(centre, 1) / N)", "tl.store(centre_ptr + row, tl.sum(centre, 1) * 0)"),
        ],
        ids=["between", "mean", "last_block", "centre"],
    )
    def test_planted_bug_in_wide_rows_is_seen(self, old, new, device):
        self.sees(old, new, device, file="norm_wide", kind="", shape=(2, 9000 if "centre_ptr" in old else 33000))
