"""What changes after the first step: options and groups, gradients that come and go, state dicts of others."""

import copy
import math

import pytest
import torch

from fastlm import optim
from fastlm.errors import UserError
from fastlm.ops.master_weights import join_master
from tests.optim.cases import CLASSES, assert_bits_equal, each_class, make, run, set_gradients, snapshot


def _params(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def _step(optimizer, params, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in without else grad
    optimizer.step()


def test_loaded_hyperparameters_decide_which_moments_there_are():
    ours, theirs = _params(6), _params(6)
    optimizer, their_optimizer = optim.SGD(ours, 0.1), torch.optim.SGD(theirs, 0.1, momentum=0.9)
    for seed in range(3):
        _step(their_optimizer, theirs, seed)
    with torch.no_grad():
        ours[0].copy_(theirs[0])
    optimizer.load_state_dict(their_optimizer.state_dict())
    for seed in (3, 4):
        _step(optimizer, ours, seed)
        _step(their_optimizer, theirs, seed)
    torch.testing.assert_close(ours[0], theirs[0])


def test_loaded_moments_are_converted_by_the_loaded_hyperparameters():
    theirs, ours = _params(4096), _params(4096)
    their_optimizer = torch.optim.SGD(theirs, 0.1, momentum=0.9)
    _step(their_optimizer, theirs, 0)
    optimizer = optim.SGD(ours, 0.1, state_bits=8)
    optimizer.load_state_dict(their_optimizer.state_dict())
    assert optimizer.state[ours[0]]["momentum_buffer"].dtype == torch.int8
    _step(optimizer, ours, 1)


def test_a_parameter_moved_to_another_group_counts_once():
    a, b = params = _params(4, 4)
    optimizer = optim.AdamW(params, 0.1)
    _step(optimizer, params, 0)
    optimizer.param_groups[0]["params"] = [a]
    optimizer.add_param_group({"params": [b], "lr": 0.01})
    _step(optimizer, params, 1)
    _step(optimizer, params, 2)
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 3]


@pytest.mark.parametrize("dampening", (0.0, 0.5))
def test_momentum_may_begin_and_end_later(dampening):
    ours, theirs = _params(5), _params(5)
    pair = optim.SGD(ours, 0.1, dampening=dampening), torch.optim.SGD(theirs, 0.1, dampening=dampening)
    for seed, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.0, 0.9)):
        for optimizer, params in zip(pair, (ours, theirs)):
            optimizer.param_groups[0]["momentum"] = momentum
            _step(optimizer, params, seed)
    torch.testing.assert_close(ours[0], theirs[0])


def test_averages_may_begin_and_end_later():
    params = _params(5)
    optimizer = optim.AdamW(params, 0.1)
    _step(optimizer, params, 0)
    optimizer.param_groups[0]["average_decay"] = 0.5
    before = params[0].detach().clone()
    _step(optimizer, params, 1)
    torch.testing.assert_close(optimizer.state[params[0]]["average"], (before + params[0].detach()) / 2)
    optimizer.param_groups[0]["average_decay"] = None
    _step(optimizer, params, 2)
    assert "average" not in optimizer.state[params[0]]


def test_storage_may_change_later():
    params = _params(4096, dtype=torch.bfloat16)
    optimizer = optim.AdamW(params, 0.01)
    group, state = optimizer.param_groups[0], optimizer.state
    _step(optimizer, params, 0)
    for changes, dtypes in (
        ({"precision": "master"}, {"exp_avg": torch.float32, "master": torch.float32}),
        ({"state_bits": 8}, {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8, "master": torch.float32}),
        ({"state_bits": 32, "precision": "remainder"}, {"exp_avg_sq": torch.float32, "remainder": torch.int16}),
        ({"state_bits": None, "precision": "nearest"}, {"exp_avg": torch.bfloat16}),
    ):
        group.update(changes)
        _step(optimizer, params, 1)
        found = {k: v.dtype for k, v in state[params[0]].items()}
        assert dtypes.items() <= found.items() and ("master" in dtypes) == ("master" in found)
        assert ("exp_avg_scale" in found) == (group["state_bits"] == 8) and ("remainder" in dtypes) == (
            "remainder" in found
        )
    assert int(state[params[0]]["step"]) == 5
    group["precision"] = "double"
    with pytest.raises(UserError, match="precision must be one of"):
        _step(optimizer, params, 2)


@pytest.mark.parametrize("options", ({"precision": "stochastic"}, {"precision": "master", "state_bits": 8, "seed": 3}))
@pytest.mark.parametrize("name", ("adamw", "muon"))
def test_sporadic_gradients_resume_bit_for_bit(name, options):
    if name == "muon" and "state_bits" in options:
        options = {"precision": "stochastic", "seed": 3}
    shapes = [(64, 64), (64, 64), (64, 65), (64, 64)]

    def fresh():
        params = _params(*shapes, dtype=torch.bfloat16)
        cls = optim.AdamW if name == "adamw" else optim.Muon
        return params, cls([{"params": params[:3]}, {"params": params[3:]}], lr=0.01, **options)

    without = [(), (1,), (0, 3), (), (), (0,), ()]  # after three, parameters 0 and 1 have made two steps, not together
    (whole, one), (cut, two) = fresh(), fresh()
    for seed, absent in enumerate(without):
        _step(one, whole, seed, absent)
    for seed, absent in enumerate(without[:3]):
        _step(two, cut, seed, absent)
    state = copy.deepcopy(two.state_dict())
    resumed, three = fresh()
    three.load_state_dict(state)
    with torch.no_grad():
        for p, q in zip(resumed, cut):
            p.copy_(q)
    for seed, absent in list(enumerate(without))[3:]:
        _step(three, resumed, seed, absent)
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed))


def _roundings(optimizer, params, active):
    """Which elements of params[active] a stochastic step rounded up, all starting from the same weights."""
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 2.0**-10) if i == active else None  # a third of an ulp below 1
    optimizer.step()
    return params[active] != 1


def test_random_numbers_belong_to_the_parameter():
    def ones(n):
        return [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(n)]

    params = ones(2)
    groups = [{"params": params[:1], "seed": 1}, {"params": params[1:], "seed": 0}]
    optimizer = optim.SGD(groups, 1.0, precision="stochastic")
    for p in params:
        p.grad = torch.full_like(p, 2.0**-10)
    optimizer.step()
    moved = [p != 1 for p in params]
    assert all(0 < m.sum() < 4096 for m in moved) and not torch.equal(*moved), "seeds 1 and 0 collide"
    alternating = ones(2)
    optimizer = optim.SGD([{"params": alternating[:1]}, {"params": alternating[1:]}], 1.0, precision="stochastic")
    first, second = (_roundings(optimizer, alternating, i) for i in (0, 1))
    assert not torch.equal(first, second), "groups that take turns draw equal numbers"
    alone = ones(2)
    optimizer = optim.SGD(alone, 1.0, precision="stochastic")
    assert torch.equal(_roundings(optimizer, alone, 1), second), "who else has a gradient must not matter"


def test_missing_moments_are_refused():
    params, optimizer = make("lion")
    run(params, optimizer, range(2))
    ours, adamw = make("adamw")
    run(ours, adamw, [0])
    before = snapshot(ours, adamw)
    with pytest.raises(
        UserError, match="AdamW: the state dict has no exp_avg_sq of parameter 0, which has made 2 steps"
    ):
        adamw.load_state_dict(optimizer.state_dict())
    assert_bits_equal(snapshot(ours, adamw), before)
    state = copy.deepcopy(adamw.state_dict())
    del state["state"][2]["exp_avg"]
    with pytest.raises(UserError, match="no exp_avg of parameter 2"):
        adamw.load_state_dict(state)


def test_a_compiled_step_counts_only_what_moves():
    params = _params(4, 4)
    optimizer = optim.AdamW(params, 0.1)
    _step(optimizer, params, 0)
    compiled = torch.compile(optimizer.step, backend="eager")
    params[0].grad, params[1].grad = torch.ones(4), None
    compiled()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1]


def test_frozen_parameters_are_checked_when_they_have_a_gradient():
    frozen = [
        torch.nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False),
        torch.nn.Parameter(torch.ones(3, dtype=torch.float16), requires_grad=False),
        torch.nn.Parameter(torch.ones(3), requires_grad=False),
    ]
    matrix = _params((3, 3), dtype=torch.bfloat16)
    for cls in (optim.AdamW, optim.Muon):
        optimizer = cls([*matrix, *frozen], precision="remainder")
        matrix[0].grad = torch.ones_like(matrix[0])
        optimizer.step()
        assert all(bool((p == 1).all()) and p not in optimizer.state for p in frozen)
    frozen[2].requires_grad_(True).grad = torch.ones(3)
    with pytest.raises(UserError, match="a parameter must be a matrix"):
        optimizer.step()


def test_a_load_inside_averages_is_refused():
    params, optimizer = make("adamw", "average")
    run(params, optimizer, range(2))
    before = snapshot(params, optimizer)
    with optimizer.averages(), pytest.raises(UserError, match=r"load_state_dict\(\) inside averages\(\)"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert_bits_equal(snapshot(params, optimizer), before)


@pytest.mark.parametrize("weights_first", (True, False))
def test_masters_and_remainders_become_each_other_exactly(weights_first):
    def fresh(precision):
        params = _params(300, dtype=torch.bfloat16)
        return params, optim.AdamW(params, 0.01, precision=precision)

    params, optimizer = fresh("master")
    _step(optimizer, params, 0)
    master = optimizer.state[params[0]]["master"]
    tie = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # halfway: master and remainder round them differently
    master[:3] = tie
    with torch.no_grad():
        params[0].copy_(master)
    for precision in ("remainder", "master"):
        other, twin = fresh(precision)
        for do in (0, 1) if weights_first else (1, 0):
            if do == 0:
                with torch.no_grad():
                    other[0].copy_(params[0])
            else:
                twin.load_state_dict(optimizer.state_dict())
        _step(twin, other, 1)
        _step(optimizer, params, 1)
        both = []
        for o, p in ((optimizer, params[0]), (twin, other[0])):
            state = o.state[p]
            both.append(state["master"] if "master" in state else join_master(p.detach(), state["remainder"]))
        assert torch.equal(*both)
        params, optimizer = other, twin


def test_what_is_refused_leaves_no_group_behind():
    optimizer = optim.AdamW(_params(3))
    for bad, message in (
        ({"betas": 0.9}, "betas must be two numbers in"),
        ({"lr": "0.1"}, "lr must be a finite number >= 0, got '0.1'"),
        ({"seed": None}, "seed must be an int, got None"),
    ):
        with pytest.raises(UserError, match=message):
            optimizer.add_param_group({"params": _params(3), **bad})
        with pytest.raises(UserError, match=message):
            optim.AdamW(_params(3), **bad)
    sgd = optim.SGD(_params(3))
    with pytest.raises(TypeError):
        sgd.add_param_group({"params": _params(3), "momentum": "0.9"})
    assert len(optimizer.param_groups) == len(sgd.param_groups) == 1


def test_there_is_no_norm_of_no_gradients():
    params, optimizer = make("adamw")
    run(params, optimizer, [0])
    assert optimizer.grad_norm is not None
    for p in params.values():
        p.grad = None
    optimizer.step()
    assert optimizer.grad_norm is None


def test_a_state_on_meta_has_a_state_dict():
    params, optimizer = make("adamw")
    set_gradients(params, 0)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"] = state["step"].to("meta")
    assert all(s["step"].is_meta for s in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("scheduler", ("OneCycleLR", "CyclicLR"))
def test_schedulers_cycle_muons_momentum(scheduler):
    matrix, vector = _params((3, 3), 3)
    optimizer = optim.Muon([{"params": [matrix]}, {"params": [vector], "use_muon": False}], lr=0.1)
    if scheduler == "OneCycleLR":
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, base_momentum=0.8, max_momentum=0.9)
    else:
        torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, base_momentum=0.8, max_momentum=0.9)
    assert optimizer.param_groups[0]["momentum"] == 0.9 and "betas" not in optimizer.param_groups[0]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.95)


def test_muon_groups_know_heads_and_positions():
    names = ("score", "classifier", "position_bias", "composition", "scores")
    net = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3, bias=False) for name in names})
    groups = optim.muon_groups(net)
    named = {p: n.split(".")[0] for n, p in net.named_parameters()}
    assert [[named[p] for p in g["params"]] for g in groups] == [
        ["composition", "scores"],
        ["score", "classifier", "position_bias"],
    ]


def test_an_emptied_state_begins_again():
    params = _params(4, 4)
    optimizer = optim.AdamW(params, 0.1)
    _step(optimizer, params, 0)
    optimizer.state[params[0]].clear()
    _step(optimizer, params, 1)
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 2]


@each_class
def test_what_is_not_done_is_refused_and_not_passed_over(name):
    """torch takes these in a group; passing them over would train in the other direction, or write twice at once."""
    p = torch.nn.Parameter(torch.ones(4, 4))
    cls = CLASSES[name][0]
    optimizer = cls([torch.nn.Parameter(torch.ones(2, 2))])
    for group, words in (
        ({"params": [p], "maximize": True}, "maximize=True, which is not supported; negate the loss"),
        ({"params": [p], "amsgrad": True}, "amsgrad=True, which is not supported"),
        ({"params": [p], "lr": torch.tensor(-1.0)}, "lr must be a finite number >= 0"),
        ({"params": [p], "lr": torch.tensor(math.nan)}, "lr must be a finite number >= 0"),
    ):
        with pytest.raises(UserError, match=words):
            optimizer.add_param_group(group)
    with pytest.raises(UserError, match="stands twice"), pytest.warns(UserWarning, match="duplicate"):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [p], "lr": torch.tensor(0.5), "maximize": False})
