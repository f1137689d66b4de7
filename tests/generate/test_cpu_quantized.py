"""Decoding with int8 and int4 weights on the CPU: the logits are those of the dequantised model, within what bf16 leaves."""

import copy

import pytest
import torch

from fastlm import nn
from fastlm.generate import CpuDecoder, cpu, generate
from fastlm.generate.cpu import reason_against
from fastlm.models import Transformer, TransformerConfig
from fastlm.ops import _native
from fastlm.ops.quantized_cpu import FineRowProduct, Int4RowProduct, RowProduct

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not torch.backends.mkl.is_available(), reason="CPU decode"
)


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    monkeypatch.setattr(cpu, "_SMALL", 0)


def make_model(**changes):
    torch.manual_seed(2)
    sizes = {"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 96}
    model = Transformer(TransformerConfig(**{**sizes, "max_positions": 160, "init_std": 0.1, **changes})).eval()
    with torch.no_grad():  # fresh biases are 0: they would not be missed
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def dequantised(model):
    """The same model with ordinary layers of the same rounded weights."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.QuantizedLinear):
                setattr(module, name, layer.dequantize())
    return model


def logits_of(model, steps=20):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (1, 5 + steps), generator=generator)
    with torch.no_grad():
        cache = model.make_cache(1, 5 + steps)
        model.hidden(tokens[:, :5], cache=cache)
        decoder = CpuDecoder(model, [cache])
        return torch.cat([decoder.step([token], [0]) for token in tokens[0, 5:].tolist()]), decoder


CONFIGS = [
    {},
    {"position": "learned", "norm": "layer", "gated": False, "attention_bias": True, "mlp_bias": True},
    {"tie_embeddings": False},
]


@pytest.mark.parametrize("config", CONFIGS, ids=["llama", "gpt2", "untied"])
def test_logits_are_those_of_the_dequantised_model(config):
    model = make_model(**config)
    before, _ = logits_of(model)
    nn.quantize_(model, skip=(), tied=True)
    assert reason_against(model, 1) is None
    ours, decoder = logits_of(model)
    kinds = {type(product) for layer in decoder.layers for product in layer if not isinstance(product, cpu._Norm)}
    assert kinds == {RowProduct}
    assert type(decoder.head) is (FineRowProduct if _native.int8_products_are_exact() else cpu._Product)
    plain = dequantised(model)
    if model.config.tie_embeddings:  # the embedding itself is not rounded
        plain.quantized_head = None
        plain.__dict__["quantized_head"] = model.quantized_head.dequantize()
    want, _ = logits_of(plain)
    bf16, _ = logits_of(plain.bfloat16())
    scale = want.abs().max()
    rounding, error = (ours - want).abs().max() / scale, (want - before).abs().max() / scale
    assert 0 < rounding < 0.02 and rounding < 0.5 * error + 0.005, (rounding, error)
    assert rounding <= 2 * (bf16 - want).abs().max() / scale  # as a model of bf16 weights and fp32 arithmetic has


@pytest.mark.parametrize(
    "format, changes", [((8, 32), {}), ((4, 64), {"d_model": 80, "d_ff": 104, "head_dim": 20})], ids=str
)
def test_other_formats_are_read_as_fp32_copies(format, changes):
    model = make_model(**changes)
    nn.quantize_(model, *format)
    ours, decoder = logits_of(model)
    assert type(decoder.layers[0][1]) is cpu._Product
    torch.testing.assert_close(ours, logits_of(dequantised(model))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", [(8, None, True), (8, None, False), (8, 64), (4, 32)], ids=str)
def test_codes_of_a_tied_head_that_no_product_reads_are_left(format):
    model = make_model()
    nn.quantize_(model, *format[:2], symmetric=format[2:] != (False,), skip=(), tied=True)
    head = logits_of(model)[1].head
    if format == (8, None, True) and _native.int8_products_are_exact():
        assert type(head) is FineRowProduct
    else:
        assert type(head) is cpu._Product and torch.equal(head.weight.view(97, 64), model.embed.weight)


def test_int4_is_packed_once(monkeypatch):
    model = make_model(attention_bias=True)
    before, _ = logits_of(model)
    nn.quantize_(model, 4, 32)
    ours, decoder = logits_of(model)
    assert {type(p) for layer in decoder.layers for p in layer if not isinstance(p, cpu._Norm)} == {Int4RowProduct}
    plain = dequantised(model)
    want, bf16 = logits_of(plain)[0], logits_of(copy.deepcopy(plain).bfloat16())[0]
    assert 0 < (ours - want).abs().max() <= 2 * (bf16 - want).abs().max()
    assert (ours - want).abs().max() < 0.2 * (want - before).abs().max()
    monkeypatch.setattr(_native, "pack_int4_for_cpu", lambda codes: pytest.fail("packed again"))
    assert torch.equal(logits_of(model)[0], ours)


def test_zero_points_and_odd_widths_are_too():
    model = make_model(d_model=40, n_heads=2, n_kv_heads=1, head_dim=20, d_ff=50)
    nn.quantize_(model, 8)
    ours, decoder = logits_of(model)
    assert {type(p) for p in decoder.layers[0][1:3]} == {cpu._Product}
    torch.testing.assert_close(ours, logits_of(dequantised(model))[0], rtol=1e-4, atol=1e-5)
    for bits, group in ((8, None), (4, 32)):
        model = make_model()
        nn.quantize_(model, bits, group, symmetric=False)
        ours, decoder = logits_of(model)
        assert type(decoder.layers[0][1]) is cpu._Product
        torch.testing.assert_close(ours, logits_of(dequantised(model))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes(dtype):
    model = make_model().to(dtype)
    nn.quantize_(model)
    ours, decoder = logits_of(model)
    want, _ = logits_of(dequantised(model).double())
    assert type(decoder.layers[0][1]) is (RowProduct if dtype == torch.bfloat16 else cpu._Product)
    assert (ours - want).abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-12) * want.abs().max()


def test_a_row_product_and_its_sum():
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40)
    layer = nn.QuantizedLinear.from_linear(linear)
    weight, bias = layer.weight.double(), linear.bias.double()
    x, y = torch.zeros(96), torch.zeros(40)
    with torch.no_grad():
        product = RowProduct(layer.codes, layer.scale, layer.bias, x, y)
        for scale in (1.0, 1e-20, 1e20):
            x.copy_(torch.randn(96) * scale)
            want, size = weight @ x.double(), weight.abs() @ x.double().abs()
            product()
            assert ((y - want - bias).abs() <= 2**-7 * size + 1e-6).all()
            y.copy_(torch.randn(40))
            before = y.double()
            product.add()
            assert ((y - before - want - bias).abs() <= 2**-7 * size + 1e-6).all()


@pytest.mark.skipif(not _native.int8_products_are_exact(), reason="this CPU's int8 products saturate")
def test_a_fine_row_product_has_16_bits_of_x():
    torch.manual_seed(0)
    layer = nn.QuantizedLinear.from_linear(torch.nn.Linear(200, 33, bias=False))
    weight, x, y = layer.weight.double(), torch.zeros(200), torch.zeros(33)
    product = FineRowProduct(layer.codes, layer.scale, x, y)
    for values in (torch.randn(200), torch.full((200,), -3.0), torch.randn(200) * 1e-20, torch.randn(200).exp() ** 4):
        x.copy_(values)
        product()
        step = x.double().abs().max() / (127 * 256)
        error = (y - weight @ x.double()).abs()
        # Half a step in every element; and what fp32 leaves of the sum.
        assert (error <= 0.5 * step * weight.abs().sum(1) * 1.01 + 1e-6 * (weight.abs() @ x.double().abs())).all()
        assert error.max() <= 6 * 0.29 * step * weight.norm(dim=1).max() + 1e-6 * y.abs().max()  # they do not add up
    x.zero_()
    product()
    assert not y.any()


@pytest.mark.skipif(not _native.int8_products_are_exact(), reason="this CPU's int8 products saturate")
def test_a_digit_in_the_wrong_place_is_seen(monkeypatch):
    monkeypatch.setattr(FineRowProduct, "_ROUND", FineRowProduct._ROUND - 128)  # the borrow of the low byte is lost
    with pytest.raises(AssertionError):
        test_a_fine_row_product_has_16_bits_of_x()


def test_generation_and_changed_codes():
    model, prompt = make_model(), torch.tensor([[1, 2, 3]])
    nn.quantize_(model)
    before = generate(model, prompt, 12, temperature=0)
    assert torch.equal(before, generate(model, prompt, 12, temperature=0))
    model.blocks[0].mlp.down.codes.neg_()
    assert not torch.equal(before, generate(model, prompt, 12, temperature=0))


def test_threads_do_not_change_the_bits():
    model, before = make_model(d_model=96, d_ff=256), torch.get_num_threads()
    nn.quantize_(model, skip=(), tied=True)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(2)
            cache = model.make_cache(1, 30)
            with torch.no_grad():
                model.hidden(torch.arange(9)[None], cache=cache)
                decoder = CpuDecoder(model, [cache])
                decoder.threads.now = threads
                results.append(torch.cat([decoder.step([token], [0]) for token in range(12)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
