"""csrc/adamw.cu on the host body of the device layer, alone and as the op's backend, against the reference and torch's AdamW."""

import math
import re
import subprocess
from ctypes import c_float, c_int32

import pytest
import torch

from fastlm import ops
from fastlm.kernels import tensor_table
from fastlm.kernels.moment_bound import in_two, least_root
from fastlm.kernels.tensor_table import BLOCK, format_of
from fastlm.ops import _cuda
from fastlm.ops.adamw import OP
from fastlm.testing import bands_intact, guarded, poison_empty
from tests.csrc.host_library import (
    ROOT,
    Both,
    HostError,
    In,
    library,
    needs_compiler,
    needs_nvcc,
    planted,
    same_in_all_orders,
)
from tests.ops import test_adamw as plain
from tests.ops import test_optimizer_contract as contract
from tests.ops import test_optimizer_modes as modes
from tests.ops.optimizer_cases import MODES, OPTIONS, Mode, assert_alike, bits, call, clone, make, run, same_bits
from tests.wheels import build_library

pytestmark = needs_compiler
as_backend = pytest.mark.usefixtures("cuda_on_the_host")
COLUMNS = (
    "params", "grads", "exp_avgs", "exp_avg_sqs", "masters", "remainders", "averages", "exp_avg_scales",
    "exp_avg_sq_scales",
)  # fmt: skip
RICH = Mode("remainders", "random", True)
# Three blocks of the table with a tail that ends within a lane's four elements, less than one, and exactly one.
SHAPES = [(2 * BLOCK + 150,), (5, 7), (BLOCK,)]


@pytest.fixture(scope="module")
def lib():
    return library("csrc/adamw.cu")


def launch(lib, lists, mode, order="forward", step=3, seed=(11, 0), found_inf=None, grad_scale=0.5, **changed):
    """Copies of the lists after one step by one launch; `changed` replaces members of the launcher's struct."""
    lists = {name: [_copied(t) for t in tensors] for name, tensors in lists.items()}
    columns = [lists.get(name, []) for name in COLUMNS]
    params, options = lists["params"], OPTIONS["adamw_"]
    beta1, beta2 = options["beta1"], options["beta2"]
    (high1, low1), (high2, low2) = in_two(beta1), in_two(beta2)
    counts = [-(-p.numel() // BLOCK) for p in params]
    pointers = [[t[i].data_ptr() if t else 0 for t in columns] for i in range(len(params))]
    random_codes, random_weights = mode.states == "random", mode.weights == "stochastic"
    numbers = {
        "lr": options["lr"], "step": float(step), "grad_scale": grad_scale, "average_rest": 0.25,
        "log_beta1": math.log(beta1), "log_beta2": math.log(beta2), "high1": high1, "low1": low1,
        "high2": high2, "low2": low2, "rest1": 1 - beta1, "rest2": 1 - beta2,
        "least": least_root(beta1, beta2), "eps": options["eps"], "weight_decay": options["weight_decay"],
    }  # fmt: skip
    buffers = {f"{name} {i}": (In if name == "grads" else Both)(t) for name in lists for i, t in enumerate(lists[name])}
    lib.run("fastlm_adamw_step", {
        "addresses": In(torch.tensor(pointers)), "sizes": In(torch.tensor([p.numel() for p in params])),
        "owners": In(torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], dtype=torch.int32)),
        "blocks": In(torch.tensor([b for n in counts for b in range(n)], dtype=torch.int32)), "count": sum(counts),
        "formats": (c_int32 * 9)(*map(format_of, columns)),
        "random_weights": c_int32(random_weights), "random_codes": c_int32(random_codes),
        "streams": In(torch.arange(len(params), dtype=torch.int32)), "seed": In(torch.tensor(seed)),
        "found_inf": In(None if found_inf is None else torch.tensor(found_inf)),
        "lr_at": None, "step_at": None, "grad_scale_at": None, **{k: c_float(n) for k, n in numbers.items()}, **changed,
    }, order=order, buffers=buffers)  # fmt: skip
    return lists


def _copied(t):
    """A copy that begins where t does within 16 bytes."""
    past = t.data_ptr() % 16 // t.element_size()
    whole = torch.empty(t.numel() + past, dtype=t.dtype)
    return whole[past:].view(t.shape).copy_(t)


def wanted(lists, mode):
    lists = clone(lists)
    call("adamw_", lists, mode, "reference", 3, grad_scale=0.5)
    return lists


def check_launch(lib, mode, orders=True, shapes=SHAPES):
    lists = make("adamw_", mode, "cpu", shapes)
    lists = {name: [_moved(t, i) for i, t in enumerate(tensors)] for name, tensors in lists.items()}
    names = [name for name in lists if name != "grads"]

    def written(order):
        found = launch(lib, lists, mode, order)
        return tuple(t for name in names for t in found[name])

    got = iter(same_in_all_orders(written) if orders else written("random"))
    assert_alike({name: [next(got) for _ in lists[name]] for name in names} | {"grads": []},
                 wanted(lists, mode) | {"grads": []}, mode, "adamw_")  # fmt: skip


def _moved(t, i):
    """The second tensor of each list does not begin at a multiple of what a lane reads at once."""
    return torch.cat([t.new_zeros(i % 2), t.view(-1)])[i % 2 :].view(t.shape) if t.dtype != torch.float32 or i else t


@pytest.mark.parametrize(
    "mode",
    [Mode(), Mode("stochastic", "bf16"), RICH, Mode("fp32", "codes"), Mode("masters", "fp32", True)], ids=str,
)  # fmt: skip
def test_all_orders(lib, mode):
    check_launch(lib, mode)


@pytest.mark.parametrize("found", (1.0, -1.0, math.nan, math.inf))
def test_a_skipped_step_writes_nothing(lib, found):
    for mode in (Mode(), RICH):
        lists = make("adamw_", mode, "cpu", SHAPES[1:])
        assert same_bits(launch(lib, lists, mode, found_inf=found), lists)
        assert same_bits(launch(lib, lists, mode, found_inf=0.0), launch(lib, lists, mode))


def test_numbers_on_the_device(lib):
    for mode in (Mode(), RICH):
        lists = make("adamw_", mode, "cpu", SHAPES[1:])
        on_device = {
            "lr_at": In(torch.tensor(1e-2)), "step_at": In(torch.tensor(3.0)), "grad_scale_at": In(torch.tensor(0.5)),
            "lr": c_float(9), "step": 9, "grad_scale": 9.0,
        }  # fmt: skip
        assert same_bits(launch(lib, lists, mode, **on_device), launch(lib, lists, mode))


def test_a_table_that_is_wrong_is_seen(lib):
    lists = make("adamw_", Mode(), "cpu", [(40,)])
    with pytest.raises(HostError, match="out of bounds: read of bytes 160 to 175 of buffer '.* 0'"):
        launch(lib, lists, Mode(), sizes=In(torch.tensor([44])))
    with pytest.raises(HostError, match="out of bounds: read of .* of buffer 'owners'"):
        launch(lib, lists, Mode(), count=2)
    with pytest.raises(HostError, match="returned 1: no report"):
        launch(lib, lists, Mode(), count=0)


@needs_nvcc
def test_fp32_moves_in_16_bytes_and_16_bits_in_8(tmp_path):
    """Each of a lane's accesses, of which every list has one for either group of four elements: none is split up."""
    ptx = tmp_path / "adamw.ptx"
    command = [build_library.find_nvcc(), "-std=c++20", "-O3", "-I", ROOT / "csrc", "-arch=sm_90a", "-ptx"]
    subprocess.run([*command, ROOT / "csrc" / "adamw.cu", "-o", ptx], check=True)
    kernels = re.split(r"\.entry ", ptx.read_text())[1:]
    assert len(kernels) == 4
    for text in kernels:
        average = "ELb1EE" in text.split("(")[0]
        for word, lists in (
            ("ld", 5),
            ("st", 5),
        ):  # weight, remainder, gradient, states; parameter, master, remainder, states
            found = re.findall(rf"\b{word}\.global\.cs((?:\.v\d)?\.[a-z]\d+)", text)
            for width in (".v4.u32", ".v2.u32"):
                assert found.count(width) >= 2 * (lists + average), (word, width, found)


# --- planted bugs -------------------------------------------------------------------------------------------------

BUGS = {
    "no first bias correction": ("rate = lr / one_minus_power(a.log_beta1, step);", "rate = lr;"),
    "no second bias correction": ("1.0f / sqrtf(one_minus_power(a.log_beta2, step))", "1.0f"),
    "no decay": ("w = fmaf(-decay, w, w);", ""),
    "no bound of codes": ("if (bound * bound > v) v = bound * bound;", ""),
    "no gradient scale": ("const float scaled = g * scale;", "const float scaled = g;"),
    "remainders without the carry": ("has_remainder ? 0x8000 :", "has_remainder ? 0 :"),
    "words of another lane": ("mine.word[2 + k], 1)", "mine.word[2 + k], 2)"),
    "words of the other group": ("word[0][k] = odd ? other : mine.word[k];", "word[0][k] = mine.word[k];"),
    "each state the same half": (": words.word[i] >> 16", ": words.word[i] & 0xffff"),
    "codes draw the weights' numbers": ("lane_id(), kCodes, step_number", "lane_id(), 0, step_number"),
    "one scale for all": ("(address(column)) + first / kWarp", "(address(column))"),
    "a lane's scale for all": ("scale = warp_max(scale);", ""),
    "codes cut off": ("floorf(root + 0.5f)", "floorf(root)"),
    "averages forget": ("between(x[i], w[j][i], a.average_rest)", "w[j][i]"),
    "the tail is taken for whole": ("rest < kLane ? static_cast<int>(rest) : kLane", "kLane"),
    "all is taken for aligned": ("base % (kLane * bytes) == 0}", "true}"),
    "the second half is left out": ("(a.table.count) * kShares}", "(a.table.count)}"),
    "masters stay behind": ("row.list(FASTLM_ADAMW_MASTER).put(j, left, out);", ""),
    "a skip is not seen": ("if (found != 0) return;", ""),
    "NaN is no skip": ("if (found != 0) return;", "if (found > 0) return;"),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory):
    """The kernel that can do all of it, alone: a quarter of the time to compile."""
    folder = tmp_path_factory.mktemp("planted")
    text = (ROOT / "csrc" / "adamw.cu").read_text(encoding="utf-8")
    text, changed = re.subn(r"const auto kernel = [^;]*;", "const auto kernel = adamw_kernel<true, true>;", text)
    assert changed == 1
    (folder / "one.cu").write_text(text, encoding="utf-8")
    (folder / "all").mkdir()
    return planted(str(folder / "one.cu"), BUGS, folder / "all", ["adamw_lists.h"])


def check_all(lib):
    for mode in (RICH, Mode("stochastic", "random", True), Mode("masters", "codes", True)):
        check_launch(lib, mode, orders=False)
    lists = make("adamw_", RICH, "cpu", SHAPES[1:])
    for found in (1.0, math.nan):
        assert same_bits(launch(lib, lists, RICH, found_inf=found), lists)


def test_the_lists_that_show_the_bugs_are_right(lib):
    check_all(lib)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, with_bug):
    with pytest.raises((AssertionError, HostError)):
        check_all(with_bug[name])


# --- the op's backend ---------------------------------------------------------------------------------------------


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
