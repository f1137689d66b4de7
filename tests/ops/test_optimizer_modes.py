"""The modes of adamw_, sgd_ and lion_: master weights, remainders, stochastic rounding, 8-bit states, averages, skipped steps."""

import pytest
import torch

from fastlm import ops
from fastlm.ops.master_weights import join_master, split_master
from fastlm.testing import planted_bug
from tests.ops.optimizer_cases import BACKENDS, MODES, STATES, Mode, assert_alike, bits, call, clone, make, run

each_op = pytest.mark.parametrize("op", list(STATES))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", BACKENDS[1:])


def _check_mode(op, mode, backend, device):
    lists = make(op, mode, device)
    exact = mode.states == "fp32" and mode.weights in ("fp32", "masters", "remainders")
    steps = 2 if exact else 1  # what is rounded differently once would differ more after another step
    want = run(op, lists, mode, "reference", steps, grad_scale=0.5)
    assert_alike(run(op, lists, mode, backend, steps, grad_scale=0.5), want, mode, op)


@each_op
@each_kernel
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_follows_the_reference(op, backend, mode, device):
    _check_mode(op, mode, backend, device)


@each_op
def test_the_reference_itself(op, device):
    """In every mode: the fp32 step of what is stored, and nothing else."""
    for mode in MODES:
        lists = make(op, mode, device)
        got, plain = run(op, lists, mode, "reference"), make(op, Mode(), device)
        plain = {"grads": [g.float() for g in lists["grads"]]}
        weights = lists.get("masters", lists["params"])
        if mode.weights == "remainders":
            weights = [join_master(*pair) for pair in zip(lists["params"], lists["remainders"])]
        plain["params"] = [w.float() for w in weights]
        for name in STATES[op]:
            scales = lists.get(f"{name.removesuffix('s')}_scales")
            plain[name] = [t.float() for t in lists[name]] if scales is None else list(map(_value, lists[name], scales))
        if op == "adamw_" and mode.states in ("codes", "random"):  # m^2 <= 0.5763 v for beta1 = 0.8, beta2 = 0.99
            least = [
                m.double().square() * ((1 - 0.99) * (1 - 0.8**2 / 0.99) / (1 - 0.8) ** 2) for m in plain["exp_avgs"]
            ]
            plain["exp_avg_sqs"] = [torch.maximum(v, low.float()) for v, low in zip(plain["exp_avg_sqs"], least)]
        plain = run(op, plain, Mode(), "reference")
        for i, w in enumerate(plain["params"]):
            if mode.averages:
                torch.testing.assert_close(
                    got["averages"][i], 0.75 * lists["averages"][i] + 0.25 * w, rtol=1e-6, atol=1e-6
                )
            # What the formula gives of codes is not to the last bit what the reference reads.
            limits = {"rtol": 1e-6, "atol": 1e-6} if mode.states in ("codes", "random") else {"rtol": 0, "atol": 0}
            if mode.weights == "masters":
                torch.testing.assert_close(got["masters"][i], w, **limits)
            if mode.weights == "remainders":
                torch.testing.assert_close(join_master(got["params"][i], got["remainders"][i]), w, **limits)
            p, ulp = got["params"][i].float(), 2.0 ** (w.abs().log2().floor() - 7)
            limit = {"fp32": 0.0, "stochastic": 1.0}.get(mode.weights, 0.5)
            assert ((p - w).abs() <= limit * ulp + 4e-7 * (1 + w.abs())).all()
            for k, name in enumerate(STATES[op]):
                scales = got.get(f"{name.removesuffix('s')}_scales")
                exact = plain[name][i]
                if scales is not None:
                    part = exact.double().abs() / scales[i].repeat_interleave(256)[: exact.numel()].view(exact.shape)
                    root = part**0.25 * 127 if k == 0 else (part**0.125 * 255).clamp(min=1)
                    apart = (got[name][i].double().abs() - root).abs()
                    assert (apart < (1 if mode.states == "random" else 0.5) + 1e-3).all()
                    assert (got[name][i].sign() * exact.sign() >= 0).all()
                else:
                    assert torch.equal(got[name][i], exact.to(got[name][i].dtype))


def _value(codes, scales):
    """What codes stand for, by the formula in block_quantize's docstring."""
    c, scale = codes.double(), scales.double().repeat_interleave(256)[: codes.numel()].view(codes.shape)
    return ((c / 127) ** 4 * c.sign() * scale if codes.dtype == torch.int8 else (c / 255) ** 8 * scale).float()


# --- remainders ---------------------------------------------------------------------------------------------------


def _awkward(device, numel):
    """fp32 weights that are hard to split: subnormal, near the largest, ties, zeros of both signs, about to change sign."""
    words = torch.tensor(
        [0x1, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x3F808000, 0x3F818000,
         0x3F80FFFF, 0x3F807FFF, 0x0, 0x33D6BF95, 0x3F7FFFFF, 0x7F800000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF],
        dtype=torch.int64,
    )  # fmt: skip
    words = torch.cat([words, words + 2**31])
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return torch.cat([words.view(torch.float32), 0.01 * torch.randn(numel - 40)]).to(device)


def _check_remainders(op, backend, device, steps=6, numel=2100):
    """A run with fp32 masters and one with remainders, from the same weights: equal masters, bit for bit, at every step."""
    master = _awkward(device, numel)
    params, remainders = split_master(master)
    assert torch.equal(bits(join_master(params, remainders))[~master.isnan()], bits(master)[~master.isnan()])
    states = {name: [torch.zeros_like(master)] for name in STATES[op]}
    one = {"params": [params.clone()], "masters": [master.clone()], **clone(states)}
    two = {"params": [params], "remainders": [remainders], **states}
    for step in range(1, steps + 1):
        grads = [torch.randn(master.shape, device=device)]
        if step == 2:
            grads[0][-1:].view(torch.int32).fill_(0x7FFFFFFF)  # a NaN that a carry would make -0.0
        for mode, lists in ((Mode("masters"), one), (Mode("remainders"), two)):
            call(op, lists | {"grads": grads}, mode, backend, step, weight_decay=0.1)
        got, want = join_master(two["params"][0], two["remainders"][0]), one["masters"][0]
        nan = want.isnan()
        assert torch.equal(got.isnan(), nan) and torch.equal(two["params"][0].isnan(), nan), "NaN became a number"
        assert torch.equal(bits(got)[~nan], bits(want)[~nan])
        for name in STATES[op]:
            assert torch.equal(bits(two[name][0])[~nan], bits(one[name][0])[~nan])
        p = two["params"][0]
        assert ((p.float() - want).abs() <= (one["params"][0].float() - want).abs())[
            want.isfinite() & p.isfinite()
        ].all()


@each_op
@each_backend
def test_remainders_are_an_fp32_master(op, backend, device):
    _check_remainders(op, backend, device)


@each_kernel
def test_remainders_over_many_steps(backend, device):
    _check_remainders("adamw_", backend, device, 40, 300)


# --- stochastic rounding ------------------------------------------------------------------------------------------


def _exact_update(op, backend, device, numel=5000, step=3, seed=11, place=0, **options):
    """bf16 weights after a step whose fp32 sum is exact, so that only the random bits decide; and that sum."""
    torch.manual_seed(1)
    p = (1 + torch.randint(0, 128, (numel,)) / 128).to(torch.bfloat16).to(device)
    g = (torch.randint(-255, 256, (numel,)) / 256).to(torch.bfloat16).to(device)
    state = torch.zeros(numel, device=device)
    lists = {"params": [p], "grads": [g]} | ({STATES[op][0]: [state]} if op == "lion_" else {})
    lists = {k: [torch.zeros(1, dtype=t[0].dtype, device=device)] * place + t for k, t in lists.items()}
    options = {"lr": 2.0**-9, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0} | options
    options = options if op == "sgd_" else {"lr": 2.0**-10 * 1.25, "weight_decay": 0.0}
    exact = p.float() - options["lr"] * (g.float() if op == "sgd_" else g.float().sign())
    getattr(ops, op)(**lists, step=step, seed=seed, backend=backend, **options)
    return p, exact


def _check_random_bits(backend, device):
    for op in ("sgd_", "lion_"):
        for numbers in (
            {},
            {"place": 1},
            {"step": 4},
            {"seed": torch.tensor([5 << 40 | 7, 3 << 33 | 2], device=device)},
        ):
            want, exact = _exact_update(op, "reference", device, **numbers)
            got, _ = _exact_update(op, backend, device, **numbers)
            assert torch.equal(bits(got), bits(want)), f"{op}: other random bits at {numbers}"
            assert ((got.float() - exact).abs() < 2.0**-7).all() and (got.float() != exact).any()


@each_kernel
def test_random_bits_are_the_same_on_every_backend(backend, device):
    _check_random_bits(backend, device)


def test_random_bits_are_not_used_twice(device):
    base, _ = _exact_update("sgd_", "torch", device)
    tensor = lambda *pair: torch.tensor(pair, device=device)  # noqa: E731
    assert torch.equal(base, _exact_update("sgd_", "torch", device, seed=tensor(11, 0))[0])
    for other in (
        {"step": 4},
        {"place": 1},
        {"seed": 12},
        {"seed": tensor(11, 1)},
        {"seed": tensor(11 + (1 << 32), 0)},
    ):
        # Half of the roundings of another random number are others.
        assert (base != _exact_update("sgd_", "torch", device, **other)[0]).float().mean() > 0.2, other
    # Equal weights and gradients at many places of one tensor: no block repeats another.
    p, g = torch.ones(1 << 14, dtype=torch.bfloat16), torch.ones(1 << 14, dtype=torch.bfloat16)
    ops.sgd_([p], [g], lr=2.0**-9, step=1, seed=3, backend="torch")
    rows = (p == 1).view(-1, 64)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_stochastic_rounding_has_no_bias(device):
    n = 10**6
    p, exact = _exact_update("sgd_", "torch", device, n)
    assert ((p.float() - exact) * 128).double().mean().abs() < 1e-3  # units in the last place of [1, 2)
    # 1000 weights, 1000 updates of a hundredth of a unit each: rounding to nearest would never move.
    p = torch.ones(1000, dtype=torch.bfloat16)
    g = torch.full((1000,), -1.0, dtype=torch.bfloat16)
    for step in range(1, 1001):
        ops.sgd_([p], [g], lr=2.0**-7 / 100, step=step, seed=0, backend="torch")
    assert ((p.double().mean() - 1) * 128 - 10).abs() / 1000 < 1e-3


@each_backend
def test_stochastic_rounding_keeps_special_values(backend, device):
    inf, nan, top = float("inf"), float("nan"), torch.finfo(torch.bfloat16).max
    values = (
        torch.tensor([inf, -inf, nan, top, -top, 0.0, -0.0, 1.0, 2.0**-133], dtype=torch.bfloat16).repeat(40).to(device)
    )
    p, g = values.clone(), torch.zeros_like(values)
    ops.sgd_([p], [g], lr=0.5, step=1, seed=5, backend=backend)
    assert torch.equal(p.isnan(), values.isnan())
    assert torch.equal(p[~p.isnan()], values[~p.isnan()])
    p, g = torch.full((4096,), top, dtype=torch.bfloat16, device=device), torch.full((4096,), -1e36, device=device)
    ops.sgd_([p], [g], lr=1.0, step=1, seed=5, backend=backend)  # a third of the way from the largest to 2^128
    assert (p == top).all()


# --- 8-bit states -------------------------------------------------------------------------------------------------


@each_backend
def test_small_second_moments_do_not_become_zero(backend, device):
    """A gradient 1e-6 of its neighbours': a code of 0 for its v beside one of 1 for its m would be an update of 1 / eps."""
    g = torch.ones(300, device=device)
    g[::2] = 1e-6
    for seed in (None, 3):
        lists = {"params": [torch.zeros_like(g)], "grads": [g]}
        lists["exp_avgs"] = [torch.zeros(300, dtype=torch.int8, device=device)]
        lists["exp_avg_sqs"] = [torch.zeros(300, dtype=torch.uint8, device=device)]
        scales = {f"{n}_scales": [torch.zeros(2, device=device)] for n in ("exp_avg", "exp_avg_sq")}
        for step in range(1, 6):
            ops.adamw_(**lists, **scales, lr=1.0, step=step, weight_decay=0.0, seed=seed, backend=backend)
        assert (lists["exp_avg_sqs"][0] > 0).all()
        assert lists["params"][0].abs().max() < 20


@each_kernel
def test_a_block_with_nan_or_inf_stays_so(backend, device):
    for bad in (float("nan"), float("inf")):
        lists = make("lion_", Mode("fp32", "codes"), device, [(1000,)])
        lists["grads"][0][300] = bad
        call("lion_", lists, Mode("fp32", "codes"), backend)
        found = lists["exp_avg_scales"][0]
        assert found[1].isinf() and found[[0, 2, 3]].isfinite().all()
        call("lion_", lists | {"grads": [torch.zeros(1000, device=device)]}, Mode("fp32", "codes"), backend)
        assert lists["params"][0].isnan().sum() == 256


def test_codes_follow_a_slow_average(device):
    """beta2 = 0.999 takes 0.1% off v in each step, a thirtieth of a code: random codes follow."""
    lists = {"params": [torch.zeros(2048)], "grads": [torch.zeros(2048)]}
    lists["exp_avgs"] = [torch.zeros(2048, dtype=torch.int8)]
    lists["exp_avg_sqs"] = [torch.full((2048,), 128, dtype=torch.uint8)]
    lists["exp_avg_sqs"][0][::256] = 255
    scales = {"exp_avg_scales": [torch.zeros(8)], "exp_avg_sq_scales": [torch.ones(8)]}
    lists["grads"][0][::256] = 1.0  # holds the scale of each block
    before = _value(lists["exp_avg_sqs"][0], scales["exp_avg_sq_scales"][0])[1:256].mean()
    for step in range(1, 701):
        ops.adamw_(**lists, **scales, lr=0.0, step=step, beta2=0.999, seed=1, backend="torch")
    after = _value(lists["exp_avg_sqs"][0], scales["exp_avg_sq_scales"][0]).view(8, 256)[:, 1:].mean()
    assert abs(after / before / 0.999**700 - 1) < 0.05


# --- planted bugs -------------------------------------------------------------------------------------------------


def _check_all(device):
    for mode in (Mode("masters", "fp32", True), Mode("remainders", "random"), Mode("fp32", "codes", True)):
        _check_mode("adamw_", mode, "triton", device)


@each_op
@each_backend
@pytest.mark.parametrize("decay", (0.0, 0.3, 1.0))
def test_averages_that_are_given_up(op, backend, decay, device):
    """An old average leaves no rounding of its own in the new one."""
    lists = {name: [t] for name, t in zip(("params", "grads", *STATES[op]), torch.full((4, 300), 1e-3, device=device))}
    average = torch.full((300,), 1e6, device=device)
    call(op, lists | {"averages": [average]}, Mode(), backend, 2, average_decay=decay)
    want = torch.lerp(lists["params"][0].double(), torch.full_like(average, 1e6).double(), decay)
    torch.testing.assert_close(average.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "check, old, new",
    [
        (_check_remainders, "high = (bits + 0x8000) >> 16", "high = bits >> 16"),  # the carry
        (_check_remainders, "(bits - (high << 16)).to(tl.int16)", "(bits & 0x7FFF).to(tl.int16)"),
        (_check_remainders, "bits = tl.where(w == w, w.to(tl.int32, bitcast=True), _NAN)",
         "bits = w.to(tl.int32, bitcast=True)"),  # NaN carried into the sign
        (_check_random_bits, "step, start // 2, BLOCK // 2)", "step, 0, BLOCK // 2)"),  # every block draws the same
        (_check_random_bits, "(tl.zeros((COUNT // 4,), tl.float32) + step).to(tl.int32)", "zero"),  # and every step
        (_check_random_bits, "tl.load(table.stream + owner), step", "0, step"),  # and every tensor
        (_check_random_bits, "tl.join(half_of(words, False), half_of(words, True))",
         "tl.join(half_of(words, False), half_of(words, False))"),
        (_check_all, " ^ -2147483648", ""),  # codes take the weights' numbers
        (_check_all, "half_of(pairs, True)", "half_of(pairs, False)"),  # v takes those of m
        (_check_all, "tl.load(scale_ptr + row, mask", "tl.load(scale_ptr + row // 2, mask"),  # the scale of another block
        (_check_all, "tl.store(scale_ptr + row, scale", "tl.store(scale_ptr + row, tl.max(scale, 0) + 0 * scale"),
        (_check_all, "code = tl.floor(root + 0.5)", "code = tl.floor(root)"),
        (_check_all, "average + average_rest * apart", "w"),
        (_check_all, "tl.store(master_ptr + col, w, mask=mask)", "pass"),  # the master stays behind
    ],
    ids=["carry", "remainder", "nan", "block", "step", "tensor", "half", "stream", "pair", "scale", "scales", "floor",
         "average", "master"],
)  # fmt: skip
def test_planted_bug_is_seen(check, old, new, device):
    ops_of = {_check_remainders: ("adamw_",), _check_random_bits: ("sgd_", "lion_"), _check_all: ("adamw_",)}[check]
    file = "adamw" if "pairs" in old else "optimizer_state"
    args = ("adamw_", "triton", device, 3) if check is _check_remainders else ("triton", device)
    args = (device,) if check is _check_all else args
    check(*args)
    with planted_bug(ops_of[0], old, new, file=file), pytest.raises(AssertionError):
        check(*args)
