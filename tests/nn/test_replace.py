"""replace() puts the ops into models of transformers and torch, in place, and takes them out again."""

import contextlib
import copy
import importlib
import inspect
import io
import pkgutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from fastlm import nn, ops
from fastlm.nn import replace, replace_table
from fastlm.testing import assert_accurate

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


@pytest.mark.parametrize(
    "name, dtype, padding",
    [
        *((name, torch.float32, "left") for name in ("gpt2", "llama", "gemma2")),
        *((name, torch.bfloat16, None) for name in ("gpt2", "llama")),
        *((name, torch.bfloat16, "left") for name in CONFIGS),
    ],
    ids=str,
)
def test_accuracy(name, dtype, padding):
    plain = make(name, dtype)
    if name == "gemma2":
        plain.set_attn_implementation("eager")
    right, ours = exact(copy.deepcopy(plain)), copy.deepcopy(plain)
    report = replace(ours)
    assert len(report.replaced) == COUNTS[name] and not report.kept, str(report)
    # One draw of plain torch's error may be small by chance: four cotangents, judged together.
    (mine, left), (true, middle), (theirs, rest) = (step(model, padding, 4) for model in (ours, right, plain))
    assert_accurate(mine, true, theirs, "logits")
    for key in left:
        assert_accurate(left[key], middle[key], rest[key], key)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_on_the_kernels(name, device):
    plain = make(name).to(device)
    ours = copy.deepcopy(plain)
    replace(ours, loss=True)
    tokens = batch()[0]["input_ids"][:, :6].to(device)
    found = []
    for model, backend in ((plain, "auto"), (ours.train(), "triton")):
        with ops.use_backend(backend):
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in model.named_parameters()}))
    close(*found)


@pytest.mark.parametrize("name", CONFIGS)
def test_undo_restores_bit_for_bit(name):
    model = make(name)
    before = step(model, "left")
    attributes = {key: sorted(m.__dict__) for key, m in model.named_modules()}
    implementation = model.config._attn_implementation
    report = replace(model, loss=True)
    assert model.config._attn_implementation == "fastlm" and implementation != "fastlm"
    close(before, step(model, "left"))
    report.undo()
    assert model.config._attn_implementation == implementation
    assert {key: sorted(m.__dict__) for key, m in model.named_modules()} == attributes
    same(before, step(model, "left"))
    report.undo()
    again = replace(model, norms=False, mlps=False, attention=False)
    assert not again.replaced
    same(before, step(model, "left"))


def test_undo_leaves_what_others_did_since():
    model = make("llama")
    report = replace(model)
    mlp = model.model.layers[0].mlp
    ours, mlp.forward = mlp.forward, lambda x: ours(x)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="forward of a LlamaMLP was changed by others"):
        report.undo()
    assert "forward" in mlp.__dict__ and "forward" not in model.model.layers[1].mlp.__dict__
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_all_else_stays(name):
    model = make(name, torch.bfloat16).eval()
    calls = []
    handle = model.get_submodule("transformer.ln_f" if name == "gpt2" else "model.norm").register_forward_hook(
        lambda module, args, out: calls.append(1)
    )
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    classes = [type(m) for m in model.modules()]
    signature = inspect.signature(model.forward)
    random = torch.get_rng_state()
    report = replace(model, loss=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    assert all(parameters[key] is p and p.dtype is torch.bfloat16 for key, p in model.named_parameters())
    assert not any(m.training for m in model.modules())
    assert inspect.signature(model.forward) == signature
    assert all(p.grad is None for p in model.parameters())
    model(**batch()[0])
    assert calls == [1]
    again = replace(model, loss=True)
    assert not again.replaced and set(again.kept) == set(report.replaced)
    again.undo()
    assert model.config._attn_implementation == "fastlm"
    handle.remove()


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_generate(name, padding):
    theirs, args = make(name).eval(), batch(padding)[0]
    args.pop("position_ids", None)
    ours = copy.deepcopy(theirs)
    replace(ours, loss=True)
    found = [m.generate(**args, max_new_tokens=9, do_sample=False) for m in (theirs, ours)]
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing_and_compile(name):
    plain = make(name).train()
    ours = copy.deepcopy(plain)
    replace(ours)
    want = step(plain)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    close(want, step(ours))
    ours.gradient_checkpointing_disable()
    torch._dynamo.reset()
    close(want, step(torch.compile(ours, backend="aot_eager", fullgraph=True)))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_copies_and_files(name, tmp_path):
    plain = make(name)
    ours = copy.deepcopy(plain)
    report = replace(ours, loss=True)
    want = step(ours)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for other in (copy.deepcopy(ours), torch.load(stream, weights_only=False)):
        inside = {id(m) for m in other.modules()}
        assert all(id(m.forward.module) in inside for m in other.modules() if "forward" in m.__dict__)
        same(want, step(other))
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0)
        assert other(**batch()[0]).logits.abs().max() == 0  # it computes with parameters of its own
    same(want, step(ours))
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("forward" in m.__dict__ for m in loaded.modules()) and loaded.config._attn_implementation != "fastlm"
    same(step(plain), step(loaded))
    fresh = make(name)
    replace(fresh)
    fresh.load_state_dict(ours.state_dict())
    report.undo()
    same(step(plain), step(ours))


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


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name, part", [("gpt2", "transformer.h.0.mlp.c_fc"), ("llama", "model.layers.0.mlp.up_proj")])
def test_a_wrapped_projection_is_not_fused(name, part, when):
    plain = make(name)
    ours = copy.deepcopy(plain)
    early = replace(ours) if when == "after" else None
    for model in (plain, ours):
        torch.manual_seed(2)
        model.set_submodule(part, LoRA(model.get_submodule(part)))
    if early is None:
        report = replace(ours)
        mlp, last = part.rsplit(".", 1)
        assert report.kept == {mlp: f"{COPY[name]}: its {last} is LoRA, not a plain Linear or Conv1D"}
    want, got = step(plain), step(ours)
    close(want, got)
    assert got[1][f"{part}.a"].abs().max() > 0


COPY = {"gpt2": "GPT2MLP", "llama": "LlamaMLP"}


@pytest.mark.parametrize(
    "name, part", [("gpt2", "transformer.h.1.mlp.c_proj"), ("llama", "model.layers.1.mlp.gate_proj")]
)
def test_a_projection_with_hooks_is_called(name, part):
    model, calls = make(name), []
    handle = model.get_submodule(part).register_forward_hook(lambda *args: calls.append(1))
    report = replace(model)
    mlp, last = part.rsplit(".", 1)
    assert report.kept == {mlp: f"{COPY[name]}: its {last} has hooks"}
    step(model)
    assert calls == [1]
    handle.remove()
    report = replace(model)
    assert list(report.replaced) == [mlp]
    before = step(model)
    for register in ("register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(model.get_submodule(part), register)(lambda *args: calls.append(2))
        close(before, step(model))
        handle.remove()
    assert calls == [1, 2, 2]


@pytest.fixture
def mesh():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sharded_by_fsdp(name, when, mesh):
    from torch.distributed.fsdp import fully_shard

    plain = make(name).train()
    ours = copy.deepcopy(plain)
    if when == "before":
        replace(ours, loss=True)
    for layer in ours.get_submodule("transformer.h" if name == "gpt2" else "model.layers"):
        fully_shard(layer, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    if when == "after":
        assert not replace(ours, loss=True).kept
    (_, want), (out, (loss, gradients)) = losses(plain), losses(ours)
    assert out.logits is None
    close(want, (loss, {key: g.full_tensor() for key, g in gradients.items()}))


def test_quantised_weights_and_other_activations_are_kept():
    class Packed(torch.nn.Parameter):
        pass

    model = make("llama")
    down = model.model.layers[0].mlp.down_proj
    down.weight = Packed(down.weight.data)
    assert "its down_proj has a weight of type Packed" in replace(model).kept["model.layers.0.mlp"]
    for kind, name in (("quick_gelu", "QuickGELUActivation"), ("sigmoid", "Sigmoid")):
        report = replace(make("llama", hidden_act=kind))
        assert set(report.kept.values()) == {f"LlamaMLP: the op has no activation {name}"}
        assert list(report.kept) == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize("kind", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"])
def test_activations(kind):
    for name, option in (("llama", "hidden_act"), ("gpt2", "activation_function")):
        plain = make(name, **{option: kind})
        ours = copy.deepcopy(plain)
        assert not replace(ours, norms=False, attention=False).kept
        close(step(plain), step(ours))


def test_dropout_draws_as_before():
    plain = make("gpt2", resid_pdrop=0.3).train()
    ours = copy.deepcopy(plain)
    replace(ours, attention=False)
    found = []
    for model in (plain, ours):
        torch.manual_seed(5)
        found.append(step(model))
    close(*found)
    assert not torch.equal(step(ours)[0], found[1][0])


@contextlib.contextmanager
def no_context():
    yield


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mixed_dtypes_and_autocast(name):
    """Outputs have the dtype they had, whatever meets in a module."""
    plain = make(name)
    ours = copy.deepcopy(plain)
    replace(ours)
    with torch.autocast("cpu", torch.bfloat16):
        close(step(plain), step(ours), 3e-2)
        seen = [m(**batch()[0], output_hidden_states=True, use_cache=False) for m in (plain, ours)]
    assert [h.dtype for h in seen[0].hidden_states] == [h.dtype for h in seen[1].hidden_states]
    norm = plain.get_submodule("transformer.h.0.ln_1" if name == "gpt2" else "model.norm")
    mine = ours.get_submodule("transformer.h.0.ln_1" if name == "gpt2" else "model.norm")
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    for context in (no_context(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert mine(x).dtype is norm(x).dtype
    assert not torch.equal(mine(x), x)


def losses(model, **options):
    """The loss of a call, and the gradient of every parameter."""
    args, live = batch("left")
    # What a padding token predicts is not asked: attentions differ in what a query without a key gets.
    labels = args["input_ids"].where(live & live.roll(1, 1), options.get("ignore_index", -100))
    model.zero_grad(set_to_none=True)
    out = model(**args, labels=labels, use_cache=False, **options)
    loss = out[0]
    loss.backward()
    return out, (loss.detach()[None], {key: p.grad.clone() for key, p in model.named_parameters()})


OPTIONS = [
    {},
    {"num_items_in_batch": 7},
    {"num_items_in_batch": torch.tensor(31)},
    {"ignore_index": 3},
    {"shift_labels": torch.arange(2 * S).view(2, S) % V},
    {"return_dict": False},
    {"output_hidden_states": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_loss(name, options):
    plain = make(name).train()
    ours = copy.deepcopy(plain)
    assert "(the model)" in replace(ours, loss=True).replaced
    (theirs, want), (mine, got) = losses(plain, **options), losses(ours, **options)
    close(want, got)
    if options.get("return_dict", True):
        assert type(mine) is type(theirs) and mine.logits is None and theirs.logits is not None
        assert mine.keys() == theirs.keys() - {"logits"}
    else:
        assert type(mine) is tuple and len(mine) == len(theirs) - 1


def test_loss_is_exact():
    """Under the accuracy rule, against cross-entropy in fp64 of the logits of the fp64 model."""
    plain = make("llama", torch.bfloat16).train()
    ours, right = copy.deepcopy(plain), exact(copy.deepcopy(plain))
    replace(ours, loss=True)

    def double(logits, labels, vocab_size, **_):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    right.loss_function = double
    found = [losses(model)[1] for model in (ours, right, plain)]
    assert_accurate(*(loss for loss, _ in found), "loss")
    for key in found[0][1]:
        assert_accurate(*(gradients[key] for _, gradients in found), key)


def test_logits_are_there_wherever_the_loss_is_not_ours():
    model = make("llama").eval()
    args = batch()[0]
    want = model(**args).logits
    report = replace(model, loss=True, norms=False, mlps=False, attention=False)
    tokens = args["input_ids"]
    for found in (model(tokens), model(tokens, labels=tokens), model.train()(tokens)):
        assert torch.equal(found.logits, want)
    out = model(tokens, labels=tokens[:, -3:], logits_to_keep=3)
    torch.testing.assert_close(out.logits, want[:, -3:])
    assert out.loss is not None
    assert model(tokens, None, None, None, None, tokens).logits is None  # labels by their place
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    torch.testing.assert_close(model(tokens, labels=tokens).logits, want * 2)
    handle.remove()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert torch.equal(model(tokens, labels=tokens).loss, want.sum())
    report.undo()
    assert replace(model, loss=True).kept == {
        "(the model)": "LlamaForCausalLM: its loss_function is not transformers' own for causal language models"
    }
    # All labels ignored: 0 and no gradient, where the model's own is NaN.
    model = make("llama").train()
    replace(model, loss=True)
    loss = model(tokens, labels=torch.full_like(tokens, -100)).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters())


def test_softcap_of_the_logits_and_models_whose_loss_is_not_known():
    plain = make("gemma2", final_logit_softcapping=2.0).train()
    plain.set_attn_implementation("eager")  # sdpa has no softcap
    ours = copy.deepcopy(plain)
    replace(ours, loss=True)
    (_, want), (out, got) = losses(plain), losses(ours)
    assert out.logits is None
    close(want, got)
    config = transformers.GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})
    report = replace(AutoModelForCausalLM.from_config(config), loss=True)
    assert report.kept == {"(the model)": "GraniteForCausalLM: its loss is not known to be that of plain logits"}


def test_other_heads_bare_models_and_wrappers():
    """Everything around the layers: no head, another head, a wrapper of the user's, a subclass."""
    config = CONFIGS["llama"](num_labels=3)
    base = transformers.AutoModel.from_config(config)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)

    class Mine(transformers.LlamaForCausalLM):
        pass

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.norm = model, torch.nn.LayerNorm(32)

    tokens = batch()[0]["input_ids"]
    for model, count in ((base, 9), (classifier, 9), (Mine(config), 10), (Wrapper(Mine(config)), 11)):
        call = model.inner if isinstance(model, Wrapper) else model
        with torch.no_grad():
            want = call.eval()(tokens)[0]
            report = replace(model, loss=True)
            assert len(report.replaced) == count and not report.kept, str(report)
            torch.testing.assert_close(call(tokens)[0], want, rtol=1e-5, atol=1e-5)
            report.undo()
            assert torch.equal(call(tokens)[0], want)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.LayerNorm(16), torch.nn.RMSNorm(16)
        self.c, self.d = torch.nn.LayerNorm((3, 16)), nn.RMSNorm(16)
        self.e, self.f = torch.nn.RMSNorm(16, elementwise_affine=False), torch.nn.GroupNorm(1, 3)
        self.g = torch.nn.MultiheadAttention(16, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_torch(dtype):
    model = Plain().to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    plain = copy.deepcopy(model)
    report = replace(model)
    assert report.replaced == {
        "a": "LayerNorm: ops.layer_norm",
        "b": "RMSNorm: ops.rms_norm",
        "e": "RMSNorm: ops.rms_norm",
    }
    assert report.kept == {
        "c": "LayerNorm: normalises over [3, 16], more than the last dimension",
        "f": "GroupNorm: not a class that is known (torch.nn.modules.normalization.GroupNorm)",
        "g": "MultiheadAttention: build the model with fastlm.nn.MultiheadAttention",
    }
    x = (torch.randn(2, 3, 16) * 1e-2).to(dtype)  # small: eps counts, and RMSNorm's default depends on the dtype
    for name in "abe":
        exact = plain.get_submodule(name).double()(x.double())
        if name != "a":
            exact = torch.nn.functional.rms_norm(x.double(), (16,), getattr(plain, name).weight, torch.finfo(dtype).eps)
        theirs = plain.get_submodule(name).to(dtype)(x)
        assert_accurate(model.get_submodule(name)(x), exact, theirs, name)


def test_report_reads_well():
    model = make("llama", hidden_act="quick_gelu")
    model.model.layers[1].mlp.act_fn = torch.nn.SiLU()
    assert str(replace(model, loss=True)) == (
        "replaced 9 modules\n"
        "  1 LlamaForCausalLM: ops.linear_cross_entropy\n"
        "  5 LlamaRMSNorm: ops.rms_norm\n"
        "  1 LlamaMLP: ops.gated_mlp\n"
        "  2 LlamaAttention: ops.attention\n"
        "kept 1 module\n"
        "  1 LlamaMLP: the op has no activation QuickGELUActivation (model.layers.0.mlp)"
    )
    with pytest.raises(TypeError, match="replace: model must be a torch.nn.Module, got str"):
        replace("llama")


def test_only_what_is_asked_for():
    for options, kinds in (
        ({"norms": False}, {"LlamaMLP", "LlamaAttention"}),
        ({"mlps": False}, {"LlamaRMSNorm", "LlamaAttention"}),
        ({"attention": False}, {"LlamaRMSNorm", "LlamaMLP"}),
    ):
        report = replace(make("llama"), **options)
        assert {text.split(":")[0] for text in report.replaced.values()} == kinds and not report.kept


def test_a_forward_that_changed_since_is_noticed(monkeypatch):
    """transformers may write another formula into a class of the same name."""

    def doubled(self, x):
        return 2 * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", doubled)
    report = replace(make("llama"), mlps=False, attention=False)
    assert not report.replaced
    assert set(report.kept.values()) == {"LlamaRMSNorm: ops.rms_norm gives other values than this version of the class"}
    model = make("llama")
    model.model.norm.forward = lambda x: x
    assert replace(model, mlps=False, attention=False).kept["model.norm"].endswith("replaced by others already")
    meta = make("gpt2").to("meta")
    assert len(replace(meta).replaced) == COUNTS["gpt2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["llama.LlamaRMSNorm", "t5.T5LayerNorm", "gpt_oss.GptOssRMSNorm", "gemma3.Gemma3RMSNorm", "cohere.CohereLayerNorm"],
)
def test_norms_of_transformers(name, dtype):
    folder, kind = name.split(".")
    norm = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), kind)(48).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 48, dtype=dtype) * 3
    double = x.double() - (x.double().mean(-1, keepdim=True) if name.startswith("cohere") else 0)
    exact = (
        double
        * (
            double.pow(2).mean(-1, keepdim=True) + (norm.eps if name.startswith("gemma") else norm.variance_epsilon)
        ).rsqrt()
    )
    exact = exact * (norm.weight.double() + name.startswith("gemma"))
    theirs = norm(x)
    assert replace(norm).replaced
    assert_accurate(norm(x), exact, theirs, name)
    other = x.to(torch.float32 if dtype is torch.bfloat16 else torch.bfloat16)
    assert norm(other).dtype is type(norm).forward(norm, other).dtype


def test_mlps_of_transformers():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "mlp_bias": True}
    for kind, config in (
        ("nemotron.NemotronMLP", transformers.NemotronConfig(**sizes)),
        ("clip.CLIPMLP", transformers.CLIPTextConfig(hidden_size=32, intermediate_size=40, hidden_act="gelu")),
        ("gpt_bigcode.GPTBigCodeMLP", transformers.GPTBigCodeConfig(n_embd=32, resid_pdrop=0.0)),
    ):
        folder, kind = kind.split(".")
        kind = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), kind)
        mlp = kind(*((40, config) if folder == "gpt_bigcode" else (config,)))
        x = torch.randn(3, 5, 32)
        want = mlp(x)
        assert list(replace(mlp).replaced) == ["(the model)"]
        torch.testing.assert_close(mlp(x), want, rtol=1e-5, atol=1e-5)


def _classes():
    """name -> every class of that name in transformers' models."""
    wanted, found = {**replace_table.NORMS, **replace_table.MLPS, **replace_table.LOSSES}, {}
    import transformers.models as models

    for folder in pkgutil.iter_modules(models.__path__):
        source = f"transformers.models.{folder.name}.modeling_{folder.name}"
        stems = tuple(name for name in wanted if name.lower().startswith(folder.name.replace("_", "").lower()))
        if stems and importlib.util.find_spec(source):
            module = importlib.import_module(source)
            for name in stems:
                if name in vars(module):
                    found[name] = vars(module)[name]
    return found


def _code(kind):
    """What the class computes, without docstrings and annotations."""
    found = []
    for name in ("forward", "_norm"):
        function = inspect.unwrap(vars(kind)[name]) if name in vars(kind) else None
        if function is not None:
            code = function.__code__
            found += [code.co_code, code.co_names, [c for c in code.co_consts if not isinstance(c, str)]]
    return found


def test_the_table_is_true_of_this_transformers():
    """Classes that share an entry have, instruction for instruction, one forward; the first of each is tested above or below."""
    classes, groups = _classes(), {}
    for table in (replace_table.NORMS, replace_table.MLPS):
        for name, entry in table.items():
            assert name in classes, name
            line = entry.by, entry.forward, entry.names, str(entry.options), name.endswith("T5LayerNorm")
            groups.setdefault(line, []).append(name)
    different = {
        key: [name for name in names if _code(classes[name]) != _code(classes[names[0]])]
        for key, names in groups.items()
    }
    assert not {key: names for key, names in different.items() if names}
