"""The lists of tensors an optimizer step takes: what must hold for them, groups of one dtype, and one memory order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops.block_quantize import BLOCK

_STREAMS = 1 << 20  # numbers that a caller may give as streams: those of another part of a DTensor lie so far on


def check_lengths(op: str, given: dict[str, Sequence[Tensor] | None]) -> None:
    """Raises ValueError unless all lists that are there are equally long."""
    lengths = {name: len(tensors) for name, tensors in given.items() if tensors is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{op}: {', '.join(lengths)} must be equally long, got {list(lengths.values())}")


class Lists(NamedTuple):
    """What one call updates: one entry for each parameter in every list; a list that is absent is empty."""

    params: list[Tensor]
    grads: list[Tensor]
    masters: list[Tensor]
    remainders: list[Tensor]
    averages: list[Tensor]
    states: tuple[list[Tensor], ...]
    scales: tuple[list[Tensor], ...]  # of the states that are 8-bit codes

    def flat(self) -> list[list[Tensor]]:
        """All lists in the order of the op's schema and of the kernels' table of addresses."""
        return [
            self.params, self.grads, *self.states, self.masters, self.remainders, self.averages, *self.scales
        ]  # fmt: skip

    def written(self) -> list[list[Tensor]]:
        return [self.params, *self.flat()[2:]]

    def cut(self, cuts: list[tuple[int, int, int]]) -> Lists:
        """Flat views of these parts (tensor, start, stop) of all lists."""

        def part(t, start, stop):
            flat = t if t.ndim == 1 else t.view(-1)
            return flat if stop - start == flat.shape[0] else flat[start:stop]

        def parts(tensors):
            return [part(tensors[i], start, stop) for i, start, stop in cuts] if tensors else tensors

        def of_scales(tensors):
            return [tensors[i][start // BLOCK : -(-stop // BLOCK)] for i, start, stop in cuts] if tensors else tensors

        return Lists(*map(parts, self[:5]), tuple(map(parts, self.states)), tuple(map(of_scales, self.scales)))


def groups_of(
    op: str, lists: Lists, state_names: Sequence[str], seeded: bool, streams: Sequence[int] | None = None
) -> list[tuple[Lists, list[int]]]:
    """The lists, split so that each list of a group has one dtype, and the random stream of each parameter.

    `streams` are its number as the caller counts; None: its place in the list. DTensors become their local shards; no group is
    empty, nor any tensor in it. Raises TypeError, ValueError for lists that do not fit together.
    """
    if not lists.params:
        return []
    check = _Check(op, state_names, lists.params[0].device, seeded)
    if _uniform(lists):
        check(0, lists.params[0], *(_pick(lists, 0)[1:]))
        for i, p in enumerate(lists.params) if any(lists.scales) else ():
            check.scales(i, p, *(_pick(lists, i)[5:]))
        return [(lists, list(range(len(lists.params)) if streams is None else streams))]
    groups: dict[tuple, list[tuple]] = {}
    for i, p in enumerate(lists.params):
        one = _pick(lists, i)
        check(i, p, *one[1:])
        one = Lists(*(_map(_local, part) for part in one))
        check.scales(i, one.params, *one[5:])
        if one.params.numel():
            key = _map(lambda t: t.dtype, tuple(one))
            own, apart = (i, len(lists.params)) if streams is None else (streams[i], _STREAMS)
            groups.setdefault(key, []).append((one, own + apart * _shard_number(p)))
    return [(_gather([one for one, _ in group]), [stream for _, stream in group]) for group in groups.values()]


def _pick(lists: Lists, i: int) -> tuple:
    """Parameter i's entry of every list, None for those that are absent."""
    return Lists(*_map(lambda tensors: tensors[i] if tensors else None, tuple(lists), leaf=list))


def _gather(ones: list[Lists]) -> Lists:
    def column(*tensors):
        return [] if tensors[0] is None else list(tensors)

    plain = [column(*(one[k] for one in ones)) for k in range(5)]
    nested = [tuple(map(column, *(one[k] for one in ones))) for k in (5, 6)]
    return Lists(*plain, *nested)


def _map(fn, part: Any, leaf: type = Tensor) -> Any:
    """fn of every tensor (or list) in nested tuples; None stays."""
    if isinstance(part, leaf):
        return fn(part)
    return None if part is None else tuple(_map(fn, p, leaf) for p in part)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if type(t).__name__ == "DTensor" else t


def _shard_number(p: Tensor) -> int:
    """Which part of a DTensor this process holds: processes with equal parts draw equal random numbers, others do not."""
    number = 0
    for dim, placement in enumerate(getattr(p, "placements", ())):
        if placement.is_shard():
            number = number * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)
    return number


class _Check:
    """The checks of one parameter's tensors."""

    def __init__(self, op: str, state_names: Sequence[str], device: torch.device, seeded: bool) -> None:
        self.op, self.state_names, self.device, self.seeded = op, state_names, device, seeded

    def __call__(self, i, p, g, master, remainder, average, states, scales) -> None:
        if not p.is_floating_point():
            raise TypeError(f"{self.op}: params[{i}] must be floating point, got {p.dtype}")
        if not g.is_floating_point():
            raise TypeError(f"{self.op}: grads[{i}] must be floating point, got {g.dtype}")
        if g.layout != torch.strided:
            raise TypeError(
                f"{self.op}: grads[{i}] must be dense, got {g.layout}; give grad.to_dense(), or an nn.Embedding sparse=False"
            )
        named = [("grads", g), ("masters", master), ("remainders", remainder), ("averages", average)]
        for name, t in [*named, *zip(self.state_names, states)]:
            if t is not None:
                self.fits(f"{name}[{i}]", t, p)
        sixteen = (torch.bfloat16, torch.float16)
        self.dtype(i, "masters", master, (torch.float32,), p, sixteen)
        self.dtype(i, "remainders", remainder, (torch.int16,), p, sixteen[:1])
        self.dtype(i, "averages", average, (torch.float32, p.dtype), p, None)
        for k, (name, state, scale) in enumerate(zip(self.state_names, states, scales)):
            if scale is not None:
                self.dtype(i, name, state, (torch.int8 if k == 0 else torch.uint8,), p, None)
            elif state is not None and state.dtype not in (torch.float32, torch.bfloat16, p.dtype):
                raise TypeError(
                    f"{self.op}: {name}[{i}] must be float32, bfloat16 or its parameter's {p.dtype}"
                    f" (8-bit codes come with {name.removesuffix('s')}_scales), got {state.dtype}"
                )
        if self.seeded and p.dtype == torch.float16 and master is None:
            raise TypeError(
                f"{self.op}: seed: params[{i}] is float16, and only bfloat16 is rounded stochastically; give masters"
            )

    def fits(self, name: str, t: Tensor, p: Tensor) -> None:
        if t.shape != p.shape:
            raise ValueError(
                f"{self.op}: {name} must have the shape of its parameter, {list(p.shape)}, got {list(t.shape)}"
            )
        if t.device != self.device or p.device != self.device:
            raise ValueError(f"{self.op}: all tensors must be on {self.device}, got {name} on {t.device}")
        places, expected = getattr(t, "placements", None), getattr(p, "placements", None)
        if places != expected:
            raise ValueError(f"{self.op}: {name} must be sharded like its parameter, {expected}, got {places}")

    def dtype(self, i: int, name: str, t: Tensor | None, allowed: tuple, p: Tensor, params: tuple | None) -> None:
        if t is None:
            return
        if params is not None and p.dtype not in params:
            wanted = " or ".join(str(d)[6:] for d in params)
            raise TypeError(f"{self.op}: {name} are for params in {wanted}, got {p.dtype} in params[{i}]")
        if t.dtype not in allowed:
            wanted = " or ".join(dict.fromkeys(str(d)[6:] for d in allowed))
            raise TypeError(f"{self.op}: {name}[{i}] must be {wanted}, got {t.dtype}")

    def scales(self, i: int, p: Tensor, states: tuple, scales: tuple) -> None:
        """Of local tensors: a scale for each block of the shard."""
        for name, scale in zip(self.state_names, scales):
            if scale is None:
                continue
            name, blocks = f"{name.removesuffix('s')}_scales[{i}]", -(-p.numel() // BLOCK)
            if scale.dtype != torch.float32 or scale.shape != (blocks,) or not scale.is_contiguous():
                raise ValueError(
                    f"{self.op}: {name} must be contiguous float32 [{blocks}], one for each {BLOCK} elements"
                    f" (of the local shard), got {scale.dtype} {list(scale.shape)}"
                )
            if scale.device != self.device:
                raise ValueError(f"{self.op}: all tensors must be on {self.device}, got {name} on {scale.device}")


def _uniform(lists: Lists) -> bool:
    """Whether all that holds for the first parameter holds for the others: the common case, at a microsecond each."""
    shapes = [p.shape for p in lists.params]
    shaped = [tensors for tensors in (*lists[:5], *lists.states) if tensors]
    every = shaped + [tensors for tensors in lists.scales if tensors]
    return (
        all([t.shape for t in tensors] == shapes for tensors in shaped[1:])
        and all(len({t.dtype for t in tensors}) == 1 for tensors in every)
        and {g.layout for g in lists.grads} == {torch.strided}
        and len({t.device for tensors in every for t in tensors}) == 1
        and {type(t) for tensors in every for t in tensors} <= {Tensor, torch.nn.Parameter}
        and all(p.numel() for p in lists.params)
    )


def _dense(t: Tensor) -> bool:
    """Whether t's elements fill one block of memory, in whatever order."""
    expected = 1
    for stride, size in sorted((st, s) for s, st in zip(t.shape, t.stride()) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_one_order(lists: Lists) -> tuple[Lists, list[tuple[Tensor, Tensor]]]:
    """The lists with the tensors of each parameter in one memory order, and pairs (old, new) to copy back after the step.

    The order is that of the parameter's memory where this has no gaps, else that of its elements, so that the blocks of its
    8-bit states are the same at every step, whatever the strides of a gradient. Tensors that have it are used as they are, or
    as flat views.
    """
    if all(t.is_contiguous() for tensors in (*lists[:5], *lists.states) for t in tensors):
        return lists, []
    copies: list[tuple[Tensor, Tensor]] = []

    def ordered(t: Tensor, p: Tensor, written: bool) -> Tensor:
        dense = _dense(p)
        if t.stride() == p.stride() and dense or not dense and t.is_contiguous():
            return t.as_strided((t.numel(),), (1,))
        new = torch.empty_like(
            p if dense else t, dtype=t.dtype, memory_format=torch.preserve_format if dense else torch.contiguous_format
        )
        new.copy_(t)
        if written:
            copies.append((t, new))
        return new.as_strided((t.numel(),), (1,))

    def of(tensors: list[Tensor], written: bool = True) -> list[Tensor]:
        return [ordered(t, p, written) for t, p in zip(tensors, lists.params)]

    work = Lists(
        of(lists.params), of(lists.grads, False), of(lists.masters), of(lists.remainders), of(lists.averages),
        tuple(map(of, lists.states)), lists.scales,
    )  # fmt: skip
    return work, copies
