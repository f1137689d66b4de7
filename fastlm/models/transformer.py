"""The one transformer: every family is a TransformerConfig of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.errors import UserError
from fastlm.models.config import TransformerConfig
from fastlm.models.rope import rope_tables
from fastlm.nn import KVCache, LayerNorm, RMSNorm, attend
from fastlm.nn.mlp import fusable


class Attention(nn.Module):
    """Causal self-attention with one product for queries, keys and values: qkv rows are [H, H_kv, H_kv] heads of Dh."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        width = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.d_model, width, bias=config.attention_bias)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.attention_bias)

    def forward(self, x: Tensor, place: _Place, layer: int) -> Tensor:
        B, S, _ = x.shape
        heads = self.qkv(x).view(B, S, -1, self.head_dim)  # [B, S, H + 2 H_kv, Dh]
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        if place.cos is not None:
            q, k = ops.rotary(q, k, place.cos, place.sin, positions=place.positions)
        if place.cache is not None:
            k, v = place.cache.append(layer, k, v)
        y = attend(self, q, k, v, causal=True, key_lengths=place.key_lengths)
        return self.out(y.reshape(B, S, -1))


class MLP(nn.Module):
    """act(up(x)), or gated act(gate(x)) * up(x) with one product for both, then down. gate_up rows are [gate, up].

    One op, unless a projection has hooks or is not exactly a Linear (nn.LoRALinear): then they are called one by one.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gated = config.gated
        if config.gated:
            self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=config.mlp_bias)
        else:
            self.up = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        first, down = self.gate_up if self.gated else self.up, self.down
        if not fusable(first, down):
            pre = first(x)
            return down(
                ops.glu(*pre.chunk(2, -1), self.activation) if self.gated else ops.activation(pre, self.activation)
            )
        if self.gated:
            return ops.gated_mlp(
                x, first.weight, None, down.weight, first.bias, None, down.bias, activation=self.activation
            )
        return ops.mlp(x, first.weight, down.weight, first.bias, down.bias, activation=self.activation)


class Block(nn.Module):
    """Pre-norm attention and MLP. What a sublayer adds to the residual stream is added by the next norm, in one pass."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.attention = Attention(config)
        self.norm2 = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, stream: Tensor | None, place: _Place, layer: int) -> tuple[Tensor, Tensor]:
        """x [B, S, D] is what the block before adds to the stream [B, S, D] (None: x is the stream). Returns the same pair."""
        x, stream = (self.norm1(x), x) if stream is None else self.norm1(x, stream)
        x, stream = self.norm2(self.attention(x, place, layer), stream)
        return self.mlp(x), stream


class _Place:
    """Where the tokens of a call stand: rotary rows, cache, and how many keys each row may see."""

    def __init__(self, model: Transformer, count: int, cache: KVCache | None) -> None:
        self.cache, self.positions, self.key_lengths = cache, None, None
        self.cos, self.sin = model.cos, model.sin
        if cache is not None and cache.length is None:
            self.positions = cache.positions(count)
            self.key_lengths = cache.lengths + count
        elif model.cos is not None:
            start = 0 if cache is None else cache.length
            self.cos, self.sin = model.cos[start : start + count], model.sin[start : start + count]


class Transformer(nn.Module):
    """A decoder-only language model.

    Call it on tokens int64 [B, S] for logits [B, S, V]. Fresh weights are random; `fastlm.load` makes one from a Hugging Face
    folder. Parameters:

        embed.weight [V, D], head.weight [V, D] (untied only), positions.weight [max_positions, D] (learned only), norm.*
        blocks.{i}.norm1.*, blocks.{i}.norm2.*: weight [D], and bias [D] with norm="layer"
        blocks.{i}.attention.qkv.weight [(H + 2 H_kv) Dh, D], blocks.{i}.attention.out.weight [D, H Dh], and their biases
        blocks.{i}.mlp.gate_up.weight [2 F, D] (gated) or .mlp.up.weight [F, D], .mlp.down.weight [D, F], and their biases

    Attributes:
        config: the TransformerConfig.
        activation_checkpointing: set True to recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_positions, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = _norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.cos: Tensor | None
        self.sin: Tensor | None
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.make_tables()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights, as GPT-2 has them (Radford et al. 2019); s = config.init_std. For a model made on the meta device
        too, after to_empty.

            norms                                  weight 1, bias 0
            embed, positions, head, qkv, gate, up  normal(0, s)
            attention.out, mlp.down                normal(0, s / sqrt(2 n_layers)): 2 n_layers terms add up in the stream
            biases of products                     0
        """
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if ".bias" in name:
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                adds_to_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layers) if adds_to_stream else std)

    def make_tables(self) -> None:
        """Computes the rotary tables on the device of the embedding; for a model whose weights were just assigned."""
        if self.config.position == "rotary":
            self.cos, self.sin = rope_tables(self.config, self.embed.weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)
        # Made anew: `.to(bfloat16)` would round the angles, and to_empty would leave them unwritten.
        self.make_tables()
        return self

    @property
    def head_weight(self) -> Tensor:
        """The output product's matrix [V, D]; the embedding itself where tied."""
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    @property
    def sections(self) -> dict[str, tuple[int, ...]]:
        """Rows of the matrices that lie one behind the other in one weight, by a part of its name, for optim.muon_groups."""
        c = self.config
        found = {"qkv": (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim)}
        return found | ({"gate_up": (c.d_ff, c.d_ff)} if c.gated else {})

    def make_cache(self, batch: int, max_length: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to max_length tokens (default max_positions), on the model's device."""
        config, weight = self.config, self.embed.weight
        sizes = (config.n_layers, config.n_kv_heads, config.head_dim, batch, max_length or config.max_positions)
        return KVCache(*sizes, dtype=dtype or weight.dtype, device=weight.device)

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """The states [B, S, D] behind the last norm, of which the logits are a product with `head_weight`.

        Args:
            tokens: int64 [B, S].
            cache: keys and values of the tokens before; these are appended to it. None for a sequence from its start.

        Raises:
            UserError: tokens of another shape or type, outside the vocabulary (checked on the CPU; a GPU would have to wait),
            beyond max_positions or the cache's room.
        """
        count = self._check(tokens, cache)
        place = _Place(self, count, cache)
        x, stream = self.embed(tokens), None
        if self.config.position == "learned":
            start = 0 if cache is None else cache.length
            table = self.positions.weight
            x = x + (table[start : start + count] if place.positions is None else F.embedding(place.positions, table))
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for i, block in enumerate(self.blocks):
            if recompute:
                x, stream = checkpoint(block, x, stream, place, i, use_reentrant=False)
            else:
                x, stream = block(x, stream, place, i)
        if cache is not None:
            cache.advance(count)
        return self.norm(x, stream)[0]

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Logits [B, S, V]; see `hidden` for the arguments."""
        return F.linear(self.hidden(tokens, cache=cache), self.head_weight)

    def loss(self, tokens: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy of the next tokens, a 0-d fp32 tensor; the logits are never stored.

        Args:
            tokens: int64 [B, S].
            labels: int64 [B, S], already shifted: labels[b, s] is the token after tokens[b, s], or -100 for no loss there.
            reduction: "mean" over the labels that count, or "sum".
        """
        if labels.shape != tokens.shape:
            raise UserError(
                f"model: labels must have the shape of tokens {list(tokens.shape)}, got {list(labels.shape)}"
            )
        return ops.linear_cross_entropy(self.hidden(tokens), self.head_weight, labels, reduction=reduction)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Any:
        """Continues the prompts; see fastlm.generate.generate for the options."""
        from fastlm.generate import generate

        return generate(self, tokens, max_new_tokens, **options)

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Writes a Hugging Face folder; see fastlm.models.io.save."""
        from fastlm.models.io import save

        save(self, folder, **options)

    def _check(self, tokens: Tensor, cache: KVCache | None) -> int:
        """Refuses what the model cannot read. Returns S."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise UserError(f"model: tokens must be int64 [batch, sequence], got {tokens.dtype} {list(tokens.shape)}")
        if cache is not None and cache.batch != tokens.shape[0]:
            raise UserError(f"model: the cache has {cache.batch} rows, tokens have {tokens.shape[0]}")
        count = tokens.shape[1]
        longest = count if cache is None else cache.longest + count
        if longest > self.config.max_positions:
            raise UserError(
                f"model: {longest} tokens are more than the model's {self.config.max_positions} positions; give a shorter text"
            )
        if cache is not None:
            if torch.is_grad_enabled():
                raise UserError("model: a cache holds no graph; call within torch.inference_mode() or torch.no_grad()")
            cache.check_room(count)
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (t.item() for t in torch.aminmax(tokens))
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise UserError(
                    f"model: token {wrong} is outside the vocabulary of {self.config.vocab_size}; use the model's own tokenizer"
                )
        return count


def _norm(config: TransformerConfig) -> nn.Module:
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.d_model, eps=config.norm_eps)
