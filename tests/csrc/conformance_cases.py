"""The cases of tests.csrc.conformance: instructions, launchers of kernels made of them, arguments, how near results must be.

A case is a launcher of a .cu file here and a function that makes its arguments; to add one, add a row to CASES.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.csrc import conformance_arguments as arguments
from tests.csrc.host_library import Both, In, Out


def exact(found: Tensor, want: Tensor) -> tuple[Tensor, float]:
    """Which values have other bits. Any NaN of fp32 is as good as any other: the host body does not model what it carries."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    wrong = found.view(bits) != want.view(bits)
    if found.dtype == torch.float32:
        wrong &= ~(found.isnan() & want.isnan())
    return wrong, 0.0


def within(error: float, floor: float = 2.0**-126) -> Callable[[Tensor, Tensor], tuple[Tensor, float]]:
    """A comparison that allows a relative error, or `floor` where the wanted value is too small for that. Half a rounding is
    added for the host body's own."""
    allowed = error + 2.0**-24

    def compare(found: Tensor, want: Tensor) -> tuple[Tensor, float]:
        f, w = found.double(), want.double()
        same = (f == w) | (f.isnan() & w.isnan())
        off = (f - w).abs() / w.abs().clamp_min(floor / error)
        off = torch.where(same, 0.0, off).nan_to_num(math.inf, math.inf)
        return off > allowed, off.max().item() if off.numel() else 0.0

    return compare


def sorted_rows(*outputs: Tensor) -> Sequence[Tensor]:
    """Each row in ascending order: of values that threads got in the order in which they came."""
    return [t.sort(-1).values for t in outputs]


def atomic_results(cells: Tensor, old: Tensor, sums: Tensor) -> Sequence[Tensor]:
    """The last exchanged value belongs to those that others got; who got which is open."""
    exchanged = torch.cat([old[0], cells[3:4]])
    return [cells[[0, 1, 2, 4]], *sorted_rows(exchanged, old[1]), sums]


@dataclasses.dataclass(frozen=True)
class Case:
    """An instruction, the launcher of a kernel made of it, and its arguments.

    make(generator) gives the launcher's arguments but the stream: In, Both, Out, ints and tuples of ints. canonical(*outputs)
    turns what the Boths and Outs hold afterwards into what is the same in every order of threads; compare says how near it must
    be. majors: compute capabilities that have the instruction; none for all.
    """

    name: str
    launcher: str
    make: Callable[[torch.Generator], list]
    compare: Callable[[Tensor, Tensor], tuple[Tensor, float]] = exact
    canonical: Callable[..., Sequence[Tensor]] = lambda *outputs: outputs
    source: str = "conformance.cu"
    majors: tuple[int, ...] = ()


def _with(make: Callable, *values, **named) -> Callable[[torch.Generator], list]:
    return lambda g: make(g, *values, **named)


_PRODUCTS = re.findall(
    r"^CASE\((\w+), (\w+), (\d+)", Path(__file__).with_name("wgmma_cases.cu").read_text(), re.MULTILINE
)

CASES = [
    *(
        Case(f"shuffle, _up, _down, _xor {name}", f"shuffles_{name}", _with(arguments.shuffle, dtype))
        for name, dtype in (("i32", torch.int32), ("f32", torch.float32), ("i64", torch.int64))
    ),
    Case("warp_ballot, _any, _all", "votes", arguments.vote),
    Case("warp_barrier", "warp_barriers", arguments.warp_barrier),
    Case("warp_sum, _max, block_sum, _max", "reductions", arguments.reduction),
    *(
        Case(f"load_vector, store_vector {name}", f"vectors_{name}", _with(arguments.vector, dtype, count))
        for name, dtype, count in (
            ("u8x1", torch.uint8, 1), ("bf16x1", torch.bfloat16, 1), ("bf16x2", torch.bfloat16, 2),
            ("f32x2", torch.float32, 2), ("u8x16", torch.uint8, 16), ("fp16x8", torch.float16, 8),
            ("f32x4", torch.float32, 4),
        )
    ),
    Case("named_barrier, _arrive", "named_barriers", arguments.named_barrier),
    Case("minimum, maximum", "extremes", arguments.extreme),
    Case("pointer_at, pointer_cast", "pointers", lambda g: [In(arguments.any_floats(g, 64)), Out(torch.zeros(64).int())]),
    Case("fill_zero", "cleared", lambda g: [Both(torch.rand(999, generator=g)), 700]),
    *(Case(f"to_float {n}", f"to_float_{n}", _with(arguments.every_half, d)) for n, d in
      (("bf16", torch.bfloat16), ("fp16", torch.float16))),
    *(Case(f"from_float {n}", f"from_float_{n}", _with(arguments.floats_to_halves, d)) for n, d in
      (("bf16", torch.bfloat16), ("fp16", torch.float16))),
    Case("fast_exp2", "exp2_of", _with(arguments.function, -130.0, 130.0), within(2.0**-22)),
    Case("fast_log2", "log2_of", _with(arguments.function, 0.4, 2.1), within(2.0**-22, 2.0**-22)),
    Case("fast_rsqrt", "rsqrt_of", _with(arguments.function, 0.5, 4.1), within(2.0**-22.9)),
    Case("fast_reciprocal", "reciprocal_of", _with(arguments.function, -2.1, 2.1), within(2.0**-23)),
    Case("fast_tanh", "tanh_of", _with(arguments.function, -10.0, 10.0), within(2.0**-11)),
    Case("philox", "random_words", arguments.philox),
    *(
        Case(f"atomic_add, _max, _cas, _exchange {n}", f"atomics_{n}", _with(arguments.atomic, d, low), canonical=atomic_results)
        for n, d, low in (("i32", torch.int32, -(2**31)), ("u32", torch.int32, 0), ("u64", torch.int64, 0))
    ),
    Case("atomic_wrap", "wraps", arguments.wrap, canonical=sorted_rows),
    Case("is_last_block", "tickets", arguments.ticket),
    Case("device_fence, grid of blocks that wait", "grid_barriers", arguments.grid_barrier),
    Case("load_acquire, store_release, spin_pause", "flags", arguments.flag),
    *(
        Case(name, launcher, make, source="cluster_cases.cu", majors=(9, 10))
        for name, launcher, make in (
            ("cluster_rank, _blocks", "ranks", arguments.rank),
            ("cluster_barrier, _pointer", "ring", arguments.cluster),
            ("cluster_arrive, _wait", "halves", arguments.cluster),
            ("cluster_sum, _max, _arrive_relaxed", "sums", arguments.cluster_sum),
            ("cluster_pointer, atomic_add", "counts", arguments.cluster_count),
        )
    ),
    *(
        Case(f"{what} {n}", f"{launcher}_{n}", _with(make, *values), source="mma_cases.cu")
        for n, d in (("bf16", torch.bfloat16), ("fp16", torch.float16))
        for what, launcher, make, *values in (
            ("mma", "mma", arguments.fragment, d), ("packed_subtract, pack, byte_permute", "pairs", arguments.word, 3),
        )
    ),
    Case("bitwise", "bitwise_of", _with(arguments.word, 4), source="mma_cases.cu"),
    *(
        Case(f"copy_async<{n}>, _commit, _wait", "ahead", _with(arguments.copy_async, n), source="async_cases.cu")
        for n in (1, 2, 4)
    ),
    *(
        Case(name, launcher, make, source="async_cases.cu", majors=(9, 10))
        for name, launcher, make in (
            ("mbarrier_arrive, _wait, _invalidate", "threads", lambda g: [Out(torch.zeros(9 * 32 + 4).int()), 9]),
            ("mbarrier, tensor_load, _store, elect_one", "pipeline", arguments.pipeline),
            *(
                (f"tensor_load {rank}d {n}", f"box_{n}", _with(arguments.box, d, rank))
                for rank in range(1, 6)
                for n, d in (("bf16", torch.bfloat16), ("float", torch.float32))
            ),
            *(
                (f"tensor_reduce_add {n}", f"add_{n}", _with(arguments.addition, d))
                for n, d in (("float", torch.float32), ("bf16", torch.bfloat16), ("int", torch.int32))
            ),
            *(
                (f"bulk_load, _store, _reduce_add {n}", f"bulk_{n}", _with(arguments.bulk, d))
                for n, d in (("float", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
            ),
            ("fence_async_global", "relay", arguments.relay),
            ("fence_async_shared, cluster_pointer", "pass_on", lambda g: [Out(torch.zeros(6, 32)), 2]),
            ("warpgroup_id, elect_one, setmaxnreg", "groups", lambda g: [Out(torch.zeros(384).int())]),
        )
    ),
    *(
        Case(f"wgmma {launcher}", launcher, _with(arguments.product, getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[t]),
                                                  int(n)), source="wgmma_cases.cu", majors=(9,))
        for launcher, t, n in _PRODUCTS
    ),
]  # fmt: skip
