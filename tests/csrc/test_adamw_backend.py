"""The op adamw_ on csrc/adamw.cu, on the host body of the device layer, against the reference and torch's AdamW."""

import math
import re

import pytest
import torch

from fastlm import ops
from fastlm.kernels import tensor_table
from fastlm.kernels.tensor_table import BLOCK, format_of
from fastlm.ops import _cuda
from fastlm.ops.adamw import OP
from fastlm.testing import bands_intact, guarded, poison_empty
from tests.csrc.host_library import ROOT, needs_compiler
from tests.csrc.test_adamw import COLUMNS, RICH, SHAPES
from tests.ops import test_adamw as plain
from tests.ops import test_optimizer_contract as contract
from tests.ops import test_optimizer_modes as modes
from tests.ops.optimizer_cases import MODES, OPTIONS, Mode, bits, call, clone, make, run, same_bits

pytestmark = needs_compiler
as_backend = pytest.mark.usefixtures("cuda_on_the_host")


@as_backend
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_follows_the_reference(mode):
    modes._check_mode("adamw_", mode, "cuda", "cpu")


@as_backend
@pytest.mark.parametrize("grad_scale", [None, 0.5])
def test_follows_torch_in_fp32(grad_scale):
    plain.test_follows_torch_in_fp32("cuda", grad_scale, "cpu")


@as_backend
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16), (torch.float32, torch.float32, torch.bfloat16),
     (torch.float16, torch.float32, torch.float32), (torch.float16,) * 3],
    ids=["bf16", "bf16_with_fp32_state", "fp32_with_bf16_grads", "fp16_with_fp32_state", "fp16"],
)  # fmt: skip
def test_accuracy(dtypes):
    plain.test_accuracy("cuda", dtypes, "cpu")


@as_backend
def test_remainders_are_an_fp32_master_bit_for_bit():
    modes._check_remainders("adamw_", "cuda", "cpu")
    modes._check_remainders("adamw_", "cuda", "cpu", 40, 300)


@as_backend
@pytest.mark.parametrize("seed", (11, torch.tensor([5 << 40 | 7, 3 << 33 | 2])), ids=("int", "tensor"))
def test_random_bits_are_the_references(seed):
    """With betas and eps of 0 a step is exactly lr * sign(gradient), so that the random bits alone decide."""
    p = (1 + torch.randint(0, 128, (5000,)) / 128).bfloat16()
    g = torch.randint(1, 256, (5000,)).mul_(torch.randint(0, 2, (5000,)) * 2 - 1).div(256).bfloat16()
    exact = p.float() - 2.0**-10 * 1.25 * g.float().sign()
    found = []
    for backend in ("reference", "cuda"):
        lists = [[torch.ones(1, dtype=torch.bfloat16), p.clone()], [torch.ones(1, dtype=torch.bfloat16), g]]
        states = [[torch.zeros(1), torch.zeros(5000)] for _ in range(2)]
        ops.adamw_(*lists, *states, lr=2.0**-10 * 1.25, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, step=4,
                   seed=seed, backend=backend)  # fmt: skip
        found.append(lists[0][1])
    assert torch.equal(bits(found[0]), bits(found[1]))
    assert ((found[0].float() - exact).abs() < 2.0**-7).all() and (found[0].float() != exact).float().mean() > 0.9
    assert ((found[0].float() - exact).mean() * 128).abs() < 0.03


@as_backend
def test_special_values_are_rounded_as_the_references():
    inf, top = math.inf, torch.finfo(torch.bfloat16).max
    values = torch.tensor([inf, -inf, math.nan, top, -top, 0.0, -0.0, 1.0, 2.0**-133], dtype=torch.bfloat16).repeat(40)
    # The last: a third of the way from the largest to infinity, which is never taken.
    for g, beta in ((0.0, 0.9), (1.0, 0.0)):
        found = []
        for backend in ("reference", "cuda"):
            p, grads, m, v = values.clone(), torch.full_like(values, -g), torch.zeros(360), torch.zeros(360)
            ops.adamw_(
                [p], [grads], [m], [v], lr=1e36, beta1=beta, beta2=beta, eps=1e-8, weight_decay=0.0, step=1, seed=5,
                backend=backend,
            )  # fmt: skip
            found.append(p)
        want, got = found
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(bits(got)[~got.isnan()], bits(want)[~got.isnan()])
        assert (got[values == top] == top).all()


@as_backend
def test_early_bias_correction_is_exact():
    for step in (1, 2, 700, 100_000):
        found = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cuda")):
            p, g, m, v = ([torch.full((3,), float(x), dtype=dtype)] for x in (0, 1, 0, 0))
            ops.adamw_(p, g, m, v, lr=1.0, step=step, backend=backend)
            found.append(p[0].double())
        torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


@as_backend
def test_infinite_moments_and_small_betas():
    for dtype, large in ((torch.float16, 1e4), (torch.float32, 1e21)):
        plain.test_an_infinite_second_moment_stops_its_weight_alone("cuda", dtype, large, "cpu")
    plain.test_an_infinite_first_moment_stays_what_it_is("cuda", "cpu")
    for betas in ((0.9, 0.0), (0.0, 0.0), (0.0, 0.999), (1e-6, 1e-9), (0.3, 0.4)):
        plain.test_small_betas_forget("cuda", betas, "cpu")


@as_backend
def test_moments_settle_at_what_gradients_are():
    plain.test_moments_settle_at_what_gradients_are("cpu", "cuda")


@as_backend
def test_a_step_tensor_is_as_exact_as_a_number():
    plain.test_a_step_tensor_is_as_exact_as_a_number("cuda", 0.99999, "cpu")


@as_backend
@pytest.mark.parametrize("decay", (0.0, 0.3, 1.0))
def test_averages_that_are_given_up(decay):
    modes.test_averages_that_are_given_up("adamw_", "cuda", decay, "cpu")


@as_backend
def test_codes():
    modes.test_small_second_moments_do_not_become_zero("cuda", "cpu")
    for bad in (math.nan, math.inf):  # a block with such a number stays NaN, the others do not
        mode = Mode("fp32", "codes")
        lists = make("adamw_", mode, "cpu", [(1000,)])
        lists["grads"][0][300] = bad
        call("adamw_", lists, mode, "cuda")
        assert [s.isinf().tolist() for s in lists["exp_avg_scales"]] == [[False, True, False, False]]
        call("adamw_", lists | {"grads": [torch.zeros(1000)]}, mode, "cuda")
        assert lists["params"][0].isnan().sum() == 256


@as_backend
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_one_bad_gradient_anywhere_leaves_all_as_it_was(bad):
    """As in training: the norm of the gradients, the skip and the clip coefficient stay on the device."""
    for mode in (Mode(), RICH):
        lists = make("adamw_", mode, "cpu", [(5, 7), (700,)])
        for i, at in ((0, 0), (0, 34), (1, 0), (1, 699)):
            grads = [g.clone() for g in lists["grads"]]
            grads[i].view(-1)[at] = bad
            before = clone(lists)
            norm = ops.global_norm(grads, backend="cuda")
            found, scale = (~norm.isfinite()).float(), (1 / norm).clamp(max=1)
            call("adamw_", lists | {"grads": grads}, mode, "cuda", 2, found_inf=found, grad_scale=scale)
            assert same_bits(lists, before)


@as_backend
def test_skips_and_numbers_as_the_others():
    contract._check_skip("adamw_", "cuda", "cpu", MODES[::4])
    plain.test_numbers_may_be_tensors("cuda", "cpu")
    lists = [[t for t in tensors if t.numel()] for tensors in plain._lists("cpu")]
    want, got = ([[t.clone() for t in tensors] for tensors in lists] for _ in range(2))
    ops.adamw_(*want, lr=0.02, step=3, grad_scale=0.25, backend="cuda")
    numbers = (torch.tensor(0.02), torch.tensor(3), torch.tensor(0.25, dtype=torch.float64))  # of other dtypes too
    OP.forward(*got, *[[]] * 5, *numbers, None, None, [], 0.0, 0.0, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.01, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(plain._flat(got), plain._flat(want)))


@as_backend
@pytest.mark.parametrize("mode", [Mode(), RICH, Mode("stochastic", "bf16", True), Mode("masters", "codes")], ids=str)
def test_nothing_else_is_touched_and_runs_repeat(mode):
    lists = make("adamw_", mode, "cpu", [(5, 7), (2049,)])
    pairs = {name: [guarded(t, band=113.0) for t in tensors] for name, tensors in lists.items()}
    inner = {name: [t for t, _ in found] for name, found in pairs.items()}
    with poison_empty():
        call("adamw_", inner, mode, "cuda", 2)
    for name, found in pairs.items():
        assert all(bands_intact(buffer) for _, buffer in found), f"{mode}: wrote outside a tensor of {name}"
    again = clone(lists)
    call("adamw_", again, mode, "cuda", 2)
    assert same_bits(inner, again) and same_bits({"grads": inner["grads"]}, {"grads": lists["grads"]})


@as_backend
def test_memory_of_any_order():
    plain.test_strides("cuda", "cpu")
    plain.test_nothing_to_do("cuda", "cpu")
    plain.test_leaves_that_require_grad("cuda", "cpu")
    for mode in (Mode("fp32", "codes", True), RICH):
        lists = make("adamw_", mode, "cpu", [(40, 60)])
        want = run("adamw_", lists, mode, "cuda")
        views = {n: [t.clone().t() if t.ndim == 2 else t.clone() for t in tensors] for n, tensors in lists.items()}
        views["grads"] = [g.contiguous() for g in views["grads"]]
        call("adamw_", views, mode, "cuda", 2)
        flat = {name: [t.t() if t.ndim == 2 else t for t in tensors] for name, tensors in views.items()}
        assert same_bits(flat | {"grads": []}, want | {"grads": []})


@as_backend
@pytest.mark.parametrize("coded", (False, True))
def test_offsets_have_64_bits(coded):
    """A table by hand says that the tensors are the end of ones of 2^32 elements and more, which begin far outside of memory."""
    lists = make("adamw_", Mode("fp32", "codes" if coded else "fp32"), "cpu", [(300,)])
    far, columns = 1 << 32, [lists.get(name, []) for name in COLUMNS]
    found = []
    for blocks in (0, far // BLOCK):
        work = [[t.clone() for t in tensors] for tensors in columns]
        past = [blocks * BLOCK // (256 if name.endswith("scales") else 1) for name in COLUMNS]
        address = [t[0].data_ptr() - n * t[0].element_size() if t else 0 for t, n in zip(work, past)]
        sizes, owner, block = torch.tensor([blocks * BLOCK + 300]), torch.zeros(1, dtype=torch.int32), [blocks]
        torch.ops.fastlm_host.adamw_step(
            torch.tensor([address]), sizes, None, owner, torch.tensor(block, dtype=torch.int32), [*map(format_of, columns)],
            False, False, *[None] * 5, 0.1, 1.0, 1.0, 0.0, -0.1, -0.01, 0.9, 0.0, 0.99, 0.0, 0.1, 0.01, 0.0, 1e-8,
            0.1,
        )  # fmt: skip
        found.append(plain._flat(work))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and not torch.equal(found[0][0], lists["params"][0])


def test_python_and_the_kernels_mean_the_same_numbers():
    headers = "".join((ROOT / "csrc" / name).read_text(encoding="utf-8") for name in ("fastlm.h", "multi_tensor.h"))
    assert int(re.search(r"#define FASTLM_TABLE_BLOCK (\d+)", headers).group(1)) == BLOCK
    for dtype, number in tensor_table._FORMATS.items():
        assert f"FASTLM_{str(dtype)[6:].upper()} = {number}" in headers
    assert "FASTLM_ABSENT = -1" in headers and format_of([]) == -1
    names = re.findall(r"FASTLM_ADAMW_([A-Z_]+),?\n", (ROOT / "csrc" / "adamw.h").read_text(encoding="utf-8"))
    assert [f"{name.lower()}s" for name in names[:9]] == list(COLUMNS) and names[9] == "LISTS"


@as_backend
def test_mixed_lists_draw_by_their_own_place():
    p = [torch.ones(300), torch.ones(300, dtype=torch.bfloat16), torch.ones(0)]
    g, m, v = ([torch.full_like(t, x) for t in p] for x in (0.3, 0, 0))
    ops.adamw_(p, g, m, v, lr=1e-3, step=1, seed=5, backend="cuda")
    one = [[torch.full((300,), x, dtype=torch.bfloat16)] for x in (1, 0.3, 0, 0)]
    ops.adamw_(*one, lr=1e-3, step=1, seed=5, streams=[1], backend="cuda")
    assert torch.equal(p[1], one[0][0]) and len(p[1].unique()) == 2 and len(p[0].unique()) == 1


@as_backend
def test_dispatcher_and_compile():
    lists = make("adamw_", RICH, "cpu", [(5, 7), (300,)])
    numbers = (None, None, torch.tensor(0.5), torch.zeros(()), torch.tensor([1, 2]))
    constants = tuple(OPTIONS["adamw_"][k] for k in OPTIONS["adamw_"] if k != "lr")
    columns = contract._flat("adamw_", lists)
    torch.library.opcheck(OP.forward, (*columns, *numbers, [0, 1], 0.1, 3.0, 0.0, 0.5, *constants, "cuda"))
    plain.test_compile("cuda", "cpu")


def test_what_it_does_not_take():
    p = [torch.ones(3).double()]
    with pytest.raises(ValueError, match="its kernels take float32, bfloat16, float16, got float64"):
        ops.adamw_(p, p, p, p, lr=0.1, step=1, backend="cuda")
    assert "not measured" in OP._slower("cuda") and OP._slower("triton") is None
    with pytest.raises(ValueError, match=r"sgd_: backend must be 'auto' or one of \('triton', 'torch', 'reference'\)"):
        ops.sgd_([torch.ones(3)], [torch.ones(3)], lr=0.1, step=1, backend="cuda")


@as_backend
def test_wrong_calls_are_refused():
    call, long, short = torch.ops.fastlm_host.adamw_step, torch.int64, torch.int32
    right = [
        torch.zeros(2, 9, dtype=long), torch.zeros(2, dtype=long), None, torch.zeros(0, dtype=short),
        torch.zeros(0, dtype=short), [0] * 9, False, False, *[None] * 5, *[0.0] * 15,
    ]  # fmt: skip
    assert call(*right) is None  # a table without blocks: nothing to do
    for changed, words in (
        ({0: torch.zeros(2, 8, dtype=long)}, "address must be a contiguous tensor of 18 elements"),
        ({5: [0] * 8}, "formats must have 9 entries"),
        ({6: True}, "random numbers need seed and stream"),
        ({7: True, 2: torch.zeros(3, dtype=short), 12: torch.zeros(2, dtype=long)}, "stream must be .* of 2 elements"),
        ({7: True, 2: torch.zeros(2, dtype=short), 12: torch.zeros(3, dtype=long)}, "seed must be .* of 2 elements"),
        ({8: torch.ones((), dtype=torch.float64)}, "lr must be a contiguous tensor of 1 elements of the type"),
        ({11: torch.ones((), device="meta")}, "found_inf must be a CPU tensor"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(*(dict(enumerate(right)) | changed).values())


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_on_a_gpu(mode):
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    modes._check_mode("adamw_", mode, "cuda", "cuda")
    lists = {n: [t.cuda() for t in tensors] for n, tensors in make("adamw_", mode, "cpu", [(1 << 20,), (77,)]).items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        one, two = (run("adamw_", lists, mode, "cuda") for _ in range(2))
    torch.cuda.synchronize()
    assert same_bits(one, two)


@pytest.mark.gpu
def test_remainders_and_skips_on_a_gpu():
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    modes._check_remainders("adamw_", "cuda", "cuda")
    contract._check_skip("adamw_", "cuda", "cuda", MODES)
    plain.test_numbers_may_be_tensors("cuda", "cuda")
    plain.test_strides("cuda", "cuda")


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Numbers and the skip are read at every replay."""
    if reason := _cuda.unavailable():
        pytest.skip(reason)
    lists = make("adamw_", RICH, "cuda", SHAPES)
    numbers = {"step": torch.tensor(2.0, device="cuda"), "found_inf": torch.zeros((), device="cuda")}
    seed, want = torch.tensor([11, 0], device="cuda"), clone(lists)
    options = OPTIONS["adamw_"] | {"average_decay": 0.75, "backend": "cuda", "seed": seed}
    ops.adamw_(**clone(lists), **numbers, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = ops.global_norm(lists["grads"], backend="cuda")
        ops.adamw_(**lists, **numbers, **options)
    for step, found in ((2, 0), (3, 1), (4, 0)):
        numbers["step"].fill_(step), numbers["found_inf"].fill_(found)
        graph.replay()
        if not found:
            ops.adamw_(**want, step=step, **options)
        assert same_bits(lists, want)
        torch.testing.assert_close(norm, ops.global_norm(lists["grads"], backend="reference"), rtol=1e-6, atol=0)
