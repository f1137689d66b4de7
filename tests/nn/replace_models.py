"""Tiny models of transformers for the tests of replace, and what a training step of theirs gives."""

import io

import torch
import transformers
from transformers import AutoModelForCausalLM

from fastlm import nn

V, S = 41, 12
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **NO_IDS,
}  # fmt: skip
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, **NO_DROPOUT, **NO_IDS}
CONFIGS = {
    "gpt2": lambda **more: transformers.GPT2Config(**{**GPT2, **more}),
    "llama": lambda **more: transformers.LlamaConfig(**SIZES, **more),
    "mistral": lambda **more: transformers.MistralConfig(**SIZES, sliding_window=5, **more),
    "qwen3": lambda **more: transformers.Qwen3Config(**SIZES, **more),
    "gemma2": lambda **more: transformers.Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=8, **more),
    "phi3": lambda **more: transformers.Phi3Config(**SIZES, **more),
    "olmo2": lambda **more: transformers.Olmo2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, **more),
}
COUNTS = {"gpt2": 9, "llama": 9, "mistral": 9, "qwen3": 13, "gemma2": 13, "phi3": 9, "olmo2": 13}


def make(name, dtype=torch.float32, kind=AutoModelForCausalLM, **more):
    torch.manual_seed(1)
    if name == "gemma2":  # transformers' choice differs by version, and torch's attention leaves the softcap out
        more = {"attn_implementation": "eager"} | more
    model = kind.from_config(CONFIGS[name](**more)).to(dtype)
    for key, parameter in model.named_parameters():
        scale = parameter.ndim == 1 and key.endswith("weight") and name != "gemma2"
        torch.nn.init.normal_(parameter, mean=float(scale), std=0.2)
    return model


def batch(padding=None):
    tokens = torch.randint(1, V, (2, S), generator=torch.Generator().manual_seed(0))
    live = torch.ones(2, S, dtype=torch.bool)
    if padding is None:
        return {"input_ids": tokens}, live
    live[1, :5] = False
    positions = (live.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens.where(live, 0), "attention_mask": live.long(), "position_ids": positions}, live


def step(model, padding=None, draws=1):
    """Logits where there is no padding, and the gradient of every parameter, of several draws one behind the other."""
    args, live = batch(padding)
    logits = model(**args, use_cache=False).logits[live]
    names, parameters = zip(*model.named_parameters())
    generator, found = torch.Generator().manual_seed(0), []
    for left in reversed(range(draws)):
        weight = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
        found.append(torch.autograd.grad((logits * weight).sum(), parameters, retain_graph=left > 0))
    return logits.detach(), {name.removeprefix("_orig_mod."): torch.stack(g) for name, g in zip(names, zip(*found))}


def same(left, right):
    assert torch.equal(left[0], right[0]) and left[1].keys() == right[1].keys()
    assert all(torch.equal(left[1][key], right[1][key]) for key in left[1])


def close(left, right, share=2e-5):
    assert (left[0] - right[0]).abs().max() <= share * left[0].abs().max()
    largest = max(g.abs().max() for g in left[1].values())
    for key in left[1]:
        assert (left[1][key] - right[1][key]).abs().max() <= share * largest, key


def exact(model):
    """The model in fp64 throughout: the norms of transformers, and the eager attention of gemma2, go to fp32."""
    model = model.double()
    if model.config._attn_implementation == "eager":
        nn.transformers.register()
        model.set_attn_implementation("fastlm")

    def norm(module, offset):
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        module.forward = lambda x: x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (offset + module.weight)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm(module, float("Gemma" in type(module).__name__))
    return model


def losses(model, **options):
    """The loss of a call, and the gradient of every parameter."""
    args, live = batch("left")
    # What a padding token predicts is not asked: attentions differ in what a query without a key gets.
    labels = args["input_ids"].where(live & live.roll(1, 1), options.get("ignore_index", -100))
    model.zero_grad(set_to_none=True)
    out = model(**args, labels=labels, use_cache=False, **options)
    loss = out[0]
    loss.backward()
    return out, (
        loss.detach()[None],
        {key.removeprefix("_orig_mod."): p.grad.clone() for key, p in model.named_parameters()},
    )


def reloaded(model):
    """The model through torch.save and torch.load."""
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


class LoRA(torch.nn.Module):
    """As peft wraps a projection."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        shape = layer.weight.shape if isinstance(layer, torch.nn.Linear) else layer.weight.shape[::-1]
        self.a = torch.nn.Parameter(torch.randn(2, shape[1]) * 0.1)
        self.b = torch.nn.Parameter(torch.randn(shape[0], 2) * 0.1)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T
