"""State dicts: there and back through torch.save, the project's checkpoints and torch's optimizers, in every mode."""

import copy
import io
import json

import pytest
import torch

from fastlm import optim
from fastlm.errors import UserError
from fastlm.train import checkpoint
from tests.optim.cases import CLASSES, MODES, assert_bits_equal, each_class, each_mode, make, make_params, run, snapshot

THEIRS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
}
both = pytest.mark.parametrize("name", THEIRS)


def make_theirs(name, dtype=torch.float32):
    cls, hyper = THEIRS[name]
    params = make_params(dtype)
    plain = [params["scalar"], params["vector"]]
    groups = [{"params": [params["wide"], params["matrix"]]}, {"params": plain, "weight_decay": 0.0}]
    return params, cls(groups, **hyper)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copied(source, target):
    with torch.no_grad():
        for k, p in target.items():
            p.copy_(source[k])


@each_class
@each_mode
def test_torch_save_and_back(name, mode):
    params, optimizer = make(name, mode)
    run(params, optimizer, range(3))
    state = through_a_file(optimizer.state_dict())
    other, twin = make(name, mode)
    twin.load_state_dict(state)  # before the weights: what is missing must not be made from the wrong ones
    copied(params, other)
    assert_bits_equal(snapshot(other, twin), snapshot(params, optimizer))
    kept = copy.deepcopy(state)
    run(params, optimizer, range(3, 6))
    run(other, twin, range(3, 6))
    assert_bits_equal(snapshot(other, twin), snapshot(params, optimizer))
    for key, saved in kept["state"].items():  # the twin's steps wrote into its own tensors
        assert_bits_equal(saved, state["state"][key])


@each_class
@each_mode
def test_checkpoints_hold_every_mode(name, mode, tmp_path):
    def as_model(params):
        model = torch.nn.Module()
        for k, p in params.items():
            model.register_parameter(k, p)
        return model

    params, optimizer = make(name, mode)
    run(params, optimizer, range(2))
    path = checkpoint.save(tmp_path, 2, as_model(params), optimizer, {})
    other, twin = make(name, mode)
    checkpoint.load(path, as_model(other), twin)
    assert_bits_equal(snapshot(other, twin), snapshot(params, optimizer))
    run(params, optimizer, range(2, 4))
    run(other, twin, range(2, 4))
    assert_bits_equal(snapshot(other, twin), snapshot(params, optimizer))


def test_the_count_of_skipped_steps_goes_along(tmp_path):
    """Through torch.save, a checkpoint, torch's own optimizer, and dicts and checkpoints without it."""
    model = torch.nn.Linear(3, 2)
    optimizer, theirs = optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    for value in (1.0, torch.nan, torch.inf):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()
    state = optimizer.state_dict()
    theirs.load_state_dict(state)
    for source, count in ((through_a_file(state), 2), (theirs.state_dict(), 0), ({**state, "skipped": 7}, 7)):
        twin = optim.AdamW(model.parameters())
        twin.skipped.add_(5)
        twin.load_state_dict(source)
        assert twin.skipped.item() == count and twin.skipped.dtype == torch.int64
    optimizer.skipped.add_(1)
    assert state["skipped"].item() == 2, "a state dict went on counting"
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    checkpoint.load(path, model, twin)
    assert twin.skipped.item() == 3
    checkpoint.load(path, model, theirs)  # theirs has no use for it
    content = json.loads((path / checkpoint.STATE).read_bytes())
    del content["optimizer"], content["sha256"]
    checkpoint.write_json(path / checkpoint.STATE, {**content, "sha256": checkpoint._json_sha256(content)})
    checkpoint.load(path, model, twin)
    assert twin.skipped.item() == 0


def test_a_checkpoint_of_more_parameters_is_refused(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    with pytest.raises(UserError, match="but the optimizer does not train that parameter"):
        checkpoint.load(path, model, optim.AdamW([model.weight]))


@both
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_torch_and_we_continue_each_other(name, dtype):
    mode = "fp32" if dtype == torch.float32 else "nearest"
    (ours, optimizer), (theirs, their_optimizer) = make(name, mode), make_theirs(name, dtype)
    run(ours, optimizer, range(3))
    run(theirs, their_optimizer, range(3))
    copied(theirs, ours)  # in 16 bits the two round differently
    from_us, from_them = copy.deepcopy(optimizer.state_dict()), through_a_file(their_optimizer.state_dict())
    optimizer.load_state_dict(from_them)
    their_optimizer.load_state_dict(from_us)
    for k in ours:
        for key in CLASSES[name][0].MOMENTS:
            moment = optimizer.state[ours[k]][key]
            assert moment.dtype == ours[k].dtype == their_optimizer.state[theirs[k]][key].dtype
    run(ours, optimizer, range(3, 6))
    run(theirs, their_optimizer, range(3, 6))
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], **tolerance)
    if name == "adamw":
        assert all(float(s["step"]) == 6 for s in their_optimizer.state.values())


@both
def test_torch_fused_state_loads(name):
    theirs, their_optimizer = make_theirs(name)
    for group in their_optimizer.param_groups:
        group["fused"] = True
    run(theirs, their_optimizer, range(2))
    ours, optimizer = make(name)
    copied(theirs, ours)
    optimizer.load_state_dict(their_optimizer.state_dict())
    run(ours, optimizer, range(2, 4))
    run(theirs, their_optimizer, range(2, 4))
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k])


@both
@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("fp32", "nearest", "fp16 master")])
def test_a_torch_state_loads_into_every_mode(name, mode):
    """Moments are converted, masters and averages made from the weights that are there at the next step.

    Not in fp16: torch's second moments are 0 there, and its weights NaN.
    """
    dtype = MODES[mode][0]
    theirs, their_optimizer = make_theirs(name, dtype)
    run(theirs, their_optimizer, range(2))
    ours, optimizer = make(name, mode)
    optimizer.load_state_dict(their_optimizer.state_dict())
    copied(theirs, ours)
    wide = ours["wide"]
    group, state = optimizer.param_groups[0], optimizer.state[wide]
    assert {k: group[k] for k in MODES[mode][1]} == MODES[mode][1], "the optimizer lost its own modes"
    first = CLASSES[name][0].MOMENTS[0]
    if group["state_bits"] == 8:
        from fastlm.ops.block_quantize import block_dequantize

        found = block_dequantize(state[first], state[f"{first}_scale"])
        torch.testing.assert_close(found, their_optimizer.state[theirs["wide"]][first].float(), rtol=0.1, atol=1e-3)
    else:
        assert torch.equal(state[first].float(), their_optimizer.state[theirs["wide"]][first].float())
    before = wide.detach().float().clone()
    run(ours, optimizer, [2])
    if "master" in optimizer.state[wide]:
        assert (optimizer.state[wide]["master"] - before).abs().max() < 0.5  # of the loaded weights, not the first ones
    run(theirs, their_optimizer, [2])
    # Adam's or the momentum's next step is about 0.02 long; 8-bit codes and 16-bit weights blur it.
    assert (wide.float() - theirs["wide"].float()).abs().mean() < 0.004


def test_8_bit_states_load_into_fp32_ones():
    params, optimizer = make("adamw", "8 bits")
    run(params, optimizer, range(3))
    other, plain = make("adamw")
    copied(params, other)
    plain.load_state_dict(optimizer.state_dict())
    state = plain.state[other["wide"]]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["exp_avg"].dtype == torch.float32
    twin_params, twin = make("adamw", "8 bits")
    twin.load_state_dict(plain.state_dict())
    codes = [o.state[p["wide"]]["exp_avg"] for o, p in ((optimizer, params), (twin, twin_params))]
    assert (codes[0].int() - codes[1].int()).abs().max() <= 1  # a code is the nearest one to its own value
    run(other, plain, [3])


def test_user_hooks_see_and_change_what_is_loaded():
    params, optimizer = make("adamw", "master")
    run(params, optimizer, range(2))
    other, twin = make("adamw", "master")
    seen = []

    def halve(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["master"] *= 0.5
        return state_dict

    twin.register_load_state_dict_pre_hook(halve)
    twin.register_load_state_dict_post_hook(lambda o: seen.append(o.state[other["wide"]]["master"].dtype))
    for _ in range(2):
        twin.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32] * 2
    assert torch.equal(twin.state[other["wide"]]["master"], 0.5 * optimizer.state[params["wide"]]["master"])


def test_other_parameters_are_refused_untouched():
    params, optimizer = make("adamw")
    run(params, optimizer, [0])
    before = snapshot(params, optimizer)
    foreign = optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(foreign.state_dict())
    torchs = torch.optim.AdamW(
        [{"params": [params["wide"], params["matrix"]]}, {"params": [params["scalar"], params["vector"]]}],
        maximize=True,
    )
    with pytest.raises(UserError, match="maximize"):
        optimizer.load_state_dict(torchs.state_dict())
    other, wider = make("adamw")
    other["matrix"].data = torch.randn(7, 5)
    run(other, wider, [0])
    with pytest.raises(UserError, match=r"exp_avg of parameter \d is \[7, 5\], the parameter"):
        optimizer.load_state_dict(wider.state_dict())
    assert_bits_equal(snapshot(params, optimizer), before)
    run(params, optimizer, [1])


@each_mode
def test_distributed_checkpoint_helpers(mode):
    """torch.distributed.checkpoint.state_dict gets and sets by name, also into an optimizer that has made no step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def trained(seeds):
        params, optimizer = make("adamw", mode)
        model = torch.nn.Module()
        for k, p in params.items():
            model.register_parameter(k, p)
        run(params, optimizer, seeds)
        for p in params.values():
            p.grad = None
        return model, params, optimizer

    model, params, optimizer = trained(range(2))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model, other, twin = trained([])
    copied(params, other)
    set_optimizer_state_dict(other_model, twin, state)
    assert_bits_equal(snapshot(other, twin), snapshot(params, optimizer))
    run(params, optimizer, [2])
    run(other, twin, [2])
    assert_bits_equal(snapshot(other, twin), snapshot(params, optimizer))
