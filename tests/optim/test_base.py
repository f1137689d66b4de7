"""What all optimizers share, on each of them: skipping, clipping, storage modes, averages, GradScaler, torch's own helpers."""

import copy
import math
import pickle

import pytest
import torch

from fastlm import ops, optim
from fastlm.errors import UserError
from fastlm.ops import use_backend
from tests.optim.cases import (
    CLASSES,
    MODES,
    assert_bits_equal,
    each_class,
    each_mode,
    make,
    run,
    set_gradients,
    snapshot,
)


def _spoil(params, place, bad):
    where = {"first": ("wide", 0), "last": ("vector", 8), "tiny": ("scalar", 0), "16 bits": ("wide", 4159)}[place]
    params[where[0]].grad.view(-1)[where[1]] = bad


@each_class
@each_mode
@pytest.mark.parametrize("known", (True, False), ids=("host", "device"))
def test_a_non_finite_gradient_changes_nothing(name, mode, known, device, monkeypatch):
    """known=False: as on a GPU, where the host does not wait to hear of it; the kernels decide."""
    where = "cpu" if known else device
    params, optimizer = make(name, mode, where)
    other, untroubled = make(name, mode, where)
    if not known:
        monkeypatch.setattr(optim.FusedOptimizer, "_is_known", lambda *_: False)
    count = 0
    with use_backend("auto" if known else "triton"):
        run(params, optimizer, [0])
        run(other, untroubled, [0])
        before = snapshot(params, optimizer)
        places = ("first", "last", "tiny", "16 bits") if known else ("last",)
        for place in places:
            for bad in (math.nan, math.inf, -math.inf) if known else (math.nan,):
                set_gradients(params, 1)
                _spoil(params, place, bad)
                optimizer.step()
                count += 1
                assert optimizer.skipped.item() == count, (place, bad)
                assert_bits_equal(snapshot(params, optimizer), before)
        run(params, optimizer, [2, 3])
        run(other, untroubled, [2, 3])
    # Skipped steps do not count: the rest is as if they had never been.
    assert_bits_equal(snapshot(params, optimizer), snapshot(other, untroubled))
    assert all(float(s["step"]) == 3 for s in optimizer.state_dict()["state"].values())


@each_class
def test_a_first_step_may_be_skipped(name, device, monkeypatch):
    monkeypatch.setattr(optim.FusedOptimizer, "_is_known", lambda *_: False)
    params, optimizer = make(name, "average", device)
    other, untroubled = make(name, "average", device)
    with use_backend("triton"):
        set_gradients(params, 1)
        params["wide"].grad[0, 0] = math.nan
        optimizer.step()
        run(params, optimizer, [2, 3])
        run(other, untroubled, [2, 3])
    assert_bits_equal(snapshot(params, optimizer), snapshot(other, untroubled))


def test_without_skipping_torch_is_followed_into_the_ditch():
    params, optimizer = make("adamw", skip_nonfinite=False)
    set_gradients(params, 0)
    params["matrix"].grad[0, 0] = math.nan
    optimizer.step()
    assert params["matrix"].isnan().any() and params["wide"].isfinite().all()
    assert optimizer.skipped.item() == 0 and optimizer.grad_norm is None


@each_class
def test_max_norm_is_clipping_before_the_step(name):
    ours, ours_optimizer = make(name, max_norm=0.5, skip_nonfinite=False)
    theirs, theirs_optimizer = make(name, skip_nonfinite=False)
    for seed, scale in ((0, 1.0), (1, 1e-4), (2, 3.0)):
        set_gradients(ours, seed, scale)
        before = {k: p.grad.clone() for k, p in ours.items()}
        ours_optimizer.step()
        assert all(torch.equal(p.grad, before[k]) for k, p in ours.items()), "a gradient was changed"
        set_gradients(theirs, seed, scale)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        torch.testing.assert_close(ours_optimizer.grad_norm, norm)
        theirs_optimizer.step()
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-5, atol=1e-6)


def test_grad_scale_comes_before_clipping():
    ours, ours_optimizer = make("sgd", max_norm=0.5)
    theirs, theirs_optimizer = make("sgd", max_norm=0.5)
    set_gradients(ours, 0, 1024.0)
    ours_optimizer.step(grad_scale=torch.tensor(1 / 1024))
    set_gradients(theirs, 0)
    theirs_optimizer.step(grad_scale=1.0)
    torch.testing.assert_close(ours_optimizer.grad_norm, theirs_optimizer.grad_norm)
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-6, atol=1e-7)


@each_class
@pytest.mark.parametrize("unscale", (False, True), ids=("scaled", "unscaled by the user"))
def test_grad_scaler(name, unscale):
    """torch's scaler on the CPU: an overflow is skipped and halves the scale, the rest equals the run without a scaler."""
    params, optimizer = make(name, max_norm=1.0)
    other, plain = make(name, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(4):
        scaler.scale(torch.ones(()))  # what makes the scaler's own tensors
        set_gradients(params, seed, scaler.get_scale())
        if seed == 1:
            params["matrix"].grad[1, 1] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if seed != 1:
            run(other, plain, [seed])
            torch.testing.assert_close(optimizer.grad_norm, plain.grad_norm, rtol=1e-5, atol=0)
    assert scaler.get_scale() == 2.0**9 and optimizer.skipped.item() == 1
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    for k in params:
        torch.testing.assert_close(params[k], other[k], rtol=1e-5, atol=1e-6)


@each_class
def test_the_fp32_weight_survives_16_bits(name):
    """Updates far below half a bf16 step: "nearest" stands still, the other modes move as fp32 does."""
    moved = {}
    for mode in ("nearest", "stochastic", "remainder", "master"):
        params, optimizer = make(name, mode)
        start = params["wide"].detach().float().clone()
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-5, 0.0
        for _ in range(8):
            params["wide"].grad = torch.ones_like(params["wide"])
            optimizer.step()
        state = optimizer.state[params["wide"]]
        if mode == "remainder":
            assert state["remainder"].dtype == torch.int16
        end = params["wide"].detach().float()
        if mode == "master":
            assert state["master"].dtype == torch.float32
            assert torch.equal(state["master"].bfloat16(), params["wide"])
            end = state["master"]
        if mode == "remainder":
            from fastlm.ops.master_weights import join_master

            end = join_master(params["wide"].detach(), state["remainder"])
        moved[mode] = (start - end).mean().item()
        assert params["vector"].dtype == torch.float32 and "master" not in optimizer.state.get(params["vector"], {})
    total = {"adamw": 8e-5, "lion": 8e-5, "sgd": 1e-5 * sum(sum(0.9**j for j in range(i + 1)) for i in range(8))}[name]
    assert moved["master"] == pytest.approx(total, rel=1e-2)
    assert moved["remainder"] == pytest.approx(moved["master"], rel=1e-6)
    assert moved["stochastic"] == pytest.approx(total, rel=0.5)
    assert abs(moved["nearest"]) < 0.3 * total


def test_remainder_is_the_master_bit_for_bit():
    from fastlm.ops.master_weights import join_master

    (a, one), (b, two) = make("adamw", "remainder"), make("adamw", "master")
    for group in two.param_groups:
        group["state_bits"] = None
    run(a, one, range(5))
    run(b, two, range(5))
    for k in ("wide", "matrix", "scalar"):
        whole = join_master(a[k].detach(), one.state[a[k]]["remainder"])
        assert torch.equal(whole, two.state[b[k]]["master"]), k


def test_stochastic_rounding_repeats_with_the_seed_and_differs_without():
    runs = {}
    for label, seed in (("a", 5), ("b", 5), ("c", 6)):
        params, optimizer = make("adamw", "stochastic", seed=seed)
        run(params, optimizer, range(3))
        runs[label] = params["wide"].detach()
    assert torch.equal(runs["a"], runs["b"]) and not torch.equal(runs["a"], runs["c"])


def test_moments_have_the_dtypes_that_are_asked_for():
    def dtypes(mode, **options):
        params, optimizer = make("adamw", mode, **options)
        run(params, optimizer, [0])
        return [optimizer.state[params[k]]["exp_avg_sq"].dtype for k in ("wide", "matrix", "vector")]

    assert dtypes("nearest") == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert dtypes("nearest", state_bits=32) == [torch.float32] * 3
    assert dtypes("stochastic") == dtypes("remainder") == [torch.float32] * 3
    assert dtypes("8 bits") == [torch.uint8, torch.float32, torch.float32]


@each_class
@each_mode
def test_strides_of_parameters(name, mode):
    """Transposed and sliced parameters move as contiguous ones; where blocks or random numbers follow memory, nearly so."""
    (cls, hyper), (dtype, stored) = CLASSES[name], MODES[mode]
    values = torch.randn(80, 70).to(dtype)
    wide = torch.full((80, 140), math.nan, dtype=dtype)
    forms = [values.clone(), values.t().contiguous().t(), wide[:, ::2].copy_(values)]
    params = [torch.nn.Parameter(form) for form in forms]
    strides = [p.stride() for p in params]
    for p in params:
        optimizer = cls([p], **hyper, **stored)
        for seed in range(3):
            set_gradients({"p": p}, seed)
            optimizer.step()
    exact = mode != "stochastic" and stored.get("state_bits") != 8
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 0.03, "atol": 0.01}
    for p in params[1:]:
        if name == "lion" and not exact:  # of a momentum near 0 a code decides the sign
            assert (p - params[0]).abs().float().mean() < 5e-3
            continue
        torch.testing.assert_close(p.float(), params[0].float(), check_stride=False, **tolerance)
    assert [p.stride() for p in params] == strides and wide[:, 1::2].isnan().all()


def test_groups_differ_in_their_modes():
    coded, averaged = (torch.nn.Parameter(torch.randn(80, 70)) for _ in range(2))
    optimizer = optim.AdamW(
        [{"params": [coded], "state_bits": 8}, {"params": [averaged], "average_decay": 0.5, "betas": (0.8, 0.9)}]
    )
    run({"a": coded, "b": averaged}, optimizer, range(2))
    assert optimizer.state[coded]["exp_avg"].dtype == torch.int8 and "average" not in optimizer.state[coded]
    assert optimizer.state[averaged]["exp_avg"].dtype == torch.float32
    kept = coded.detach().clone()
    with optimizer.averages():
        assert torch.equal(averaged, optimizer.state[averaged]["average"]) and torch.equal(coded, kept)


@each_class
def test_averages(name):
    params, optimizer = make(name, "average")
    expected = {k: p.detach().clone() for k, p in params.items()}
    for seed in range(3):
        run(params, optimizer, [seed])
        expected = {k: 0.9 * e + 0.1 * params[k].detach() for k, e in expected.items()}
    own = snapshot(params, optimizer)
    with optimizer.averages():
        for k, p in params.items():
            torch.testing.assert_close(p.detach(), expected[k])
        with pytest.raises(UserError, match="step.. inside averages"):
            optimizer.step()
        with pytest.raises(UserError, match="already active"), optimizer.averages():
            pass
    assert_bits_equal(snapshot(params, optimizer), own)
    with pytest.raises(KeyError), optimizer.averages():
        raise KeyError
    assert_bits_equal(snapshot(params, optimizer), own)
    run(params, optimizer, [3])


def test_averages_of_16_bit_weights_are_kept_in_fp32():
    params, optimizer = make("adamw", "remainder")
    run(params, optimizer, range(3))
    own = snapshot(params, optimizer)
    average = optimizer.state[params["wide"]]["average"]
    assert average.dtype == torch.float32
    with optimizer.averages():
        assert torch.equal(params["wide"], average.bfloat16())
    assert_bits_equal(snapshot(params, optimizer), own)


@each_class
def test_torch_helpers(name):
    """Schedulers, hooks, closures, tensor learning rates, groups added later, copies."""
    params, optimizer = make(name, max_norm=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, cycle_momentum=False)
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": torch.tensor(0.5)})
    assert optimizer.param_groups[-1]["weight_decay"] == 0.1
    extra.grad = torch.ones(3)

    def closure():
        assert torch.is_grad_enabled()
        set_gradients(params, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure).item() == 3.0
    assert seen == ["before", "after"] and (extra < 0.95).all()
    scheduler.optimizer.param_groups.pop()  # OneCycleLR knows two groups
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] != 0.02
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.max_norm, twin.skip_nonfinite) == (1.0, True)
        own = dict(zip(params, (p for group in twin.param_groups for p in group["params"])))
        set_gradients(own, 1)
        twin.step()


def test_a_compiled_model_trains_as_a_plain_one():
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = optim.AdamW(model.parameters(), lr=0.1, max_norm=0.1, average_decay=0.5)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        for step in range(3):
            forward(torch.full((2, 6), 1.0 + step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with optimizer.averages():
            weights.append(forward(torch.ones(1, 6)).detach())
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(weights[0], weights[2])
    torch.testing.assert_close(weights[1], weights[3])


def test_parameters_that_step_together_share_one_count():
    params, optimizer = make("adamw")
    run(params, optimizer, [0, 1])
    steps = {k: optimizer.state[p]["step"] for k, p in params.items()}
    assert steps["wide"] is steps["matrix"]
    set_gradients(params, 2)
    params["matrix"].grad = None
    optimizer.step()
    counts = {k: int(optimizer.state[p]["step"]) for k, p in params.items()}
    assert counts == {"wide": 3, "matrix": 2, "scalar": 3, "vector": 3}
    run(params, optimizer, [3])
    assert int(optimizer.state[params["matrix"]]["step"]) == 3
    saved = optimizer.state_dict()["state"]
    assert len({s["step"].data_ptr() for s in saved.values()}) == len(saved)  # torch's optimizers count in place


def test_the_default_skips_at_no_cost_in_meaning():
    """Finite gradients: skipping or not, clipping above the norm or not, give the same bits."""
    runs = []
    for options in ({}, {"skip_nonfinite": False}, {"max_norm": 1e9}):
        params, optimizer = make("adamw", **options)
        run(params, optimizer, range(3))
        runs.append(snapshot(params, optimizer))
    assert_bits_equal(runs[0], runs[1])
    assert_bits_equal(runs[0], runs[2])


def test_errors():
    p = torch.nn.Parameter(torch.zeros(4, 4))
    half = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))

    def fails(message, *args, cls=optim.AdamW, **kwargs):
        with pytest.raises(UserError, match=message):
            cls(*args, **kwargs)

    fails("precision must be one of nearest, stochastic, remainder, master, got 'fp8'", [p], precision="fp8")
    fails("state_bits must be None, 32 or 8, got 4", [p], state_bits=4)
    fails(r"average_decay must be in \[0, 1\)", [p], average_decay=1.0)
    fails("max_norm must be above 0", [p], max_norm=0.0)
    fails("'stochastic' is for bfloat16 parameters, got float16", [half], precision="stochastic")
    fails("Lion: betas must be two numbers", [p], cls=optim.Lion, betas=(0.9, 1.0))
    fails("SGD: momentum must be", [p], cls=optim.SGD, momentum=-0.1)
    fails("SGD: nesterov needs momentum", [p], cls=optim.SGD, nesterov=True)
    fails("lr must be a finite number >= 0", [p], lr=math.nan)
    fails("real floating point, got torch.complex64", [torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = optim.AdamW([p])
    with pytest.raises(UserError, match="betas"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "betas": (1.0, 0.9)})
    assert len(optimizer.param_groups) == 1
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    sparse = optim.AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse gradients are not supported"):
        sparse.step()
    with pytest.raises(UserError, match=r"averages\(\) needs average_decay"), optimizer.averages():
        pass


def test_nothing_to_do():
    params, optimizer = make("adamw")
    optimizer.step()
    assert not optimizer.state and ops.global_norm([]).item() == 0
