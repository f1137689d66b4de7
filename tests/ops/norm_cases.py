"""What the tests of rms_norm and layer_norm share: a Case for every feature, and the tests themselves as a base class."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.kernels import norm_launch
from fastlm.ops.norm_reference import kept
from fastlm.testing import Case, assert_accurate, check_accuracy, check_guards, check_op, check_reference, planted_bug

BACKENDS = ("torch", "triton")
SEED, P = 11, 0.3
# Features of a case: r residual, d dropout, o weight_offset 1, l llama casting.
KINDS = ("", "r", "d", "rdo", "ol")


def random(shape, dtype, device, mean=0.0, spread=1.0):
    return (mean + spread * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)


@dataclass(frozen=True)
class Norm:
    """One of the two ops. plain(x, weight, bias, offset) is torch's own."""

    name: str

    def op(self, x, weight=None, bias=None, **options):
        if self.name == "rms_norm":
            return ops.rms_norm(x, weight, 1e-5, bias=bias, **options)
        return ops.layer_norm(x, weight, bias, 1e-5, **options)

    def plain(self, x, weight, bias):
        if self.name == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
        y = F.rms_norm(x, x.shape[-1:], weight, 1e-5)
        return y if bias is None else y + bias

    def args(self, kind, dtype, device, shape=(2, 5, 40)):
        # LayerNorm: a mean well away from 0, so that a one-pass variance would show.
        x = random(shape, dtype, device, 3.0 if self.name == "layer_norm" else 0.0)
        weight = random(shape[-1:], dtype, device, 0.0 if "o" in kind else 1.0, 0.3)
        bias = [random(shape[-1:], dtype, device, 0.0, 0.5)] if self.has_bias(kind) else []
        return x, weight, *bias, *([random(shape, dtype, device)] if "r" in kind else [])

    def has_bias(self, kind):
        return self.name == "layer_norm" or "o" in kind

    def case(self, kind, make=None):
        def split(args):
            bias = args[2] if self.has_bias(kind) else None
            return args[0], args[1], bias, args[-1] if "r" in kind else None

        def fn(*args, backend):
            x, weight, bias, residual = split(args)
            options = {"dropout_p": P, "seed": SEED} if "d" in kind else {}
            options |= {"weight_offset": 1.0} if "o" in kind else {}
            options |= {"casting": "llama"} if "l" in kind else {}
            return self.op(x, weight, bias, residual=residual, backend=backend, **options)

        def plain(*args):
            x, weight, bias, residual = split(args)
            if "d" in kind:
                x = torch.where(kept(x, torch.tensor([SEED, 0], device=x.device), P), x / (1 - P), 0)
            s = x if residual is None else x + residual
            weight = 1 + weight if "o" in kind else weight
            y = self.plain(s, None, None) * weight + bias if "l" in kind else self.plain(s, weight, bias)
            return y if residual is None else (y, s)

        make = make or (lambda dtype, device: self.args(kind, dtype, device))
        return Case(
            self.name, fn, make, lambda dtype, device: self.args(kind, dtype, device, (2, 3, 5)), plain,
            empty=lambda dtype, device: self.args(kind, dtype, device, (0, 8)),
        )  # fmt: skip


class NormTests:
    """Base class of the two test files' one; `norm` is the op."""

    norm: Norm

    @pytest.mark.parametrize("kind", KINDS)
    def test_reference(self, kind):
        check_reference(self.norm.case(kind))

    @pytest.mark.parametrize("kind", KINDS)
    def test_reference_is_torchs_formula(self, kind):
        case = self.norm.case(kind)
        args = case.make(torch.float64, "cpu")
        torch.testing.assert_close(case.fn(*args, backend="reference"), case.plain(*args), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("kind", ["", "r", "d", "rdo"])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_contract(self, backend, kind, device):
        check_op(self.norm.case(kind), backend, device)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_accuracy(self, backend, dtype, kind, device):
        check_accuracy(self.norm.case(kind), backend, dtype, device)

    @pytest.mark.parametrize("n", [1, 16, 64, 123, 1024, 1030, 4100])
    def test_widths(self, n, device):
        check_accuracy(
            self.norm.case("r"), "triton", torch.float32, device, self.norm.args("r", torch.float32, device, (7, n))
        )

    # Looped in the backward, and in both directions.
    @pytest.mark.parametrize("shape, kind", [((3, 9000), ""), ((3, 9000), "rdo"), ((2, 33000), "r"), ((1, 33000), "d")])
    def test_wide_rows(self, shape, kind, device):
        case = self.norm.case(kind, lambda dtype, device: self.norm.args(kind, dtype, device, shape))
        check_accuracy(case, "triton", torch.float32, device)
        if kind != "d":
            check_guards(case, "triton", device)

    def test_many_rows_of_a_narrow_matrix(self, device):
        # On the CPU each program of the backward walks over several blocks of rows.
        shape = (1100, 40)
        check_accuracy(
            self.norm.case(""), "triton", torch.float32, device, self.norm.args("", torch.float32, device, shape)
        )

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("which", ["neither", "weight", "bias"])
    def test_optional_parameters(self, backend, which, dtype, device):
        x, weight, bias = (random(s, dtype, device).requires_grad_() for s in ((2, 5, 40), (40,), (40,)))
        weight, bias = weight if which == "weight" else None, bias if which == "bias" else None
        inputs = [t for t in (x, weight, bias) if t is not None]
        got, want = (self.norm.op(x, weight, bias, backend=name) for name in (backend, "reference"))
        torch.testing.assert_close(got, want)
        cotangent = torch.randn_like(got)
        for g, w in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (got, want))):
            torch.testing.assert_close(g, w)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_frozen_parameters_get_no_gradient(self, backend, dtype, device):
        x, weight, bias = (random(s, dtype, device) for s in ((2, 5, 40), (40,), (40,)))
        x.requires_grad_()
        bias.requires_grad_()
        self.norm.op(x, weight, bias, backend=backend).sum().backward()
        assert weight.grad is None
        torch.testing.assert_close(bias.grad, torch.full_like(bias, 10.0))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_fp32_parameters_with_bf16_input(self, backend, device):
        x, *parameters = self.norm.args("ol", torch.bfloat16, device)
        for kind in ("", "ol"):
            case = replace(self.norm.case(kind), plain=None)  # F.layer_norm takes mixed dtypes on the CPU only
            args = (x, *(p.float() for p in parameters))[: len(self.norm.args(kind, torch.float32, "cpu"))]
            check_accuracy(case, backend, torch.bfloat16, device, args)
            assert case.fn(*args, backend=backend).dtype == torch.bfloat16

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_parameter_gradients_are_summed_in_fp32(self, backend, device):
        args = self.norm.args("", torch.bfloat16, device, (1000, 8))  # torch's CPU LayerNorm sums in bf16, off by 10 %
        check_accuracy(replace(self.norm.case(""), plain=None), backend, torch.bfloat16, device, args)

    @pytest.mark.parametrize("kind", ["r", "rdo"])
    @pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_fp32_residual_stream_with_bf16_branch(self, backend, parameters, kind, device):
        x, *middle, residual = self.norm.args(kind, torch.bfloat16, device)
        args = (x, *(t.to(parameters) for t in middle), torch.randn(residual.shape, device=device))
        case = replace(self.norm.case(kind), plain=None)
        check_accuracy(case, backend, torch.bfloat16, device, args)
        y, total = case.fn(*args, backend=backend)
        assert y.dtype == torch.bfloat16 and total.dtype == torch.float32

    @pytest.mark.parametrize(
        "x_dtype, residual_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)]
    )
    @pytest.mark.parametrize("casting", ["fp32", "llama"])
    @pytest.mark.parametrize("backend", ("reference", *BACKENDS))
    def test_a_narrower_residual_does_not_round_y(self, backend, casting, x_dtype, residual_dtype, device):
        x, residual = (random((3, 40), kind, device) for kind in (x_dtype, residual_dtype))
        weight = random((40,), x_dtype, device, 1e5)  # products beyond fp16's range
        y, total = self.norm.op(x, weight, residual=residual, casting=casting, backend=backend)
        assert y.dtype == x_dtype and total.dtype == residual_dtype and y.isfinite().all()
        assert torch.equal(total, (x.float() + residual.float()).to(residual_dtype))
        # y is the norm of the very sum that is returned.
        xhat = self.norm.plain(total.double(), None, None)
        of_sum = self.norm.plain(total.float(), None, None)
        if casting == "llama":
            xhat, of_sum = xhat.to(x_dtype).double(), of_sum.to(x_dtype).float()
        assert_accurate(y, xhat * weight.double(), (of_sum * weight.float()).to(x_dtype))

    def test_rows_of_the_backward_by_its_widest_dtype(self, device, monkeypatch):
        # With dy in fp32, rows of 8192 and a dropout spill, whatever the dtype of the residual stream.
        x, residual = torch.randn(1, 8192, device=device), torch.randn(1, 8192, device=device).bfloat16()
        y, _ = self.norm.op(x.requires_grad_(), residual=residual, dropout_p=P, seed=SEED, backend="triton")
        monkeypatch.setattr(norm_launch, "_row_backward", lambda *_: pytest.fail("the rows were kept in registers"))
        y.sum().backward()
        assert x.grad.isfinite().all()

    # --- rows at two strides --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", ["", "r"])
    def test_heads_of_one_product_are_read_in_place(self, kind, device, monkeypatch):
        qkv = torch.randn(2, 3, 9, 16, device=device)
        q, k, _ = qkv.split((4, 4, 1), 2)
        _, *parameters = self.norm.args("", torch.float32, device, (2, 3, 4, 16))
        for x in (q, k, q[:, :, 1], qkv.transpose(0, 1)[:, 1:]):
            fn = self.norm.case(kind).fn
            args = (x, *parameters, *([x.flip(0)] if kind else []))
            want = fn(*args, backend="reference")
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch.Tensor, "contiguous", lambda t: t if t.ndim == 1 else pytest.fail("a copy was made")
                )
                got = fn(*args, backend="triton")
            torch.testing.assert_close(got, want)

    def test_gradients_at_two_strides(self, device):
        def make(dtype, device):
            x, *rest = self.norm.args("r", dtype, device, (2, 3, 4, 16))
            wide = random((2, 3, 9, 16), dtype, device)
            return x, *rest[:-1], wide[:, :, 2:6]

        check_accuracy(self.norm.case("r", make), "triton", torch.float32, device)
        x, *parameters = (t.requires_grad_() for t in self.norm.args("", torch.float32, device, (2, 3, 4, 16)))
        cotangent = torch.randn(2, 4, 3, 16, device=device).transpose(1, 2)
        for got, want in zip(
            *(
                torch.autograd.grad(self.norm.op(x, *parameters, backend=b), x, cotangent)
                for b in ("triton", "reference")
            )
        ):
            torch.testing.assert_close(got, want)

    def test_strides_beyond_31_bits(self, device):
        # Of the 12 GiB that the rows span, only the pages of these rows are ever touched.
        far = torch.empty(3 * 2**31, dtype=torch.bfloat16, device=device)
        x, dy = (far[start:].as_strided((2, 2, 40), (2**31 + 64, 80, 1)) for start in (0, 1000))
        for t in (x, dy):
            t.copy_(torch.randn(t.shape))
        want, got = ([self.norm.op(x.requires_grad_(), backend=b)] for b in ("reference", "triton"))
        for outs in (want, got):
            outs += torch.autograd.grad(outs[0], x, dy)
            torch.testing.assert_close(outs, want)

    # --- dropout --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", [(3, 7, 50), (1, 33000)], ids=str)
    def test_the_mask_is_the_same_bits_everywhere(self, shape, device):
        x, zeros = torch.randn(shape, device=device), torch.zeros(shape, device=device)
        seed = torch.tensor([-(2**62) - 5, 2**33 + 3], device=device)
        want = torch.where(kept(x, seed, P), x * (1 / (1 - P)), 0)
        for backend in ("reference", *BACKENDS):
            _, total = self.norm.op(x, residual=zeros, dropout_p=P, seed=seed, backend=backend)
            assert torch.equal(total, want)
        other = torch.tensor([-(2**62) - 5, 2**33 + 4], device=device)
        assert not torch.equal(kept(x, seed, P), kept(x, other, P))

    def test_the_mask_is_fair(self):
        for p in (0.1, 0.6):
            share = kept(torch.empty(1000, 100), torch.tensor([3, 0]), p).double().mean().item()
            assert abs(share - (1 - p)) < 5 * (p * (1 - p) / 1e5) ** 0.5

    @pytest.mark.parametrize("backend", ("reference", *BACKENDS))
    def test_no_dropout_is_bitwise_no_dropout(self, backend, device):
        x, *rest, residual = (t.requires_grad_() for t in self.norm.args("r", torch.float32, device))
        for r in (None, residual):
            runs = []
            for options in ({}, {"dropout_p": 0.0, "seed": 3}):
                y = self.norm.op(x, *rest, residual=r, backend=backend, **options)
                outs = y if r is not None else (y,)
                runs.append((*outs, *torch.autograd.grad(sum(o.sin().sum() for o in outs), (x, *rest))))
            assert all(torch.equal(a, b) for a, b in zip(*runs))

    def test_seeds(self, device):
        x = torch.randn(4, 20, device=device)
        run = lambda **options: self.norm.op(x, dropout_p=P, **options)  # noqa: E731
        assert torch.equal(run(seed=7), run(seed=torch.tensor([7, 0], device=device)))
        assert not torch.equal(run(), run())
        with pytest.raises(TypeError, match=f"{self.norm.name}: seed must be an int"):
            run(seed=0.5)
        for p in (-0.1, 1.0):
            with pytest.raises(ValueError, match=rf"{self.norm.name}: dropout_p must lie in \[0, 1\), got {p}"):
                self.norm.op(x, dropout_p=p)

    def test_no_dropout_of_dtensors(self):
        DTensor = type("DTensor", (torch.Tensor,), {})
        with pytest.raises(ValueError, match=f"{self.norm.name}: dropout_p must be 0 for a DTensor"):
            self.norm.op(torch.randn(2, 8).as_subclass(DTensor), dropout_p=P)

    @pytest.mark.parametrize("kind", ["d", "rdo"])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_mask_is_not_saved(self, backend, kind, device):
        args = [t.requires_grad_() for t in self.norm.args(kind, torch.float32, device)]
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            self.norm.case(kind).fn(*args, backend=backend)
        whole = [t for t in saved.values() if t.numel() >= args[0].numel()]
        assert all(t.dtype == torch.float32 for t in whole)
        if backend == "triton":
            assert len(whole) == 1  # what was normalised, or what it was dropped from

    # --- casting --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("backend", ("reference", *BACKENDS))
    def test_castings_round_where_they_say(self, backend, device):
        x, weight = (random(s, torch.bfloat16, device) for s in ((8, 512), (512,)))
        xhat = self.norm.plain(x.float(), None, None)
        rounded_first = xhat.bfloat16() * weight
        gemma = (xhat * (1 + weight.float())).bfloat16()
        llama = self.norm.op(x, weight, casting="llama", backend=backend)
        fp32 = self.norm.op(x, weight, weight_offset=1.0, backend=backend)
        # rstd may differ in its last bit, which moves a rounding now and then; the other casting differs in a third.
        assert (llama != rounded_first).double().mean() < 0.002
        assert (fp32 != gemma).double().mean() < 0.002
        assert (self.norm.op(x, weight, backend=backend) != rounded_first).double().mean() > 0.1
        late = self.norm.op(x, weight, weight_offset=1.0, casting="llama", backend=backend)
        assert (late != (xhat.bfloat16().float() * (1 + weight.float())).bfloat16()).double().mean() < 0.002

    def test_unknown_casting(self):
        with pytest.raises(ValueError, match=f"{self.norm.name}: casting must be one of fp32, llama, got 'gemma'"):
            self.norm.op(torch.randn(2, 8), casting="gemma")

    # --- planted bugs ---------------------------------------------------------------------------------------------

    def planted(self, old, new, file="norm_rows"):
        return planted_bug(self.norm.name, old, new, file=file)

    def sees(self, old, new, device, *, file="norm_rows", kind="rdo", shape=None):
        """The checks turn red when `old` in a kernel file becomes `new`."""
        case = self.norm.case(kind, shape and (lambda dtype, device: self.norm.args(kind, dtype, device, shape)))
        seen = pytest.raises(AssertionError, match="max error|unwritten|NaN or inf")
        with self.planted(old, new, file), seen:
            check_accuracy(case, "triton", torch.float32, device)
            check_guards(case, "triton", device)

    def test_write_outside_a_tensor_is_seen(self, device):
        # Only under guard bands: without them this bug corrupts the process.
        bug = self.planted("(col < N)[None, :]\n    out", "(col < N + 8)[None, :]\n    out")
        with bug, pytest.raises(AssertionError, match="wrote outside"):
            check_guards(self.norm.case(""), "triton", device)

    # --- errors, derivatives --------------------------------------------------------------------------------------

    def test_errors(self, device):
        x, weight, name = torch.randn(2, 8), torch.randn(8), self.norm.name
        with pytest.raises(ValueError, match=rf"{name}: weight must be \[8\]"):
            self.norm.op(x, weight[:7])
        with pytest.raises(ValueError, match=rf"{name}: bias must be \[8\]"):
            self.norm.op(x, weight, weight[:7])
        with pytest.raises(ValueError, match=f"{name}: residual must have x's shape"):
            self.norm.op(x, weight, residual=x[:1])
        with pytest.raises(ValueError, match=f"{name}: x must have at least one dimension"):
            self.norm.op(x[0, 0])
        whole = torch.ones(2, 8, dtype=torch.int64)
        with pytest.raises(TypeError, match=f"{name}: x must be floating point"):
            self.norm.op(whole, weight)
        for argument, value in {"weight": whole[0], "bias": whole[0], "residual": whole}.items():
            with pytest.raises(TypeError, match=f"{name}: {argument} must be floating point, got torch.int64"):
                self.norm.op(x, **{argument: value})
        for p in ("0.1", torch.tensor(0.1), [0.1]):
            with pytest.raises(
                TypeError, match=rf"{name}: dropout_p must be a number in \[0, 1\), got {type(p).__name__}"
            ):
                self.norm.op(x, dropout_p=p)
        with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
            self.norm.op(x, weight, backend="tritn")
        with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
            self.norm.op(x.double(), backend="triton")
        with pytest.raises(ValueError, match="its rows are at most 262144 wide, got 262145"):
            self.norm.op(torch.empty(1, 262145, device=device), backend="triton")
        with pytest.raises(ValueError, match=r"its rows are numbered in 32 bits: fewer than 2\^31 of them"):
            ops.explain(self.norm.op, torch.empty(1, device=device).expand(2**31, 1), backend="triton")

    @pytest.mark.parametrize("kind", KINDS)
    def test_torch_form_differentiates_twice(self, kind):
        case = self.norm.case(kind)
        args = [a.requires_grad_() for a in case.tiny(torch.float64, "cpu")]
        assert torch.autograd.gradgradcheck(lambda *a: case.fn(*a, backend="torch"), args)
