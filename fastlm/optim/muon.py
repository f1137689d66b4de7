"""Muon over ops.newton_schulz, with torch.optim.Muon's state dict, and AdamW for what is not a hidden matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.errors import UserError
from fastlm.ops.newton_schulz import QUINTIC
from fastlm.optim.base import FusedOptimizer, check_betas
from fastlm.optim.state import checked

# What groups with use_muon=False take where they say nothing, as in Keller Jordan's MuonWithAuxAdam.
_AUXILIARY = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
_ADJUSTMENTS = (None, "original", "match_rms_adamw")
_POSITIONS = {"position", "positions", "positional"}  # parts of names between dots and underscores
_STACK = 1 << 27  # elements of same-shape matrices orthogonalised together; the iteration holds a few times as many
_HEADS = (
    "head",
    "lm_head",
    "output",
    "embed_out",
    "unembedding",
    "score",
    "classifier",
)  # last part of a module's name


class Muon(FusedOptimizer):
    """Momentum, orthogonalised: hidden matrices move by matrices whose singular values are all near 1.

        m <- momentum * m + (1 - momentum) * g;    u = nesterov ? (1 - momentum) * g + momentum * m : m
        p <- p - lr * weight_decay * p - lr * ratio * newton_schulz(u)

    Matrices of one shape are orthogonalised together, in one call. A weight [E, M, N] (experts) is E matrices. Groups with
    `use_muon=False` are updated by AdamW: see `muon_groups`, which divides a model's parameters.

        optimizer = Muon(muon_groups(model, lr=0.02, adamw_lr=3e-4))

    The state dict has torch.optim.Muon's layout (momentum_buffer) plus `step`, and either loads the other's. Under FSDP2 each
    process keeps its shard of the momentum; the directions of same-shape matrices are gathered together in bf16, every
    process orthogonalises them and keeps its part (experts divided by their first dimension need no gathering).
    Papers: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982.

    Args:
        params: parameters, or parameter groups. Keys of a group besides the arguments below: use_muon (True), betas (0.9, 0.95;
            for use_muon=False, whose other defaults are lr 3e-4, eps 1e-10, weight_decay 0); flatten (False): a weight
            [O, I, ...] of a convolution is then one matrix [O, I * ...]; sections (None): numbers of rows, such as those of
            queries, keys and values in one weight, each of which is a matrix of its own.
        lr: number or 0-d tensor. weight_decay: decoupled. momentum: in [0, 1). nesterov: see above.
        ns_coefficients, eps, ns_steps: of ops.newton_schulz; also a sequence of triples, such as
            fastlm.ops.newton_schulz.POLAR_EXPRESS.
        adjust_lr_fn: the ratio. None or "original": sqrt(max(1, M / N)).  "match_rms_adamw": 0.2 sqrt(max(M, N)), with which
            learning rate and weight decay tuned for AdamW can be kept (Liu et al.).
        ns_dtype: of the products, bf16 as in torch.
        precision, average_decay, seed, max_norm, skip_nonfinite: see `FusedOptimizer`.

    Raises:
        UserError: a hyperparameter out of range; a parameter that is no matrix and no batch of them, or is divided along one
        dimension by FSDP2 and tensor parallelism both.
    """

    MOMENTS = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        precision: str = "nearest",
        average_decay: float | None = None,
        seed: int = 0,
        max_norm: float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "use_muon": True, "flatten": False, "sections": None,  # betas not: schedulers would cycle them, not momentum
            "precision": precision, "state_bits": None, "average_decay": average_decay, "seed": seed,
        }  # fmt: skip
        self.ns_dtype = ns_dtype
        super().__init__(params, defaults, max_norm=max_norm, skip_nonfinite=skip_nonfinite)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; a group with use_muon=False has AdamW's defaults."""
        if not param_group.get("use_muon", True):
            param_group = {**_AUXILIARY, **param_group}
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "ns_dtype": self.ns_dtype}

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.MOMENTS if group.get("use_muon", True) else ("exp_avg", "exp_avg_sq")

    def _check_group(self, group: dict[str, Any]) -> None:
        if not group["use_muon"]:
            return check_betas("Muon", group)
        if not 0 <= group["momentum"] < 1:
            raise UserError(f"Muon: momentum must be in [0, 1), got {group['momentum']}")
        if group["adjust_lr_fn"] not in _ADJUSTMENTS:
            raise UserError(
                f"Muon: adjust_lr_fn must be 'original', 'match_rms_adamw' or None, got {group['adjust_lr_fn']!r}"
            )
        if group["state_bits"] == 8:
            raise UserError(
                "Muon: state_bits=8 is for groups with use_muon=False; the momentum is orthogonalised as it is"
            )
        for p in checked(group):
            if p.ndim < 2 or (p.ndim > 3 and not group["flatten"]):
                raise UserError(
                    f"Muon: a parameter must be a matrix [M, N] or a batch of them [E, M, N], got {list(p.shape)}; put vectors "
                    "and embeddings into a group with use_muon=False (see muon_groups), and the weights of convolutions "
                    "into one with flatten=True"
                )
            if _is_divided(p) and not _holds_whole_matrices(p, group["flatten"]):
                _stacked_places(p)
            sections = group["sections"]
            if sections is not None and (group["flatten"] or sum(sections) != p.shape[-2]):
                raise UserError(
                    f"Muon: sections {tuple(sections)} must add up to the rows of a matrix, got {list(p.shape)}"
                )
        return None

    def _update(self, group, params, grads, states, step, common) -> None:
        if not group["use_muon"]:
            moments = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            hyper = {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
            ops.adamw_(params, grads, *moments, beta1=beta1, beta2=beta2, step=step, **hyper, **common)
            return
        scale, buffers = common.pop("grad_scale", None), [s["momentum_buffer"] for s in states]
        for indices in _stacks(params, group["flatten"]):
            chosen = [params[i] for i in indices]
            directions = self._directions(
                group,
                chosen,
                [grads[i] for i in indices],
                [buffers[i] for i in indices],
                scale,
                common.get("found_inf"),
            )
            updates = self._orthogonal(group, directions, chosen[0])
            if not _local(chosen[0]).numel():  # this process has no rows of these
                continue
            ratio = 1.0 if group["sections"] else _ratio(group, chosen[0].shape)
            mine = {k: [v[i] for i in indices] if isinstance(v, list) else v for k, v in common.items()}
            ops.sgd_(
                chosen,
                [_like(p, u) for p, u in zip(chosen, updates)],
                None,
                lr=group["lr"] * ratio,
                weight_decay=group["weight_decay"] / ratio,  # which sgd_ multiplies by its lr
                step=step,
                **mine,
            )

    def _directions(self, group, params, grads, buffers, scale, found_inf) -> Tensor:
        """Updates the momenta; -> this process's part of what is to be orthogonalised, [n, *shape of a parameter]."""
        momentum, shape = group["momentum"], _local(params[0]).shape
        out = torch.empty((len(params), *shape), dtype=self.ns_dtype, device=params[0].device)
        for p, grad, buffer, place in zip(params, grads, buffers, out):
            if _is_divided(p) and grad.placements != p.placements:
                grad = grad.redistribute(p.device_mesh, p.placements)
            grad, buffer = _local(grad), _local(buffer)
            g = grad.to(torch.promote_types(buffer.dtype, torch.float32))
            if scale is not None:
                g = g * scale
            if found_inf is None and buffer.dtype == g.dtype:
                new = buffer.lerp_(g, 1 - momentum)
            else:
                new = torch.lerp(buffer.to(g.dtype), g, 1 - momentum)
                buffer.copy_(new if found_inf is None else torch.where(found_inf != 0, buffer.to(g.dtype), new))
            place.copy_(torch.lerp(g, new, momentum) if group["nesterov"] else new)
        return out

    def _orthogonal(self, group, directions: Tensor, p: Tensor) -> Iterable[Tensor]:
        """The updates of n parameters like p, this process's part of each."""
        gather = _is_divided(p) and not _holds_whole_matrices(p, group["flatten"])
        if gather:
            directions = _gathered(directions, p)
        matrices = directions.flatten(2) if group["flatten"] else directions
        hyper = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "eps": group["eps"]}
        if group["sections"] is None:
            found = ops.newton_schulz(matrices, **hyper).view(directions.shape)
        else:  # fp32, since each has a ratio of its own
            parts = matrices.split(tuple(group["sections"]), -2)
            found = torch.cat([ops.newton_schulz(m, **hyper).float() * _ratio(group, m.shape) for m in parts], -2)
        return _own_part(found, p) if gather else found


def _is_divided(p: Tensor) -> bool:
    return type(p).__name__ == "DTensor"


def _local(t: Tensor) -> Tensor:
    return t.to_local() if _is_divided(t) else t


def _ratio(group: dict[str, Any], shape: torch.Size) -> float:
    """By how much the learning rate of a matrix is multiplied."""
    rows, columns = (shape[0], math.prod(shape[1:])) if group["flatten"] else shape[-2:]
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


def _like(p: Tensor, update: Tensor) -> Tensor:
    """An update, or this process's part of it, as a tensor or DTensor that goes with p."""
    if not _is_divided(p):
        return update.view(p.shape)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(update, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def _stacks(params: list[Tensor], flatten: bool) -> Iterator[list[int]]:
    """Indices of parameters whose matrices are orthogonalised together: of one shape and one division among processes."""
    alike: dict[tuple, list[int]] = {}
    for i, p in enumerate(params):
        if p.numel():
            place = (p.device_mesh, p.placements) if _is_divided(p) else None
            alike.setdefault((p.shape, place), []).append(i)
    for indices in alike.values():
        size = max(1, _STACK // params[indices[0]].numel())
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _holds_whole_matrices(p: Tensor, flatten: bool) -> bool:
    """Whether a DTensor is divided along leading dimensions only, so that each process has matrices of its own."""
    return not flatten and all(
        place.is_replicate() or (place.is_shard() and place.dim < p.ndim - 2) for place in p.placements
    )


def _stacked_places(p: Tensor) -> list:
    """The placements of n tensors like p, one behind the other along a new first dimension."""
    from torch.distributed.tensor import Replicate, Shard

    places = [Shard(place.dim + 1) if type(place) is Shard else place for place in p.placements]
    if any(type(place) not in (Shard, Replicate) for place in places):
        raise UserError(
            f"Muon: a matrix {list(p.shape)} must be placed by Shard and Replicate to be gathered, got {tuple(p.placements)}; "
            "where FSDP2 and tensor parallelism divide the same dimension, let FSDP2 divide another "
            "(fully_shard(..., shard_placement_fn=...)) or put it into a group with use_muon=False"
        )
    return places


def _gathered(parts: Tensor, p: Tensor) -> Tensor:
    """The whole of n tensors like p, from this process's part of them."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((parts.shape[0], *p.shape))
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    whole = DTensor.from_local(parts, p.device_mesh, _stacked_places(p), shape=shape, stride=tuple(strides))
    return whole.full_tensor()


def _own_part(whole: Tensor, p: Tensor) -> Tensor:
    """This process's part of n tensors like p, of which it has the whole; no communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = p.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, _stacked_places(p)).to_local()


def muon_groups(
    model: torch.nn.Module,
    *,
    lr: float = 0.02,
    weight_decay: float = 0.0,
    adamw_lr: float = 3e-4,
    adamw_weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    not_hidden: Sequence[str] = (),
    sections: dict[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `Muon`: it takes the hidden matrices, AdamW the rest.

    Hidden are parameters [M, N] and [E, M, N] but for embeddings (weights of nn.Embedding, and parameters or modules with
    "embed" or the word "position" in their name), the output head (a module named head, lm_head, output, embed_out,
    unembedding, score or classifier, and whatever shares its weight with an embedding) and those named in `not_hidden`.
    Everything else - norms, biases, gates of fewer dimensions, convolutions - is AdamW's, those of one dimension without
    weight decay.

    Args:
        model: its trainable parameters are divided; frozen ones are left out, a tied one comes once.
        lr, weight_decay: Muon's. adamw_lr, adamw_weight_decay, betas: AdamW's.
        not_hidden: parts of parameter names that are AdamW's too, such as "router".
        sections: part of a parameter's name -> the numbers of rows of the matrices in it: {"qkv": (D, D_kv, D_kv),
            "gate_up": (F, F)} for fastlm's Transformer.

    Returns:
        Three groups, and one more for each of `sections`, with use_muon and hyperparameters set; empty ones are dropped.
    """
    outside = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    words = ("embed", *not_hidden)
    sections = sections or {}
    muon: dict[str | None, list[Tensor]] = {None: [], **{part: [] for part in sections}}
    matrices, vectors = [], []
    for name, p in model.named_parameters():
        module = name.rsplit(".", 2)[-2] if "." in name else ""
        if not p.requires_grad:
            continue
        apart = module in _HEADS or any(w in name for w in words) or not _POSITIONS.isdisjoint(re.split(r"[._]", name))
        if p.ndim in (2, 3) and p not in outside and not apart:
            muon[next((part for part in sections if part in name), None)].append(p)
        else:
            (matrices if p.ndim >= 2 else vectors).append(p)
    own, aux = (
        {"use_muon": True, "lr": lr, "weight_decay": weight_decay},
        {"use_muon": False, "lr": adamw_lr, "betas": betas},
    )
    groups = [
        *({"params": params, **own, **({"sections": tuple(sections[k])} if k else {})} for k, params in muon.items()),
        {"params": matrices, "weight_decay": adamw_weight_decay, **aux},
        {"params": vectors, "weight_decay": 0.0, **aux},
    ]
    return [group for group in groups if group["params"]]
