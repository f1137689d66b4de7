"""Unmodified models of transformers with attn_implementation="fastlm" give what they give with "eager"."""

import copy

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    T5Config,
)

from fastlm import nn, ops
from fastlm.nn.transformers import CAUSAL, KEYS_ONLY, SLIDING, attention_forward, attention_mask

nn.transformers.register()

V, S = 41, 12
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, **NO_IDS,
}  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
CONFIGS = {
    "gpt2": lambda **more: GPT2Config(vocab_size=V, n_embd=32, n_head=4, n_layer=2, n_positions=64, **NO_IDS, **more),
    "llama": lambda **more: LlamaConfig(**GQA, **more),
    "mistral": lambda **more: MistralConfig(**GQA, sliding_window=5, **more),
    "gemma2": lambda **more: Gemma2Config(**GQA, sliding_window=5, query_pre_attn_scalar=5, attn_logit_softcapping=2.0, **more),
    "gpt_oss": lambda **more: GptOssConfig(**GQA, sliding_window=5, **EXPERTS, **more),
    "bert": lambda **more: BertConfig(**SIZES, **more),
    "t5": lambda **more: T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=10, **{**NO_IDS, "decoder_start_token_id": 1}, **more,
    ),
}  # fmt: skip
DECODERS = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"]
# Where eager computes its softmax in fp32 whatever the model's dtype, "sdpa" is the exact one; gemma2 has none.
EXACT = {"gpt2": "eager", "bert": "eager", "t5": "eager", "gpt_oss": "eager", "llama": "sdpa", "mistral": "sdpa"}


def pair(name, theirs="eager", dtype=torch.float32, **more):
    """(model with `theirs`, the same with "fastlm"), with weights that make attention matter."""
    torch.manual_seed(1)
    config = CONFIGS[name](**more)
    kind = {"bert": BertModel, "t5": AutoModelForSeq2SeqLM}.get(name, AutoModelForCausalLM)
    make = kind._from_config if name == "bert" else kind.from_config
    model = make(config, attn_implementation=theirs).to(dtype)
    for key, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and key.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.2)
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("fastlm")
    assert ours.config._attn_implementation == "fastlm" and model.config._attn_implementation == theirs
    return model.eval(), ours.eval()


def batch(name, padding):
    """(the arguments of a call, bool [2, S] of the positions that are not padding)."""
    tokens = torch.randint(1, V, (2, S), generator=torch.Generator().manual_seed(0))
    live = torch.ones(2, S, dtype=torch.bool)
    if padding == "left":
        live[1, :5] = False
    if padding == "right":
        live[1, -5:] = False
    args = {"input_ids": tokens.where(live, 0)}
    if padding is not None:
        args["attention_mask"] = live.long()
        if name not in ("bert", "t5"):
            args["position_ids"] = (live.cumsum(1) - 1).clamp(min=0)
    if name == "t5":
        args["decoder_input_ids"] = torch.randint(1, V, (2, 7), generator=torch.Generator().manual_seed(1))
    return args, torch.ones(2, 7, dtype=torch.bool) if name == "t5" else live


def outputs(model, args, live):
    found = model(**args, use_cache=False) if not isinstance(model, BertModel) else model(**args)
    return (found.last_hidden_state if isinstance(model, BertModel) else found.logits)[live]


def gradients(model, out, weight):
    """{name: gradient of every parameter that got one}, and the largest of their elements."""
    (out * weight).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return found, max(g.abs().max() for g in found.values())


def compare(theirs, ours, args, live, share):
    """Outputs and gradients differ by at most `share` of the largest one. (Some gradients, as that of BERT's key bias, are
    nothing but rounding.)"""
    expected, found = outputs(theirs, args, live), outputs(ours, args, live)
    assert (found - expected).abs().max() <= share * max(1.0, expected.abs().max())
    weight = torch.randn_like(expected) / expected.numel()
    wanted, largest = gradients(theirs, expected, weight)
    given, _ = gradients(ours, found, weight)
    assert given.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (given[key] - gradient).abs().max() <= share * largest, key


@pytest.mark.parametrize("padding", [None, "none hidden", "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients(name, padding):
    compare(*pair(name), *batch(name, padding), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_in_fp64(name, padding, backend, monkeypatch):
    plain = ops.attention
    if (backend, name) == ("torch", "gpt_oss"):
        pytest.skip("the torch form has no sinks")
    monkeypatch.setattr(ops, "attention", lambda *args, **options: plain(*args, **options, backend=backend))
    compare(*pair(name, EXACT[name], torch.float64), *batch(name, padding), 1e-10)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "t5"])
def test_on_the_kernels(name, device, monkeypatch):
    plain = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **options: plain(*args, **options, backend="triton"))
    theirs, ours = (model.to(device) for model in pair(name))
    args, live = batch(name, "left")
    compare(theirs, ours, {key: x.to(device) for key, x in args.items()}, live.to(device), 1e-5)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_generate(name, padding):
    args, _ = batch("bert", padding)  # without positions: generate makes its own
    found = [m.generate(**args, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True)
             for m in pair(name)]  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences) and len(found[0].logits) == 9
    for mine, other in zip(found[1].logits, found[0].logits):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_a_cache_in_pieces_and_of_fixed_size(name):
    theirs, ours = pair(name)
    args, live = batch(name, "left")
    tokens, mask, positions = args["input_ids"], args["attention_mask"], args["position_ids"]
    for make in (lambda: transformers.DynamicCache(config=ours.config),
                 lambda: transformers.StaticCache(config=ours.config, max_cache_len=20)):  # fmt: skip
        caches = [make(), make()]
        for a, b in ((0, 6), (6, 9), (9, 10), (10, 12)):
            expected, found = (
                model(
                    tokens[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache
                ).logits
                for model, cache in zip((theirs, ours), caches)
            )
            torch.testing.assert_close(found[live[:, a:b]], expected[live[:, a:b]], rtol=1e-5, atol=2e-5)


def test_other_patterns():
    """Packed sequences, masks of the user's, a decoder used in both directions, a window on both sides."""
    theirs, ours = pair("llama")
    tokens = batch("llama", None)[0]["input_ids"]
    everywhere = torch.ones(2, S, dtype=torch.bool)
    packed = torch.cat((torch.arange(5), torch.arange(S - 5))).expand(2, S)
    compare(theirs, ours, {"input_ids": tokens, "position_ids": packed}, everywhere, 1e-5)
    seen = torch.rand(2, 1, S, S) < 0.5
    seen |= torch.eye(S, dtype=torch.bool)
    added = torch.zeros(2, 1, S, S).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = theirs(tokens, attention_mask=added).logits
    for mask in (seen, added):
        torch.testing.assert_close(ours(tokens, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)
    for padding in (None, "right"):
        args, live = batch("llama", padding)
        compare(theirs, ours, {**args, "is_causal": False}, live, 1e-5)
    args, live = batch("t5", "left")  # an additive mask beside the position bias
    args["attention_mask"] = torch.zeros(2, 1, 1, S).masked_fill(args["attention_mask"][:, None, None] == 0, -1e9)
    compare(*pair("t5"), args, live, 1e-5)
    config = transformers.ModernBertConfig(**SIZES, local_attention=6, global_attn_every_n_layers=2)
    theirs = transformers.ModernBertModel._from_config(config, attn_implementation="eager").eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("fastlm")
    for padding in (None, "right"):
        args, live = batch("bert", padding)
        expected, found = (m(**args).last_hidden_state[live] for m in (theirs, ours))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_output_attentions_and_record_attention():
    theirs, ours = pair("llama")
    args, live = batch("llama", "left")
    expected = theirs(**args, output_attentions=True).attentions
    with nn.record_attention(ours, weights=True) as maps:
        found = ours(**args, output_attentions=True).attentions
    assert list(maps) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for mine, other, read in zip(found, expected, maps.values()):
        rows = live[:, None, :, None].expand_as(other)
        torch.testing.assert_close(mine[rows], other[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read["weights"], mine)
        torch.testing.assert_close(read["received"], mine.sum(2))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_keeps_the_mask(reentrant):
    theirs, ours = pair("mistral")
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    ours.train()
    compare(theirs, ours, *batch("mistral", "left"), 1e-5)


def test_dropout_in_training():
    rates = {"attn_pdrop": 0.4, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    theirs, ours = pair("gpt2", **rates)
    args, live = batch("gpt2", "right")
    compare(theirs, ours, args, live, 1e-5)
    ours.train()
    torch.manual_seed(3)
    first = outputs(ours, args, live)
    assert not torch.allclose(first, outputs(ours, args, live))
    torch.manual_seed(3)
    assert torch.equal(first, outputs(ours, args, live))
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        plain = ops.attention
        patch.setattr(
            ops, "attention", lambda *a, **options: asked.append(options["dropout_p"]) or plain(*a, **options)
        )
        outputs(ours, args, live)
        outputs(ours.eval(), args, live)
    assert asked == [0.4, 0.4, 0.0, 0.0]


def test_compiled():
    theirs, ours = pair("llama")
    args, live = batch("llama", "left")
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(compiled, args, live), outputs(theirs, args, live), rtol=1e-5, atol=1e-5)


def outputs_of(compiled, args, live):
    return compiled(**args, use_cache=False).logits[live]


# --- what the mask function hands over ----------------------------------------------------------------------------------


def handed(length=8, past=0, mask=None, device="cpu", **options):
    """The mask for `length` new tokens after `past`, as create_causal_mask asks for it."""
    return attention_mask(
        batch_size=2, q_length=length, kv_length=past + length, q_offset=past, attention_mask=mask,
        mask_function=transformers.masking_utils.causal_mask_function, device=device, **options,
    )  # fmt: skip


def test_nothing_of_the_size_of_the_scores_is_made():
    live = torch.ones(2, 8, dtype=torch.bool)
    padded = live.clone()
    padded[1, :3] = False
    assert handed() is None and handed(mask=live) is None and handed(3, 5, live) is None
    found = handed(mask=padded)
    assert found.dtype == CAUSAL and found.shape == (2, 1, 1, 8) and torch.equal(found[:, 0, 0].bool(), padded)
    both = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert handed(**both) is None and handed(mask=padded, **both).dtype == KEYS_ONLY
    window = {"local_size": 4, "config": MistralConfig(**GQA, sliding_window=4)}
    assert handed(**window).dtype == SLIDING and handed(**window).numel() == 1
    assert handed(mask=padded, **window).shape == (2, 1, 1, 8)
    assert handed(4, **window) is None  # no query has four keys before it
    # Elsewhere than on the CPU no value is read; on meta there is none to read.
    found = handed(mask=live.to("meta"), device="meta")
    assert found.dtype == CAUSAL and found.shape == (2, 1, 1, 8)


def test_what_is_not_known_is_materialized():
    rows, columns = torch.arange(8)[:, None], torch.arange(8)[None]
    causal = torch.zeros(8, 8).masked_fill(columns > rows, float("-inf"))
    assert torch.equal(handed(allow_is_causal_skip=False), causal.expand(2, 1, 8, 8))
    chunks = {"local_size": 4, "config": LlamaConfig(**GQA)}
    assert torch.equal(handed(**chunks), causal.expand(2, 1, 8, 8))
    moved = attention_mask(
        batch_size=2, q_length=3, kv_length=8, q_offset=torch.tensor(2),
        mask_function=transformers.masking_utils.causal_mask_function,
    )  # fmt: skip
    assert torch.equal(moved, causal[2:5].expand(2, 1, 3, 8))


@pytest.mark.parametrize(
    ("mask", "options", "error", "words"),
    [
        (torch.ones(1, 1, 1, 1, dtype=SLIDING), {}, ValueError, "passes no sliding_window"),
        (torch.ones(2, 1, 1, 6, dtype=CAUSAL), {}, ValueError, "the mask is for 6 keys, and the layer has 8"),
        (torch.ones(2, 1, 8, 8, dtype=torch.int64), {}, TypeError, "must be boolean or floating point"),
        (None, {"cache": object()}, ValueError, "no paged cache"),
    ],
)
def test_mistakes(mask, options, error, words):
    q = torch.randn(2, 4, 8, 8)
    with pytest.raises(error, match=words):
        attention_forward(torch.nn.Module(), q, q, q, mask, **options)
