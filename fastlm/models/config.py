"""What a transformer is: one frozen dataclass of axes that belong to no family; gpt2.py and llama.py map to it."""

from __future__ import annotations

import dataclasses

from fastlm.config import option
from fastlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a Transformer. Raises UserError for values that do not fit together.

    n_kv_heads, head_dim and d_ff left at None take their usual value and are integers afterwards. There is no dropout.
    """

    vocab_size: int = option(50257, "tokens in the vocabulary")
    d_model: int = option(768, "width of the residual stream")
    n_layers: int = option(12, "blocks")
    n_heads: int = option(12, "query heads")
    n_kv_heads: int | None = option(
        None, "key/value heads, each shared by n_heads / n_kv_heads queries; none for n_heads"
    )
    head_dim: int | None = option(None, "width of one head; none for d_model / n_heads")
    d_ff: int | None = option(
        None, "width of the MLP; none for 4 d_model, or if gated 8/3 d_model rounded up to a multiple of 64"
    )
    max_positions: int = option(1024, "longest sequence, prompt and generated tokens together")

    norm: str = option("rms", "normalisation before attention, MLP and output", choices=("rms", "layer"))
    norm_eps: float = option(1e-5, "added to the variance (or mean square) by the norms")
    position: str = option("rotary", "how a token knows its place", choices=("rotary", "learned"))
    rope_theta: float = option(10000.0, "base wavelength of the rotary embedding")
    rope_scaling: str = option(
        "none",
        "how rotary angles stretch to longer sequences than first trained on",
        choices=("none", "linear", "llama3"),
    )
    rope_factor: float = option(1.0, "stretch of rope_scaling, at least 1")
    rope_low_freq_factor: float = option(1.0, "llama3: waves longer than original / this are stretched fully")
    rope_high_freq_factor: float = option(4.0, "llama3: waves shorter than original / this are left as they are")
    rope_original_positions: int = option(8192, "llama3: the longest sequence first trained on")
    activation: str = option("silu", "the MLP's activation", choices=("gelu", "gelu_tanh", "silu", "relu2"))
    gated: bool = option(True, "MLP act(gate(x)) * up(x), else act(up(x))")
    attention_bias: bool = option(False, "biases in the query, key, value and output products")
    mlp_bias: bool = option(False, "biases in the MLP's products")
    tie_embeddings: bool = option(True, "one matrix as input embedding and output product")

    init_std: float = option(0.02, "standard deviation of fresh weights")
    bos_id: int | None = option(None, "token that begins a text; none if there is none")
    eos_ids: tuple[int, ...] = option((), "tokens that end a text")
    pad_id: int | None = option(None, "token that fills up short rows; none if there is none")
    kind: str = option("decoder", "decoder; encoder and encoder_decoder are to come")

    def __post_init__(self) -> None:
        _choices(self)
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_positions"):
            _at_least(self, name, 1)
        if self.head_dim is None and self.d_model % self.n_heads:
            raise UserError(
                f"model: d_model {self.d_model} is no multiple of n_heads {self.n_heads}; give head_dim too"
            )
        self._resolve("n_kv_heads", self.n_heads)
        self._resolve("head_dim", self.d_model // self.n_heads)
        self._resolve("d_ff", -(-self.d_model * 8 // (3 * 64)) * 64 if self.gated else 4 * self.d_model)
        for name in ("n_kv_heads", "head_dim", "d_ff"):
            _at_least(self, name, 1)
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model: n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}"
            )
        if self.position == "rotary" and self.head_dim % 2:
            raise UserError(f"model: rotary positions need an even head_dim, got {self.head_dim}")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not getattr(self, name) > 0:
                raise UserError(f"model: {name} must be above 0, got {getattr(self, name)}")
        self._check_rope_scaling()
        self._check_ids()

    def _resolve(self, name: str, usual: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, usual)

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling == "none":
            return
        if self.rope_factor < 1:
            raise UserError(f"model: rope_factor must be at least 1, got {self.rope_factor}")
        if self.rope_scaling == "llama3":
            low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
            if not 0 < low < high:
                raise UserError(
                    f"model: rope_low_freq_factor must lie between 0 and rope_high_freq_factor, got {low} and {high}"
                )
            _at_least(self, "rope_original_positions", 1)

    def _check_ids(self) -> None:
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        ids = {"bos_id": self.bos_id, "pad_id": self.pad_id} | {f"eos_ids[{i}]": t for i, t in enumerate(self.eos_ids)}
        for name, token in ids.items():
            if token is not None and not 0 <= token < self.vocab_size:
                raise UserError(f"model: {name} must be a token below vocab_size {self.vocab_size}, got {token}")


def _choices(config: TransformerConfig) -> None:
    if config.kind in ("encoder", "encoder_decoder"):
        raise NotImplementedError(f"model: kind {config.kind!r} is not built yet; only 'decoder' is")
    if config.kind != "decoder":
        raise UserError(f"model: kind must be decoder, got {config.kind!r}")
    for field in dataclasses.fields(config):
        choices, value = field.metadata["choices"], getattr(config, field.name)
        if choices and value not in choices:
            raise UserError(f"model: {field.name} must be one of {', '.join(choices)}, got {value!r}")


def _at_least(config: TransformerConfig, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise UserError(f"model: {name} must be at least {least}, got {getattr(config, name)}")
