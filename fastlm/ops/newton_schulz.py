"""Newton-Schulz iteration: the nearest semi-orthogonal matrix, roughly, by products alone (Muon)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.ops._op import Op
from fastlm.ops._tensor import compute_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, kellerjordan.github.io/posts/muon
# Amsel et al. 2025, arXiv:2505.16932: the best polynomial for what the steps before it leave, for singular values from 1e-3 on.
# As its authors do, all but the last are those of X / 1.01, so that rounding to bf16 does not lead outside the range.
_OPTIMAL = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLAR_EXPRESS = (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _OPTIMAL), (1.875, -1.25, 0.375))
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRID = 65535  # the second dimension of a CUDA grid
_PAIRS = 384  # rows from which on steps are made in pairs
_LARGE = 1 << 17  # elements from which on a CPU calls for one matrix at a time take no longer than those for a batch


def _triples(coefficients):
    return [coefficients[i : i + 3] for i in range(0, len(coefficients), 3)]


def _reference(matrices, coefficients, eps, dtype):
    """In fp32 (fp64 for fp64 matrices), whatever `dtype` says."""
    x = matrices.to(compute_dtype(matrices))
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=eps)
    for a, b, c in _triples(coefficients):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if matrices.shape[-2] > matrices.shape[-1] else x
    return x.to(matrices.dtype)


def _torch(matrices, coefficients, eps, dtype):
    """With torch's batched products, in `dtype`."""
    if matrices.numel() == 0:
        return matrices.clone(memory_format=torch.contiguous_format)
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=compute_dtype(x))
    x = (x / norm.clamp(min=eps)).to(dtype).contiguous()
    triples = _triples(coefficients)
    if (x.device.type == "cpu" and x[0].numel() >= _LARGE) or x.shape[0] == 1:
        x = torch.stack([_iterated(matrix, triples) for matrix in x])
    else:
        x = _iterated(x, triples)
    x = x.mT if matrices.shape[-2] > matrices.shape[-1] else x
    return x.reshape(matrices.shape).to(matrices.dtype).contiguous()


def _iterated(x, triples):
    """The steps on a matrix or a batch of them, no taller than wide."""
    if x.device.type == "cpu" and x.ndim == 2 and x.dtype.itemsize == 2 and _pairs_hold(x, triples):
        return _in_pairs(x, *triples[0], len(triples))
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in triples:
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _pairs_hold(x, triples):
    """Whether two steps at a time were measured to be faster and to keep the accuracy rule."""
    own = all(tuple(triple) == QUINTIC for triple in triples)
    return own and x.shape[-2] >= _PAIRS and x.shape[-1] >= 2 * x.shape[-2]


def _in_pairs(x, a, b, c, steps):
    """The steps, two at a time behind the first, the second of two on the small A alone: with P = a I + b A + c A A the next A is
    P A P, and X takes one product for both. For five steps 22 M^3 + 12 M^2 N operations in place of 10 M^3 + 20 M^2 N.

    After Gram Newton-Schulz, dao-lab.ai/blog/2026/gram-newton-schulz. In bf16 it must go back to X: without, singular values
    reached 38 where 1.2 is the most; once in five steps, the error was up to 2.5 times that of the plain steps; in pairs, up
    to 1.5 times from 384 rows on (and up to 3 times below, or 2 times with POLAR_EXPRESS).
    """
    made = 0
    while made < steps:
        gram = x @ x.T
        z = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        pair = made > 0 and made + 1 < steps
        if pair:
            half = torch.addmm(gram, z, gram, beta=a)
            gram = torch.addmm(half, half, z, beta=a)
            z2 = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            z.diagonal().add_(a)
            x = torch.addmm(z, z2, z, beta=a) @ x
        else:
            x = torch.addmm(x, z, x, beta=a)
        made += 1 + pair
    return x


def _supports(backend, matrices, dtype):
    if backend != "triton":
        return None
    if dtype not in _KERNEL_DTYPES:
        return f"its kernels compute in float32, bfloat16 or float16, not {str(dtype)[6:]}"
    count = matrices.shape[:-2].numel()
    return f"its grid holds at most {_GRID} matrices, got {count}" if count > _GRID else None


def _slower(backend, *_):
    return "torch's products are taken until these were measured to be faster" if backend == "triton" else None


OP = Op(
    "newton_schulz",
    "(Tensor matrices, float[] coefficients, float eps, ScalarType dtype, str backend) -> Tensor",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("newton_schulz:newton_schulz_fwd", None)},
    supports=_supports,
    slower=_slower,
    dtypes=_KERNEL_DTYPES,
)

OP.fake(lambda matrices, coefficients, eps, dtype, backend: matrices.new_empty(matrices.shape))


def _steps(coefficients, steps):
    """a, b, c of every step, one behind the other."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 100:
        raise ValueError(f"newton_schulz: steps must be a whole number from 1 to 99, got {steps!r}")
    triples = list(coefficients)
    if triples and not isinstance(triples[0], Sequence):
        triples = [tuple(triples)]
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(
            f"newton_schulz: coefficients must be (a, b, c) for all steps, or a sequence of such triples, got {coefficients!r}"
        )
    triples = (triples + [triples[-1]] * steps)[:steps]
    return [float(number) for triple in triples for number in triple]


def newton_schulz(
    matrices: Tensor,
    *,
    steps: int = 5,
    coefficients: Sequence = QUINTIC,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Brings the singular values of each matrix near 1 and keeps its singular vectors, by products alone:

        X <- matrix / max(|matrix|_F, eps);    `steps` times:  A = X X^T,  X <- a X + (b A + c A A) X

    (of the transpose where M > N). With U S V^T the matrix, the result is U f(S / |S|) V^T, f being the polynomial
    a s + b s^3 + c s^5 applied `steps` times. It does not tend to U V^T: with the default coefficients f lies between 0.68 and
    1.21 for s from 0.0016 to 1, and is 485 s for the least: singular values of less than 1/700 of the Frobenius norm stay below
    0.68, the smaller the more. A matrix of zeros gives zeros.

    Args:
        matrices: [..., M, N], fp16, bf16 or fp32 (any float dtype on reference and torch), any strides and any number of
            leading dimensions: a batch of matrices of one shape costs one call. Each stands for itself: a NaN in one does not
            touch the others.
        steps: how many, 1 to 99.
        coefficients: (a, b, c) of all steps; or one such triple per step, the last of which is taken for all further steps and
            those too many are left out: `POLAR_EXPRESS` for the optimal polynomials of Amsel et al. 2025, arXiv:2505.16932.
        eps: the least norm to divide by. The norm is summed in fp32.
        dtype: of the products and of what lies between them; None: that of matrices. Muon's authors take bf16. The reference
            computes in fp32 or fp64 whatever it says.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        Like `matrices`, contiguous. There is no gradient: the result is detached from the matrices, on every backend.

    Raises:
        ValueError: fewer than two dimensions, steps or coefficients that make no sense, an unknown or unsupported backend.
        TypeError: matrices or dtype not floating point; a DTensor, of which no process has a whole matrix.

    Backends: triton (compute capability >= 8.0; three launches a step, the two symmetric products of which compute only the
    tiles on and above the diagonal), torch (batched products; `auto` until ours was measured to be faster; on a CPU, large
    matrices in 16 bits that are twice as wide as tall take steps in pairs: at four times, 22 % less work), reference.
    Paper: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    if not isinstance(matrices, Tensor) or not matrices.is_floating_point():
        kind = matrices.dtype if isinstance(matrices, Tensor) else type(matrices).__name__
        raise TypeError(f"newton_schulz: matrices must be a floating point tensor, got {kind}")
    if type(matrices).__name__ == "DTensor":
        raise TypeError("newton_schulz: matrices is a DTensor; whole matrices are needed: pass matrices.full_tensor()")
    if matrices.ndim < 2:
        raise ValueError(f"newton_schulz: matrices must be [..., M, N], got {list(matrices.shape)}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"newton_schulz: dtype must be a floating point dtype, got {dtype}")
    if not eps > 0:
        raise ValueError(f"newton_schulz: eps must be above 0, got {eps}")
    numbers, dtype = _steps(coefficients, steps), dtype or matrices.dtype
    backend = OP.choose(backend, matrices, dtype)
    with torch.no_grad():
        matrices = matrices.detach()
        if backend in OP.plain_forms:
            return OP.plain(backend, matrices, numbers, float(eps), dtype)
        return OP.forward(matrices, numbers, float(eps), dtype, backend)
