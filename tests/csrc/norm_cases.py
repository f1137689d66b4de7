"""What the tests of the kernels of rms_norm and layer_norm share: their launchers, what these must give, the tests themselves."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_uint32

import pytest
import torch

from fastlm.ops.norm_reference import dropped, norm_reference
from fastlm.testing import assert_accurate, check_accuracy, check_guards, check_op
from tests.csrc.host_library import DTYPES, Both, HostError, In, Out, library, planted, same_in_all_orders
from tests.ops.norm_cases import KINDS, Norm, random

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EPS, P, SEED = 1e-5, 0.3, torch.tensor([11, 5])
HEADERS = ("norm_bwd.h", "norm_fwd.h", "norm_rows.h")

# Rows of part of a warp (of 2, 4 and 32 threads), of several warps, of a block; too wide for a block in the backward, and in
# both: those of a cluster, or without clusters read again; and those that are read element by element.
SHAPES = {
    "few": (150, 24), "part": (5, 40), "warp": (9, 512), "warps": (3, 1032), "block": (2, 4104), "wide_backward": (3, 8200),
    "wide": (1, 16392), "odd": (5, 37), "odd_warps": (2, 1231), "one": (3, 1),
}  # fmt: skip


def rows_of(x):
    """(inner, outer stride, inner stride) of a tensor [..., N] of two or three dimensions."""
    return (1, x.stride(0), 0) if x.ndim == 2 else (x.shape[1], x.stride(0), x.stride(1))


def dropout(p):
    return {"threshold": c_uint32(int(p * 2**32)), "grown": c_float(1 / (1 - p))}


def with_bugs(kernels, bugs, factory):
    return planted(kernels.source, bugs, factory.mktemp("planted"), HEADERS)


def cast(dtype, *tensors):
    return (t if t is None else t.to(dtype) for t in tensors)


class Kernels:
    """The launchers of one norm, called as csrc/bindings/norm.h calls them, and their oracles."""

    def __init__(self, name: str):
        self.name, self.centred, self.source = name, name == "layer_norm", f"csrc/{name}.cu"

    # --- forward --------------------------------------------------------------------------------------------------

    def forward(
        self, lib, x, weight=None, bias=None, residual=None, *, offset=0.0, llama=False, p=0.0, order="forward"
    ):
        """y, residual_out or None, mean or None, rstd."""
        parameter = weight if weight is not None else bias
        y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=FP32)
        mean = torch.empty_like(rstd) if self.centred else None
        residual_out = None if residual is None else residual.new_empty(x.shape)
        lib.run(f"fastlm_{self.name}_fwd", {
            "x": In(x), "weight": In(weight), "bias": In(bias), "residual": In(residual), "seed": In(SEED if p else None),
            "y": Out(y), "residual_out": Out(residual_out), "mean": Out(mean), "rstd": Out(rstd),
            "rows": x.numel() // x.shape[-1], "columns": x.shape[-1],
            "x_rows": rows_of(x), "residual_rows": rows_of(x if residual is None else residual),
            "x_dtype": c_int32(DTYPES[x.dtype]),
            "parameter_dtype": c_int32(DTYPES[(x if parameter is None else parameter).dtype]),
            "residual_dtype": c_int32(DTYPES[(x if residual is None else residual).dtype]), "round_first": c_int32(llama),
            "eps": EPS, "weight_offset": offset, **dropout(p),
        }, order=order)  # fmt: skip
        return y, residual_out, mean, rstd

    def statistics(self, s):
        """mean (0 where there is none) and rstd of rows, in fp64."""
        s = s.double()
        mean = s.mean(-1) if self.centred else torch.zeros(s.shape[:-1], dtype=FP64)
        return mean, ((s - mean.unsqueeze(-1)).square().mean(-1) + EPS).rsqrt()

    def check_forward(self, lib, x, weight=None, bias=None, residual=None, orders=False, **options):
        """Compares all that the launcher writes with the reference."""
        args = (x, weight, bias, residual)
        if orders:
            written = iter(same_in_all_orders(
                lambda order: [t for t in self.forward(lib, *args, order=order, **options) if t is not None]
            ))  # fmt: skip
            found = [next(written), None if residual is None else next(written)]
            found += [next(written) if self.centred else None, next(written)]
        else:
            found = self.forward(lib, *args, **options)
        y, residual_out, mean, rstd = found

        def reference(x, weight, bias, residual):
            rest = (EPS, options.get("offset", 0.0), options.get("llama", False), options.get("p", 0.0))
            seed = SEED if options.get("p") else None
            out = norm_reference(x, weight, bias, residual, seed, *rest, centred=self.centred)
            return out if residual is not None else (out, None)

        exact, plain = reference(*cast(FP64, *args)), reference(*args)
        assert_accurate(y, exact[0], plain[0], "y")
        total = dropped(x.double(), SEED, options["p"]) if options.get("p") else x
        if residual is not None:
            assert_accurate(residual_out, exact[1], plain[1], "residual_out")
            total = residual_out
        wanted = self.statistics(total)
        torch.testing.assert_close(rstd.double(), wanted[1], rtol=1e-6, atol=0)
        if self.centred:
            torch.testing.assert_close(mean.double(), wanted[0], rtol=1e-6, atol=1e-6)

    # --- backward -------------------------------------------------------------------------------------------------

    def backward(self, lib, dy, x, statistics, weight=None, *, dsum=None, need=(True, True), offset=0.0, p=0.0,
                 has_residual=False, parts=3, order="forward"):  # fmt: skip
        """dx, dresidual, dweight, dbias, None where they are not asked for. dsum and dresidual: of the residual stream."""
        columns, rows = x.shape[-1], x.numel() // x.shape[-1]
        two = has_residual and (p > 0 or x.dtype != dy.dtype)
        kind = dy.dtype if weight is None else weight.dtype
        dx, dresidual = dy.new_empty(dy.shape), x.new_empty(x.shape) if two else None
        dweight, dbias = (dy.new_empty(columns, dtype=kind) if needed else None for needed in need)
        workspace = lambda *shape: Both(torch.full(shape, float("nan")))  # noqa: E731
        lib.run(f"fastlm_{self.name}_bwd", {
            "dy": In(dy), "dsum": In(dsum), "x": In(x), "weight": In(weight),
            "mean": In(statistics[0] if self.centred else None), "rstd": In(statistics[1]), "seed": In(SEED if p else None),
            "dx": Out(dx), "dresidual": Out(dresidual), "dweight": Out(dweight), "dbias": Out(dbias),
            "partial": workspace(2, parts, columns), "row_sums": workspace(2, rows), "rows": rows, "columns": columns,
            "dy_rows": rows_of(dy), "dsum_rows": rows_of(x if dsum is None else dsum), "x_rows": rows_of(x),
            "dtype": c_int32(DTYPES[dy.dtype]), "x_dtype": c_int32(DTYPES[x.dtype]), "parameter_dtype": c_int32(DTYPES[kind]),
            "has_residual": c_int32(has_residual), "parts": c_int32(parts), "weight_offset": offset, **dropout(p),
        }, order=order)  # fmt: skip
        return dx, dresidual, dweight, dbias

    def gradients(self, dy, x, statistics, weight, dsum, dtype, *, offset=0.0, p=0.0, has_residual=False):
        """What `backward` computes, from the formula in `dtype`."""
        dy, x, weight, dsum, mean, rstd = cast(dtype, dy, x, weight, dsum, *(t.unsqueeze(-1) for t in statistics))
        s = dropped(x, SEED, p) if p and not has_residual else x
        xhat = (s - mean) * rstd
        g = dy if weight is None else dy * (offset + weight)
        ds = g - xhat * (g * xhat).mean(-1, keepdim=True)
        if self.centred:
            ds = ds - g.mean(-1, keepdim=True)
        ds = ds * rstd if dsum is None else ds * rstd + dsum
        sums = ((dy * xhat).flatten(0, -2).sum(0), dy.flatten(0, -2).sum(0))
        return dropped(ds, SEED, p) if p else ds, ds, *sums

    def check_backward(self, lib, dy, x, weight=None, orders=False, dsum=None, parts=3, need=(True, True), **options):
        s = dropped(x.double(), SEED, options["p"]) if options.get("p") and not options.get("has_residual") else x
        statistics = [t.float() for t in self.statistics(s)]
        run = lambda order: self.backward(  # noqa: E731
            lib, dy, x, statistics, weight, dsum=dsum, parts=parts, need=need, order=order, **options
        )
        found = run("forward")
        if orders:
            same_in_all_orders(lambda order: [t for t in run(order) if t is not None])
        exact, plain = (self.gradients(dy, x, statistics, weight, dsum, d, **options) for d in (FP64, FP32))
        for what, got, want, by_hand in zip(("dx", "dresidual", "dweight", "dbias"), found, exact, plain):
            if got is not None:
                assert_accurate(got, want, by_hand.to(got.dtype), what)

    def check(self, lib, shape, dtype=FP32, orders=False):
        """Both directions in a usual form."""
        x, dy, (weight, bias) = (
            random(shape, dtype, "cpu", 2.0),
            random(shape, dtype, "cpu"),
            self.parameters(shape[-1], dtype),
        )
        self.check_forward(lib, x, weight, bias, orders=orders)
        self.check_backward(lib, dy, x, weight, orders=orders)

    def parameters(self, columns, dtype):
        return random((columns,), dtype, "cpu", 1.0, 0.5), random((columns,), dtype, "cpu")


class KernelTests:
    """Base class of the two test files' one."""

    kernels: Kernels

    @pytest.fixture
    def lib(self):
        return library(self.kernels.source)

    @pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_widths(self, lib, dtype, shape):
        self.kernels.check(lib, shape, dtype, orders=shape[0] * shape[1] < 4000)

    @pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
    @pytest.mark.parametrize("shape", ((5, 40), (5, 37), (2, 1032)), ids=str)
    def test_features_of_the_forward(self, lib, dtype, shape):
        x, residual, (own, other) = (
            random(shape, dtype, "cpu"),
            random(shape, dtype, "cpu"),
            self.kernels.parameters(shape[-1], dtype),
        )
        check = self.kernels.check_forward
        check(lib, x)
        check(lib, x, own, other, offset=1.0)
        check(lib, x, own, llama=True)
        check(lib, x, own, None, residual)
        check(lib, x, own.float(), other.float(), residual, offset=1.0, llama=True)
        check(lib, x, None, other, residual.float())
        check(lib, x, own, p=P)
        check(lib, x, own.float(), None, residual.float(), p=P)

    @pytest.mark.parametrize("shape", ((3, 8200), (1, 16392)), ids=str)
    def test_wide_rows_of_a_gpu_without_clusters(self, lib, shape):
        with lib.without_clusters():
            self.kernels.check(lib, shape)

    def test_more_rows_than_clusters(self, lib):
        for dtype in (FP32, BF16):
            x, dy = (random((5, 8200), dtype, "cpu", 1.0) for _ in range(2))
            self.kernels.check_backward(lib, dy, x, random((8200,), dtype, "cpu"), orders=dtype is BF16, parts=8)

    # Held in registers, by elements, and by columns.
    @pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
    @pytest.mark.parametrize("shape", ((70, 40), (5, 37), (2, 8200)), ids=str)
    def test_features_of_the_backward(self, lib, dtype, shape):
        x, dy, dsum = (random(shape, dtype, "cpu", mean) for mean in (1.0, 0.5, 0.0))
        weight, check = self.kernels.parameters(shape[-1], dtype)[0], self.kernels.check_backward
        with lib.without_clusters():
            check(lib, dy, x, need=(False, False))
            check(lib, dy, x, weight.float(), offset=1.0, parts=1)
            check(lib, dy, x, weight, dsum=dsum, has_residual=True, need=(True, False))
            check(lib, dy, x.float(), weight, dsum=dsum.float(), has_residual=True, need=(False, True))
            check(lib, dy, x, weight, p=P)
            check(lib, dy, x.float(), weight.float(), dsum=dsum.float(), p=P, has_residual=True)

    @pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
    def test_rows_lie_anywhere(self, lib, dtype):
        weight, (fused, other, third) = random((40,), dtype, "cpu", 1.0), random((3, 3, 4, 120), dtype, "cpu")
        heads, others = fused[:, 1:3, 40:80], other[:, :2, 80:]  # of one product, at two strides
        forward, backward = self.kernels.check_forward, self.kernels.check_backward
        forward(lib, heads, weight, None, others, orders=True)
        forward(lib, fused[:, 0, 1:41], weight, None, other[:, 1, 3:43])  # no row begins at 16 bytes
        forward(lib, fused[:1, 0, :40].expand(6, 40), weight)  # the same row again and again
        forward(lib, random((3, 43), dtype, "cpu")[:, :40], weight)  # only the first row begins at 16 bytes
        forward(lib, fused[0, :, :40], random((41,), dtype, "cpu", 1.0)[1:])  # the weight does not
        backward(lib, heads, others, weight, dsum=third[:, 2:, 8:48], has_residual=True, orders=True)
        backward(lib, fused[:, 0, 1:41], other[:, 1, 3:43], weight, orders=True)
        backward(lib, fused[:1, 0, :40].expand(6, 40), other[0, :, :40].repeat(2, 1)[:6], weight)

    # Of blocks of rows and of rows, among one block, two, and more than there are; 16-bit rows are read one ahead.
    @pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
    @pytest.mark.parametrize("parts", (1, 2, 9))
    def test_rows_are_shared_among_blocks(self, lib, parts, dtype):
        for shape in ((150, 40), (5, 1032), (5, 37), (3, 8200)):
            x, dy, weight = (
                random(shape, dtype, "cpu", 1.0),
                random(shape, dtype, "cpu"),
                random(shape[1:], dtype, "cpu"),
            )
            self.kernels.check_backward(lib, dy, x, weight, orders=parts == 2 and shape[1] < 1000, parts=parts)

    def test_small_and_large_numbers(self, lib):
        sign = 1 - 2 * (torch.arange(64) % 2)  # a mean of 0
        y, _, _, rstd = self.kernels.forward(lib, 1e-30 * sign.unsqueeze(0).float())
        assert rstd.item() == pytest.approx(EPS**-0.5) and y[0, 0].item() == pytest.approx(1e-30 * EPS**-0.5)
        y, _, _, _ = self.kernels.forward(lib, (300 * sign.unsqueeze(0)).half())  # squares are above fp16's range
        assert torch.equal(y, sign.unsqueeze(0).half())

    def test_what_it_cannot_run_is_refused(self, lib):
        x, half = random((2, 8), FP32, "cpu"), random((2, 8), BF16, "cpu")
        for first, residual in ((x, half), (half, half.half())):
            with pytest.raises(HostError, match="returned 1"):
                self.kernels.forward(lib, first, None, None, residual)
            with pytest.raises(HostError, match="returned 1"):
                self.kernels.backward(lib, first, residual, (x[:, 0], x[:, 1]))
        with pytest.raises(HostError, match="returned 1"):
            self.kernels.backward(lib, x, x, (x[:, 0], x[:, 1]), parts=0)
        with pytest.raises(HostError, match="returned 1"):
            self.kernels.forward(lib, x[:0])

    # --- planted bugs ---------------------------------------------------------------------------------------------

    def sees(self, lib):
        """Fails if the library has one of the planted bugs."""
        kernels, fused = self.kernels, random((3, 4, 80), FP32, "cpu")
        kernels.check(lib, (70, 40), orders=True)
        kernels.check_backward(lib, *(random((5, 1032), FP32, "cpu") for _ in range(2)), orders=True, parts=1)
        kernels.check_forward(lib, fused[:, :2, :40])
        kernels.check_forward(lib, random((3, 43), FP32, "cpu")[:, :40])
        x = random((5, 40), FP32, "cpu")
        kernels.check_forward(lib, x, p=P)
        kernels.check_backward(
            lib, x, random((5, 40), FP32, "cpu"), dsum=fused[:, :2, :40].flatten(0, 1)[:5], p=P, has_residual=True
        )
        wide, wider = random((2, 5, 8196), FP32, "cpu", 1.0), random((2, 1, 16388), FP32, "cpu", 1.0)
        kernels.check_backward(lib, *wide, orders=True, parts=4)
        kernels.check_forward(lib, wider[0], orders=True)
        with lib.without_clusters():
            kernels.check_backward(lib, wide[0, :3], wide[1, :3])
            kernels.check_forward(lib, wider[0], None, None, wider[1])

    # --- as a backend of the op -----------------------------------------------------------------------------------

    @pytest.mark.usefixtures("cuda_on_the_host")
    @pytest.mark.parametrize("kind", ("", "rdo"))
    def test_contract(self, kind):
        check_op(Norm(self.kernels.name).case(kind), "cuda", "cpu")

    @pytest.mark.usefixtures("cuda_on_the_host")
    @pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_accuracy(self, kind, dtype):
        norm = Norm(self.kernels.name)
        check_accuracy(norm.case(kind), "cuda", dtype, "cpu")
        check_accuracy(norm.case(kind), "cuda", dtype, "cpu", norm.args(kind, dtype, "cpu", (300, 21)))
        check_guards(norm.case(kind), "cuda", "cpu")

    @pytest.mark.usefixtures("cuda_on_the_host")
    @pytest.mark.parametrize("shape", ((0, 8), (3, 0), (8,), (1, 1, 1), (2, 0, 3)), ids=str)
    def test_sizes_of_nothing_and_one(self, shape):
        norm = Norm(self.kernels.name)
        args = [t.requires_grad_() for t in norm.args("r", FP32, "cpu", shape)]
        found, wanted = (norm.case("r").fn(*args, backend=backend) for backend in ("cuda", "reference"))
        torch.testing.assert_close(found, wanted)
        gradients = (torch.autograd.grad(sum(t.sum() for t in out), args) for out in (found, wanted))
        torch.testing.assert_close(*gradients)

    @pytest.mark.usefixtures("cuda_on_the_host")
    def test_wrong_calls_of_the_backward_are_refused_before_memory_is_touched(self):
        call = getattr(torch.ops.fastlm_host, f"{self.kernels.name}_bwd")
        dy, x, rows = torch.randn(2, 8), torch.randn(2, 8), torch.ones(2)
        mean = rows if self.kernels.centred else None
        options = (None, False, False, False, EPS, 0.0, 0.0)
        for args, words in (
            ((dy[:1], None, x, None, None, mean, rows, *options), "dy must have x's shape"),
            ((dy, dy.half(), x, None, None, mean, rows, *options), "dresidual_out must have x's dtype"),
            ((dy, None, x, None, None, mean, rows[:1], *options), "rstd must be float32, of x's shape"),
            ((dy, None, x, None, None, None if mean is rows else rows, rows, *options), "mean"),
            ((dy, None, x, None, None, mean, rows, None, False, True, *options[3:]), "a gradient of no parameter"),
            ((dy.half(), None, x.bfloat16(), None, None, mean, rows, *options), "the kernel was not started"),
        ):
            with pytest.raises(RuntimeError, match=words):
                call(*args)
