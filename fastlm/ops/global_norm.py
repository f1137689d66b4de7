"""The norm of all gradients taken as one vector, for clipping and for skipping steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastlm.kernels.tensor_table import formats_of, table_of
from fastlm.ops import _cuda
from fastlm.ops._op import Op

# Elements the torch form sums at a time. In fp32, for the error that grows with them: 7e-4 in one vector_norm of 16.8 M
# elements, 8e-5 in pieces of 2^22. 16-bit ones are made fp32 in the cache first: 4.5 ms for 13.8 M at 2^18, 6.4 at 2^15.
_PIECE, _CACHED = 1 << 22, 1 << 18
_WIDE = {torch.float32, torch.float64}
_KINDS = {(dtype, torch.strided) for dtype in (*_WIDE, torch.float16, torch.bfloat16)}
_FP64 = {(torch.float64, torch.strided)}
_PLAIN = {Tensor, torch.nn.Parameter}
_PROGRAMS_PER_SM = 4  # of the CUDA kernel: as many as run at once, and each has an equal share


def _reference(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).to(_out_dtype(tensors))


def _torch(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        dtype = _out_dtype(tensors)
        norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        return torch.linalg.vector_norm(torch.stack([n.to(dtype) for n in norms]))
    dtypes = {t.dtype for t in tensors}
    if dtypes <= _WIDE:
        norm = _wide_norm(tensors)
    else:
        square = _square_of_16_bits([t for t in tensors if t.dtype not in _WIDE])
        if dtypes & _WIDE:
            square += _wide_norm([t for t in tensors if t.dtype in _WIDE]).square()
        norm = square.sqrt()
    if not math.isfinite(norm.item()):  # squares may overflow where the norm does not
        return _reference(tensors)
    return norm.to(_out_dtype(tensors))


def _wide_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of fp32 and fp64, in fp64."""
    if max(map(Tensor.numel, tensors)) > _PIECE:
        tensors = [part for t in tensors for part in t.reshape(-1).split(_PIECE)]
    norms = list(map(torch.linalg.vector_norm, tensors))
    if len({n.dtype for n in norms}) > 1:
        norms = [n.double() for n in norms]
    return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)


def _square_of_16_bits(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of fp16 and bf16, in fp64."""
    cached = torch.empty(min(_CACHED, max(map(Tensor.numel, tensors))), dtype=torch.float32)
    squares = []
    for t in tensors:
        for part in t.reshape(-1).split(_CACHED):
            wide = cached[: part.numel()].copy_(part)
            squares.append(torch.dot(wide, wide))
    return torch.stack(squares).sum(dtype=torch.float64)


def _out_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if all(t.dtype == torch.float64 for t in tensors) else torch.float32


def _cuda_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The launcher of csrc/global_norm.cu."""
    device = tensors[0].device
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    table, _ = table_of([tensors], None)
    programs = min(table.block.numel(), _PROGRAMS_PER_SM * sms)
    workspace = torch.empty(2 * programs + 1, dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    where = (table.address, table.size, table.owner, table.block, formats_of(tensors))
    _cuda.function("global_norm")(*where, workspace, norm)
    return norm


OP = Op(
    "global_norm",
    "(Tensor[] tensors, str backend) -> Tensor",
    reference=_reference,
    torch=_torch,
    kernels={"triton": ("global_norm:global_norm", None), "cuda": (_cuda_norm, None)},
    slower=_cuda.not_measured,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)

OP.fake(lambda tensors, backend: torch.empty((), dtype=torch.float32, device=tensors[0].device))


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor], *, backend: str = "auto") -> Tensor:
    """The Euclidean norm of all tensors taken as one vector, sqrt(sum of squares of all elements).

    Args:
        tensors: any shapes, strides, sizes (also none) and devices; fp16, bf16, fp32 and fp64, mixed at will; only read.
            A DTensor counts as the whole tensor: one reduction over the mesh for all that are divided alike.

    Returns:
        0-d tensor on the device of the first, fp64 if all are fp64, else fp32 (16-bit types are summed in fp32, partial sums of
        the torch form in fp64). No tensors give 0. NaN in any gives NaN, else infinity gives infinity. Finite elements give a
        finite norm, up to fp32's largest number: squares that overflow are scaled (torch form on a GPU: they do overflow).
        No gradient flows through it. Bitwise repeatable; no host sync.

    Raises:
        TypeError: a tensor that is not real floating point, or sparse. ValueError: an unknown or unsupported backend.

    Backends: triton (fp32, bf16, fp16; one launch per dtype and one that adds up; compute capability >= 8.0), cuda (likewise,
    one launch for all; "auto" does not take it), torch (the CPU default), reference.
    """
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    # Sets: with many small tensors the host's time is all there is.
    kinds = {(t.dtype, t.layout) for t in tensors}
    if not kinds <= _KINDS:
        _refuse(tensors)
    dtype = torch.float64 if kinds == _FP64 else torch.float32
    if {type(t) for t in tensors} <= _PLAIN and len({t.get_device() for t in tensors}) == 1:
        return _plain_norm(tensors, dtype, backend, len(kinds) == 1)
    device = tensors[0].device
    groups: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        mesh, sums = None, ()
        if type(t).__name__ == "DTensor":
            t, mesh, sums = _local(t)
        groups.setdefault((t.device, mesh, sums), []).append(t)
    squares = []
    for (_, mesh, sums), group in groups.items():
        square = _plain_norm(group, dtype, backend).double().square()
        squares.append((square if mesh is None else _over_mesh(square, mesh, sums)).to(device))
    return torch.stack(squares).sum().sqrt().to(dtype)


def _refuse(tensors: list[Tensor]) -> None:
    for i, t in enumerate(tensors):
        if not t.is_floating_point() or t.layout != torch.strided:
            what = t.dtype if t.layout == torch.strided else f"{t.layout}; give its to_dense()"
            raise TypeError(f"global_norm: tensors[{i}] must be dense and real floating point, got {what}")


def _plain_norm(tensors: list[Tensor], dtype: torch.dtype, backend: str, alike: bool = False) -> Tensor:
    """The norm of plain tensors on one device; alike: of one dtype."""
    backend = OP.choose(backend, *(tensors[:1] if alike else {t.dtype: t for t in tensors}.values()))
    if backend in OP.plain_forms:
        return OP.plain(backend, tensors).to(dtype)
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return torch.zeros((), dtype=dtype, device=tensors[0].device)
    return OP.forward([t.contiguous() for t in filled], backend)


def _local(t: Tensor) -> tuple[Tensor, object, tuple[bool, ...]]:
    """-> this process's part of a DTensor, its mesh, and over which dimensions of the mesh squares are to be added."""
    from torch.distributed.tensor import Replicate

    if any(place.is_partial() for place in t.placements):
        t = t.redistribute(placements=[Replicate() if place.is_partial() else place for place in t.placements])
    return t.to_local(), t.device_mesh, tuple(not place.is_replicate() for place in t.placements)


def _over_mesh(square: Tensor, mesh: object, sums: tuple[bool, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    places = [Partial() if add else Replicate() for add in sums]
    return DTensor.from_local(square, mesh, places, run_check=False).full_tensor()
