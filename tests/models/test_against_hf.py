"""Both libraries with the same weights: logits, greedy tokens, loss, gradients."""

import pytest
import torch

from fastlm.models import gpt2, llama
from tests.models.families import NAMES, pair, tokens


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, tmp_path):
    theirs, ours = pair(name, tmp_path)
    batch = tokens(2, 150)
    with torch.no_grad():
        expected, got = theirs(batch).logits, ours(batch)
    assert expected.std() > 0.5
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa-tied", "llama3-rope"])
def test_greedy_tokens_in_fp64(name, tmp_path):
    theirs, ours = pair(name, tmp_path, torch.float64)
    expected = again = cached = tokens(2, 9)
    with torch.inference_mode():
        for _ in range(64):
            expected = torch.cat([expected, theirs(expected).logits[:, -1:].argmax(-1)], 1)
        for _ in range(64):
            again = torch.cat([again, ours(again)[:, -1:].argmax(-1)], 1)
        cache = ours.make_cache(2)
        step = cached
        for _ in range(64):
            step = ours(step, cache=cache)[:, -1:].argmax(-1)
            cached = torch.cat([cached, step], 1)
    assert len(expected[0, 9:].unique()) > 3, "a model that repeats itself proves nothing"
    assert again.tolist() == expected.tolist()
    assert cached.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name, tmp_path):
    theirs, ours = pair(name, tmp_path, torch.float64)
    text = tokens(3, 41)
    text_labels = text.clone()
    text_labels[0, 5:12] = -100
    expected = theirs(text, labels=text_labels).loss  # shifts by itself
    expected.backward()
    labels = torch.cat([text_labels[:, 1:], torch.full((3, 1), -100)], 1)
    loss = ours.loss(text, labels)
    loss.backward()
    assert loss.ndim == 0
    assert abs(loss.item() - expected.item()) < 1e-5

    live = int((labels != -100).sum())
    assert ours.loss(text, labels, "sum").item() == pytest.approx(loss.item() * live, rel=1e-5)

    family = gpt2 if name.startswith("gpt2") else llama
    their_grads = {key: p.grad for key, p in theirs.named_parameters()}
    our_grads = {key: p.grad for key, p in ours.named_parameters()}
    rules = family.rules(ours.config)
    assert {rule.ours for rule in rules} == our_grads.keys()
    for rule in rules:
        grad = rule.to_ours([their_grads.pop(key) for key in rule.theirs])
        # Their norms, rotary angles and loss are fp32 in an fp64 model too.
        torch.testing.assert_close(our_grads[rule.ours], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
    assert not their_grads, "gradients nobody compared"
