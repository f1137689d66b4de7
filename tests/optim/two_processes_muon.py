"""Run twice by test_muon.py, as `two_processes_muon.py RANK FOLDER`: Muon under FSDP2 equals Muon in one process."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fastlm.errors import UserError
from fastlm.optim import Muon, muon_groups


class _Net(torch.nn.Module):
    """Matrices whose rows do not divide by two, two of one shape, experts, and what is AdamW's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(2)])
        self.up, self.down = torch.nn.Linear(6, 9), torch.nn.Linear(9, 6, bias=False)
        self.experts = torch.nn.Parameter(torch.randn(3, 6, 4))
        self.one = torch.nn.Linear(4, 1, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        x = self.down(self.up(x).tanh())
        return self.one(torch.einsum("bsd,edf->bsf", x, self.experts).tanh()).square().mean()


def _with_tensor_parallelism() -> None:
    """What FSDP2 divides along the dimension that is divided already is refused at once, with a remedy that works."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    for remedy in (None, lambda _: Shard(1)):
        model = parallelize_module(torch.nn.Linear(4, 6, bias=False), mesh["tensor"], ColwiseParallel())
        fully_shard(model, mesh=mesh["data"], shard_placement_fn=remedy)
        try:
            optimizer = Muon(model.parameters())
        except UserError as error:
            assert remedy is None and "shard_placement_fn" in str(error) and "_StridedShard" in str(error), error
            continue
        assert remedy is not None, [p.placements for p in model.parameters()]
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for options in ({}, {"sections": {"up": (6, 3)}}):
        models = []
        for _ in range(2):
            torch.manual_seed(7)
            models.append(_Net())
        plain, sharded = models
        fully_shard(sharded, mesh=mesh)
        tokens = torch.randint(0, 11, (3, 2, 5), generator=torch.Generator().manual_seed(5))  # [step, rank, S]
        runs = [(m, Muon(muon_groups(m, lr=0.02, weight_decay=0.1, adamw_lr=1e-2, **options), max_norm=1.0,
                         ns_dtype=torch.float32)) for m in (plain, sharded)]  # fmt: skip
        for group in (g for _, o in runs for g in o.param_groups if not g["use_muon"]):
            group["eps"] = 1e-2  # with a small one Adam turns the rounding of a tiny gradient into a full step
        for step in range(3):
            for m, optimizer in runs:
                optimizer.zero_grad()
                m(tokens[step] if m is plain else tokens[step, rank][None]).backward()
                optimizer.step()
        for (name, p), (_, q) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
            assert isinstance(q, DTensor), name
            torch.testing.assert_close(
                q.full_tensor(), p, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
            buffer = runs[1][1].state[q].get("momentum_buffer")
            assert buffer is None or buffer.to_local().shape == q.to_local().shape, name
    _with_tensor_parallelism()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
