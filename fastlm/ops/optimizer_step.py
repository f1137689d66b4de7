"""What the in-place optimizer ops share: checks of their lists, groups of one dtype, memory order, and the plain step.

An op adds its formula (adamw.py, sgd.py, lion.py). What surrounds it is the same for all: the weight is read in fp32 (from the
parameter, its master, or the parameter and its remainder), the states likewise (16 bits, fp32 or 8-bit codes), and both are
written back rounded. `plain_step` does so in plain torch, kernels/optimizer_state.py on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops._cuda import not_measured
from fastlm.ops._op import Op
from fastlm.ops._tensor import compute_dtype
from fastlm.ops.block_quantize import BLOCK, block_dequantize, block_quantize
from fastlm.ops.master_weights import join_master, random_halves, round_stochastic, split_master
from fastlm.ops.optimizer_lists import Lists, check_lengths, groups_of, in_one_order
from fastlm.ops.random_bits import seed_tensor

# Elements that the torch form takes at a time: 4 MiB of fp32 stay in the cache between the passes over them.
# Processor time of AdamW's step of 13.8 M parameters with a clip coefficient: 14.2 ms at 2^18, 12.6 at 2^20, 14.1 at 2^22.
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 24}
_CODES = 1 << 31  # added to a tensor's stream where the random words are for its codes


class Numbers(NamedTuple):
    """The numbers of a step; each a float or a 0-d tensor on the device, but for seed and streams."""

    lr: Any
    step: Any
    grad_scale: Any  # None: gradients as they are
    found_inf: Tensor | None
    seed: Tensor | None  # int64 (seed, offset)
    average_decay: float
    streams: list[int]  # one for each parameter: which random numbers are its own


class Common(NamedTuple):
    """The keyword arguments that every optimizer op takes, as its public function got them."""

    lr: Any
    step: Any
    grad_scale: Any
    found_inf: Tensor | None
    masters: Sequence[Tensor] | None
    remainders: Sequence[Tensor] | None
    seed: Any
    averages: Sequence[Tensor] | None
    average_decay: float | None
    backend: str
    streams: Sequence[int] | None = None


def optimizer_op(
    name: str,
    states: Sequence[str],
    constants: str,
    formula: Callable,
    fused: Callable,
    rounds_once: bool = False,
    piece: int | None = None,
    of_codes: Callable | None = None,
    cuda: Callable | None = None,
) -> Op:
    """The Op of an optimizer step over these lists of states, which its public function calls through `run_step`.

    Args:
        states: names of the lists of states; `<name without s>_scales` are their scales.
        constants: the op's own numbers as schema text, such as "float beta1, float eps".
        formula: formula(weight, grad, *states, numbers, *constants) -> the new weight and states.
        fused: fused(weights, grads, states, numbers, *constants), in place on lists of tensors of one dtype.
        rounds_once: whether `fused` takes bf16 tensors and rounds what it computes in fp32.
        piece: elements `fused` should be given at a time on the CPU, because it passes over them several times.
        of_codes: of_codes(states, *constants), in place: what is done to states read from 8-bit codes before the step.
        cuda: launcher of a kernel in the CUDA library, with the arguments of the schema without `backend`; None: there is none.
    """
    written = ["params", *states, "masters", "remainders", "averages", *map(scales_name, states)]
    lists = [f"Tensor({chr(97 + i)}!)[] {n}" for i, n in enumerate(written)]
    numbers = (
        "Tensor? lr_tensor, Tensor? step_tensor, Tensor? grad_scale_tensor, Tensor? found_inf, Tensor? seed, int[] streams,"
        " float lr, float step, float grad_scale, float average_decay"
    )
    op = Op(
        name,
        f"({lists[0]}, Tensor[] grads, {', '.join(lists[1:])}, {numbers}, {constants}, str backend) -> ()",
        reference=partial(_plain, by_formula(formula), None, False, None, of_codes),
        torch=partial(_plain, by_formula(formula), fused, rounds_once, piece, of_codes),
        kernels={"triton": (f"{name.rstrip('_')}:{name}step", None)} | ({"cuda": (cuda, None)} if cuda else {}),
        slower=not_measured,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )
    op.fake(lambda *args: None)
    return op


def scales_name(state: str) -> str:
    return state.removesuffix("s") + "_scales"


def run_step(
    op: Op, params, grads, states: dict[str, Any], scales: Sequence[Any], common: Common, constants: tuple
) -> None:
    """One step: checks, then one call for each combination of dtypes. `states`: name -> list, or None where there is none."""
    if common.averages is not None and not (common.average_decay is not None and 0 <= common.average_decay <= 1):
        raise ValueError(f"{op.name}: average_decay must be in [0, 1] beside averages, got {common.average_decay}")
    if common.masters is not None and common.remainders is not None:
        raise ValueError(f"{op.name}: give masters or remainders, not both: either holds the fp32 weights")
    optional = {"masters": common.masters, "remainders": common.remainders, "averages": common.averages}
    names = {scales_name(state): given for state, given in zip(states, scales)}
    named = {"streams": common.streams} | names
    check_lengths(op.name, {"params": params, "grads": grads} | states | optional | named)
    lists = Lists(
        list(params), list(grads), *([] if t is None else list(t) for t in optional.values()),
        tuple([] if t is None else list(t) for t in states.values()),
        tuple([] if t is None else list(t) for t in scales),
    )  # fmt: skip
    groups = groups_of(op.name, lists, list(states), common.seed is not None, common.streams)
    backend = op.choose(common.backend, *(t[0] for group, _ in groups for t in group.flat() if t))
    for group, streams in groups:
        device = group.params[0].device
        numbers = Numbers(
            *(_number(op.name, n, getattr(common, n), device) for n in ("lr", "step", "grad_scale")),
            _found_inf(op.name, common.found_inf, device, backend),
            None if common.seed is None else seed_tensor(op.name, common.seed, group.params[0]),
            0.0 if common.average_decay is None else float(common.average_decay),
            streams,
        )
        if numbers.found_inf is True:
            return
        work, copies = in_one_order(group)
        _call(op, backend, work, numbers, constants)
        for old, new in copies:
            old.copy_(new)


def _call(op: Op, backend: str, lists: Lists, numbers: Numbers, constants: tuple) -> None:
    if not isinstance(numbers.grad_scale, Tensor) and numbers.grad_scale == 1.0:
        numbers = numbers._replace(grad_scale=None)  # most steps need no clipping
    if backend != "reference" and not torch.compiler.is_compiling():
        # Neither a kernel's stores nor torch's fused steps are seen by autograd's version counters.
        torch.autograd.graph.increment_version([t for tensors in lists.written() for t in tensors])
    if backend in op.plain_forms:
        op.plain(backend, *lists, numbers, constants)
    else:
        values = [1.0 if n is None else n for n in numbers[:3]]
        on_device = [n if isinstance(n, Tensor) else None for n in values]
        values = [0.0 if isinstance(n, Tensor) else n for n in values]
        op.forward(*lists.flat(), *on_device, numbers.found_inf, numbers.seed, numbers.streams, *values,
                   numbers.average_decay, *constants, backend)  # fmt: skip


def _number(op: str, name: str, value: Any, device: torch.device) -> Any:
    """A float, or a 0-d tensor on `device` where its value cannot be read without waiting for the device (and for the step on
    the CPU, where torch's fused steps take a tensor)."""
    if not isinstance(value, Tensor):
        return None if value is None else float(value)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must be a number or a tensor of one element, got {list(value.shape)}")
    value = value.full_tensor() if type(value).__name__ == "DTensor" else value
    if (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (name == "step" and device.type == "cpu")
    ):
        return value.item()
    return value if value.ndim == 0 and value.device == device else value.reshape(()).to(device)


def _found_inf(op: str, value: Any, device: torch.device, backend: str) -> Any:
    """None, a 0-d tensor on the device, or True where reading it is free and it says that the step must not be made."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"{op}: found_inf must be a tensor of one element, nonzero to skip the step, got {value!r}")
    value = value.full_tensor() if type(value).__name__ == "DTensor" else value
    if value.device.type == "cpu" and backend not in ("triton", "cuda") and not torch.compiler.is_compiling():
        return bool(value) or None
    return value.reshape(()).to(device, torch.float32)


# --- the plain step -----------------------------------------------------------------------------------------------


def by_formula(formula: Callable) -> Callable:
    """The formula on lists of tensors, in place."""

    def update(weights, grads, states, numbers, *constants):
        for i, (w, g) in enumerate(zip(weights, grads)):
            old = [s[i] for s in states if s]
            for t, new in zip((w, *old), formula(w, g, *old, numbers, *constants)):
                t.copy_(new)

    return update


def _plain(
    update: Callable,
    fused: Callable | None,
    rounds_once: bool,
    piece: int | None,
    of_codes: Callable | None,
    *args: Any,
) -> None:
    """The reference (fused=None: formula on whole tensors) and the torch form (torch's fused step on pieces)."""
    lists, numbers, constants = Lists(*args[:-2]), *args[-2:]
    of_codes = of_codes if any(lists.scales) else None
    # torch's compiler cannot trace its fused step, but fuses the formula; and a skip must be decided on the device.
    if fused is None or torch.compiler.is_compiling() or numbers.found_inf is not None:
        return plain_step(update, lists, numbers, constants, None, compute_dtype(lists.params[0]), of_codes)
    dtype, p = compute_dtype(lists.params[0]), lists.params[0]
    dtypes = {tensors[0].dtype for tensors in (lists.params, lists.grads, *lists.states) if tensors}
    if rounds_once and p.dtype == torch.bfloat16 and len(dtypes) == 1:
        dtype = p.dtype  # not so fp16: a scale may take its gradients out of range
    bare = not (lists.masters or lists.remainders or lists.averages or any(lists.scales) or numbers.seed is not None)
    if bare and numbers.grad_scale is None and dtypes == {dtype} and piece is None:
        return fused(lists.params, lists.grads, lists.states, numbers, *constants)
    limit = _PIECE["cuda"] if p.device.type == "cuda" else piece or _PIECE["cpu"]
    return plain_step(fused, lists, numbers, constants, limit, dtype if bare else compute_dtype(p), of_codes)


def plain_step(
    update: Callable,
    lists: Lists,
    numbers: Numbers,
    constants: tuple,
    limit: int | None,
    dtype: torch.dtype,
    of_codes: Callable | None = None,
) -> None:
    """`update` on the weights, gradients and states in `dtype`, `limit` elements at a time (None: one tensor), and what it made
    of them rounded into the lists."""
    skip = None if numbers.found_inf is None else numbers.found_inf != 0
    scratch = _Scratch(dtype, lists.params[0].device, limit)
    for cuts in _cuts([p.numel() for p in lists.params], limit):
        part = lists.cut(cuts)
        weights = _weights(part, scratch, skip)
        grads = _grads(part.grads, numbers.grad_scale, scratch)
        states = [_state(i, *pair, scratch, skip) for i, pair in enumerate(zip(part.states, part.scales))]
        if of_codes is not None:
            of_codes(states, *constants)
        update(weights, grads, states, numbers, *constants)
        for a, w in zip(part.averages, weights):
            if skip is None and a.dtype == dtype:
                a.lerp_(w, 1 - numbers.average_decay)
            else:
                _write(a, torch.lerp(a.to(dtype), w, 1 - numbers.average_decay), skip)
        _write_weights(part, weights, cuts, numbers, skip)
        random = _random_codes(cuts, numbers) if any(part.scales) and numbers.seed is not None else None
        for i, tensors in enumerate(states):
            _write_state(i, part.states[i], part.scales[i], tensors, random, skip)


class _Scratch:
    """Buffers that serve piece after piece: fresh memory would cost page faults."""

    def __init__(self, dtype: torch.dtype, device: torch.device, limit: int | None) -> None:
        self.dtype, self.device, self.limit = dtype, device, limit
        self.buffers: dict[Any, Tensor] = {}

    def like(self, key: Any, tensors: list[Tensor]) -> list[Tensor]:
        sizes = [t.numel() for t in tensors]
        if self.limit is None:
            return [torch.empty(n, dtype=self.dtype, device=self.device) for n in sizes]
        if key not in self.buffers:
            self.buffers[key] = torch.empty(self.limit, dtype=self.dtype, device=self.device)
        buffer, start, found = self.buffers[key], 0, []
        for n in sizes:  # split takes ten times as long
            found.append(buffer[start : start + n])
            start += n
        return found

    def cast(self, key: Any, tensors: list[Tensor], own: bool) -> list[Tensor]:
        """The tensors themselves if they have the dtype (and `own` copies are not asked for), else copies."""
        if not tensors or (tensors[0].dtype == self.dtype and not own):
            return tensors
        return [out.copy_(t) for out, t in zip(self.like(key, tensors), tensors)]


def _cuts(sizes: list[int], limit: int | None) -> Iterator[list[tuple[int, int, int]]]:
    """(tensor, start, stop) of the parts of each piece; starts are multiples of BLOCK."""
    if limit is None:
        yield from ([(i, 0, n)] for i, n in enumerate(sizes))
        return
    found, room = [], limit
    for i, n in enumerate(sizes):
        start = 0
        while start < n:
            stop = n if n - start <= room else start + room // BLOCK * BLOCK
            if stop > start:
                found.append((i, start, stop))
            room -= stop - start
            start = stop
            if start < n or room == 0:
                yield found
                found, room = [], limit
    if found:
        yield found


def _weights(part: Lists, scratch: _Scratch, skip: Tensor | None) -> list[Tensor]:
    if part.remainders:
        return [join_master(p, r).to(scratch.dtype) for p, r in zip(part.params, part.remainders)]
    return scratch.cast("weights", part.masters or part.params, skip is not None)


def _grads(grads: list[Tensor], scale: Any, scratch: _Scratch) -> list[Tensor]:
    if scale is None:
        return scratch.cast("grads", grads, False)
    if grads[0].dtype == scratch.dtype:
        return [torch.mul(g, scale, out=out) for g, out in zip(grads, scratch.like("grads", grads))]
    return [out.copy_(g).mul_(scale) for g, out in zip(grads, scratch.like("grads", grads))]


def _state(i: int, tensors: list[Tensor], scales: list[Tensor], scratch: _Scratch, skip: Tensor | None) -> list[Tensor]:
    if scales:
        return [block_dequantize(t, s).to(scratch.dtype) for t, s in zip(tensors, scales)]
    return scratch.cast(i, tensors, skip is not None)


def _write(old: Tensor, new: Tensor, skip: Tensor | None) -> None:
    if new is not old:
        old.copy_(new if skip is None else torch.where(skip, old, new.to(old.dtype)))


def _write_weights(part: Lists, weights: list[Tensor], cuts: list, numbers: Numbers, skip: Tensor | None) -> None:
    stochastic = numbers.seed is not None and part.params[0].dtype == torch.bfloat16
    if stochastic and not (part.masters or part.remainders):
        spans = [(numbers.streams[i], start, stop - start) for i, start, stop in cuts]
        for p, w, halves in zip(part.params, weights, random_halves(numbers.seed, spans, numbers.step)):
            _write(p, round_stochastic(w, halves.view(w.shape)), skip)
        return
    for j, (p, w) in enumerate(zip(part.params, weights)):
        if part.remainders:
            p_new, remainder = split_master(w.float())
            _write(part.remainders[j], remainder, skip)
            _write(p, p_new, skip)
        else:
            if part.masters:
                _write(part.masters[j], w, skip)
            _write(p, w, skip)


def _random_codes(cuts: list, numbers: Numbers) -> list[Tensor]:
    """Two random numbers for each element of each part: one for the codes of either state."""
    spans = [(numbers.streams[i] + _CODES, 2 * start, 2 * (stop - start)) for i, start, stop in cuts]
    return [halves.view(-1, 2) for halves in random_halves(numbers.seed, spans, numbers.step)]


def _write_state(i: int, olds: list, scales: list, news: list, random: list | None, skip: Tensor | None) -> None:
    if not scales:
        for old, new in zip(olds, news):
            _write(old, new, skip)
        return
    for j, (old, scale, new) in enumerate(zip(olds, scales, news)):
        part = None if random is None else random[j][:, i].to(new.dtype).add_(0.5).mul_(1 / 65536)
        codes, fresh = block_quantize(new, old.dtype == torch.int8, part)
        _write(old, codes, skip)
        _write(scale, fresh, skip)
