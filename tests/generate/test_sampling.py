import pytest
import torch

from fastlm.errors import UserError
from fastlm.generate import Draws, SamplingConfig, generate
from fastlm.models import Transformer, TransformerConfig
from tests.ops.test_sample import filtered

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 4}, {"top_p": 0.7}, {"min_p": 0.4}], ids=str)
def test_tokens_fall_with_their_probabilities(options):
    """Over rows and steps together."""
    rows, steps, logits = 2000, 20, torch.tensor([0.3, -1.0, 0.9, 0.1, -0.4, 0.2])
    expected = filtered(logits, **options)
    draws = Draws(SamplingConfig(seed=3, **options), steps, CPU)
    drawn = torch.stack([draws(logits.expand(rows, -1)) for _ in range(steps)])
    counts = torch.bincount(drawn.flatten(), minlength=6)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi2 = ((counts - rows * steps * expected)[live] ** 2 / (rows * steps * expected[live])).sum()
    assert chi2 < 20.5  # 99.9% quantile of chi-squared with 5 degrees of freedom


def test_greedy_and_seeds():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])
    assert Draws(SamplingConfig(temperature=0), 1, CPU)(logits).tolist() == [1, 0]
    flat = torch.zeros(64, 1000)

    def draw(seed, rows=64):
        draws = Draws(SamplingConfig(seed=seed), 3, CPU)
        return torch.stack([draws(flat[:rows]) for _ in range(3)])

    one = draw(1)
    assert torch.equal(one, draw(1)) and not torch.equal(one, draw(2)) and not torch.equal(draw(None), draw(None))
    assert len(set(map(tuple, one.tolist()))) == 3  # each step has numbers of its own
    assert torch.equal(one[:, :5], draw(1, 5))  # and each row, whatever rows come behind it
    assert torch.equal(draw(2**64 - 1), draw(-1))  # torch's seeds are unsigned


def model(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 16}
    return Transformer(TransformerConfig(**sizes, max_positions=64, **changes)).eval()


@pytest.mark.parametrize("fast", [True, False])
def test_a_row_draws_what_it_draws_alone_and_ends_with_its_end(fast):
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "fast": fast}
    both = generate(model(), [[1, 2, 3], [4]], 30, eos_id=(), **options)
    assert both[0].tolist() == generate(model(), [[1, 2, 3]], 30, eos_id=(), **options)[0].tolist()
    new = both[0][3:].tolist()
    eos = new[9]
    ended = generate(model(), [[1, 2, 3], [4]], 30, eos_id=eos, **options)
    assert ended[0].tolist() == [1, 2, 3, *new[: new.index(eos) + 1]]


@pytest.mark.parametrize("fast", [True, False])
def test_nan_in_the_weights_is_said(fast):
    broken = model()
    with torch.no_grad():
        broken.blocks[0].mlp.down.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="logits behind 2 tokens are NaN.*check the model's weights"):
        generate(broken, [[1, 2]], 5, fast=fast)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e39},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_k": float("nan")},
        {"top_k": True},
        {"seed": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
    ],
    ids=str,
)
def test_values_out_of_range(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SamplingConfig(**options)
