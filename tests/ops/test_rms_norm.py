import pytest
import torch

from fastlm import ops
from tests.ops.norm_cases import Norm, NormTests


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(4, 8), (600, 96)], ids=str)
def test_torch_form_takes_a_batch_of_cotangents(op, dtype, size):
    """autograd.grad(is_grads_batched=True), which refuses calls that write into what is not batched."""
    x, weight, dy = torch.randn(size), torch.randn(size[-1]), torch.randn(2, *size)
    inputs = [t.to(dtype).requires_grad_() for t in (x, weight)]
    y = getattr(ops, op)(*inputs, backend="torch")
    both = torch.autograd.grad(y, inputs, dy.to(dtype), is_grads_batched=True, retain_graph=True)
    for i, d in enumerate(dy.to(dtype)):
        for got, want in zip(both, torch.autograd.grad(y, inputs, d, retain_graph=True), strict=True):
            torch.testing.assert_close(
                got[i],
                want,
                rtol=2e-2 if dtype == torch.bfloat16 else 1e-4,
                atol=0.1 if dtype == torch.bfloat16 else 1e-3,
            )


class TestRMSNorm(NormTests):
    norm = Norm("rms_norm")

    @pytest.mark.parametrize(
        "old, new",
        [
            ("tl.sum(x * x, 1) / N + eps", "tl.sum(x * x, 1) / BLOCK_N + eps"),  # the mean over the padded width
            ("ds = rstd * (g -", "ds = (g -"),  # a missing scale
            ("along = (tl.sum(g * xhat, 1) / N)[:, None]", "along = 0.0"),  # the projection forgotten
            ("y *= (weight_offset + tl", "y *= (0.0 + tl"),
            ("g = dy * weight[None, :]", "g = dy * (weight - weight_offset)[None, :]"),
            ("ds = tl.where(keep, ds * grown, 0.0)", "ds = ds * grown"),  # the dropped ones get a gradient
            ("ds = tl.where(keep, ds * grown, 0.0)", "ds = tl.where(keep, ds, 0.0)"),
            ("c1 = zero + row[:, None]", "c1 = zero"),  # the same columns dropped in every row
            ("tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
            ("row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)\n    col", "row = tl.program_id(0) * BLOCK_M + "
             "tl.arange(0, BLOCK_M)\n    M = M - 1\n    col"),  # the last row not written
            ("dbias += dy\n", "dbias = dy\n"),  # only the last block of rows counted
        ],
        ids=["mean", "scale", "projection", "offset", "offset_bwd", "dropped", "grown", "rows", "words", "tail", "dbias"],
    )  # fmt: skip
    def test_planted_bug_is_seen(self, old, new, device):
        self.sees(old, new, device, shape=(1100, 6) if "dbias" in old else None)

    def test_planted_rounding_is_seen(self, device):
        x, weight = torch.randn(8, 512, device=device).bfloat16(), torch.randn(512, device=device).bfloat16()
        want = self.norm.op(x, weight, casting="llama", backend="triton")
        with self.planted("if ROUND_FIRST:", "if not ROUND_FIRST:"):
            assert (self.norm.op(x, weight, casting="llama", backend="triton") != want).double().mean() > 0.1

    @pytest.mark.parametrize(
        "old, new",
        [
            ("rstd = tl.rsqrt(squares / N + eps)", "rstd = tl.rsqrt(squares / BLOCK_N + eps)"),
            ("tl.store(along_ptr + row, tl.sum(along, 1) / N)", "tl.store(along_ptr + row, tl.sum(along, 1) / N * 0)"),
            ("threshold, row, start, 1, BLOCK_N), x * grown", "threshold, row, 0, 1, BLOCK_N), x * grown"),
            ("ds = rstd * (g - xhat * along)", "ds = g - xhat * along"),
            ("partial = tl.program_id(1).to(tl.int64) * N + start", "partial = start"),
        ],
        ids=["mean", "projection", "mask", "scale", "partials"],
    )
    def test_planted_bug_in_wide_rows_is_seen(self, old, new, device):
        kind, shape = ("d", (1, 33000)) if "threshold" in old else ("", (2, 33000) if "squares" in old else (4, 9000))
        self.sees(old, new, device, file="norm_wide", kind=kind, shape=shape)
