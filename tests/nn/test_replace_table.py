"""What replace puts in place of single classes, and of the loss, computes what they do."""

import copy
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from fastlm import nn, ops
from fastlm.nn import replace, replace_table
from fastlm.testing import assert_accurate
from tests.nn.replace_models import COUNTS, SIZES, S, V, batch, close, exact, losses, make, step


@pytest.mark.parametrize("kind", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"])
def test_activations(kind):
    for name, option in (("llama", "hidden_act"), ("gpt2", "activation_function")):
        plain = make(name, **{option: kind})
        ours = copy.deepcopy(plain)
        assert not replace(ours, norms=False, attention=False).kept
        close(step(plain), step(ours))


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


def test_a_forward_without_its_module_says_so():
    norm = torch.nn.LayerNorm(8)
    replace(norm)
    twin = copy.copy(norm)  # shares the forward
    del norm
    with pytest.raises(ReferenceError, match="replace: the module of this forward is gone"):
        twin(torch.zeros(8))
    report = replace(twin)
    assert not twin(torch.zeros(8)).any()
    report.undo()
    assert "forward" not in twin.__dict__


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
    x = (torch.randn(2, 3, 16) * 1e-2).to(dtype)  # small: eps counts
    for name in "abe":
        exact = plain.get_submodule(name).double()(x.double())
        if name != "a":
            eps = torch.finfo(torch.float32).eps  # also for 16-bit inputs: it is that of the dtype computed in
            exact = torch.nn.functional.rms_norm(x.double(), (16,), getattr(plain, name).weight, eps)
        theirs = plain.get_submodule(name).to(dtype)(x)
        assert_accurate(model.get_submodule(name)(x), exact, theirs, name)


def test_a_forward_that_changed_since_is_noticed(monkeypatch):
    """transformers may write another formula into a class of the same name."""

    def doubled(self, x):
        return 2 * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    target = "transformers.models.llama.modeling_llama.LlamaRMSNorm.forward"
    monkeypatch.setattr(target, doubled)
    report = replace(make("llama"), mlps=False, attention=False)
    assert not report.replaced
    assert set(report.kept.values()) == {f"LlamaRMSNorm: the forward of its class was replaced by {__name__}"}
    monkeypatch.setattr(target, _theirs(doubled))
    report = replace(make("llama"), mlps=False, attention=False)
    assert not report.replaced
    assert set(report.kept.values()) == {"LlamaRMSNorm: ops.rms_norm gives other values than this version of the class"}
    monkeypatch.undo()
    wrong = {
        "LlamaRMSNorm": (replace_table.NORMS, {"options": {"weight_offset": 1.0}}),
        "Qwen3RMSNorm": (replace_table.NORMS, {"forward": lambda m, known, x: ops.rms_norm(x, m.weight, 1e-5)}),
        "LlamaMLP": (replace_table.MLPS, {"names": ("act_fn", "up_proj", "gate_proj", "down_proj")}),
        "GPT2MLP": (replace_table.MLPS, {"forward": lambda module, known, x: module.c_proj(module.c_fc(x))}),
    }
    for name, (table, change) in wrong.items():  # planted bugs
        monkeypatch.setitem(table, name, dataclasses.replace(table[name], **change))
        model = {"GPT2MLP": "gpt2", "Qwen3RMSNorm": "qwen3"}.get(name, "llama")
        report = replace(make(model), attention=False)
        assert {text.split(":")[0] for text in report.kept.values()} == {name}
        monkeypatch.undo()
    model = make("llama")
    model.model.norm.forward = lambda x: x
    assert replace(model, mlps=False, attention=False).kept["model.norm"].endswith("replaced by others already")
    meta = make("gpt2").to("meta")
    assert len(replace(meta).replaced) == COUNTS["gpt2"]


def _theirs(function):
    """The function as if transformers had it, as far as replace can see."""
    scope = {"__name__": "transformers.models.changed", "torch": torch}
    return types.FunctionType(function.__code__, scope, function.__name__, None, function.__closure__)


def _mlp(name, **sizes):
    """One MLP of transformers, its weights large enough to matter."""
    folder, kind = name.split(".")
    source = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    sizes = {"hidden_size": 32, "intermediate_size": 150, **sizes}
    config = getattr(transformers, kind.removesuffix("MLP") + "Config")(**sizes)
    kind = getattr(source, kind)
    torch.manual_seed(3)
    mlp = kind(*((150, config) if folder == "gpt2" else (config,)))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return mlp.to(torch.bfloat16)


@pytest.mark.parametrize(
    "name", ["llama.LlamaMLP", "phi3.Phi3MLP", "phi.PhiMLP", "gpt2.GPT2MLP", "nemotron.NemotronMLP"]
)
def test_a_small_change_is_noticed_in_16_bits(name, monkeypatch):
    """A factor of 1.02 is below the rounding of a whole MLP in bf16."""
    sizes = {"mlp_bias": True} if name.startswith("llama") else {}
    sizes = {"n_embd": 32} if name.startswith("gpt2") else sizes
    mlp = _mlp(name, **sizes)
    report = replace(mlp)
    assert report.replaced and not report.kept, str(report)
    report.undo()
    assert all(p.dtype is torch.bfloat16 for p in mlp.parameters())
    own = type(mlp).forward
    monkeypatch.setattr(type(mlp), "forward", _theirs(lambda self, x: own(self, x) * 1.02))
    (reason,) = replace(mlp).kept.values()
    assert reason.endswith("gives other values than this version of the class")


def test_eps_of_16_bit_inputs_is_probed(monkeypatch):
    def of_the_dtype(module, known, x):
        return ops.rms_norm(x, module.weight, torch.finfo(x.dtype).eps if module.eps is None else module.eps)

    entry = dataclasses.replace(replace_table.TORCH["RMSNorm"], forward=of_the_dtype)
    monkeypatch.setitem(replace_table.TORCH, "RMSNorm", entry)
    model = torch.nn.Sequential(torch.nn.RMSNorm(16, eps=1e-6), torch.nn.RMSNorm(16)).bfloat16()
    report = replace(model)
    assert list(report.replaced) == ["0"]
    assert report.kept == {"1": "RMSNorm: ops.rms_norm gives other values than this version of the class"}


@pytest.mark.parametrize("how", ["property", "class", "mapping"])
def test_a_loss_function_of_the_users_is_kept(how, monkeypatch):
    def five(logits, labels, **_):
        return logits.float().mean() * 0 + 5

    kind = transformers.LlamaForCausalLM
    if how == "property":
        kind = type("Mine", (kind,), {"loss_function": property(lambda self: five)})
    elif how == "class":
        kind = type("Mine", (kind,), {"_loss_function": staticmethod(five)})
    else:
        monkeypatch.setitem(transformers.loss.loss_utils.LOSS_MAPPING, "ForCausalLM", five)
    model, tokens = make("llama").train(), batch()[0]["input_ids"]
    model.__class__ = kind
    assert replace(model, loss=True).kept == {
        "(the model)": f"{kind.__name__}: its loss_function is not transformers' own for causal language models"
    }
    assert model(tokens, labels=tokens).loss == 5


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_class_patched_by_others_is_kept(name, wraps, monkeypatch):
    """As Liger and Unsloth do it, with or without functools.wraps, which makes the patch look like the class's own."""
    model, tokens = make(name).train(), batch()[0]["input_ids"]
    own = type(model).forward

    def more(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.loss = out.loss + 7
        return out

    monkeypatch.setattr(type(model), "forward", functools.wraps(own)(more) if wraps else more)
    want = model(tokens, labels=tokens).loss
    kept = replace(model, loss=True).kept
    assert kept == {"(the model)": f"{type(model).__name__}: the forward of its class was replaced by {__name__}"}
    torch.testing.assert_close(model(tokens, labels=tokens).loss, want)
    assert want > 7


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
        stems = tuple(
            name for name in wanted if name.lower().replace("_", "").startswith(folder.name.replace("_", "").lower())
        )
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
    different = {name for name in replace_table.LOSSES if _code(classes[name]) != _code(classes["LlamaForCausalLM"])}
    assert different == {"GPT2LMHeadModel", "Gemma2ForCausalLM", "Gemma3ForCausalLM"}, "tested on their own"
    assert _code(classes["Gemma2ForCausalLM"]) == _code(classes["Gemma3ForCausalLM"])
