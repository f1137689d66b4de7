"""The norms are torch's, with the same state dicts."""

import pytest
import torch

from fastlm import nn

PAIRS = [
    (nn.RMSNorm, torch.nn.RMSNorm, {}),
    (nn.RMSNorm, torch.nn.RMSNorm, {"eps": 1e-3}),
    (nn.RMSNorm, torch.nn.RMSNorm, {"elementwise_affine": False}),
    (nn.LayerNorm, torch.nn.LayerNorm, {}),
    (nn.LayerNorm, torch.nn.LayerNorm, {"bias": False, "eps": 1e-3}),
    (nn.LayerNorm, torch.nn.LayerNorm, {"elementwise_affine": False}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_equals_torch(ours, theirs, options):
    theirs = theirs(24, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = ours(24, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 24) * 1e-3
    torch.testing.assert_close(ours(x), theirs(x))
    residual = torch.randn(3, 5, 24)
    y, total = ours(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, theirs(x + residual))
    assert isinstance(ours, type(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_default_eps_is_that_of_the_dtype_computed_in(dtype):
    x = (torch.randn(2, 8) * 1e-2).to(dtype)  # small: bf16's own eps would halve the norm of these and more
    ours, theirs = (module(8).to(dtype)(x) for module in (nn.RMSNorm, torch.nn.RMSNorm))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(TypeError, match="rms_norm: x must be floating point"):
        nn.RMSNorm(8)(torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("module", [nn.RMSNorm, nn.LayerNorm])
def test_one_dimension_only(module):
    with pytest.raises(ValueError, match=r"must be one dimension, the last, got \[4, 6\]"):
        module((4, 6))


def _fill(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_gemma_and_llama_are_transformers():
    transformers = pytest.importorskip("transformers")
    gemma = _fill(transformers.models.gemma.modeling_gemma.GemmaRMSNorm(24, eps=1e-5))
    llama = _fill(transformers.models.llama.modeling_llama.LlamaRMSNorm(24, eps=1e-5))
    x = torch.randn(3, 5, 24).bfloat16()
    for theirs, options in ((gemma, {"weight_offset": 1.0}), (llama, {"casting": "llama"})):
        theirs = theirs.bfloat16()
        ours = nn.RMSNorm(24, 1e-5, dtype=torch.bfloat16, **options)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("module", [nn.RMSNorm, nn.LayerNorm])
def test_offset_starts_at_the_identity(module):
    norm = module(24, weight_offset=1.0)
    assert (norm.weight == 0).all()
    x = torch.randn(3, 24)
    torch.testing.assert_close(norm(x), module(24)(x))
    assert "weight_offset=1.0" in repr(norm) and "casting" not in repr(norm)


@pytest.mark.parametrize("module", [nn.RMSNorm, nn.LayerNorm])
def test_dropout_is_before_the_residual_and_in_training_only(module):
    norm = module(24, dropout=0.5)
    x, residual = torch.randn(7, 24), torch.randn(7, 24)
    _, total = norm(x, residual)
    branch = total - residual
    dropped = branch.abs() < 1e-6
    assert 0.2 < dropped.float().mean() < 0.8
    torch.testing.assert_close(branch[~dropped], 2 * x[~dropped])
    norm.eval()
    assert torch.equal(norm(x, residual)[1], x + residual)


@pytest.mark.parametrize("module", [nn.RMSNorm, nn.LayerNorm])
def test_errors(module):
    with pytest.raises(ValueError, match="Norm: casting must be 'fp32' or 'llama', got 'gemma'"):
        module(4, casting="gemma")
    with pytest.raises(ValueError, match=r"Norm: dropout must lie in \[0, 1\), got 1.0"):
        module(4, dropout=1.0)
