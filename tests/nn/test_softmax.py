import torch

from fastlm import nn


def test_equals_torch():
    x = torch.randn(2, 3, 4)
    for dim in (-1, 0, 1):
        torch.testing.assert_close(nn.Softmax(dim)(x), torch.nn.Softmax(dim)(x))
    assert nn.Softmax().state_dict() == {} and isinstance(nn.Softmax(), torch.nn.Softmax)


def test_scale_and_mask():
    x, mask = torch.randn(2, 3, 4), torch.rand(4) > 0.3
    mask[0] = True
    want = torch.softmax((0.5 * x).masked_fill(~mask, float("-inf")), -1)
    torch.testing.assert_close(nn.Softmax(scale=0.5)(x, mask), want)
