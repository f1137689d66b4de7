import pytest
import torch

from fastlm.errors import UserError
from fastlm.generate import SamplingConfig, filter_logits, keep_min_p, keep_top_k, keep_top_p, make_generator, sample


def test_filters_keep_what_their_formulas_say():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = lambda out: (out > -torch.inf)[0].tolist()  # noqa: E731
    assert kept(keep_top_k(logits, 2)) == [True, True, False, False]
    assert kept(keep_top_k(logits, 9)) == [True] * 4
    assert kept(keep_top_p(logits, 0.5)) == [True, False, False, False]
    assert kept(keep_top_p(logits, 0.6)) == [True, True, False, False]
    assert kept(keep_top_p(logits, 1e-12)) == [True, False, False, False]
    assert kept(keep_min_p(logits, 0.29)) == [True, True, True, False]
    assert kept(keep_min_p(logits, 1.0)) == [True, False, False, False]
    assert torch.equal(keep_top_p(logits, 0.6)[:, :2], logits[:, :2])


def test_order_is_temperature_then_top_k_then_top_p_then_min_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two that top-k leaves, the first holds 4/7 > 0.5; of all four it would hold 0.4 and the second would stay.
    out = filter_logits(logits, SamplingConfig(top_k=2, top_p=0.5))
    assert (out > -torch.inf).tolist() == [[True, False, False, False]]
    # At temperature 1/2 the shares are 16, 9, 4, 1 of 30.
    out = filter_logits(logits, SamplingConfig(temperature=0.5, min_p=0.3))
    assert (out > -torch.inf).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.3, "top_p": 0.3, "min_p": 0.5},
    ],
)
def test_same_as_transformers(options):
    transformers = pytest.importorskip("transformers")
    logits = 3 * torch.randn(16, 100)
    warpers = [
        transformers.TemperatureLogitsWarper(options.get("temperature", 1.0)),
        transformers.TopKLogitsWarper(options["top_k"]) if "top_k" in options else None,
        transformers.TopPLogitsWarper(options["top_p"]) if "top_p" in options else None,
        transformers.MinPLogitsWarper(options["min_p"]) if "min_p" in options else None,
    ]
    expected = logits
    for warper in filter(None, warpers):
        expected = warper(None, expected)
    assert torch.equal(filter_logits(logits, SamplingConfig(**options)), expected)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 4}, {"top_p": 0.7}, {"min_p": 0.4}])
def test_tokens_fall_with_their_probabilities(options):
    config, rows = SamplingConfig(**options), 40_000
    logits = torch.randn(6)
    expected = filter_logits(logits[None], config).softmax(-1)[0]
    drawn = sample(logits.expand(rows, -1), config, make_generator(0, "cpu"))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi2 = ((counts - rows * expected)[live] ** 2 / (rows * expected[live])).sum()
    assert chi2 < 20.5  # 99.9% quantile of chi-squared with 5 degrees of freedom


@pytest.mark.parametrize("spread, top_p", [(3.0, 0.6), (0.1, 0.6), (3.0, 0.9999)])
def test_few_candidates_of_a_large_vocabulary(spread, top_p):
    """The short cut (wide spread: a few tokens hold 60%) and what it leaves alone draw the same tokens as the plain form."""
    logits, config = spread * torch.randn(4, 5000), SamplingConfig(top_p=top_p, min_p=0.001)
    allowed = filter_logits(logits, config) > -torch.inf
    seen = torch.zeros_like(allowed)
    for seed in range(300):
        drawn = sample(logits, config, make_generator(seed, "cpu"))
        seen[torch.arange(4), drawn] = True
    assert not (seen & ~allowed).any()
    likely = logits.softmax(-1) > 0.03
    assert (seen | ~likely | ~allowed).all()


def test_top_k_of_sample_is_that_of_the_filter():
    logits, config = torch.randn(1, 50), SamplingConfig(top_k=3, top_p=0.9)
    allowed = (filter_logits(logits, config) > -torch.inf)[0].nonzero().flatten()
    drawn = sample(logits.expand(500, -1), config, make_generator(0, "cpu"))
    assert set(drawn.tolist()) == set(allowed.tolist())


def test_greedy_and_seeds():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])
    assert sample(logits, SamplingConfig(temperature=0)).tolist() == [1, 0]
    flat = torch.zeros(64, 1000)
    draw = lambda seed: sample(flat, SamplingConfig(), make_generator(seed, "cpu"))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(None), draw(None))
    # bf16 logits are drawn from in fp32: 1000 equal tokens would otherwise share few values of noise.
    assert len(set(sample(flat.bfloat16(), SamplingConfig(), make_generator(1, "cpu")).tolist())) > 50


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}],
)
def test_values_out_of_range(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SamplingConfig(**options)
