"""Looking at the attention inside a model, during an ordinary forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.ops.attention_maps import OPTIONS

_LISTENER = "attention_listener"


def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """ops.attention(q, k, v, **options), with its arguments, results and errors, called on behalf of `module`.

    A module that calls this instead of the op can be looked into by `record_attention`.
    """
    listener = getattr(module, _LISTENER, None)
    if listener is not None:
        listener(q, k, options)
    return ops.attention(q, k, v, **options)


@contextmanager
def record_attention(
    model: nn.Module,
    layers: Iterable[str] | None = None,
    *,
    weights: bool = False,
    queries: slice | None = None,
    rows: int = 256,
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Within the block, every forward of the model also records what its attention layers read.

        with record_attention(model) as maps:
            model(tokens)
        maps["blocks.0.attention"]["received"]  # [B, H, T]

    The maps are computed from the queries and keys that the layer has at hand, at the price of one more product of the two;
    nothing is run twice, the model's own results do not change. A compiled model is compiled once more for it.

    Args:
        model: any module whose attention goes through `fastlm.nn.attend`: fastlm.Transformer, nn.Attention,
            nn.MultiheadAttention, and transformers models with attn_implementation="fastlm". Others record nothing.
        layers: names from model.named_modules() to record, with everything inside them; None for all.
        weights: also record the weights themselves, which take B * H * queries * T numbers a layer.
        queries: a slice of the queries for `weights`; None for all.
        rows: queries that `received` works on at a time.

    Yields:
        A dict, filled by each forward: name of the attention module -> {"received": [B, H, T], the weight each key receives
        from all queries} and, if asked for, "weights" [B, H, queries, T]; fp32, without graph, before dropout; of packed
        sequences without B. A layer called again overwrites what it had: read it after each forward of a generation.

    Raises:
        ValueError: a layer that the model does not have.
    """
    modules = dict(model.named_modules())
    wanted = [""] if layers is None else list(layers)
    unknown = sorted(set(wanted) - set(modules)) if layers is not None else []
    if unknown:
        raise ValueError(
            f"record_attention: the model has no layers {unknown}; names are those of model.named_modules()"
        )
    found: dict[str, dict[str, Tensor]] = {}

    def listener(name: str) -> Any:
        @torch.no_grad()
        def listen(q: Tensor, k: Tensor, options: dict[str, Any]) -> None:
            options = {key: value for key, value in options.items() if key in OPTIONS}
            found[name] = {"received": ops.received_attention(q, k, rows=rows, **options)}
            if weights:
                found[name]["weights"] = ops.attention_weights(q, k, queries=queries, **options)

        return listen

    chosen = {n: m for n, m in modules.items() if any(w in ("", n) or n.startswith(f"{w}.") for w in wanted)}
    before = {name: module.__dict__.get(_LISTENER) for name, module in chosen.items()}
    for name, module in chosen.items():
        module.__dict__[_LISTENER] = listener(name)
    try:
        yield found
    finally:
        for name, module in chosen.items():
            module.__dict__[_LISTENER] = before[name]
            if before[name] is None:
                del module.__dict__[_LISTENER]
