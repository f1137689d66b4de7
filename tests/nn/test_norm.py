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


@pytest.mark.parametrize("module", [nn.RMSNorm, nn.LayerNorm])
def test_one_dimension_only(module):
    with pytest.raises(ValueError, match=r"must be one dimension, the last, got \[4, 6\]"):
        module((4, 6))
