"""Run twice by test_two_processes.py, as `two_processes.py RANK FOLDER`: the optimizers on divided and replicated parameters.

Each check compares with the same steps of whole parameters in this process.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fastlm.ops.master_weights import join_master
from tests.optim.cases import CLASSES, MODES

SHAPES = {"wide": (67, 64), "matrix": (3, 7), "row": (1, 5), "vector": (9,)}  # parts are unequal, one is empty


class Net(torch.nn.Module):
    def __init__(self, dtype, seed=7):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for k, s in SHAPES.items():
            self.register_parameter(k, torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)))

    def forward(self, x):
        hidden = (x @ self.wide.t()).tanh()
        return (
            (hidden[:, :9] * self.vector).sum() + (hidden[:, :7] @ self.matrix.t()).sum() + self.row.sum() * x.shape[0]
        )


def set_gradients(model, seed, bad=None):
    """The same whole gradients for plain and divided parameters. bad: a parameter whose last element becomes NaN."""
    generator = torch.Generator().manual_seed(seed)
    for k, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if k == bad:
            grad.view(-1)[-1] = torch.nan
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def pair(name, mode, mesh, **options):
    """-> (whole model, its optimizer), (divided model, its optimizer)."""
    cls, hyper = CLASSES[name]
    dtype, stored = MODES[mode]
    found = []
    for divided in (False, True):
        model = Net(dtype)
        if divided:
            fully_shard(model, mesh=mesh)
        found.append((model, cls(model.parameters(), **hyper, **stored, **options)))
    return found


def whole(t):
    if not isinstance(t, DTensor):
        return t
    return t.to(torch.int32).full_tensor().to(torch.int16) if t.dtype == torch.int16 else t.full_tensor()


def values(p, state):
    """The weight as exactly as it is known, and the states that are numbers."""
    found = {key: whole(value).float() for key, value in state.items() if key not in ("master", "remainder")}
    if "remainder" in state:
        return {"weight": join_master(whole(p.detach()), whole(state["remainder"])), **found}
    return {"weight": whole(state.get("master", p).detach()).float(), **found}


def same(runs, bits=False):
    """Vectors and their tails round differently, so parts may differ from the whole in the last bit; bits=True: not even so."""
    (a, one), (b, two) = runs
    for (k, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert isinstance(q, DTensor), k
        assert one.state[p].keys() == two.state[q].keys(), k
        want, got = values(p, one.state[p]), values(q, two.state[q])
        tolerance = (
            {"rtol": 1e-6, "atol": 1e-7}
            if p.dtype == torch.float32 or "master" in one.state[p]
            else {"rtol": 2**-7, "atol": 1e-3}
        )
        tolerance = {"rtol": 0, "atol": 0} if bits else tolerance
        for key in want:
            torch.testing.assert_close(got[key], want[key], msg=lambda m, k=k, key=key: f"{k}.{key}: {m}", **tolerance)


def close(runs):
    """Where blocks of codes and random numbers follow the parts: weights within a bf16 step of each other on average."""
    (a, _), (b, _) = runs
    for (k, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert (whole(q.detach()).float() - p.detach().float()).abs().mean() < 1e-2, k


def check_steps(name, mode, mesh):
    runs = pair(name, mode, mesh)
    for seed in range(3):
        for model, optimizer in runs:
            set_gradients(model, seed)
            optimizer.step()
    if MODES[mode][1].get("state_bits") == 8 or mode == "stochastic":
        return close(runs)
    return same(runs)


def check_clipping(name, mesh):
    runs = pair(name, "fp32", mesh, max_norm=0.5)
    for seed in range(3):
        for model, optimizer in runs:
            set_gradients(model, seed)
            optimizer.step()
        norms = [optimizer.grad_norm for _, optimizer in runs]
        assert type(norms[1]) is torch.Tensor
        torch.testing.assert_close(*norms)
    same(runs)


def check_skip(name, mode, mesh):
    """A NaN in the part of one process stops the step of both."""
    runs = pair(name, mode, mesh)
    for seed, bad in ((0, None), (1, "wide"), (2, "row"), (3, None)):
        for model, optimizer in runs:
            set_gradients(model, seed, bad)
            optimizer.step()
    assert [optimizer.skipped.item() for _, optimizer in runs] == [2, 2]
    if MODES[mode][1].get("state_bits") != 8 and mode != "stochastic":
        same(runs)


def check_averages(mesh):
    runs = pair("adamw", "remainder", mesh)
    for model, optimizer in runs:
        set_gradients(model, 0)
        optimizer.step()
    own = [[p.detach().clone() for p in model.parameters()] for model, _ in runs]
    with runs[0][1].averages(), runs[1][1].averages():
        for model, optimizer in runs:
            for p in model.parameters():
                assert torch.equal(whole(p.detach()), whole(optimizer.state[p]["average"]).to(p.dtype))
        close(runs)
    for (model, _), before in zip(runs, own):
        assert all(torch.equal(whole(p.detach()), whole(q)) for p, q in zip(model.parameters(), before))


def check_checkpoint(name, mode, mesh, folder):
    """torch.distributed.checkpoint saves and loads parts; a copy goes on as the first would."""
    _, (model, optimizer) = pair(name, mode, mesh)
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.step()
    path = str(folder / f"{name} {mode}".replace(" ", "-"))
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=path)
    _, (other, twin) = pair(name, mode, mesh)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    found = get_state_dict(other, twin)
    found = {"model": found[0], "optimizer": found[1]}
    dcp.load(found, checkpoint_id=path)
    set_state_dict(other, twin, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    for _ in range(2):
        for (k, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local()), k
            for key, value in optimizer.state[p].items():
                a, b = (v.to_local() if isinstance(v, DTensor) else v for v in (value, twin.state[q][key]))
                assert a.dtype == b.dtype and torch.equal(a, b), f"{k}.{key}"
        for m, o in ((model, optimizer), (other, twin)):
            set_gradients(m, 2)
            o.step()


def check_full_state_dict(mode, mesh):
    """The state dict gathered on the CPU loads into a plain optimizer, and a plain one's into the divided one."""
    (plain, one), (model, two) = pair("adamw", mode, mesh)
    for seed in range(2):
        set_gradients(model, seed)
        two.step()
    options = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(model, two, options=options)
    set_state_dict(plain, one, model_state_dict=weights, optim_state_dict=state, options=options)
    same([(plain, one), (model, two)], bits=True)
    _, (fresh, three) = pair("adamw", mode, mesh)
    set_state_dict(fresh, three, model_state_dict=weights, optim_state_dict=state, options=options)
    for m, o in ((plain, one), (fresh, three)):
        set_gradients(m, 5)
        o.step()
    same([(plain, one), (fresh, three)])


def check_real_gradients(name, mesh):
    """Forward and backward under FSDP2 and DDP, each process with its half of the batch, clipped."""
    cls, hyper = CLASSES[name]
    rank, x = dist.get_rank(), torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    models = [Net(torch.float32) for _ in range(3)]
    fully_shard(models[1], mesh=mesh)
    calls = [models[0], models[1], DistributedDataParallel(models[2])]
    # A large eps: with a small one Adam turns the rounding of a tiny gradient into a step of full size.
    hyper = hyper | ({"eps": 1e-2} if name == "adamw" else {})
    optimizers = [cls(m.parameters(), max_norm=1.0, **hyper) for m in models]
    for _ in range(3):
        for call, optimizer in zip(calls, optimizers):
            optimizer.zero_grad()
            batch = x if call is models[0] else x[2 * rank : 2 * rank + 2]
            (call(batch) * (0.5 if call is models[0] else 1.0)).backward()
            optimizer.step()
    for model, label in zip(models[1:], ("fsdp2", "ddp")):
        for (k, p), q in zip(models[0].named_parameters(), model.parameters()):
            message = lambda m, k=k, label=label: f"{label} {k}: {m}"  # noqa: E731
            torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=1e-4, atol=1e-5, msg=message)


def checks(mesh, folder):
    found = {}
    for name in CLASSES:
        for mode in MODES:
            found[f"steps {name} {mode}"] = lambda name=name, mode=mode: check_steps(name, mode, mesh)
        found[f"clipping {name}"] = lambda name=name: check_clipping(name, mesh)
        if name != "lion":  # the sign of a gradient that is 0 but for rounding is anything
            found[f"real gradients {name}"] = lambda name=name: check_real_gradients(name, mesh)
    for mode in MODES:
        found[f"skip {mode}"] = lambda mode=mode: check_skip("adamw", mode, mesh)
        found[f"checkpoint {mode}"] = lambda mode=mode: check_checkpoint("adamw", mode, mesh, folder)
    found["checkpoint sgd"] = lambda: check_checkpoint("sgd", "8 bits", mesh, folder)
    for mode in ("fp32", "remainder"):
        found[f"full state dict {mode}"] = lambda mode=mode: check_full_state_dict(mode, mesh)
    found["averages"] = lambda: check_averages(mesh)
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {}
    for name, check in checks(init_device_mesh("cpu", (2,)), folder).items():
        try:
            check()
            results[name] = None
        except Exception:  # reported by the test of this name
            results[name] = traceback.format_exc()[-3000:]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
