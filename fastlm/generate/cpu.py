"""Decoding one token at a time on the CPU, where reading the weights is nearly all the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm.models.transformer import MLP, Attention, Block, Transformer
from fastlm.nn import KVCache, LayerNorm, QuantizedLinear, RMSNorm
from fastlm.ops.quantized_cpu import FineRowProduct, Int4RowProduct, RowProduct

# Rows are decoded one after the other, so that a row's numbers do not depend on the batch. Beyond this many, one product
# for all rows is faster.
MAX_ROWS = 3
_BLOCK = 64  # keys attended to, in steps of this many: buffers and views are made once a block instead of once a token
_SMALL = 1 << 17  # elements of a weight below which calls take longer than reading it
_PLAIN = {
    Transformer,
    Block,
    Attention,
    MLP,
    LayerNorm,
    RMSNorm,
    nn.Linear,
    QuantizedLinear,
    nn.Embedding,
    nn.ModuleList,
}


def reason_against(model: nn.Module, rows: int) -> str | None:
    """Why CpuDecoder cannot stand in for model.hidden, or None. It reads weights, so every module must be the plain one."""
    if type(model) is not Transformer:
        return f"the model is a {type(model).__name__}"
    if model.embed.weight.device.type != "cpu":
        return f"the model is on {model.embed.weight.device}"
    if rows > MAX_ROWS:
        return f"{rows} rows are more than {MAX_ROWS}"
    for name, module in model.named_modules():
        changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if type(module) not in _PLAIN or changed:
            return f"{name or 'the model'} is a changed {type(module).__name__}"
    if any(type(p) is not nn.Parameter or not p.is_floating_point() for p in model.parameters()):
        return "its weights are not plain tensors"
    return None


class CpuDecoder:
    """The model for one new token a row, behind a prefilled cache: the same logits from the fewest and fastest torch calls.

    A product of one row is a batched product here, the weight [N, K] seen as [P, N / P, K]: MKL then reads it at 22-28 GB/s on
    one core and 33-60 on two, F.linear at 10 GB/s on either (384 x 384 to 2048 x 2048, EPYC 9004). fp32 and fp64 weights are
    used where they lie. Of bf16 and fp16 weights an fp32 copy is made, which takes twice their memory while the decoder
    lives; arithmetic and new keys and values are fp32 then. Of nn.QuantizedLinear, int8 codes with one scale a row are read as
    they are and int4 codes without zero points from a copy that the layer keeps, with bf16 activations (and bf16 scales, for
    int4); of other codes an fp32 copy is made. The logits do not depend on the number of threads.

    The weights must not change while the decoder lives; it is made anew for each generation.
    """

    def __init__(self, model: Transformer, caches: Sequence[KVCache]) -> None:
        """Takes over prefilled caches of one row each; those in fp32 and fp64 are written to in place."""
        config = model.config
        self.config = config
        dtype = torch.float64 if model.embed.weight.dtype == torch.float64 else torch.float32
        H, H_kv, Dh, D = config.n_heads, config.n_kv_heads, config.head_dim, config.d_model
        self.embed = model.embed.weight.detach()
        self.places = model.positions.weight.detach() if config.position == "learned" else None
        self.stream = torch.zeros(D, dtype=dtype)
        self.normed = torch.zeros(D, dtype=dtype)
        self.qkv = torch.zeros((H + 2 * H_kv) * Dh, dtype=dtype)
        self.mixed = torch.zeros(H * Dh, dtype=dtype)
        self.up = torch.zeros((2 if config.gated else 1) * config.d_ff, dtype=dtype)
        self.active = torch.zeros(config.d_ff, dtype=dtype)
        self.logits = torch.zeros(config.vocab_size, dtype=dtype)
        q, k, v = self.qkv.split((H * Dh, H_kv * Dh, H_kv * Dh))
        self.q = q.view(H_kv, H // H_kv, Dh)
        self.k, self.v = k.view(H_kv, Dh), v.view(H_kv, Dh)
        self.turning = self.qkv[: (H + H_kv) * Dh].view(H + H_kv, 2, Dh // 2) if config.position == "rotary" else None
        self.heads_mixed = self.mixed.view(H_kv, H // H_kv, Dh)
        if self.turning is not None:
            longest = max(cache.max_length for cache in caches)
            cos, sin = model.cos[:longest].to(dtype), model.sin[:longest].to(dtype)
            self.cos, self.sin = torch.stack((cos, cos), 1), torch.stack((-sin, sin), 1)  # [T, 2, Dh / 2]
        self.norm = _Norm(model.norm, self.stream, self.normed)
        self.head = _head(model, self.normed, self.logits)
        first, *others = model.blocks
        self.layers = [self._layer(first)]
        self.threads = _Threads(self.layers[0][-2])
        self.layers += [self._layer(block) for block in others]
        self.rows = [_Row(cache, self.q) for cache in caches]

    def _layer(self, block: Block) -> tuple:
        up = block.mlp.gate_up if self.config.gated else block.mlp.up
        return (
            _Norm(block.norm1, self.stream, self.normed),
            _product(block.attention.qkv, self.normed, self.qkv),
            _product(block.attention.out, self.mixed, self.stream),
            _Norm(block.norm2, self.stream, self.normed),
            _product(up, self.normed, self.up),
            _product(block.mlp.down, self.active, self.stream),
        )

    def step(self, tokens: Sequence[int], live: Sequence[int]) -> Tensor:
        """Appends tokens[b] to each row b of `live`. Returns logits [B, V], zero for the other rows."""
        logits = self.logits.new_zeros(len(self.rows), self.config.vocab_size)
        with self.threads:
            for b in live:
                self._step(self.rows[b], tokens[b])
                logits[b] = self.logits
        return logits

    def _step(self, row: _Row, token: int) -> None:
        place = row.next_place()
        stream, up, kind, gated = self.stream, self.up, self.config.activation, self.config.gated
        stream.copy_(self.embed[token])
        if self.places is not None:
            stream.add_(self.places[place])
        if self.turning is not None:
            cos, sin = self.cos[place], self.sin[place]
        if gated:
            gate, up = up.chunk(2)
        for (norm1, qkv, out, norm2, gate_up, down), kv in zip(self.layers, row.layers):
            norm1()
            qkv()
            if self.turning is not None:
                turned = self.turning.flip(1).mul_(sin)
                torch.addcmul(turned, self.turning, cos, out=self.turning)
            row.attend(kv, self.q, self.k, self.v, self.heads_mixed)
            out.add()
            norm2()
            gate_up()
            self.active.copy_(ops.glu(gate, up, kind) if gated else ops.activation(up, kind))
            down.add()
        self.norm()
        self.head()


def _product(layer: nn.Module, x: Tensor, y: Tensor) -> _Product | RowProduct | Int4RowProduct:
    """The product with a layer's weight. Codes are read as they are where that is faster than an fp32 copy of it."""
    bias = getattr(layer, "bias", None)
    if not isinstance(layer, QuantizedLinear) or layer.codes.numel() * 8 // layer.bits < _SMALL:
        return _Product(layer.weight, bias, x, y)
    packed = layer.packed_int4(round_scales=True) if x.dtype == torch.float32 else None
    if packed is not None:
        return Int4RowProduct(packed, bias, x, y)
    if RowProduct.reason_against(layer.codes, layer.scale, layer.zero, layer.bits, x):
        return _Product(layer.weight, bias, x, y)
    return RowProduct(layer.codes, layer.scale, bias, x, y)


def _head(model: Transformer, x: Tensor, y: Tensor) -> _Product | FineRowProduct:
    """The product that gives the logits, with the codes of nn.quantize_(skip=()) or, where tied, nn.quantize_(tied=True)."""
    layer = vars(model).get("quantized_head", model.embed) if model.config.tie_embeddings else model.head
    if isinstance(layer, QuantizedLinear):
        if not FineRowProduct.reason_against(layer.codes, layer.scale, layer.zero, layer.bits, x):
            return FineRowProduct(layer.codes, layer.scale, x, y)
        if (
            model.config.tie_embeddings
        ):  # a copy of the codes' values would be no faster than the embedding, and less exact
            layer = model.embed
    return _Product(layer.weight, None, x, y)


class _Product:
    """y = W x + bias or, by `add`, y += W x + bias, for vectors x [K] and y [N] that stay where they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> None:
        N, K = weight.shape
        parts = _parts(N)
        self.weight = weight.detach().to(x.dtype).contiguous().view(parts, N // parts, K)
        self.bias = None if bias is None else bias.detach().to(x.dtype).view(parts, N // parts, 1)
        # A row seen as a column: with strides (1, 1) instead of (1, K), MKL takes a path that is ten times slower.
        self.x = x.view(1, 1, K).transpose(1, 2).expand(parts, K, 1)
        self.y = y.view(parts, N // parts, 1)

    def __call__(self) -> None:
        if self.bias is None:
            torch.bmm(self.weight, self.x, out=self.y)
        else:
            torch.baddbmm(self.bias, self.weight, self.x, out=self.y)

    def add(self) -> None:
        self.y.baddbmm_(self.weight, self.x)
        if self.bias is not None:
            self.y.add_(self.bias)


class _Norm:
    """y = norm(x) for vectors that stay where they are. A dot product and two multiplications: half of F.rms_norm's time."""

    def __init__(self, norm: RMSNorm | LayerNorm, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.eps = x, y, norm.eps
        self.weight = norm.weight.detach().to(x.dtype)
        self.bias = None if isinstance(norm, RMSNorm) else norm.bias.detach().to(x.dtype)

    def __call__(self) -> None:
        x, y = self.x, self.y
        if self.bias is not None:
            y.copy_(F.layer_norm(x, x.shape, self.weight, self.bias, self.eps))
        else:
            scale = (x.dot(x).item() / x.numel() + self.eps) ** -0.5
            torch.mul(x, self.weight, out=y).mul_(scale)


class _Row:
    """One row's keys and values, and the views of them that the current block of keys needs."""

    def __init__(self, cache: KVCache, q: Tensor) -> None:
        self.caches = [(k[0].to(q.dtype), v[0].to(q.dtype)) for k, v in zip(cache.k, cache.v)]  # [T_max, H_kv, Dh]
        self.length, self.end = cache.longest, 0
        self.scale = q.shape[-1] ** -0.5
        self.shape = q.shape[:2]
        self.mask = torch.full((cache.max_length,), -torch.inf, dtype=q.dtype)
        self.mask[: self.length] = 0

    def next_place(self) -> int:
        """Makes room for one more token. Returns its place."""
        place = self.length
        if place >= self.end:
            start = self.start = place // _BLOCK * _BLOCK
            end = self.end = min(start + _BLOCK, len(self.mask))
            self.seen = self.mask[:end].expand(1, 1, end)
            self.scores = self.mask.new_empty(*self.shape, end)
            self.layers = [
                (k[:end].permute(1, 2, 0), v[:end].transpose(0, 1), k[start:end].unbind(), v[start:end].unbind())
                for k, v in self.caches
            ]
        self.mask[place] = 0
        self.length += 1
        return place

    def attend(self, kv: tuple, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Stores k, v [H_kv, Dh] in the newest place of a layer; out = attention of q [H_kv, H / H_kv, Dh]."""
        keys, values, key_rows, value_rows = kv
        newest = self.length - 1 - self.start
        key_rows[newest].copy_(k)
        value_rows[newest].copy_(v)
        torch.baddbmm(self.seen, q, keys, alpha=self.scale, out=self.scores)
        torch.bmm(torch.softmax(self.scores, -1), values, out=out)


class _Threads:
    """Context manager around each step: with one thread or with all of torch's, whichever is faster at present.

    Two threads read weights up to twice as fast as one. But they meet at the end of every product, and where other processes keep
    the cores busy one waits there for the other's time slice: a step of 3 ms then takes 500. So a product is timed both ways
    every so many steps, and all threads are given up until then as soon as their steps have taken longer than one's would have.
    """

    EVERY = 32  # steps between trials
    TRIES = 8

    def __init__(self, probe: Callable[[], None]) -> None:
        self.probe = probe
        self.many = torch.get_num_threads()
        self._choose()

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        if self.steps == self.EVERY:
            self._choose()
        torch.set_num_threads(self.now)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self.start
        torch.set_num_threads(self.before)
        self.steps += 1
        self.spent += took
        self.shortest = min(self.shortest, took)
        if self.spent > self.gain * self.shortest * (self.steps + 1):
            self.now = 1

    def _choose(self) -> None:
        self.steps, self.spent, self.shortest = 0, 0.0, float("inf")
        self.now, self.gain = 1, 1.0
        if self.many > 1:
            one = sum(self._time(1) for _ in range(self.TRIES))
            many = 0.0
            for _ in range(self.TRIES):
                many += self._time(self.many)
                if many >= one:
                    return
            self.now, self.gain = self.many, one / many

    def _time(self, threads: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        start = time.perf_counter()
        self.probe()
        took = time.perf_counter() - start
        torch.set_num_threads(before)
        return took


def _parts(n: int) -> int:
    """Parts of equal size for the n rows of a weight: 16 or the next number that divides n, for threads to share. One part
    alone, which only a prime n beyond 64 leaves, takes a path three times slower."""
    divisors = [p for p in range(2, min(n, 64) + 1) if n % p == 0]
    return min((p for p in divisors if p >= 16), default=max(divisors, default=1))
