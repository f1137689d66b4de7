"""csrc/adamw.cu on the host body of the device layer, against the reference. As the op's backend: test_adamw_backend.py."""

import math
import re
import subprocess
from ctypes import c_float, c_int32

import pytest
import torch

from fastlm.kernels.moment_bound import in_two, least_root
from fastlm.kernels.tensor_table import BLOCK, format_of
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
from tests.ops.optimizer_cases import OPTIONS, Mode, assert_alike, call, clone, make, same_bits
from tests.wheels import build_library

pytestmark = needs_compiler
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
