"""One plan per op, drawn by hypothesis: `PLANS[op](draw) -> Plan`. The plain forms are written from the contracts alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fastlm import ops
from tests.ops.fuzz import WIDTHS, Plan, shape_of
from tests.ops.fuzz_plans_quantized import QUANTIZED

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def _norm_plan(draw, name):
    shape = shape_of(draw, draw(st.sampled_from(WIDTHS)))
    shapes = {"x": shape}
    for extra in ("weight", "bias"):
        if draw(st.booleans()):
            shapes[extra] = shape[-1:]
    if draw(st.booleans()):
        shapes["residual"] = shape
    offset = draw(st.sampled_from((0.0, 1.0))) if "weight" in shapes else 0.0

    def call(backend, **tensors):
        return getattr(ops, name)(**tensors, eps=1e-3, weight_offset=offset, backend=backend)

    def plain(x, weight=None, bias=None, residual=None):
        total = x if residual is None else x + residual
        scale = None if weight is None else weight + offset
        if name == "layer_norm":
            y = F.layer_norm(total, shape[-1:], scale, bias, 1e-3)
        else:
            y = F.rms_norm(total, shape[-1:], scale, 1e-3)
            y = y if bias is None else y + bias
        return y if residual is None else (y, total)

    return Plan(shapes, call, plain, {"weight_offset": offset})


def rms_norm(draw):
    return _norm_plan(draw, "rms_norm")


def layer_norm(draw):
    return _norm_plan(draw, "layer_norm")


def activation(draw):
    kind = draw(st.sampled_from(sorted(ACTIVATIONS)))
    shape = shape_of(draw, most=2048)
    return Plan(
        {"x": shape},
        lambda backend, x: ops.activation(x, kind, backend=backend),
        lambda x: ACTIVATIONS[kind](x),
        {"kind": kind},
    )


def glu(draw):
    kind = draw(st.sampled_from(sorted(ACTIVATIONS)))
    shape = shape_of(draw, most=2048)
    call = lambda backend, gate, up: ops.glu(gate, up, kind, backend=backend)  # noqa: E731
    return Plan({"gate": shape, "up": shape}, call, lambda gate, up: ACTIVATIONS[kind](gate) * up, {"kind": kind})


def rotary(draw):
    B, S = draw(st.sampled_from((0, 1, 2, 3))), draw(st.sampled_from((0, 1, 3, 7)))
    H, H_kv = draw(st.sampled_from((1, 2, 3, 5))), draw(st.sampled_from((1, 2)))
    width = draw(st.sampled_from((2, 5, 8, 16, 20, 33)))
    half = draw(st.integers(1, width // 2))
    interleaved = draw(st.booleans())
    angles = torch.rand(16, half, generator=torch.Generator().manual_seed(half)) * 6
    place = draw(st.sampled_from(("from 0", "positions", "offset", "packed")))
    at, lead = torch.arange(S).expand(B, S), (B, S)
    where = {}
    if place == "positions":
        where["positions"] = at = (torch.arange(B * S).view(B, S) * 5) % 16
    elif place == "offset":
        where["offset"] = torch.arange(B) * 3
        at = at + where["offset"][:, None]
    elif place == "packed":
        where["cu_seqlens"] = torch.arange(B + 1, dtype=torch.int32) * S
        at, lead = at.flatten(), (B * S,)

    def call(backend, q, k):
        cos, sin = angles.cos().to(q.device), angles.sin().to(q.device)
        there = {name: t.to(q.device) for name, t in where.items()}
        return ops.rotary(q, k, cos, sin, interleaved=interleaved, **there, backend=backend)

    def plain(q, k):
        turn = torch.polar(torch.ones(()), angles)[at].to(q.device).unsqueeze(-2)  # e^(i angle)

        def turned(x):
            wide = x.double() if x.dtype == torch.float64 else x.float()
            part = wide[..., : 2 * half]
            a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else part.split(half, -1)
            z = torch.complex(a, b) * turn
            both = (z.real, z.imag)
            out = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
            return torch.cat((out.to(x.dtype), x[..., 2 * half :]), -1)

        return turned(q), turned(k)

    options = {"half": half, "interleaved": interleaved, "place": place}
    return Plan({"q": (*lead, H, width), "k": (*lead, H_kv, width)}, call, plain, options)


def attention(draw):
    # Never one query that sees one key: the gradient of its score is 0 but for rounding, and no yardstick is that exact.
    B, S, T = (draw(st.sampled_from(sizes)) for sizes in ((0, 1, 2), (0, 2, 5, 17), (3, 17, 33)))
    H_kv, group = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 3)))
    width, value = draw(st.sampled_from((8, 13, 16))), draw(st.sampled_from((8, 5, 16)))
    causal = draw(st.sampled_from((False, True, "top_left")))

    def plain(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)) * width**-0.5
        row, col = torch.arange(S)[:, None], torch.arange(T)[None]
        seen = torch.ones(S, T, dtype=torch.bool) if not causal else col <= row + (T - S if causal is True else 0)
        seen = seen.to(q.device)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
        return (weights @ v).transpose(1, 2)

    return Plan(
        {"q": (B, S, H_kv * group, width), "k": (B, T, H_kv, width), "v": (B, T, H_kv, value)},
        lambda backend, q, k, v: ops.attention(q, k, v, causal=causal, backend=backend),
        plain,
        {"causal": causal},
    )


def targets_of(draw, shape, classes):
    """Class numbers of which some are ignored."""
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, shape, generator=generator)
    return target.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)


def softmax(draw):
    shape = shape_of(draw, draw(st.sampled_from(WIDTHS)))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    scale, kind = draw(st.sampled_from((1.0, 0.3))), draw(st.sampled_from((None, "boolean", 0.0, -8192.0, -torch.inf)))
    sizes = [draw(st.sampled_from((n, 1))) for n in shape]  # of the mask: any that broadcast; what it hides is `kind`
    shapes = {"x": shape} | ({} if kind is None else {"mask": tuple(sizes[draw(st.integers(0, len(shape))) :])})

    def mask_of(t):
        return None if t is None else t > -0.5 if kind == "boolean" else t.detach().masked_fill(t > 0.5, kind)

    def plain(x, mask=None):
        s, m = x.to(torch.promote_types(x.dtype, torch.float32)) * scale, mask_of(mask)
        if m is not None:
            s = s.masked_fill(~m, -torch.inf) if kind == "boolean" else s + m.to(s.dtype)
        dead = (s == -torch.inf).all(dim, keepdim=True)
        y = torch.softmax(s.masked_fill(dead, 0), dim).masked_fill(dead, 0).to(x.dtype)
        w, s = y.detach().to(s.dtype), s.masked_fill(s == -torch.inf, 0)
        slope = w * (s - (w * s).sum(dim, keepdim=True))  # softmax's own, at the 16-bit y that torch's backward reads
        return y if x.element_size() > 2 else (w + slope - slope.detach()).to(x.dtype)

    call = lambda backend, x, mask=None: ops.softmax(x, dim, scale=scale, mask=mask_of(mask), backend=backend)  # noqa: E731
    return Plan(shapes, call, plain, {"dim": dim, "scale": scale, "mask": kind})


def mlp(draw):
    kind = draw(st.sampled_from(sorted(ACTIVATIONS)))
    D, F_, out = (draw(st.sampled_from((1, 3, 8, 17, 32, 40))) for _ in range(3))
    shapes = {"x": shape_of(draw, D, most=40), "up_weight": (F_, D), "down_weight": (out, F_)}
    if draw(st.booleans()):
        shapes |= {"up_bias": (F_,), "down_bias": (out,)}
    recompute = draw(st.booleans())

    def plain(x, up_weight, down_weight, up_bias=None, down_bias=None):
        return F.linear(ACTIVATIONS[kind](F.linear(x, up_weight, up_bias)), down_weight, down_bias)

    return Plan(
        shapes,
        lambda backend, **t: ops.mlp(**t, activation=kind, recompute=recompute, backend=backend),
        plain,
        {"kind": kind, "recompute": recompute},
    )


def gated_mlp(draw):
    kind = draw(st.sampled_from(sorted(ACTIVATIONS)))
    D, F_, out = (draw(st.sampled_from((1, 3, 8, 17, 32, 40))) for _ in range(3))
    whole = draw(st.booleans())  # gate and up in one matrix
    shapes = {"x": shape_of(draw, D, most=40), "gate_weight": ((2 if whole else 1) * F_, D)}
    shapes |= {"down_weight": (out, F_)} if whole else {"up_weight": (F_, D), "down_weight": (out, F_)}
    recompute = draw(st.booleans())

    def call(backend, x, gate_weight, down_weight, up_weight=None):
        return ops.gated_mlp(
            x, gate_weight, up_weight, down_weight, activation=kind, recompute=recompute, backend=backend
        )

    def plain(x, gate_weight, down_weight, up_weight=None):
        gate, up = (gate_weight, up_weight) if up_weight is not None else gate_weight.chunk(2)
        return F.linear(ACTIVATIONS[kind](F.linear(x, gate)) * F.linear(x, up), down_weight)

    return Plan(shapes, call, plain, {"kind": kind, "recompute": recompute})


def linear(draw):
    D, out = (draw(st.sampled_from((1, 3, 8, 17, 32, 40))) for _ in range(2))
    shapes = {"x": shape_of(draw, D, most=40), "weight": (out, D)} | ({"bias": (out,)} if draw(st.booleans()) else {})
    return Plan(shapes, lambda backend, **t: ops.linear(**t, backend=backend), F.linear, {})


def lora_linear(draw):
    D, out = (draw(st.sampled_from((1, 3, 8, 17, 32, 40))) for _ in range(2))
    rank, scale = draw(st.sampled_from((1, 2, 4, 9))), draw(st.sampled_from((1.0, 0.5)))
    shapes = {"x": shape_of(draw, D, most=40), "weight": (out, D), "a": (rank, D), "b": (out, rank)}
    if draw(st.booleans()):
        shapes["bias"] = (out,)

    def plain(x, weight, a, b, bias=None):
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)

    return Plan(
        shapes, lambda backend, **t: ops.lora_linear(**t, scale=scale, backend=backend), plain, {"scale": scale}
    )


def _loss_options(draw, rows, classes):
    """Options of cross_entropy beyond torch's, and the constants they need."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    options = {
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.2))),
        "scale": draw(st.sampled_from((1.0, 0.7))),
        "softcap": draw(st.sampled_from((None, 3.0))),
        "z_loss": draw(st.sampled_from((0.0, 0.1))),
    }
    if draw(st.booleans()):
        options["weight"] = 0.5 + torch.rand(classes, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        options["token_weight"] = torch.randn(rows, generator=generator, dtype=torch.float64)
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["denominator"] = 7.0
    return options


def _on(options, like):
    """The options with their tensors on the device of `like`, in the dtype in which a loss is computed."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return {k: v.to(like.device, dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def _loss_of(logits, target, *, reduction, label_smoothing, scale, softcap, z_loss,
             weight=None, token_weight=None, denominator=None):  # fmt: skip
    """The loss of the contract, term by term."""
    z = logits * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp, lse, live = z.log_softmax(-1), z.logsumexp(-1), target != -100
    w = torch.ones(z.shape[-1], dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
    safe = target.clamp(min=0)
    picked = logp.gather(-1, safe[..., None])[..., 0]
    loss = -(1 - label_smoothing) * w[safe] * picked - label_smoothing * (logp * w).mean(-1) + z_loss * lse**2
    loss = loss if token_weight is None else loss * token_weight.to(z.dtype)
    loss = torch.where(live, loss, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    count = torch.where(live, w[safe], 0).sum() if denominator is None else denominator
    return loss.sum() / (count if denominator is not None or count > 0 else 1)


CLASSES = (1, 2, 5, 17, 40, 65)


def cross_entropy(draw):
    V = draw(st.sampled_from(CLASSES))
    shape = shape_of(draw, V, most=30)
    target, options = targets_of(draw, shape[:-1], V), _loss_options(draw, shape[:-1], V)
    return Plan(
        {"input": shape},
        lambda backend, input: ops.cross_entropy(
            input, target.to(input.device), **_on(options, input), backend=backend
        ),
        lambda input: _loss_of(input, target.to(input.device), **_on(options, input)),
        options,
    )


def linear_cross_entropy(draw):
    V, D = draw(st.sampled_from(CLASSES)), draw(st.sampled_from((1, 3, 8, 17, 24)))
    shape = shape_of(draw, D, most=30)
    shapes = {"input": shape, "linear_weight": (V, D)} | ({"linear_bias": (V,)} if draw(st.booleans()) else {})
    target, options = targets_of(draw, shape[:-1], V), _loss_options(draw, shape[:-1], V)

    def call(backend, input, linear_weight, linear_bias=None):
        at = target.to(input.device)
        return ops.linear_cross_entropy(
            input, linear_weight, at, linear_bias=linear_bias, **_on(options, input), backend=backend
        )

    def plain(input, linear_weight, linear_bias=None):
        return _loss_of(F.linear(input, linear_weight, linear_bias), target.to(input.device), **_on(options, input))

    return Plan(shapes, call, plain, options)


def linear_logprobs(draw):
    V, D = draw(st.sampled_from(CLASSES)), draw(st.sampled_from((1, 3, 8, 17, 24)))
    shape = shape_of(draw, D, most=30)
    shapes = {"input": shape, "linear_weight": (V, D)} | ({"linear_bias": (V,)} if draw(st.booleans()) else {})
    target, scale = targets_of(draw, shape[:-1], V), draw(st.sampled_from((1.0, 0.7)))
    softcap = draw(st.sampled_from((None, 3.0)))

    def call(backend, input, linear_weight, linear_bias=None):
        return ops.linear_logprobs(
            input, linear_weight, target.to(input.device), linear_bias=linear_bias, scale=scale, softcap=softcap,
            backend=backend,
        )[:3]  # fmt: skip

    def plain(input, linear_weight, linear_bias=None):
        at = target.to(input.device)
        z = F.linear(input, linear_weight, linear_bias) * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        logp = z.log_softmax(-1)
        found = (logp.gather(-1, at.clamp(min=0)[..., None])[..., 0], z.logsumexp(-1), -(logp.exp() * logp).sum(-1))
        return tuple(torch.where(at != -100, t, 0) for t in found)

    return Plan(shapes, call, plain, {"scale": scale, "softcap": softcap})


def _divergence(student, teacher, mask, beta, temperature, reduction):
    q, p = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if beta == 0:
        value = kl(p, q)
    elif beta == 1:
        value = kl(q, p)
    else:
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    value = torch.where(mask, value, 0)
    if reduction == "none":
        return value
    return value.sum() if reduction == "sum" else value.sum() / mask.sum().clamp(min=1)


def _divergence_options(draw, rows):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return {
        "beta": draw(st.sampled_from((0.0, 0.3, 1.0))),
        "temperature": draw(st.sampled_from((1.0, 2.0))),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "mask": torch.rand(rows, generator=generator) < 0.7,
    }


def kl_div(draw):
    V = draw(st.sampled_from(CLASSES[1:]))
    shape = shape_of(draw, V, most=30)
    options = _divergence_options(draw, shape[:-1])
    return Plan(
        {"student": shape, "teacher": shape},
        lambda backend, student, teacher: ops.kl_div(
            student, teacher.detach(), **_on_mask(options, student), backend=backend
        ),
        lambda student, teacher: _divergence(student, teacher, **_on_mask(options, student)),
        options,
    )


def _on_mask(options, like):
    return options | {"mask": options["mask"].to(like.device)}


def linear_kl_div(draw):
    V, D, D_t = draw(st.sampled_from(CLASSES[1:])), *(draw(st.sampled_from((1, 3, 8, 17, 24))) for _ in range(2))
    rows = shape_of(draw, None, most=30)
    options = _divergence_options(draw, rows)

    def call(backend, student, student_weight, teacher, teacher_weight):
        return ops.linear_kl_div(
            student, student_weight, teacher.detach(), teacher_weight.detach(), **_on_mask(options, student),
            backend=backend,
        )  # fmt: skip

    def plain(student, student_weight, teacher, teacher_weight):
        return _divergence(
            F.linear(student, student_weight), F.linear(teacher, teacher_weight), **_on_mask(options, student)
        )

    shapes = {"student": (*rows, D), "student_weight": (V, D), "teacher": (*rows, D_t), "teacher_weight": (V, D_t)}
    return Plan(shapes, call, plain, options)


_EVERY = (rms_norm, layer_norm, activation, glu, rotary, attention, softmax, mlp, gated_mlp, linear, lora_linear,
          cross_entropy, linear_cross_entropy, linear_logprobs, kl_div, linear_kl_div)  # fmt: skip
PLANS = {plan.__name__: plan for plan in _EVERY} | QUANTIZED
