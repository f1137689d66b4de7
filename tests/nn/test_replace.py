"""replace() puts the ops into models of transformers and torch, in place, and takes them out again."""

import contextlib
import copy
import gc
import inspect
import weakref

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from fastlm import ops
from fastlm.nn import replace
from fastlm.testing import assert_accurate
from tests.nn.replace_models import CONFIGS, COUNTS, LoRA, batch, close, exact, losses, make, reloaded, same, step


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
    norm = next(m for m in model.modules() if type(m).__name__.endswith("Norm"))
    argument, x = next(iter(inspect.signature(norm.forward).parameters)), torch.randn(2, 3, norm.weight.shape[0])
    torch.testing.assert_close(norm(**{argument: x}), norm(x))
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
def test_gradient_checkpointing_compile_and_export(name):
    plain = make(name).train()
    ours = copy.deepcopy(plain)
    replace(ours, loss=True)
    want = step(plain)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    close(want, step(ours))
    ours.gradient_checkpointing_disable()
    torch._dynamo.reset()
    close(losses(plain)[1], losses(torch.compile(ours, backend="aot_eager", fullgraph=True))[1])
    tokens = batch()[0]["input_ids"]
    exported = torch.export.export(ours.eval(), (tokens,), {"use_cache": False}).module()
    torch.testing.assert_close(exported(tokens, use_cache=False).logits, plain.eval()(tokens).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_copies_and_files(name, tmp_path):
    plain = make(name)
    ours = copy.deepcopy(plain)
    report = replace(ours, loss=True)
    want = step(ours)
    for other in (copy.deepcopy(ours), reloaded(ours)):
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


@pytest.mark.parametrize("what", [{"loss": True}, {"norms": False, "mlps": False}], ids=["all", "attention"])
@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy, reloaded], ids=["model", "copy", "file"])
def test_a_later_report_undoes_what_an_earlier_one_did(again, what, recwarn):
    model = make("llama")
    before, attributes = step(model), [sorted(m.__dict__) for m in model.modules()]
    first = replace(model, **what)
    other = again(model)
    report = replace(other, attention=False, **({} if what.get("loss") else what))
    assert not report.replaced
    assert set(report.kept) == {name for name in first.replaced if what.get("loss") and "attn" not in name}
    report.undo()
    assert [sorted(m.__dict__) for m in other.modules()] == attributes
    assert other.config._attn_implementation == "sdpa"
    same(before, step(other))
    assert other is model or model.config._attn_implementation == "fastlm"  # a copy's report is not the model's
    first.undo()
    same(before, step(model))
    assert not [w for w in recwarn if "replace:" in str(w.message)]


def test_attention_set_by_the_user_is_undone_to_what_it_was():
    model = make("llama")
    reports = [replace(model)]
    model.set_attn_implementation("eager")
    reports.append(replace(model))
    reports[1].undo()
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("fastlm")
    assert set(replace(model, norms=False, mlps=False).kept.values()) == {"LlamaAttention: replaced already"}
    replace(model).undo()
    assert model.config._attn_implementation == "fastlm"


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_go_with_the_model(name, keep):
    """At `del model`, as without replace: the next model may need the memory before a run of the garbage collector."""
    model = make(name)
    report = replace(model, loss=True)
    step(model)
    report = report if keep else None
    weights = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()
    if keep:
        report.undo()


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
    model = make("llama")
    model.config.pretraining_tp = 2
    assert set(replace(model).kept.values()) == {"LlamaMLP: its config asks for pretraining_tp"}
    for kind, name in (("quick_gelu", "QuickGELUActivation"), ("sigmoid", "Sigmoid")):
        report = replace(make("llama", hidden_act=kind))
        assert set(report.kept.values()) == {f"LlamaMLP: the op has no activation {name}"}
        assert list(report.kept) == ["model.layers.0.mlp", "model.layers.1.mlp"]


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
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert mine(x).dtype is norm(x).dtype
    assert not torch.equal(mine(x), x)


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
