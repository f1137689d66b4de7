"""Run twice by test_distributed.py, as `two_processes.py RANK FOLDER`: every check on DTensors and FSDP2, as JSON.

Each check compares a run over two processes with the plain run of the same op on the same data, on the triton backend
(in the interpreter) unless it says otherwise.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from fastlm import nn, ops, optim
from fastlm._interpreter import repair_interpreter
from fastlm.ops import use_backend
from tests.quick_interpreter import quicken_interpreter

B, S, N = 3, 4, 8  # an odd batch: the two parts are unequal


def _cases() -> dict:
    """name -> (fn(*args), args, a letter per argument: "b" divided, "." whole, "-" whole and without gradient)."""
    x, r, wide = torch.randn(B, S, N), torch.randn(B, S, N), torch.randn(B, S, 4, N)
    w, b = torch.randn(N), torch.randn(N)
    gate, up, down = torch.randn(2 * N, N), torch.randn(2 * N, N), torch.randn(N, 2 * N)
    low = torch.randn(3, N), torch.randn(2 * N, 3)
    q, k, v = torch.randn(B, S, 4, 16), torch.randn(B, S, 2, 16), torch.randn(B, S, 2, 16)
    angles, far = torch.rand(S, 8), torch.rand(2 * S, 8)
    hidden, vocabulary, target = torch.randn(B, S, N), torch.randn(11, N), torch.randint(0, 11, (B, S))
    target[0, 1] = -100
    cases = {
        "rms_norm": (ops.rms_norm, (x, w), "b."),
        "rms_norm without weight": (ops.rms_norm, (wide,), "b"),
        "rms_norm with residual": (lambda x, w, r: ops.rms_norm(x, w, residual=r), (x, w, r), "b.b"),
        "layer_norm": (ops.layer_norm, (x, w, b), "b.."),
        "layer_norm without bias": (ops.layer_norm, (x, w), "b."),
        "layer_norm without weight": (lambda x, b: ops.layer_norm(x, None, b), (x, b), "b."),
        "layer_norm with residual": (lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r), (x, w, b, r), "b..b"),
        "rms_norm with bias and fp32 stream": (
            lambda x, w, b, r: ops.rms_norm(x.half(), w, bias=b, residual=r, weight_offset=1.0),
            (x, w, b, r),
            "b..b",
        ),
        "softmax": (lambda x: ops.softmax(x, scale=0.5), (x,), "b"),
        "softmax with masks": (
            lambda x, m, a: ops.softmax(ops.softmax(x, mask=m), mask=a),
            (x, torch.rand(B, 1, N) > 0.3, torch.randn(S, N)),
            "bb-",
        ),
        "activation": (lambda x: ops.activation(x, "gelu_tanh"), (x,), "b"),
        "glu": (lambda g, u: ops.glu(g, u, "silu"), (x, r), "bb"),
        "mlp": (ops.mlp, (x, up, down), "b.."),
        "mlp with biases": (lambda x, u, d, b: ops.mlp(x, u, d, b.repeat(2), b), (x, up, down, b), "b..."),
        "gated_mlp": (ops.gated_mlp, (x, gate, up, down), "b..."),
        "gated_mlp in one matrix": (lambda x, g, d: ops.gated_mlp(x, g, None, d), (x, gate, down[:, :N]), "b.."),
        "linear": (ops.linear, (x, up, torch.randn(2 * N)), "b.."),
        "lora_linear": (lambda x, w, a, b: ops.lora_linear(x, w, a, b, scale=2.0), (x, up, low[0], low[1]), "b..."),
        "quantized_linear": (
            lambda x, codes, scale, bias: ops.quantized_linear(x, codes, scale, None, bias),
            (x, torch.randint(-127, 128, (6, N), dtype=torch.int8), torch.rand(6), torch.randn(6)),
            "b--.",
        ),
        "quantized_linear of int4": (
            lambda x, codes, scale, zero: ops.quantized_linear(x, codes, scale, zero, bits=4, group_size=32),
            (x, torch.randint(0, 256, (6, 16)).byte(), torch.rand(6, 1), torch.randint(0, 16, (6, 1)).byte()),
            "b---",
        ),
        "fp8_linear": (ops.fp8_linear, (x, up, torch.randn(2 * N)), "b.."),
        "fp8_linear with one scale": (lambda x, w: ops.fp8_linear(x, w, scaling="tensor"), (x, up), "b."),
        "rotary": (ops.rotary, (q, k, angles.cos(), angles.sin()), "bb--"),
        "rotary from offsets": (
            lambda q, k, cos, sin, start: ops.rotary(q, k, cos, sin, offset=start),
            (q, k, far.cos(), far.sin(), torch.tensor([3, 0, 1])),
            "bb--b",
        ),
        "rotary packed": (
            lambda q, k, cos, sin, cu: ops.rotary(q, k, cos, sin, offset=1, cu_seqlens=cu),
            (q[0], k[0], far.cos(), far.sin(), torch.tensor([0, 1, S])),
            "bb---",
        ),
        "attention": (lambda q, k, v: ops.attention(q, k, v, causal=True), (q, k, v), "bbb"),
        "attention with lse": (lambda q, k, v: ops.attention(q, k, v, return_lse=True), (q, k, v), "bbb"),
        "attention with bias": (
            lambda q, k, v, bias: ops.attention(q, k, v, bias=bias),
            (q, k, v, torch.randn(4, S, S)),
            "bbb.",
        ),
    }
    cases["linear_cross_entropy with options"] = (
        lambda h, w, b, t, a, c: ops.linear_cross_entropy(
            h, w, t, linear_bias=b, token_weight=a, weight=c, scale=0.7, softcap=5.0, z_loss=0.1, denominator=7
        ),
        (hidden, vocabulary, torch.randn(11), target, torch.randn(B, S), torch.rand(11)),
        "b..b--",
    )
    cases["linear_cross_entropy with class weights"] = (
        lambda h, w, t, c: ops.linear_cross_entropy(h, w, t, weight=c),
        (hidden, vocabulary, target, torch.rand(11)),
        "b.b-",
    )
    cases["linear_logprobs"] = (
        lambda h, w, t: ops.linear_logprobs(h, w, t, logits_bytes=1)[:3],
        (hidden, vocabulary, target),
        "b.b",
    )
    for reduction in ("mean", "sum", "none"):
        cases[f"linear_cross_entropy {reduction}"] = (
            lambda h, w, t, reduction=reduction: ops.linear_cross_entropy(h, w, t, reduction=reduction),
            (hidden, vocabulary, target),
            "b.b",
        )
    cases["cross_entropy"] = (
        lambda z, t: ops.cross_entropy(z, t, reduction="none"),
        (torch.randn(B, S, 11), target),
        "bb",
    )
    cases["cross_entropy mean"] = (
        lambda z, t, w: ops.cross_entropy(z, t, w, label_smoothing=0.1),
        (torch.randn(B, S, 11), target, torch.rand(11)),
        "bb-",
    )
    both, large = torch.randn(2, B, S, 11), (torch.randn(B, S, 5), torch.randn(11, 5))
    for reduction in ("mean", "none"):
        cases[f"linear_kl_div {reduction}"] = (
            lambda h, w, th, tw, m, reduction=reduction: ops.linear_kl_div(h, w, th, tw, mask=m, reduction=reduction),
            (hidden, vocabulary, *large, target != -100),
            "b.--b",
        )
    cases["kl_div"] = (lambda s, t: ops.kl_div(s, t, reduction="none"), tuple(both), "b-")
    cases["kl_div mean"] = (lambda s, t, m: ops.kl_div(s, t, beta=0.3, mask=m), (*both, target != -100), "b-b")
    return cases


def _outputs_and_gradients(fn, args):
    """Full outputs and gradients; cotangents are random but the same in every run."""
    leaves = [a for a in args if a.requires_grad]
    outs = fn(*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    whole = [o.full_tensor() if isinstance(o, DTensor) else o for o in outs]
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in whole)
    grads = torch.autograd.grad(loss, leaves)
    return [*whole, *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads)]


def _leaves(args, kinds, mesh=None, split=None, frozen=()):
    """Fresh arguments: plain without a mesh, else DTensors, those of kind "b" divided along `split`."""
    made = []
    for index, (a, kind) in enumerate(zip(args, kinds)):
        d = a.clone()
        if mesh is not None:
            d = distribute_tensor(d, mesh, [Shard(split) if kind == "b" and split is not None else Replicate()])
        made.append(d.requires_grad_(a.is_floating_point() and kind != "-" and index not in frozen))
    return made


def check_dtensors(name: str, split: int | None, mesh) -> None:
    """Inputs whose batch (split=0) or other dimension is divided, or all of them whole (None), give what plain ones give."""
    fn, args, kinds = _cases()[name]
    want = _outputs_and_gradients(fn, _leaves(args, kinds))
    got = _outputs_and_gradients(fn, _leaves(args, kinds, mesh, split))
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(g, w, msg=lambda m, index=index: f"{name}: output or gradient {index}: {m}")


def check_frozen(name: str, mesh) -> None:
    """A weight that gets a gradient in one call and none in the next: what DTensor remembers must not mix them up.

    What it remembers first is the call with the frozen weight: these checks are the first ones of their ops.
    """
    fn, args, kinds = _cases()[name]
    weight = kinds.index(".")
    for frozen in ((weight,), (), (weight,), (0,), ()):
        want = _outputs_and_gradients(fn, _leaves(args, kinds, frozen=frozen))
        got = _outputs_and_gradients(fn, _leaves(args, kinds, mesh, 0, frozen))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, msg=lambda m, frozen=frozen: f"{name}, frozen {frozen}: {m}")


def check_options_are_not_mixed_up(mesh) -> None:
    """Calls that differ only in which optional tensor is missing, or in an option, are told apart."""
    x, w = torch.randn(B, S, N), torch.randn(N)
    dx, dw = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Replicate()])
    for _ in range(2):
        torch.testing.assert_close(ops.layer_norm(dx, dw, None).full_tensor(), ops.layer_norm(x, w, None))
        torch.testing.assert_close(ops.layer_norm(dx, None, dw).full_tensor(), ops.layer_norm(x, None, w))
        for eps in (1e-6, 1.0):
            torch.testing.assert_close(ops.rms_norm(dx, dw, eps).full_tensor(), ops.rms_norm(x, w, eps))


def check_inference_mode(mesh) -> None:
    """The rules are there too when the first call ever is made in inference mode, where no autograd kernel runs."""
    x, w = torch.randn(B, S, N), torch.randn(N)
    dx, dw = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Replicate()])
    with torch.inference_mode():
        torch.testing.assert_close(ops.rms_norm(dx, dw).full_tensor(), ops.rms_norm(x, w))


def check_tensor_parallel(name, mesh) -> None:
    """Matrices divided by the hidden width (MLP), by rows or by columns (LoRA): no matrix and no gradient of one is gathered."""
    rows, columns, whole = Shard(0), Shard(1), Replicate()
    x, low, up = torch.randn(B, S, N), torch.randn(3, N), torch.randn(2 * N, 3)
    first, second, down = torch.randn(2 * N, N), torch.randn(2 * N, N), torch.randn(N, 2 * N)
    fn, args, places = {
        "mlp": (ops.mlp, (x, first, down), (whole, rows, columns)),
        "gated_mlp": (ops.gated_mlp, (x, first, second, down), (whole, rows, rows, columns)),
        "fp8_linear": (ops.fp8_linear, (x, first), (whole, rows)),
        "lora_linear by rows": (ops.lora_linear, (x, first, low, up), (whole, rows, whole, rows)),
        "lora_linear by columns": (ops.lora_linear, (x, first, low, up), (Shard(2), columns, columns, whole)),
    }[name]
    plain = [a.clone().requires_grad_() for a in args]
    divided = [distribute_tensor(a, mesh, [place]).requires_grad_() for a, place in zip(args, places)]
    want, got = fn(*plain), fn(*divided)
    torch.testing.assert_close(got.full_tensor(), want)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(4))
    grads = torch.autograd.grad(got.full_tensor(), divided, dy)
    for g, w, place in zip(grads, torch.autograd.grad(want, plain, dy), places, strict=True):
        torch.testing.assert_close(g.full_tensor(), w)
        assert place == whole or g.placements == (place,), f"{name}: a gradient is {g.placements}, expected {place}"


class _Block(torch.nn.Module):
    """Every op of a transformer block once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(2 * width, width)
        angles = torch.rand(S, 8)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 16)) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k = ops.rotary(q, k, self.cos, self.sin)
        y, x = self.norm2(self.out(ops.attention(q, k, v, causal=True).flatten(2)), residual=x)
        gate, up = self.up(y).chunk(2, -1)
        return x + self.down(ops.glu(gate, up, "silu"))


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 32)
        self.blocks = torch.nn.ModuleList([_Block(32)])
        self.head = torch.nn.Linear(32, 13, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return ops.linear_cross_entropy(x, self.head.weight, tokens.roll(-1, 1))


def check_fsdp(mesh) -> None:
    """Two optimizer steps of a small model under FSDP2 leave the parameters of the plain run; ranks see different data.

    A large eps: with a small one Adam turns the rounding of a tiny gradient into a step of full size.
    """

    def model():
        torch.manual_seed(7)
        return _Model()

    plain, sharded = model(), model()
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    tokens = torch.randint(0, 13, (2, 2, S), generator=torch.Generator().manual_seed(5))  # [step, rank, S]
    runs = [(m, optim.AdamW(m.parameters(), lr=1e-2, eps=1e-2)) for m in (plain, sharded)]
    for step in range(2):
        for m, optimizer in runs:
            optimizer.zero_grad()
            batch = tokens[step] if m is plain else tokens[step, dist.get_rank()][None]
            m(batch).backward()
            optimizer.step()
    for (name, p), (_, q) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        assert isinstance(q, DTensor), f"{name} is not sharded"
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


_FROZEN = (
    "rms_norm",
    "layer_norm",
    "linear_cross_entropy mean",
    "mlp with biases",
    "lora_linear",
    "attention with bias",
)


def checks(mesh) -> dict:
    """name -> check without arguments."""
    found = {"inference mode first": lambda: check_inference_mode(mesh)}
    for name in _FROZEN:
        found[f"{name} | frozen"] = lambda name=name: check_frozen(name, mesh)
    for name in _cases():
        for split, label in ((0, "batch"), (1, "second dimension"), (None, "whole")):
            if " " in name and split != 0 and "none" not in name:
                continue  # a variant of another case: the usual division is enough
            found[f"{name} | {label}"] = lambda name=name, split=split: check_dtensors(name, split, mesh)
    for name in ("mlp", "gated_mlp", "fp8_linear", "lora_linear by rows", "lora_linear by columns"):
        found[f"{name} | tensor parallel"] = lambda name=name: check_tensor_parallel(name, mesh)
    found["options"] = lambda: check_options_are_not_mixed_up(mesh)
    found["fsdp2"] = lambda: check_fsdp(mesh)
    return found


def main(rank: int, folder: Path) -> None:
    """Runs every check on both ranks in the same order and writes what went wrong."""
    repair_interpreter()
    quicken_interpreter()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {}
    for name, check in checks(init_device_mesh("cpu", (2,))).items():
        torch.manual_seed(0)
        try:
            with use_backend("triton"):
                check()
            results[name] = None
        except Exception:  # reported by the test of this name
            results[name] = traceback.format_exc()[-3000:]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
