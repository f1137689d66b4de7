import random

import pytest
import torch

from fastlm.errors import UserError
from fastlm.generate import complete, generate
from fastlm.models import Transformer, TransformerConfig
from tests.generate.test_text import Bytes

GREEDY = {"temperature": 0, "eos_id": ()}


def make_model(**changes):
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 256,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 48,
        "max_positions": 64,
    }
    return Transformer(TransformerConfig(**{**sizes, "init_std": 0.3, **changes})).eval()


def plain_greedy(model, prompt, count):
    """The definition: the whole sequence again for every token."""
    tokens = torch.as_tensor(prompt)[None]
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0].tolist()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_is_the_argmax_of_the_whole_sequence(fast, dtype):
    model = make_model().to(dtype)
    prompt = [5, 9, 200, 3]
    out = generate(model, torch.tensor([prompt]), 40, fast=fast, **GREEDY)
    assert out.tolist() == [plain_greedy(model, prompt, 40)]


@pytest.mark.parametrize("rows", [3, 6])  # with and without CpuDecoder
@pytest.mark.parametrize("fast", [True, False])
def test_unequal_prompts_get_the_tokens_they_get_alone(rows, fast):
    model, rng = make_model(), random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(1 + 5 * i)] for i in range(rows)]
    together = generate(model, prompts, 30, fast=fast, **GREEDY)
    for prompt, row in zip(prompts, together):
        assert row.tolist() == generate(model, [prompt], 30, fast=fast, **GREEDY)[0].tolist()
        assert row.tolist() == plain_greedy(model, prompt, 30)


@pytest.mark.parametrize("fast", [True, False])
def test_each_row_fills_the_context_and_no_more(fast):
    model = make_model()
    prompts = [list(range(60)), [1, 2], list(range(63))]
    out = generate(model, [torch.tensor(p) for p in prompts], 40, fast=fast, **GREEDY)
    assert [len(row) for row in out] == [64, 42, 64]
    for prompt, row in zip(prompts, out):
        assert row.tolist() == plain_greedy(model, prompt, len(row) - len(prompt))


def test_end_of_text_ends_a_row_and_pads_it():
    model = make_model()
    prompts = torch.tensor([[5, 9], [7, 7]])
    free = generate(model, prompts, 20, **GREEDY)
    eos = free[0, 6].item()
    end = free[0, 2:].tolist().index(eos)
    assert eos not in free[1].tolist()[2:]
    out = generate(model, prompts, 20, temperature=0, eos_id=eos, pad_id=0)
    assert out[0].tolist() == free[0, : 3 + end].tolist() + [0] * (19 - end)
    assert torch.equal(out[1], free[1])
    as_list = generate(model, prompts.tolist(), 20, temperature=0, eos_id=[eos])
    assert as_list[0].tolist() == free[0, : 3 + end].tolist()
    alone = generate(model, prompts[:1], 20, temperature=0, eos_id=eos)
    assert alone.tolist() == [as_list[0].tolist()]
    from_config = make_model(eos_ids=(eos,), pad_id=1)
    assert generate(from_config, prompts, 20, temperature=0)[0].tolist() == free[0, : 3 + end].tolist() + [1] * (
        19 - end
    )


class Numbers:
    """Token 12 is the text "12,"."""

    def decode(self, ids):
        return "".join(f"{i}," for i in ids)


@pytest.mark.parametrize("fast", [True, False])
def test_stop_strings_begin_and_end_inside_tokens(fast):
    model = make_model()
    prompts = [[5, 9], [7, 7, 1]]
    free = generate(model, prompts, 30, fast=fast, **GREEDY)[0][2:].tolist()
    whole = Numbers().decode(free)
    stop = Numbers().decode(free[4:7])[1:-2]
    text = whole[: whole.index(stop)]
    pieces = []
    options = {"tokenizer": Numbers(), "stop_strings": [stop], "fast": fast, **GREEDY}
    out = generate(model, prompts[:1], 30, stream=pieces.append, **options)
    assert "".join(pieces) == text
    kept = out[0][2:].tolist()
    assert kept == free[: len(kept)]
    assert Numbers().decode(kept).startswith(text) and not Numbers().decode(kept[:-1]).startswith(text)
    assert generate(model, prompts, 30, **options)[0].tolist() == out[0].tolist()


def test_sampling_follows_the_seed_and_top_k_1_is_greedy():
    model, prompt = make_model(), torch.tensor([[5, 9], [5, 9]])
    a, b, c = (generate(model, prompt, 20, seed=seed, eos_id=()) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a[0], a[1])
    assert torch.equal(generate(model, prompt, 20, top_k=1, eos_id=()), generate(model, prompt, 20, **GREEDY))


def test_same_tokens_as_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    from fastlm.models import llama

    ours = Transformer(llama.config_from_hf(config.to_dict())).double()
    state = theirs.state_dict()
    for rule in llama.rules(ours.config):
        ours.get_parameter(rule.ours).data.copy_(rule.to_ours([state[key] for key in rule.theirs]))
    prompt = torch.randint(101, (1, 7))
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
    assert torch.equal(generate(ours, prompt, 64, **GREEDY), expected)


def test_returned_tokens_can_be_trained_on():
    model = make_model()
    out = model.generate(torch.tensor([[5, 9]]), 5, temperature=0)
    model.embed(out).sum().backward()
    assert model.embed.weight.grad is not None


def test_complete():
    model = make_model()
    text = complete(model, Bytes(), "ab", 12, temperature=0)
    assert text == Bytes().decode(generate(model, [[97, 98]], 12, **GREEDY)[0][2:].tolist())
    cut = complete(model, Bytes(), ["ab", "cd"], 12, temperature=0, stop_strings=text[5])
    assert cut[0] == text.partition(text[5])[0]
    first = Bytes().encode(text)[0]
    assert complete(model, Bytes(), "ab", 12, temperature=0, eos_id=first) == ""
    with pytest.raises(UserError, match="empty"):
        complete(model, Bytes(), "")


@pytest.mark.parametrize(
    "tokens, options, words",
    [
        ([[]], {}, "prompt 0 is empty"),
        ([], {}, "no prompt"),
        ([[1], [2] * 64], {}, "prompt 1 has 64 tokens.*64"),
        ([[256]], {}, "token 256.*vocabulary of 256"),
        ([[-1]], {}, "token -1"),
        ([1, 2], {}, "prompt 0 must be"),
        (torch.tensor([1, 2]), {}, r"\[batch, sequence\]"),
        (torch.ones(1, 2), {}, "float32"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"stop_strings": "x"}, "tokenizer"),
        ([[1], [2]], {"stream": print, "tokenizer": Bytes()}, "one prompt"),
        ([[1]], {"top_p": 2.0}, "top_p"),
    ],
)
def test_user_errors_are_one_line(tokens, options, words):
    with pytest.raises(UserError, match=words) as caught:
        generate(make_model(), tokens, **options)
    assert "\n" not in str(caught.value)


def test_nothing_to_generate():
    assert generate(make_model(), torch.tensor([[1, 2]]), 0).tolist() == [[1, 2]]
