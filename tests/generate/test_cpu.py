import copy
import itertools

import pytest
import torch

from fastlm.generate import CpuDecoder, cpu, generate
from fastlm.generate.cpu import _Threads, reason_against
from fastlm.models import Transformer, TransformerConfig

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not torch.backends.mkl.is_available(), reason="CPU decode"
)


def make_model(**changes):
    torch.manual_seed(2)
    sizes = {"vocab_size": 97, "d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
    model = Transformer(TransformerConfig(**{**sizes, "max_positions": 160, "init_std": 0.2, **changes})).eval()
    with torch.no_grad():  # fresh biases are 0 and fresh norms 1: neither would be missed
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


CONFIGS = [
    {
        "position": position,
        "norm": norm,
        "gated": gated,
        "attention_bias": bias,
        "mlp_bias": bias,
        "tie_embeddings": tied,
    }
    for position, norm, gated, bias, tied in itertools.product(
        ("rotary", "learned"), ("rms", "layer"), (True, False), (True, False), (True, False)
    )
] + [{"activation": kind, "gated": gated} for kind in ("gelu", "gelu_tanh", "relu2") for gated in (True, False)]
CONFIGS += [
    {"n_kv_heads": 1},
    {"n_kv_heads": 4},
    {"n_layers": 1, "vocab_size": 8},
    {"rope_scaling": "linear", "rope_factor": 2.0},
]


def logits_of_both(model, prompt, steps):
    """Logits of each step after the prompt, from CpuDecoder and from the model on the whole sequence."""
    tokens = torch.randint(model.config.vocab_size, (1, prompt + steps))
    with torch.no_grad():
        cache = model.make_cache(1, prompt + steps)
        model.hidden(tokens[:, :prompt], cache=cache)
        decoder = CpuDecoder(model, [cache])
        ours = torch.cat([decoder.step([token], [0]) for token in tokens[0, prompt:].tolist()])
        return ours, model(tokens)[0, prompt:]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_logits_are_the_models_for_every_config(changes):
    model = make_model(**changes).double()
    ours, expected = logits_of_both(model, 5, 8)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prompt", [63, 64, 70])
def test_prompts_that_end_around_a_block_of_keys(prompt):
    ours, expected = logits_of_both(make_model().double(), prompt, 70)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_the_models_own(dtype):
    """Over 140 tokens, so that two borders between blocks of keys are passed."""
    model = make_model().to(dtype)
    exact = copy.deepcopy(model).double()
    torch.manual_seed(0)
    ours, plain = logits_of_both(model, 3, 140)
    torch.manual_seed(0)
    _, expected = logits_of_both(exact, 3, 140)
    error, allowed = (ours - expected).abs().max(), (plain - expected).abs().max()
    assert allowed > 0
    assert error <= 2 * allowed


@pytest.fixture
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_change_neither_bits_nor_torchs_setting(keep_threads):
    model = make_model(d_model=96, d_ff=256)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(2)
        cache = model.make_cache(1, 40)
        with torch.no_grad():
            model.hidden(torch.arange(20)[None], cache=cache)
            decoder = CpuDecoder(model, [cache])
            decoder.threads.now = threads
            results.append(torch.cat([decoder.step([token], [0]) for token in range(20)]))
        with pytest.raises(IndexError):
            decoder.step([10**6], [0])
        assert torch.get_num_threads() == 2
    assert torch.equal(*results)


def test_number_of_threads_follows_what_is_measured(keep_threads, monkeypatch):
    torch.set_num_threads(2)
    clock = [0.0]
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])
    seconds = {1: 2.0, 2: 1.0}

    def probe():
        clock[0] += seconds[torch.get_num_threads()]

    def step():
        with threads:
            assert torch.get_num_threads() == threads.now
            probe()
        return threads.now

    threads = _Threads(probe)
    assert step() == 2 and torch.get_num_threads() == 2
    seconds[2] = 3.0  # one slow step of several is no reason to give up
    step()
    seconds[2] = 1.0
    assert step() == 2
    seconds[2] = 50.0  # the cores are busy
    step()
    assert step() == 1
    while threads.steps < threads.EVERY:
        step()
    before = clock[0]
    assert step() == 1
    assert clock[0] - before == 2 * threads.TRIES + 50 + 2  # one try with two threads was enough
    seconds[2] = 1.0
    assert [step() for _ in range(threads.EVERY)][-1] == 2
    seconds[2] = 3.0
    assert _Threads(probe).now == 1


def test_changed_weights_are_never_stale():
    model, prompt = make_model(), torch.tensor([[1, 2, 3]])
    before = generate(model, prompt, 20, temperature=0)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.data.mul_(-3)  # .data leaves no trace in the version counter
    after = generate(model, prompt, 20, temperature=0)
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(model, prompt, 20, temperature=0, fast=False))


def test_rows_come_out_bit_for_bit_as_alone():
    model = make_model()

    def decoder(*prompts):
        caches = [model.make_cache(1, 30) for _ in prompts]
        for cache, prompt in zip(caches, prompts):
            model.hidden(torch.tensor([prompt]), cache=cache)
        return CpuDecoder(model, caches)

    with torch.no_grad():
        pair, alone = decoder([5, 6, 7], [8, 9]), decoder([8, 9])
        for token in range(10):
            assert torch.equal(pair.step([token, 2 * token], [0, 1])[1], alone.step([2 * token], [0])[0])
        assert pair.step([1, 1], [1])[0].abs().sum() == 0


def test_autocast_leaves_it_alone():
    model, prompt = make_model(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        caches = [model.make_cache(1, 9) for _ in range(2)]
        for cache in caches:
            model.hidden(prompt, cache=cache)
        plain = CpuDecoder(model, caches[:1]).step([7], [0])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(CpuDecoder(model, caches[1:]).step([7], [0]), plain)


def test_a_changed_model_takes_the_other_path():
    assert reason_against(make_model(), 1) is None
    assert "rows" in reason_against(make_model(), 100)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_model()
    model.blocks[1].mlp.down = Doubled(40, 24, bias=False)
    assert "blocks.1.mlp.down" in reason_against(model, 1)
    prompt = torch.tensor([[1, 2, 3]])
    assert torch.equal(generate(model, prompt, 9, temperature=0), generate(model, prompt, 9, temperature=0, fast=False))
    model = make_model()
    model.blocks[0].mlp.forward = lambda x: x
    assert "blocks.0.mlp" in reason_against(model, 1)
    model = make_model()
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)
    assert "norm1" in reason_against(model, 1)
