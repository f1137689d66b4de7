"""nn.QuantizedLinear and nn.quantize_: values, state dicts, casts, gradients, what is replaced and what is kept."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import nn, ops
from fastlm.models import Transformer, TransformerConfig
from fastlm.ops import _native
from fastlm.ops.quantize import dequantize_weight, quantize_weight
from fastlm.testing import assert_accurate

FORMATS = [(8, None), (8, 64), (4, 32), (4, 128)]


def make_layer(bits=8, group=None, bias=True, symmetric=True, dtype=None):
    torch.manual_seed(0)
    linear = torch.nn.Linear(70, 12, bias=bias, dtype=dtype)
    return linear, nn.QuantizedLinear.from_linear(linear, bits, group, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_it_is_the_product_with_its_weight(bits, group, symmetric):
    linear, layer = make_layer(bits, group, symmetric=symmetric)
    x = torch.randn(2, 3, 70)
    want = torch.nn.functional.linear(x, layer.weight, linear.bias)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer.dequantize()(x), want)
    step = linear.weight.abs().max() / (127 if bits == 8 else 7)
    assert (layer.weight - linear.weight).abs().max() <= step
    assert f"in_features=70, out_features=12, bias=True, bits={bits}, group_size={group}" in repr(layer)
    assert ("symmetric=False" in repr(layer)) is not symmetric


@pytest.mark.parametrize("bias, symmetric", [(True, True), (False, False)])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_state_dict_through_safetensors(bits, group, bias, symmetric, tmp_path):
    _, layer = make_layer(bits, group, bias, symmetric)
    names = ["codes", "scale"] + ["zero"] * (not symmetric) + ["bias"] * bias
    assert sorted(layer.state_dict()) == sorted(names)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = nn.QuantizedLinear(70, 12, bias, bits=bits, group_size=group, symmetric=symmetric)
    x = torch.randn(3, 70)
    assert not fresh(x).any()
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(fresh(x), layer(x)) and torch.equal(fresh.weight, layer.weight)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_casts_leave_codes_and_scales_alone():
    _, layer = make_layer(4, 32, symmetric=False)
    before, x = {k: v.clone() for k, v in layer.state_dict().items()}, torch.randn(3, 70)
    layer.half()
    assert layer.scale.dtype == torch.float32 and layer.bias.dtype == torch.float16 == layer.weight.dtype
    assert all(torch.equal(layer.state_dict()[k], before[k]) for k in ("codes", "scale", "zero"))
    assert layer(x.half()).dtype == torch.float16
    assert layer(x).dtype == torch.float32 and layer.bfloat16().weight.dtype == torch.bfloat16
    assert layer.dequantize().weight.dtype == torch.bfloat16
    layer.to("meta")
    assert layer.codes.is_meta and layer.scale.is_meta and layer(x.to("meta")).shape == (3, 12)
    _, wide = make_layer(dtype=torch.float64)
    assert wide(x.double()).dtype == torch.float64 == wide.weight.dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert wide.float()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_gradient_goes_to_the_input(rows, dtype):
    linear, layer = make_layer()
    layer, x = layer.to(dtype), torch.randn(rows, 70, dtype=dtype, requires_grad=True)
    (got,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    (want,) = torch.autograd.grad(layer.dequantize()(x).float().square().sum(), x)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
    assert [n for n, p in layer.named_parameters()] == ["bias"]
    assert layer.bias.requires_grad == linear.bias.requires_grad


@pytest.mark.parametrize("bits, group", [(8, None), (4, 32)])
def test_an_adapter_over_it_trains(bits, group):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        nn.LoRALinear(nn.QuantizedLinear.from_linear(torch.nn.Linear(16, 32), bits, group), 4),
        torch.nn.ReLU(),
        nn.LoRALinear(nn.QuantizedLinear.from_linear(torch.nn.Linear(32, 4), bits, group), 4),
    )
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    before = {k: v.clone() for k, v in model.state_dict().items() if "base" in k}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def int4_layer(scale_dtype=torch.bfloat16, bias=False, **options):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 48, bias=bias)
    return nn.QuantizedLinear.from_linear(linear, 4, 32, scale_dtype=scale_dtype, **options).bfloat16()


@pytest.fixture
def int4_calls(monkeypatch):
    called, real = [], _native.int4_weight_product
    monkeypatch.setattr(_native, "int4_weight_product", lambda *a: called.append(1) or real(*a))
    return called


def assert_close_to_fp64(layer, x, got):
    weight = dequantize_weight(
        layer.codes, layer.scale, layer.zero, bits=4, group_size=32, columns=96, dtype=torch.float64
    )
    bias = None if layer.bias is None else layer.bias.double()
    exact = torch.nn.functional.linear(x.double(), weight, bias)
    assert_accurate(got, exact, torch.nn.functional.linear(x, weight.bfloat16(), layer.bias))


@pytest.mark.parametrize("rows", [(), (1,), (2, 8), (17,), (0,)], ids=str)
def test_int4_on_the_cpu_in_bf16(rows, int4_calls):
    layer, x = int4_layer(), torch.randn(*rows, 96).bfloat16()
    with torch.no_grad():
        got = layer(x)
    assert got.requires_grad is False and bool(int4_calls) == (rows in ((), (1,), (2, 8)))
    assert_close_to_fp64(layer, x, got)
    int4_calls.clear()
    layer(x.requires_grad_())
    with torch.no_grad(), ops.use_backend("reference"):
        layer(x)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16
    assert not int4_calls


@pytest.mark.parametrize("options", [{"symmetric": False}, {"scale_dtype": torch.float32}, {"bias": True}], ids=str)
def test_int4_that_torchs_product_would_bend_goes_another_way(options, int4_calls):
    """Scales and offsets rounded to bf16, sums rounded before a bias: inputs under which that does not average out."""
    layer = int4_layer(**options)
    x = torch.ones(1, 96).bfloat16()
    x[:, 32:64] = -1
    if layer.bias is not None:
        x[:, 0] += 2**-7
        layer.codes.fill_(0x99)
        layer.scale.fill_(256.0)
        layer.bias.data.fill_(-256.0 * 32)
    elif layer.zero is None:  # groups that cancel each other
        layer.codes.fill_(0xFF)
        layer.scale.fill_(0.5 + 2**-9 - 2**-20)
        layer.scale[:, 1] *= 2
    else:
        layer.codes.copy_((layer.zero + 16 * layer.zero).repeat_interleave(16, 1))
    with torch.no_grad():
        got = layer(x)
    if layer.zero is not None:
        assert not got.any()  # every weight is 0
    assert_close_to_fp64(layer, x, got)
    assert not int4_calls and layer.packed_int4() is None or layer.bias is not None


def test_an_int4_layer_refuses_a_number():
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \[..., K\]"):
        int4_layer()(torch.tensor(1.0, dtype=torch.bfloat16))


def test_codes_under_an_old_address_are_packed_anew():
    layer, x = int4_layer(), torch.randn(2, 96).bfloat16()
    memory = torch.empty(layer.codes.shape, dtype=torch.uint8)
    with torch.no_grad():
        for value in (0x99, 0x88):
            layer.codes = torch.from_numpy(memory.numpy())  # another tensor, the same memory and version
            memory.fill_(value)
            assert bool(layer(x).any()) == (value == 0x99)


def test_int4_is_packed_once_and_again_when_it_changes(monkeypatch):
    made = torch.nn.Linear(64, 32, bias=False)
    layer = nn.QuantizedLinear.from_linear(made, 4, 32, scale_dtype=torch.bfloat16).bfloat16()
    packs, real = [], _native.pack_int4_for_cpu
    monkeypatch.setattr(_native, "pack_int4_for_cpu", lambda codes: packs.append(1) or real(codes))
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first) and len(packs) == 1
        layer.scale.mul_(2)
        assert not torch.equal(layer(x), first) and len(packs) == 2
        other = pickle.loads(pickle.dumps(layer))
        assert "_packed" not in vars(other) and torch.equal(other(x), layer(x))
        layer.load_state_dict({k: torch.zeros_like(v) for k, v in layer.state_dict().items()})
        assert not layer(x).any()


def tiny(**changes):
    torch.manual_seed(1)
    sizes = {"vocab_size": 40, "d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "d_ff": 64}
    return Transformer(TransformerConfig(**{**sizes, "max_positions": 32, "init_std": 0.2, **changes})).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_and_back(tied):
    model, tokens = tiny(tie_embeddings=tied), torch.randint(40, (2, 9))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want = model(tokens)
        report = nn.quantize_(model)
        got = model(tokens)
    assert len(report.replaced) == 8 and all("QuantizedLinear of 8 bits" in t for t in report.replaced.values())
    assert list(report.kept) == ([] if tied else ["head"])
    assert isinstance(model.blocks[1].mlp.down, nn.QuantizedLinear)
    assert 3.5 * report.bytes_after < report.bytes_before and "replaced 8 modules" in str(report)
    assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()
    report.undo()
    report.undo()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    with torch.no_grad():
        assert torch.equal(model(tokens), want)


def test_an_untied_head_and_a_tied_one_when_asked():
    model = tiny(tie_embeddings=False)
    assert "head" in nn.quantize_(model, skip=()).replaced
    tokens = torch.randint(40, (1, 5))
    with torch.no_grad():
        assert model(tokens).isfinite().all()  # by the head's weight
    model = tiny(tie_embeddings=True)
    assert "quantized_head" not in nn.quantize_(model, tied=True).replaced
    report = nn.quantize_(model, skip=(), tied=True)
    assert list(report.replaced) == ["quantized_head"]
    torch.testing.assert_close(model.quantized_head.weight, model.embed.weight, rtol=0, atol=0.01)
    assert not any("quantized_head" in name for name in model.state_dict())
    report.undo()
    assert not hasattr(model, "quantized_head")


def test_what_is_kept_and_why():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = torch.nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    patched = torch.nn.Linear(8, 8)
    patched.forward = lambda x: x
    twice = torch.nn.Linear(8, 8)
    table, head = torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8, bias=False)
    head.weight = table.weight
    model = torch.nn.ModuleDict(
        {"doubled": Doubled(8, 8), "hooked": hooked, "patched": patched, "one": twice, "two": twice, "table": table,
         "out": head, "meta": torch.nn.Linear(8, 8, device="meta"), "lm_head": torch.nn.Linear(8, 8)}
    )  # fmt: skip
    report = nn.quantize_(model)
    assert list(report.replaced) == ["one", "two"] and model["one"] is model["two"]
    for name, reason in {"doubled": "not exactly", "hooked": "hooks", "patched": "forward of its own",
                         "out": "table.weight is the same", "meta": "plain", "lm_head": "in skip"}.items():  # fmt: skip
        assert reason in report.kept[name], report
    assert "out" in nn.quantize_(model, tied=True).replaced and table.weight.shape == (8, 8)


def test_undo_leaves_what_others_put_there_and_the_originals_go_with_the_report():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    gone, first = weakref.ref(model[0].weight), model[0]
    report = nn.quantize_(model)
    model[1] = torch.nn.Identity()
    report.undo()
    assert model[0] is first and isinstance(model[1], torch.nn.Identity)
    report = nn.quantize_(model)
    del first, report
    gc.collect()
    assert gone() is None


def test_nothing_changes_if_a_weight_is_not_finite():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="quantize_: 1: quantize_weight: weight holds inf or NaN"):
        nn.quantize_(model)
    assert all(type(m) is torch.nn.Linear for m in model)


def test_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(50, (1, 7))
    with torch.no_grad():
        want = model(tokens).logits
        report = nn.quantize_(model, 8)
        got = model(tokens).logits
    assert len(report.replaced) == 4 and list(report.kept) == ["lm_head"], report
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (32, 96)
    assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()
    report.undo()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, want)


def test_errors():
    with pytest.raises(TypeError, match="QuantizedLinear: linear must be a torch.nn.Linear, got Embedding"):
        nn.QuantizedLinear.from_linear(torch.nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="quantize_: model must be a torch.nn.Module, got dict"):
        nn.quantize_({})
    with pytest.raises(ValueError, match="group_size must be 32, 64 or 128"):
        nn.QuantizedLinear(8, 8, bits=4)


def test_values_follow_the_contract_of_dequantize_weight():
    _, layer = make_layer(4, 32)
    want = dequantize_weight(layer.codes, layer.scale, bits=4, group_size=32, columns=70)
    assert torch.equal(layer.weight, want)
    y = ops.quantized_linear(torch.eye(70), layer.codes, layer.scale, bits=4, group_size=32)
    torch.testing.assert_close(y.t(), want)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_a_fresh_layer_is_zeros_quantised_and_needs_no_memory(bits, group, symmetric):
    q = quantize_weight(torch.zeros(12, 70), bits, group, symmetric)
    options = {"bits": bits, "group_size": group, "symmetric": symmetric}
    fresh = nn.QuantizedLinear(70, 12, **options)
    for name in ("codes", "scale", "zero")[: 3 - symmetric]:
        assert torch.equal(getattr(fresh, name), getattr(q, name))
    with torch.device("meta"):
        layers = [nn.QuantizedLinear(70, 12, **options)]
    with FakeTensorMode():
        layers.append(nn.QuantizedLinear(70, 12, dtype=torch.bfloat16, **options))
    layers.append(nn.QuantizedLinear(1 << 20, 1 << 20, device="meta", **options))  # 1 TB
    for layer in layers[:2]:
        assert {k: (v.shape, v.dtype) for k, v in layer.state_dict().items() if k != "bias"} == {
            k: (v.shape, v.dtype) for k, v in fresh.state_dict().items() if k != "bias"
        }
    assert layers[0].codes.is_meta and layers[2].bias.is_meta and layers[1].bias.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_undo_after_a_cast_and_a_change_of_mode(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False).eval())
    weight = model[0].weight.detach().clone()
    report = nn.quantize_(model)
    assert model[0].training and not model[1].training
    model.eval().to(dtype)
    report.undo()
    assert type(model[0]) is torch.nn.Linear and not model[0].training
    assert torch.equal(model[0].weight, weight.to(dtype)) and model[1].weight.dtype == dtype == model[0].bias.dtype
    assert model(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    report = nn.quantize_(model)
    model.to("meta")
    report.undo()
    assert model[0].weight.is_meta


def test_names_in_skip():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"skip must be a sequence of names, got the string 'head'; write \('head',\)"):
        nn.quantize_(model, skip="head")
    report = nn.quantize_(model, skip=("1", "gate"))
    assert report.kept["gate"] == "no layer has this name of skip" and "its name is in skip" in report.kept["1"]
    assert not nn.quantize_(model).kept
    with pytest.raises(TypeError, match="itself a torch.nn.Linear; take nn.QuantizedLinear.from_linear"):
        nn.quantize_(torch.nn.Linear(8, 8))


@pytest.mark.parametrize(
    "register",
    [
        "register_full_backward_pre_hook", "register_full_backward_hook", "register_state_dict_pre_hook",
        "register_state_dict_post_hook", "register_load_state_dict_pre_hook", "register_load_state_dict_post_hook",
    ],
)  # fmt: skip
def test_layers_with_hooks_of_any_kind_are_kept(register):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    getattr(model[0], register)(lambda *_: None)
    assert "hooks" in nn.quantize_(model).kept["0"]


def test_undo_restores_the_quantised_head_before():
    model = tiny(tie_embeddings=True)
    nn.quantize_(model, skip=(), tied=True)
    first = model.quantized_head
    report = nn.quantize_(model, 4, 32, skip=(), tied=True)
    assert model.quantized_head is not first
    report.undo()
    assert model.quantized_head is first
