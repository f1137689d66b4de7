"""What attention can do, as data: every feature, what a call with several of them is, and what plain torch makes of it.

tests/ops/test_attention_matrix.py runs every pair; `python tests/ops/attention_matrix.py` writes the table in the README.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import torch

from fastlm import ops
from fastlm.ops.attention_options import make_call
from fastlm.ops.attention_reference import Call, added_scores, kept, who_sees_whom, without_hidden_keys
from fastlm.testing import Case

S, T, H, H_KV, D = 37, 53, 2, 1, 16
TRIPLES = 60  # how many triples are tested
README = Path(__file__).parents[2] / "README.md"
SEQUENCES = ((5, 9), (0, 4), (20, 17), (12, 23))  # queries and keys of the packed ones: 37 and 53 in all


def _integers(*values):
    return torch.tensor(values)


def _relative_bias(table):
    return ops.RelativeBias(table, bidirectional=True, max_distance=20)


# feature -> (options that depend on nothing, tensors that get a gradient: name -> shape by number of sequences)
FEATURES: dict[str, dict] = {
    "causal": {"options": lambda n: {"causal": True}},
    "causal, top left": {"options": lambda n: {"causal": "top_left"}},
    "window": {"options": lambda n: {"window": (9, 6)}},
    "prefix": {"options": lambda n: {"prefix_lengths": _integers(40) if n == 1 else _integers(6, 3, 0, 7)}},
    "key lengths": {
        "options": lambda n: {"key_lengths": _integers(31, 2, 0, 19)[:n] if n == 1 else _integers(8, 2, 0, 19)}
    },
    "left padding": {"options": lambda n: {"key_starts": _integers(7) if n == 1 else _integers(2, 0, 5, 3)}},
    "documents": {"options": lambda n: {"document_ids": _documents(n)}},
    "packed": {"packed": True},
    "softcap": {"options": lambda n: {"softcap": 1.5}},
    "bias": {"tensors": {"bias": lambda n: (n, H, 20, 23) if n > 1 else (H, S, T)}},
    "broadcast bias": {"tensors": {"bias": lambda n: (1, 1, 1, 23 if n > 1 else T)}},
    "T5 relative bias": {"tensors": {"relative_bias": lambda n: (16, H)}},
    "ALiBi": {"options": lambda n: {"alibi_slopes": torch.tensor([0.5, 0.125])}},
    "sinks": {"tensors": {"sinks": lambda n: (H,)}},
    "block mask": {"options": lambda n: {"block_mask": _block_mask(n)}},
    "dropout": {"options": lambda n: {"dropout_p": 0.3, "seed": 11}},
    "log-sum-exp": {"options": lambda n: {"return_lse": True}},
    "scale": {"options": lambda n: {"scale": 0.4}},
    "value width": {"sizes": {"DV": 24}},
    "odd head width": {"sizes": {"D": 40}},
    "equal heads": {"sizes": {"H_KV": 2}},
    "bf16": {"dtype": torch.bfloat16},
}
# Two that say the same thing in two ways, and cannot both be said.
EXCLUSIVE = ({"causal", "causal, top left"}, {"bias", "broadcast bias"})


def _documents(n):
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randint(0, 2, (rows,), generator=generator) for rows in (S, T))
    return (q, k) if n > 1 else (q[None], k[None])


def _block_mask(n):
    """Random, with full, partial and empty blocks of 16; one list for all heads."""
    generator = torch.Generator().manual_seed(4)
    rows, columns = (20, 23) if n > 1 else (S, T)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[:16, 16:32], mask[16:32, :16] = False, True
    return ops.BlockMask.from_dense(mask, block=16)


def pairs() -> list[tuple[str, ...]]:
    """Every feature alone, and every pair that can be said."""
    return [(name,) for name in FEATURES] + [p for p in itertools.combinations(FEATURES, 2) if _sayable(p)]


def triples(count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """A seeded sample of triples."""
    every = [t for t in itertools.combinations(FEATURES, 3) if _sayable(t)]
    return sorted(random.Random(seed).sample(every, count))


def _sayable(names):
    return not any(pair <= set(names) for pair in EXCLUSIVE)


def case_of(names: tuple[str, ...], device: str = "cpu", sizes: dict | None = None) -> tuple[Case, tuple, torch.dtype]:
    """(case, arguments q, k, v and whatever else gets a gradient, dtype) of a call with these features."""
    features = [FEATURES[name] for name in names]
    packed = any(f.get("packed") for f in features)
    n = len(SEQUENCES) if packed else 1
    size = {"S": S, "T": T, "H": H, "H_KV": H_KV, "D": D} | (sizes or {})
    options, tensors, dtype = {}, {}, torch.float32
    for feature in features:
        options |= feature.get("options", lambda n: {})(n)
        tensors |= {name: shape(n) for name, shape in feature.get("tensors", {}).items()}
        size |= feature.get("sizes", {})
        dtype = feature.get("dtype", dtype)
    if packed:
        for name, lengths in zip(("cu_seqlens_q", "cu_seqlens_k"), zip(*SEQUENCES)):
            options[name] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options = {name: _moved(value, device) for name, value in options.items()}
    shapes = [(size["S"], size["H"], size["D"]), (size["T"], size["H_KV"], size["D"]),
              (size["T"], size["H_KV"], size.get("DV", size["D"]))]  # fmt: skip
    shapes = [shape if packed else (1, *shape) for shape in shapes] + list(tensors.values())
    args = tuple(torch.randn(shape, dtype=torch.float64).to(dtype).to(device) for shape in shapes)

    def named(rest):
        found = dict(zip(tensors, rest))
        if "relative_bias" in found:
            found["relative_bias"] = _relative_bias(found["relative_bias"])
        return options | found

    def fn(q, k, v, *rest, backend):
        return ops.attention(q, k, v, **named(rest), backend=backend)

    def plain(q, k, v, *rest):
        return in_plain_torch(q, k, v, **named(rest))

    return Case("attention", fn, lambda *_: args, lambda *_: args, plain=plain, autocast="cast"), args, dtype


def backend_of(case: Case, args: tuple) -> str:
    """The backend that the call takes on these arguments' device by itself."""
    return ops.explain(lambda *a: case.fn(*a, backend="auto"), *args).backend


def _moved(value, device):
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, (torch.Tensor, ops.BlockMask)) else value


_UNSAID = (
    "window", "scale", "bias", "relative_bias", "alibi_slopes", "softcap", "sinks", "cu_seqlens_q", "cu_seqlens_k",
    "max_seqlen_q", "max_seqlen_k", "key_lengths", "key_starts", "prefix_lengths", "document_ids", "block_mask", "seed",
)  # fmt: skip


def call_of(q, k, v, **options) -> Call:
    """The Call of these arguments of ops.attention."""
    unsaid = dict.fromkeys(_UNSAID) | {"causal": False, "dropout_p": 0.0, "check": False}
    return make_call(q, k, v, **unsaid | options)


def in_plain_torch(q, k, v, *, return_lse=False, **options):
    """What a user writes: products in the inputs' dtype, the softmax in fp32 and its result rounded before the second product."""
    call = call_of(q, k, v, **options)
    group = call.q.shape[2] // call.k.shape[2]
    keys, values = (without_hidden_keys(call, x).repeat_interleave(group, 2).transpose(1, 2) for x in (call.k, call.v))
    scores = call.q.transpose(1, 2) @ keys.transpose(-1, -2) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    added = added_scores(call)
    if added is not None:
        scores = scores + added.to(scores.dtype)
    seen = who_sees_whom(call)
    dead = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(dead, 0)
    if call.sinks is not None:
        scores = torch.cat((scores, call.sinks[:, None, None].expand(*scores.shape[:3], 1).to(scores.dtype)), -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probs = scores.softmax(-1, dtype=wide)[..., : values.shape[2]].masked_fill(~seen, 0)
    if call.dropout:
        probs = probs * kept(call) / (1 - call.dropout)
    out = (probs.to(values.dtype) @ values).transpose(1, 2)
    lse = torch.logsumexp(scores.to(wide), -1).masked_fill(dead.expand(*scores.shape[:3], 1).squeeze(-1), float("-inf"))
    if q.ndim == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


# --- the README's table ---------------------------------------------------------------------------------------------

_MARK = "<!-- written by tests/ops/attention_matrix.py -->"
# What decode_attention has for a feature: the option, or a word.
_DECODE = {
    "causal": "always", "window": "window", "key lengths": "lengths", "left padding": "key_starts", "packed": "page_table",
    "softcap": "softcap", "T5 relative bias": "relative_bias", "ALiBi": "alibi_slopes", "sinks": "sinks", "scale": "scale",
    "log-sum-exp": "return_lse", "value width": "always", "odd head width": "always", "equal heads": "always", "bf16": "always",
}  # fmt: skip


def table() -> str:
    """One row per feature, from what the op itself says of calls with it."""
    lines = [
        "| feature | say it with | gradients | with packed sequences | decode_attention | on the CPU |",
        "|---|---|---|---|---|---|",
    ]
    for name, feature in FEATURES.items():
        case, args, _ = case_of((name,))
        backend = backend_of(case, args)
        words = [*feature.get("options", lambda n: {})(1), *feature.get("tensors", {})] or ["cu_seqlens_q"] * (
            name == "packed"
        )
        says = ", ".join(f"`{word}`" for word in words if word != "seed") or "shapes, dtype"
        gradients = ", ".join(["q, k, v", *feature.get("tensors", {})])
        packed = "" if name == "packed" else "yes" if _sayable((name, "packed")) else "no"
        decode = _DECODE.get(name, "")
        decode = f"`{decode}`" if decode not in ("", "always") else decode
        lines.append(
            f"| {name} | {says} | {gradients} | {packed} | {decode} | {'SDPA' if backend == 'torch' else 'reference'} |"
        )
    count = len(pairs()) - len(FEATURES)
    lines.append(
        f"\nTested under the accuracy rule: each of the {count} pairs that can be said, and {TRIPLES} triples."
    )
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README's text with the table between its two marks."""
    before, _, after = readme.split(_MARK)
    return f"{before}{_MARK}\n{table()}\n{_MARK}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
