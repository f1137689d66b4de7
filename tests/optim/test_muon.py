import copy
import pickle
from pathlib import Path

import pytest
import torch

from fastlm import ops
from fastlm.errors import UserError
from fastlm.ops.newton_schulz import POLAR_EXPRESS, QUINTIC
from fastlm.optim import AdamW, Muon, muon_groups
from fastlm.testing import assert_accurate
from tests.two_ranks import run_both

SHAPES = [(12, 8), (8, 12), (12, 8), (6, 6), (12, 8)]
OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}


def make_params(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(params, optimizer, seeds, **kwargs):
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step(**kwargs)


class Exact(torch.optim.Optimizer):
    """The formula in fp64, one matrix at a time."""

    def __init__(self, params, lr, weight_decay, momentum, nesterov=True, adjust_lr_fn=None):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            m = group["momentum"]
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.copy_(m * buffer + (1 - m) * p.grad)
                u = (1 - m) * p.grad + m * buffer if group["nesterov"] else buffer
                rows, columns = p.shape[-2:]
                ratio = max(1.0, rows / columns) ** 0.5
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    ratio = 0.2 * max(rows, columns) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * ratio * ops.newton_schulz(u, backend="reference"))


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"momentum": 0.0}])
def test_steps_follow_torch(options):
    """Both orthogonalise in bf16: the error against fp64 is at most twice torch's own, by the accuracy rule."""
    ours, theirs, exact = make_params(), make_params(), [torch.nn.Parameter(p.detach().double()) for p in make_params()]
    options = OPTIONS | options
    run(ours, Muon(ours, **options), range(5))
    run(theirs, torch.optim.Muon(theirs, **options), range(5))
    run(exact, Exact(exact, **options), range(5))
    for i, (a, e, p) in enumerate(zip(ours, exact, theirs)):
        assert_accurate(a, e, p, f"parameter {i}")


def test_fp32_products_follow_the_formula():
    ours, exact = make_params(), [torch.nn.Parameter(p.detach().double()) for p in make_params()]
    run(ours, Muon(ours, ns_dtype=torch.float32, **OPTIONS), range(5))
    run(exact, Exact(exact, **OPTIONS), range(5))
    for a, e in zip(ours, exact):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_the_two_load_each_others_state():
    ours, theirs = make_params(), make_params()
    our_optimizer, their_optimizer = Muon(ours, **OPTIONS), torch.optim.Muon(theirs, **OPTIONS)
    run(ours, our_optimizer, range(3))
    run(theirs, their_optimizer, range(3))
    state, their_state = copy.deepcopy(our_optimizer.state_dict()), copy.deepcopy(their_optimizer.state_dict())
    our_optimizer.load_state_dict(their_state)
    their_optimizer.load_state_dict(state)
    for p, q, s, t in zip(ours, theirs, their_state["state"].values(), state["state"].values()):
        assert torch.equal(our_optimizer.state[p]["momentum_buffer"], s["momentum_buffer"])
        assert torch.equal(their_optimizer.state[q]["momentum_buffer"], t["momentum_buffer"])
    assert our_optimizer.param_groups[0]["momentum"] == 0.9 and our_optimizer.param_groups[0]["use_muon"]
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            p.copy_(q)
    run(ours, our_optimizer, range(3, 5))
    run(theirs, their_optimizer, range(3, 5))
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)  # bf16 directions at a rate of 0.05


def test_our_own_state_resumes_bit_for_bit():
    groups = lambda params: [{"params": params[:3]}, {"params": params[3:], "use_muon": False, "lr": 0.01}]  # noqa: E731
    whole, cut = make_params(), make_params()
    one, two = Muon(groups(whole), **OPTIONS), Muon(groups(cut), **OPTIONS)
    run(whole, one, range(4))
    run(cut, two, range(2))
    fresh = Muon(groups(cut), **OPTIONS)
    fresh.load_state_dict(copy.deepcopy(two.state_dict()))
    run(cut, fresh, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(whole, cut))


def test_pickles():
    params = make_params()
    optimizer = Muon(params, ns_dtype=torch.float32, **OPTIONS)
    run(params, optimizer, [0])
    twin, own = pickle.loads(pickle.dumps((optimizer, params)))
    assert twin.ns_dtype == torch.float32
    for seed in (1, 2):
        run(params, optimizer, [seed])
        run(own, twin, [seed])
    assert all(torch.equal(p, q) for p, q in zip(params, own))


def test_same_shapes_are_one_call(monkeypatch):
    asked = []
    real = ops.newton_schulz
    monkeypatch.setattr(ops, "newton_schulz", lambda x, **kwargs: asked.append(tuple(x.shape)) or real(x, **kwargs))
    params = make_params()
    run(params, Muon(params, **OPTIONS), [0])
    assert asked == [(3, 12, 8), (1, 8, 12), (1, 6, 6)]
    asked.clear()
    monkeypatch.setattr("fastlm.optim.muon._STACK", 200)
    pieces, whole = make_params(), make_params()
    run(pieces, Muon(pieces, **OPTIONS), [0])
    assert asked == [(2, 12, 8), (1, 12, 8), (1, 8, 12), (1, 6, 6)]
    for p, q in zip(pieces, params):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    del whole


def test_experts_are_matrices_of_their_own():
    stacked, apart = make_params([(3, 12, 8)]), make_params([(3, 12, 8)])
    matrices = [torch.nn.Parameter(m.detach().clone()) for m in apart[0]]
    one, many = Muon(stacked, **OPTIONS), Muon(matrices, **OPTIONS)
    for seed in range(3):
        set_gradients(stacked, seed)
        for m, g in zip(matrices, stacked[0].grad):
            m.grad = g.clone()
        one.step()
        many.step()
    assert torch.equal(stacked[0], torch.stack(list(matrices)))


def test_convolutions_flatten():
    conv, flat = make_params([(8, 3, 2, 2)]), make_params([(8, 3, 2, 2)])
    matrix = torch.nn.Parameter(flat[0].detach().reshape(8, 12).clone())
    one, other = Muon([{"params": conv, "flatten": True}], **OPTIONS), Muon([matrix], **OPTIONS)
    set_gradients(conv, 0)
    matrix.grad = conv[0].grad.reshape(8, 12).clone()
    one.step()
    other.step()
    assert torch.equal(conv[0].reshape(8, 12), matrix)


def test_sections_are_matrices_of_their_own():
    whole, parts = make_params([(14, 6), (14, 6)]), None
    parts = [[torch.nn.Parameter(s.detach().clone()) for s in p.split((8, 3, 3))] for p in whole]
    flat = [s for p in parts for s in p]
    one, many = Muon([{"params": whole, "sections": (8, 3, 3)}], **OPTIONS), Muon(flat, **OPTIONS)
    for seed in range(3):
        set_gradients(whole, seed)
        for p, own in zip(whole, parts):
            for s, g in zip(own, p.grad.split((8, 3, 3))):
                s.grad = g.clone()
        one.step()
        many.step()
    for p, own in zip(whole, parts):
        torch.testing.assert_close(p, torch.cat(own), rtol=1e-5, atol=1e-5)


def test_one_object_is_adamw_too():
    ours, muon, adamw = make_params(), make_params(), make_params()
    hyper = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.2}
    both = Muon([{"params": ours[:3]}, {"params": ours[3:], "use_muon": False, **hyper}], **OPTIONS)
    run(ours, both, range(4))
    run(muon, Muon(muon[:3], **OPTIONS), range(4))
    run(adamw, AdamW(adamw[3:], **hyper), range(4))
    assert all(torch.equal(p, q) for p, q in zip(ours, [*muon[:3], *adamw[3:]]))
    assert set(both.state[ours[0]]) == {"step", "momentum_buffer"}
    assert set(both.state[ours[4]]) == {"step", "exp_avg", "exp_avg_sq"}
    defaults = Muon([{"params": make_params([(3,)]), "use_muon": False}]).param_groups[0]
    assert (defaults["lr"], defaults["betas"], defaults["eps"], defaults["weight_decay"]) == (
        3e-4,
        (0.9, 0.95),
        1e-10,
        0.0,
    )


@pytest.mark.parametrize("precision", ["nearest", "stochastic", "remainder", "master"])
def test_bf16_weights(precision):
    """bf16 gradients from here and there: the fp32 run is followed as closely as the storage allows."""
    ours = make_params(dtype=torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in ours]
    one, two = Muon(ours, precision=precision, **OPTIONS), Muon(wide, **OPTIONS)
    for seed in range(6):
        set_gradients(ours, seed)
        for p, q in zip(ours, wide):
            q.grad = p.grad.float()
        one.step()
        two.step()
    for p, q in zip(ours, wide):
        exact = precision in ("remainder", "master")
        steps = 0.51 if exact else 6.0  # units in the last place of bf16
        assert ((p.float() - q).abs() <= steps * 2**-7 * q.abs().clamp(min=0.1)).all()
        if exact:
            assert one.state[p]["momentum_buffer"].dtype == torch.float32
            assert torch.equal(p, q.bfloat16())


def test_nonfinite_gradients_change_nothing_and_are_counted():
    params = make_params()
    optimizer = Muon(params, **OPTIONS)
    run(params, optimizer, [0])
    before = [p.detach().clone() for p in params] + [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    for value in (float("nan"), float("inf")):
        set_gradients(params, 1)
        params[3].grad[2, 2] = value
        optimizer.step()
    after = [*params, *(s["momentum_buffer"] for s in optimizer.state.values())]
    assert all(torch.equal(a, b) for a, b in zip(after, before)) and int(optimizer.skipped) == 2
    # As on a GPU, where found_inf is only known on the device.
    states = [optimizer.state[p] for p in params]
    for found in (1.0, 0.0):
        common = {"found_inf": torch.tensor(found)}
        optimizer._update(optimizer.param_groups[0], params, [p.grad for p in params], states, 2, common)
        same = [torch.equal(a, b) for a, b in zip(after, before)]
        assert all(same) if found else not any(same[:3])


def test_clipping_scale_and_closure():
    ours, theirs = make_params(), make_params()
    one, two = Muon(ours, **OPTIONS), Muon(theirs, **OPTIONS)
    for seed, scale in ((0, 1.0), (1, 0.25)):
        run(ours, one, [seed], grad_scale=torch.tensor(scale))
        set_gradients(theirs, seed)
        for p in theirs:
            p.grad *= scale
        assert two.step(lambda: torch.tensor(3.0)).item() == 3.0
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))
    clipped = Muon(ours, max_norm=1.0, **OPTIONS)
    set_gradients(ours, 5)
    clipped.step()
    assert float(clipped.grad_norm) > 1.0
    moved = [clipped.state[p]["momentum_buffer"] for p in ours]
    total = torch.linalg.vector_norm(torch.cat([m.flatten() for m in moved]))
    torch.testing.assert_close(total, torch.tensor(0.1), rtol=1e-4, atol=0)  # (1 - momentum) of norm 1


def test_parameters_without_gradient_and_empty_ones():
    params = make_params([(4, 4), (4, 4), (0, 4), (4, 0)])
    optimizer, before = Muon(params, **OPTIONS), params[1].detach().clone()
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before) and not optimizer.state.get(params[1])


def test_learning_rate_tensors_and_other_coefficients():
    ours, theirs = make_params(), make_params()
    run(ours, Muon(ours, **OPTIONS | {"lr": torch.tensor(0.05)}), range(2))
    run(theirs, Muon(theirs, **OPTIONS), range(2))
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)
    other = make_params()
    run(other, Muon(other, ns_coefficients=POLAR_EXPRESS, ns_steps=8, **OPTIONS | {"weight_decay": 0.0}), [0])
    start = make_params()
    for p, q in zip(other, start):
        moved = torch.linalg.svdvals((p - q) / (0.05 * max(1.0, p.shape[0] / p.shape[1]) ** 0.5))
        assert (moved - 1).abs().max() < 0.05  # eight optimal steps: singular values of 1, to bf16
    assert QUINTIC == (torch.optim._muon.DEFAULT_A, torch.optim._muon.DEFAULT_B, torch.optim._muon.DEFAULT_C)


def test_averages():
    params = make_params()
    optimizer = Muon(params, average_decay=0.5, **OPTIONS)
    start = [p.detach().clone() for p in params]
    run(params, optimizer, [0])
    own = [p.detach().clone() for p in params]
    with optimizer.averages():
        for p, a, b in zip(params, start, own):
            torch.testing.assert_close(p.detach(), (a + b) / 2)
    assert all(torch.equal(p, q) for p, q in zip(params, own))


class _Net(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 8)
        self.position_table = torch.nn.Parameter(torch.randn(5, 8))
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8, bias=False)
        self.experts = torch.nn.Parameter(torch.randn(3, 8, 8))
        self.router = torch.nn.Linear(8, 3, bias=False)
        self.frozen = torch.nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.norm = torch.nn.LayerNorm(8)
        self.conv = torch.nn.Conv2d(3, 4, 2)
        self.head = torch.nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [False, True])
def test_muon_groups(tied):
    net = _Net(tied)
    groups = muon_groups(net, lr=0.1, adamw_weight_decay=0.3, not_hidden=("router",))
    named = {p: n for n, p in net.named_parameters()}
    found = [{named[p] for p in g["params"]} for g in groups]
    assert found[0] == {"up.weight", "down.weight", "experts"}
    assert found[1] == {"embed.weight", "position_table", "router.weight", "conv.weight"} | (
        set() if tied else {"head.weight"}
    )
    assert found[2] == {"up.bias", "norm.weight", "norm.bias", "conv.bias"}
    assert [g["use_muon"] for g in groups] == [True, False, False]
    assert [g["lr"] for g in groups] == [0.1, 3e-4, 3e-4] and [g["weight_decay"] for g in groups] == [0.0, 0.3, 0.0]
    Muon(groups)


def test_sections_in_groups():
    net = torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 14), "out": torch.nn.Linear(8, 8)})
    groups = muon_groups(net, sections={"qkv": (8, 3, 3)})
    assert [g.get("sections") for g in groups] == [None, (8, 3, 3), None]
    assert groups[1]["params"] == [net["qkv"].weight]


def test_errors():
    matrix = lambda *shape: [torch.nn.Parameter(torch.randn(*shape))]  # noqa: E731
    for options, text in (
        ({"momentum": 1.0}, "momentum must be in"),
        ({"lr": -1.0}, "lr must be a finite number"),
        ({"adjust_lr_fn": "other"}, "adjust_lr_fn must be 'original', 'match_rms_adamw' or None, got 'other'"),
        ({"precision": "double"}, "precision must be one of"),
    ):
        with pytest.raises(UserError, match=f"Muon: {text}"):
            Muon(matrix(3, 3), **options)
    for shape in ((3,), (2, 3, 4, 5)):
        with pytest.raises(UserError, match=r"Muon: a parameter must be a matrix \[M, N\] or a batch of them"):
            Muon(matrix(*shape))
    with pytest.raises(UserError, match="Muon: state_bits=8 is for groups with use_muon=False"):
        Muon([{"params": matrix(3, 3), "state_bits": 8}])
    with pytest.raises(UserError, match=r"Muon: sections \(2, 2\) must add up to the rows of a matrix, got \[3, 3\]"):
        Muon([{"params": matrix(3, 3), "sections": (2, 2)}])
    with pytest.raises(UserError, match="Muon: betas must be two numbers"):
        Muon([{"params": matrix(3), "use_muon": False, "betas": (0.9, 1.0)}])


def test_two_processes_equal_one(tmp_path):
    """FSDP2 on gloo; see two_processes_muon.py."""
    run_both(Path(__file__).with_name("two_processes_muon.py"), tmp_path)
