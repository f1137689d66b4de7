"""sample: filters against transformers, the draw's distribution, its noise, and what it refuses. The Triton kernel has more in
test_sample_triton.py, the CUDA kernel in tests/csrc."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import ops
from fastlm.ops import _cuda
from fastlm.ops.random_bits import philox
from fastlm.ops.sample import _Rule

PLAIN = ("reference", "torch")
HERE = (*PLAIN, "triton")
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.3, "top_p": 0.3, "min_p": 0.5},
]


def kept(logits, host=False, **options):
    """Which tokens the filters leave."""
    rule = _Rule(logits, None, options.get("temperature", 1.0), host)
    s = rule.tempered(logits)
    keep = rule.kept(s, None, options.get("top_k", 0), None, options.get("top_p", 1.0), None, options.get("min_p", 0.0))
    return torch.ones_like(s, dtype=torch.bool) if keep is None else keep


def filtered(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Probabilities [V] in fp64 after the filters, by their definitions: of logits [V] without equals."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    left = order[: top_k or len(p)]
    share = p[left] / p[left].sum()
    left = left[(share.cumsum(-1) - share < top_p) & (share >= min_p * share[0])]
    return torch.zeros_like(p).index_copy(0, left, p[left] / p[left].sum())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filters_are_those_of_transformers(options):
    transformers = pytest.importorskip("transformers")
    logits = 3 * torch.randn(16, 100)
    expected = transformers.TemperatureLogitsWarper(options.get("temperature", 1.0))(None, logits)
    for name, warper in (("top_k", "TopKLogitsWarper"), ("top_p", "TopPLogitsWarper"), ("min_p", "MinPLogitsWarper")):
        if name in options:
            expected = getattr(transformers, warper)(options[name])(None, expected)
    assert torch.equal(kept(logits, **options), expected > -math.inf)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filters_are_their_definitions(options):
    logits = 3 * torch.randn(3, 5000)
    want = torch.stack([filtered(row, **options) > 0 for row in logits])
    for host in (False, True):
        assert torch.equal(kept(logits, host, **options), want)


def test_equal_logits_stay_or_go_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert kept(logits, top_k=2).tolist() == [[True, True, True, True, False]]
    assert kept(logits, top_p=0.6).tolist() == [[True, True, True, True, False]]
    for share, first in (
        (0.45, True),
        (0.5, False),
    ):  # e^2 is 0.476 of what top-k leaves, which is all of the equal ones
        assert kept(logits, top_k=2, top_p=share).tolist() == [[True, *3 * [not first], False]]
    assert kept(logits, top_p=1e-9).tolist() == [[True, False, False, False, False]]
    assert kept(logits, min_p=1.0).tolist() == [[True, False, False, False, False]]


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 4}, {"top_p": 0.7}, {"min_p": 0.4}], ids=str)
def test_tokens_fall_with_their_probabilities(options, backend):
    rows, logits = 100_000, torch.tensor([0.3, -1.0, 0.9, 0.1, -0.4, 0.2])
    expected = filtered(logits, **options)
    drawn = ops.sample(logits.expand(rows, -1), seed=11, backend=backend, **options)
    counts = torch.bincount(drawn, minlength=6)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi2 = ((counts - rows * expected)[live] ** 2 / (rows * expected[live])).sum()
    assert chi2 < 20.5  # 99.9% quantile of chi-squared with 5 degrees of freedom


def test_offsets_draw_independently():
    """Rows over many offsets, as decoding counts them up: pairs of neighbours fall as pairs of independent draws do."""
    logits = torch.tensor([[0.5, 0.0, -0.5]]).expand(10, 3)
    draws = torch.stack([ops.sample(logits, seed=torch.tensor([3, i])) for i in range(500)])
    pairs = torch.bincount((3 * draws[:-1] + draws[1:]).flatten(), minlength=9)
    p = logits[0].softmax(-1)
    expected = 4990 * torch.outer(p, p).flatten()
    assert ((pairs - expected) ** 2 / expected).sum() < 26.2  # 99.9% of chi-squared with 8


def test_the_noise_is_philoxs(device):
    logits = torch.randn(3, 10)
    seed = torch.tensor([-5, 2])
    rows = []
    for row in range(3):
        scores = []
        for t in range(10):
            words = philox(seed[0], *(torch.tensor(c) for c in (t // 4, row, 0x73616D70, 2)))
            u = (int(words[t % 4]) + 0.5) / 2**32
            scores.append(logits[row, t].item() - math.log(-math.log1p(-u)))
        rows.append(max(range(10), key=scores.__getitem__))
    for backend in HERE:
        assert ops.sample(logits.to(device), seed=seed.to(device), backend=backend).tolist() == rows


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_torch_draws_what_the_reference_draws(dtype):
    each = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 1e-38]), "top_k": torch.tensor([0, 1, 5, 10**6, 2, 3]),
        "top_p": torch.tensor([0.5, 0.9, 1.0, 0.1, 0.2, 0.99]), "min_p": torch.tensor([0, 0.1, 0.5, 1.0, 0, 0]),
    }  # fmt: skip
    for columns, whole in ((1, False), (7, False), (300, True), (5003, False), (5003, True)):
        x = (3 * torch.randn(6, columns)).to(dtype)
        x = x.round() if whole else x  # many are equal then, also where a filter ends
        x[5, columns // 2] = -math.inf
        for options in (*OPTIONS, {"temperature": 0}, each, {"top_k": torch.tensor(4)}):
            one, two = (ops.sample(x, seed=5, return_logprobs=True, backend=b, **options) for b in PLAIN)
            assert torch.equal(one[0], two[0]) and torch.equal(one[1].nan_to_num(9), two[1].nan_to_num(9))
            assert one[0].dtype == torch.int64 and one[1].dtype == torch.float32
            assert torch.equal(ops.sample(x, seed=5, **options), one[0])
            alone = {name: v[:1] if isinstance(v, torch.Tensor) and v.ndim else v for name, v in options.items()}
            assert torch.equal(ops.sample(x[:1], seed=5, **alone), one[0][:1])
            if columns > 1:
                want = x.double().log_softmax(-1).gather(1, one[0][:, None])[:, 0]
                torch.testing.assert_close(one[1].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.6}, {"temperature": 0.0}, {"min_p": 0.2}], ids=str)
def test_rows_with_infinities_and_nan(options, backend, device):
    x = torch.randn(5, 24, device=device)
    x[0, 3], x[1] = math.nan, -math.inf
    x[2, [5, 9]] = math.inf
    x[3, :23] = -math.inf
    x[4], x[4, 1] = torch.finfo(torch.float32).min, 3e38
    tokens, logprobs = ops.sample(x, seed=1, return_logprobs=True, backend=backend, **options)
    assert tokens[[0, 1, 3, 4]].tolist() == [-1, -1, 23, 1] and tokens[2] in (5, 9)
    assert logprobs[:2].isnan().all()
    assert ops.sample(x[:1, :1].expand(1, 5003) + math.nan, seed=1, backend=backend, **options).tolist() == [-1]
    torch.testing.assert_close(logprobs[2:].cpu(), torch.tensor([-math.log(2), 0.0, 0.0]))


@pytest.mark.parametrize("backend", HERE)
def test_an_infinite_temperature_makes_all_finite_logits_equal(backend, device):
    x = 3 * torch.randn(6, 37, device=device)
    x[:, ::2] = -math.inf
    each = torch.full((6,), math.inf, device=device)
    for options in ({}, {"top_p": 0.5}, {"min_p": 0.9}):
        found = ops.sample(x, temperature=each, seed=3, backend=backend, **options)
        assert torch.equal(found, ops.sample(x, temperature=3e38, seed=3, backend=backend, **options))
        assert (found % 2 == 1).all()
    assert len(set(ops.sample(x[:1].expand(999, 37), temperature=each.new_tensor(math.inf), seed=3).tolist())) == 18


def test_numbers_of_any_kind():
    x = torch.randn(4, 30)
    want = ops.sample(x, temperature=0.5, top_k=5, top_p=0.5, min_p=0.25, seed=1)
    kinds = {"temperature": np.float64(0.5), "top_k": np.int64(5), "top_p": np.float32(0.5), "min_p": Fraction(1, 4)}
    assert torch.equal(ops.sample(x, seed=1, **kinds), want)
    assert torch.equal(ops.sample(x, top_k=2**70, seed=1), ops.sample(x, seed=1))


class _RunningSums(TorchDispatchMode):
    """The dtypes of what is summed up."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.cumsum:
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize("backend", PLAIN)
def test_running_sums_are_of_integers(backend):
    """On a GPU those of floats need not be the same twice."""
    with _RunningSums() as seen:
        for columns in (40, 5000):
            ops.sample(torch.randn(1, columns), top_p=0.9, seed=1, backend=backend)
    assert seen.dtypes == {torch.int64}


def test_seeds():
    flat = torch.zeros(64, 1000)
    draw = lambda seed: ops.sample(flat, seed=seed)  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and torch.equal(draw(1), draw(torch.tensor([1, 0])))
    assert not torch.equal(draw(1), draw(2)) and not torch.equal(draw(None), draw(None))
    assert len(set(ops.sample(flat.bfloat16(), seed=1).tolist())) > 50  # noise is fp32 whatever the logits are


def test_it_is_compiled_and_gives_no_gradient():
    def call(x, top_p):
        return ops.sample(x, top_p=top_p, top_k=9, seed=5, return_logprobs=True)

    x, top_p = torch.randn(3, 9), torch.full((3,), 0.7)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(x, top_p)
    for got, want in zip(found, call(x.requires_grad_(), top_p)):
        torch.testing.assert_close(got, want)
        assert not want.requires_grad
    assert ops.sample(torch.zeros(0, 5)).shape == (0,)
    assert "not measured" not in str(ops.explain(ops.sample, torch.zeros(2, 5), backend="torch"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_on_a_gpu(backend):
    """The kernel draws what the reference draws, without waiting for the host, and again in a graph with another offset."""
    if backend == "cuda" and (reason := _cuda.unavailable()):
        pytest.skip(reason)
    for columns in (7, 1000, 50257, 128256):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = (3 * torch.randn(5, columns, device="cuda")).to(dtype)
            seed = torch.tensor([9, 0], device="cuda")
            for options in (*OPTIONS, {"temperature": 0}, {"top_p": torch.linspace(0.1, 1, 5, device="cuda")}):
                draw = lambda backend: ops.sample(x, seed=seed, backend=backend, **options)  # noqa: B023, E731
                want, draws = draw("reference"), draw(backend)
                near = int((draws != want).sum())  # rounding moves a draw between near ties, and at the edge of top_p
                assert near <= 1, (columns, dtype, options, draws, want)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = ops.sample(x, top_k=50, top_p=0.9, seed=seed, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sample(x, top_k=50, top_p=0.9, seed=seed, backend=backend)
    graph.replay()
    assert torch.equal(captured, first)
    seed[1] += 1
    graph.replay()
    assert torch.equal(captured, ops.sample(x, top_k=50, top_p=0.9, seed=seed, backend=backend))


@pytest.mark.parametrize(
    "error, words, change",
    [
        (TypeError, "logits must be floating point", {"logits": torch.ones(2, 8).int()}),
        (ValueError, r"logits must be \[B, V\]", {"logits": torch.ones(8)}),
        (ValueError, "V of at least 1", {"logits": torch.ones(2, 0)}),
        (ValueError, "temperature must be a number of at least 0 .* got -1", {"temperature": -1}),
        (ValueError, "temperature must be", {"temperature": math.nan}),
        (ValueError, "temperature must be .* at most fp32's largest, 3.4e38, got 1e", {"temperature": 1e39}),
        (ValueError, "temperature must be .* got inf", {"temperature": math.inf}),
        (ValueError, "top_k must be an integer of at least 1, got inf", {"top_k": math.inf}),
        (ValueError, "top_k must be an integer of at least 1, got nan", {"top_k": math.nan}),
        (ValueError, "top_k must be an integer", {"top_k": np.float32(0.5)}),
        (ValueError, "top_k must be an integer", {"top_k": np.True_}),
        (ValueError, "top_k must be an integer of at least 1, got 0", {"top_k": 0}),
        (ValueError, "top_k must be", {"top_k": 1.5}),
        (ValueError, "top_p must be above 0", {"top_p": 0.0}),
        (ValueError, "min_p must be in 0..1, got 1.5", {"min_p": 1.5}),
        (
            ValueError,
            r"top_p must be a number or a tensor \[2\], one for each row, got \[3\]",
            {"top_p": torch.ones(3)},
        ),
        (TypeError, "top_k must be integers, got torch.float32", {"top_k": torch.ones(2)}),
        (TypeError, "min_p must be real numbers", {"min_p": torch.ones(2).bool()}),
        (ValueError, "min_p must be on logits' device", {"min_p": torch.ones(2, device="meta")}),
        (TypeError, "seed must be an int", {"seed": 1.5}),
        (ValueError, "backend must be 'auto' or one of", {"backend": "numpy"}),
    ],
)
def test_wrong_arguments(error, words, change):
    arguments = {"logits": torch.ones(2, 8)} | change
    with pytest.raises(error, match=words):
        ops.sample(arguments.pop("logits"), **arguments)
