import pytest
import torch
import torch.nn.functional as F

from fastlm import nn

OPTIONS = [
    {},
    {"bias": True, "reduction": "sum", "label_smoothing": 0.1},
    {"bias": True, "weight": torch.linspace(0.5, 1.5, 11), "ignore_index": 3},
    {"reduction": "none"},
]


def _by_hand(module, input, target, ignore_index=None, **options):
    options.pop("bias", None)
    ignore_index = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(module.linear(input), target, ignore_index=ignore_index, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_same_as_torch(options):
    mine = nn.LinearCrossEntropyLoss(6, 11, **options)
    input, target = torch.randn(7, 6, requires_grad=True), torch.randint(0, 11, (7,))
    losses = []
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # torch has it from 2.13 on
        theirs = torch.nn.LinearCrossEntropyLoss(6, 11, **options)
        assert list(theirs.state_dict()) == list(mine.state_dict())
        mine.load_state_dict(theirs.state_dict())
        losses.append(theirs(input, target))
    losses = [mine(input, target), _by_hand(mine, input, target, **options), *losses]
    inputs = [input, *mine.parameters()]
    grads = [torch.autograd.grad(loss.sum(), inputs, retain_graph=True) for loss in losses[:2]]
    for loss in losses[1:]:
        torch.testing.assert_close(losses[0], loss)
    torch.testing.assert_close(grads[0], grads[1])


def test_what_torch_does_not_have():
    module = nn.LinearCrossEntropyLoss(6, 11, scale=0.5, softcap=3.0, z_loss=0.1, logits_bytes=100).double()
    input, target = torch.randn(2, 3, 6, dtype=torch.float64), torch.randint(0, 11, (2, 3))
    token_weight = torch.randn(2, 3)
    z = 3 * torch.tanh(0.5 * module.linear(input) / 3)
    each = F.cross_entropy(z.flatten(0, 1), target.flatten(), reduction="none") + 0.1 * z.logsumexp(-1).flatten() ** 2
    want = (each * token_weight.flatten()).sum() / 4
    torch.testing.assert_close(module(input, target, token_weight, denominator=4), want)


def test_a_tied_weight():
    embedding = torch.nn.Embedding(11, 6)
    module = nn.LinearCrossEntropyLoss(6, 11)
    module.linear.weight = embedding.weight
    tokens = torch.randint(0, 11, (2, 4))
    module(embedding(tokens), tokens.roll(-1, 1)).backward()
    z = F.linear(embedding(tokens), embedding.weight)
    (want,) = torch.autograd.grad(F.cross_entropy(z.flatten(0, 1), tokens.roll(-1, 1).flatten()), embedding.weight)
    torch.testing.assert_close(embedding.weight.grad, want)


def test_errors():
    with pytest.raises(ValueError, match=r"LinearCrossEntropyLoss: out_features must be \(\), got \(2,\)"):
        nn.LinearCrossEntropyLoss(6, 11, out_features=(2,))
    with pytest.raises(ValueError, match=r"weight must be \[11\], got \[6\]"):
        nn.LinearCrossEntropyLoss(6, 11, weight=torch.ones(6))
