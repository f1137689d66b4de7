"""A linear layer whose product is in fp8 e4m3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import fp8_linear as steps
from fastlm.kernels.matmul import empty_grad
from fastlm.ops._native import scaled_product
from fastlm.ops._op import Op
from fastlm.ops._tensor import autocast_dtype, compute_dtype, grad_of

_SCALINGS = ("row", "tensor")


class _StraightThrough(torch.autograd.Function):
    """The value of `rounded` with the derivative of `exact`, also where that is NaN or infinite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rounded, exact):
        return rounded.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return None, dy


def _reference(x, weight, bias, weight_scale, input_scale, by_row):
    """The rounded product, with the derivative of the product that is not rounded."""
    dtype = compute_dtype(x)
    wide, rows = x.to(dtype), steps.matrix(x.detach())
    with torch.no_grad():
        codes, scale = steps.quantize(rows, by_row, input_scale)
        if weight.dtype == steps.CODES:
            weight_codes, scales = weight, steps.weight_scales(weight, weight_scale)
        else:
            weight_codes, scales = steps.quantize(weight.detach(), by_row, weight_scale)
        rounded = F.linear(codes.to(dtype) * scale.to(dtype), weight_codes.to(dtype) * scales.to(dtype))
        rounded = rounded.view(*x.shape[:-1], weight.shape[0])
    exact = F.linear(wide, steps.wide_weight(weight, weight_scale, dtype))
    y = _StraightThrough.apply(rounded, exact)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _torch_product(codes, scale, weight_codes, weight_scale, bias, dtype):
    """torch's scaled product on a GPU; on a CPU a product in fp32, which is faster there than torch's own."""
    shapes = (*codes.shape, weight_codes.shape[0])
    if codes.device.type != "cuda" or 0 in shapes:
        return steps.wide_product(codes, scale, weight_codes, weight_scale, bias, dtype)
    by_row = scale.shape[0] > 1 or weight_scale.shape[0] > 1
    if by_row:  # both or neither, as torch wants it
        scale, weight_scale = (s.expand(n, 1).contiguous() for s, n in ((scale, shapes[0]), (weight_scale, shapes[2])))
    out = torch.bfloat16 if by_row else dtype  # all that torch has for scales of rows
    inside = None if bias is None or out == torch.float32 else bias.to(out)
    y = scaled_product(codes, weight_codes, (scale, weight_scale.t()), out, inside).to(dtype)
    return y if bias is None or inside is not None else y.add_(bias)


def _torch_forward(*args):
    return steps.forward(steps.quantize, _torch_product, *args)


def _supports(backend, x, weight, *rest):
    if backend == "reference" or x.device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(x.device) < (8, 9):
        return "fp8 products need compute capability 8.9 (Ada, Hopper) or newer"
    if backend == "torch" and (x.shape[-1] % 16 or weight.shape[0] % 16):
        return f"torch's fp8 product takes widths that are multiples of 16, got {x.shape[-1]} and {weight.shape[0]}"
    return None


def _slower(backend, x, weight, *rest):
    wide = x.device.type == "cuda" and not (x.shape[-1] % 16 or weight.shape[0] % 16)
    if backend == "triton" and wide:
        return "torch's product is taken until this one was measured to be faster"
    return None


_OPTIONS = "Tensor? weight_scale"
OP = Op(
    "fp8_linear",
    f"(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}, Tensor? input_scale, bool by_row, str backend) -> Tensor",
    f"(Tensor dy, Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}, int need, str backend) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    kernels={
        "torch": (_torch_forward, steps.backward),
        "triton": ("fp8_product:fp8_linear_fwd", steps.backward),
    },
    supports=_supports,
    slower=_slower,
    dtypes=(torch.float32, torch.bfloat16, torch.float16, steps.CODES),
)


def _fake_backward(dy, x, weight, bias, weight_scale, need, backend):
    return tuple(empty_grad(x, t, need >> i & 1) for i, t in enumerate((x, weight, bias)))


OP.fake(lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])), _fake_backward)


@OP.autograd
class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_scale, input_scale, by_row, backend):
        ctx.save_for_backward(x, weight, bias, weight_scale)
        ctx.backend = backend
        return OP.below(x, weight, bias, weight_scale, input_scale, by_row, backend)

    @staticmethod
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:3]
        bits = sum(1 << i for i, needed in enumerate(needs) if needed)
        grads = OP.backward(dy, *ctx.saved_tensors, bits, ctx.backend)
        return *(g if needed else None for g, needed in zip(grads, needs)), None, None, None, None


@OP.backward_reference
def _backward_reference(dy, x, weight, bias, weight_scale, need, backend):
    def linear(x, weight, bias):
        dtype = compute_dtype(x)
        y = F.linear(x.to(dtype), steps.wide_weight(weight, weight_scale, dtype))
        return (y if bias is None else y + bias.to(dtype)).to(x.dtype)

    if weight.dtype == steps.CODES:
        grads = grad_of(lambda x, bias: linear(x, weight, bias), (x, bias), (dy,))
        grads.insert(1, empty_grad(x, weight, False))
    else:
        grads = grad_of(linear, (x, weight, bias), (dy,))
    tensors = (x, weight, bias)
    return tuple(g if need >> i & 1 else empty_grad(x, tensors[i], False) for i, g in enumerate(grads))


def _splits(x, bias, weight_scale, by_row):
    """Ways to divide the work: places of x, weight, bias, weight_scale | y | the gradients of x, weight, bias.

    Scales of rows belong to rows: these may be divided, the inner dimension may not, nor what shares one scale.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, part, rows = Replicate(), Partial(), Shard(0)
    splits = [([whole] * 4, whole, [whole] * 3)]
    if by_row:
        splits += [([at, whole, whole, whole], at, [at, part, part]) for at in map(Shard, range(x.ndim - 1))]
        scales = rows if weight_scale is not None and weight_scale.ndim else whole
        splits.append(([whole, rows, rows, scales], Shard(x.ndim - 1), [part, rows, rows]))
    return splits


def _shard_forward(x, weight, bias, weight_scale, input_scale, by_row, backend):
    from torch.distributed.tensor import Replicate

    rules = []
    for (x_at, w_at, b_at, s_at), y_at, _ in _splits(x, bias, weight_scale, by_row):
        optional = [
            None if t is None else at for t, at in ((bias, b_at), (weight_scale, s_at), (input_scale, Replicate()))
        ]
        rules.append(([y_at], [x_at, w_at, *optional, None, None]))
    return rules


def _shard_backward(dy, x, weight, bias, weight_scale, need, backend):
    from torch.distributed.tensor import Replicate

    rules = []
    for (x_at, w_at, b_at, s_at), y_at, grads in _splits(x, bias, weight_scale, True):
        grads = [place if need >> i & 1 else Replicate() for i, place in enumerate(grads)]
        optional = [None if t is None else at for t, at in ((bias, b_at), (weight_scale, s_at))]
        rules.append((grads, [y_at, x_at, w_at, *optional, None, None]))
    return rules


OP.sharding(_shard_forward, _shard_backward)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: str = "row",
    weight_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x weight^T + bias, x and weight rounded to fp8 (e4m3: 4 significant bits, up to 448) with scales for their range:

        scale = max |row| / 448,    code = fp8(row / scale),    y = (codes_x codes_w^T) scale_x scale_w + bias

    Args:
        x: [..., D], fp16, bf16 or fp32 (fp64 too on the reference), any strides.
        weight: [F, D], any float dtype and strides, rounded at every call; or codes, torch.float8_e4m3fn, with `weight_scale`.
        bias: [F] or None, any float dtype; added in fp32.
        scaling: "row", a scale for each row of x and each row of weight; or "tensor", one for each matrix.
        weight_scale: fp32, of a weight that is given as codes: [F], [F, 1] or one element.
        input_scale: fp32, one element: a scale of x known beforehand (from the calls before), which saves looking for its
            largest element; what exceeds 448 times it is cut off there, but infinity.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [..., F] in x's dtype. Sums in fp32. Rounding to e4m3 is to nearest even and saturates: the relative error of an element
        is at most 1/16 from 1/28672 of its row's largest on: of its matrix's largest for "tensor", of 448 input_scale where
        that is given, and of 1e-12 at least: of a row whose largest is below 1e-12 little or nothing is left. For random
        normal operands y's error is about 3.7 % of y's root mean square, where a bf16 product's is about 0.3 %. A row of x
        with NaN or infinity gives NaN; for "tensor" without input_scale all of y.

        The gradient is that of the product that is not rounded (straight through, whatever x holds): dx = dy weight,
        dweight = dy^T x, in x's dtype, dbias the column sums; each in its parameter's dtype and memory order, none for codes
        and scales. Saved for it: x and the parameters. Under autocast x is taken in autocast's dtype.

    Raises:
        ValueError: shapes that do not fit, a scaling that is unknown, a weight in codes without scale, an unknown or
        unsupported backend. TypeError: a tensor of another kind.

    Backends: torch (its scaled product on compute capability >= 8.9, D and F multiples of 16; fp32 products of the codes on
    a CPU), triton (>= 8.9, any sizes; codes of a row in one pass, scales and bias where the sums are at hand), reference.
    `auto` takes triton where torch's product does not serve. Papers: Micikevicius et al. 2022, arXiv:2209.05433.
    """
    _check(x, weight, bias, weight_scale, input_scale, scaling)
    backend = OP.choose(backend, x, weight, bias)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    args = (x, weight, bias, weight_scale, input_scale, scaling == "row")
    if backend == "reference":
        return OP.plain(backend, *args)
    return OP.forward(*args, backend)


def _check(x, weight, bias, weight_scale, input_scale, scaling):
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"fp8_linear: {name} must be floating point, got {t.dtype}")
    if x.dtype.itemsize == 1 or (weight.dtype.itemsize == 1 and weight.dtype != steps.CODES):
        raise TypeError(
            f"fp8_linear: x must not be fp8 and weight codes torch.float8_e4m3fn, got {x.dtype} and {weight.dtype}"
        )
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        width = "D" if x.ndim == 0 else x.shape[-1]
        raise ValueError(
            f"fp8_linear: x must be [..., D] and weight [F, {width}] like x's last dimension, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"fp8_linear: bias must be [{weight.shape[0]}] like weight's rows, got {list(bias.shape)}")
    if scaling not in _SCALINGS:
        raise ValueError(f"fp8_linear: scaling must be 'row' or 'tensor', got {scaling!r}")
    if (weight.dtype == steps.CODES) != (weight_scale is not None):
        raise ValueError(
            f"fp8_linear: weight_scale belongs to a weight in codes (torch.float8_e4m3fn), got {weight.dtype} "
            f"{'without' if weight_scale is None else 'with'} one"
        )
    if (
        weight_scale is not None
        and weight_scale.numel() != 1
        and weight_scale.shape not in ((weight.shape[0],), (weight.shape[0], 1))
    ):
        raise ValueError(
            f"fp8_linear: weight_scale must be [{weight.shape[0]}] or one element, got {list(weight_scale.shape)}"
        )
    if input_scale is not None and input_scale.numel() != 1:
        raise ValueError(f"fp8_linear: input_scale must have one element, got {list(input_scale.shape)}")


def fp8_quantize(matrix: Tensor, *, scaling: str = "row") -> tuple[Tensor, Tensor]:
    """A matrix [N, D] as codes [N, D], torch.float8_e4m3fn, and fp32 scales [N] ("row") or 0-d ("tensor"), as `fp8_linear` makes
    them and takes them for its weight."""
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(f"fp8_quantize: matrix must be floating point [N, D], got {matrix.dtype} {list(matrix.shape)}")
    if scaling not in _SCALINGS:
        raise ValueError(f"fp8_quantize: scaling must be 'row' or 'tensor', got {scaling!r}")
    codes, scale = steps.quantize(matrix.detach(), scaling == "row")
    return codes, scale.reshape(-1) if scaling == "row" else scale.reshape(())
