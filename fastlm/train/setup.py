"""What a run is made of: the device, the out folder, the checkpoint to resume from, the optimizer and its learning rate."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm import optim
from fastlm.config import to_dict
from fastlm.errors import UserError
from fastlm.train import checkpoint
from fastlm.train.config import HYPERPARAMETERS, TrainConfig

# All that training writes into the out folder, and so all that `overwrite` may delete from it.
PRODUCTS = ("checkpoints", "best", "model", "tensorboard", "metrics.jsonl", "loss.png", "report.html")


def start_folder(out: Path, overwrite: bool) -> None:
    """Makes the out folder. Raises UserError if it holds a run, unless that is to be deleted."""
    if (out / "checkpoints").exists() or (out / "metrics.jsonl").exists():
        if not overwrite:
            raise UserError(f"train: {out} already holds a run; give resume, overwrite or another out folder")
        for path in (out / name for name in PRODUCTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def newest_checkpoint(out: Path, say: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint of a run; None if it was stopped before its first one.

    Damaged newer ones are renamed to damaged-step-<number>, so that they never count among the checkpoints to keep, and named.

    Raises:
        UserError: there is no run in the folder, or none of its checkpoints is valid.
    """
    path, skipped = checkpoint.latest_valid(out / "checkpoints")
    for damaged, fault in skipped:
        aside = damaged.with_name(f"damaged-{damaged.name}")
        shutil.rmtree(aside, ignore_errors=True)
        damaged.rename(aside)
        say(f"skipped checkpoint {damaged}: {fault}; set aside as {aside.name}")
    if path is None and skipped:
        raise UserError(f"train: no checkpoint in {out / 'checkpoints'} is valid; start again with overwrite")
    if path is None:
        if not (out / "metrics.jsonl").exists():
            raise UserError(f"train: nothing to resume in {out}; check the out folder or leave resume away")
        say(f"no checkpoint yet in {out}: starting from the beginning")
    return path


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is the first GPU, or the CPU. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"train: device must be auto, cpu, cuda or cuda:<number>, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"train: device {name} is not there ({torch.cuda.device_count()} GPUs found); use cpu or auto")
    return device


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that the settings name; no weight decay on one-dimensional parameters.

    Raises UserError where nothing is to be trained.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"train: no parameter of {type(model).__name__} has requires_grad; unfreeze what is to be trained"
        )
    name, groups = config.optimizer, optim.parameter_groups(model, config.weight_decay)
    # The loop itself stops before a step that is not finite.
    options = {"precision": config.optimizer_precision, "average_decay": config.average_decay, "skip_nonfinite": False}
    if name == "muon":
        if config.state_bits is not None:
            raise UserError("train: state_bits is not for muon, whose momentum is orthogonalised as it is")
        rates = {"lr": config.lr, "adamw_lr": config.lr, "betas": config.betas}
        decays = {"weight_decay": config.weight_decay, "adamw_weight_decay": config.weight_decay}
        # One learning rate and one weight decay for all, as if for AdamW.
        options |= {"momentum": config.momentum, "adjust_lr_fn": "match_rms_adamw"}
        sections = getattr(model, "sections", None)  # queries, keys and values are matrices of their own
        groups = optim.muon_groups(model, **rates, **decays, sections=sections)
        groups = [group if group["use_muon"] else {**group, "eps": config.eps} for group in groups]
        return optim.Muon(groups, **options)
    options |= {"state_bits": config.state_bits}
    if name == "sgd":
        return optim.SGD(groups, config.lr, config.momentum, **options)
    if name == "lion":
        return optim.Lion(groups, config.lr, config.betas, **options)
    return optim.AdamW(groups, config.lr, config.betas, config.eps, **options)


def unused_settings(config: TrainConfig) -> str:
    """A line that names the settings that were given and that the optimizer does not use; "" if there are none."""
    known = {name for used in HYPERPARAMETERS.values() for name in used}
    unused = sorted(n for n in known - HYPERPARAMETERS[config.optimizer].keys() if getattr(config, n) is not None)
    return f"not used: {', '.join(unused)}; optimizer {config.optimizer} has no such setting" if unused else ""


def check_optimizer(path: Path, config: TrainConfig | None) -> None:
    """Raises UserError if the checkpoint's optimizer is another than the one that the settings name, if they do."""
    if config is None:
        return
    made_by = checkpoint.read_state(path).get("config", {}).get("optimizer", config.optimizer)
    if made_by != config.optimizer:
        raise UserError(
            f"train: {path} has the state of optimizer {made_by}, which {config.optimizer} cannot continue; resume with "
            f"optimizer {made_by}, or start another run from the model's weights"
        )


def set_rates(optimizer: torch.optim.Optimizer, lr: float, peak: float | None) -> float:
    """Gives each parameter group its rate; -> the first group's.

    Args:
        peak: None: lr for all. Else groups have rates of their own, and get the share lr / peak of the ones they began with.
    """
    for group in optimizer.param_groups:
        if peak is None:
            group["lr"] = lr
            continue
        now = group["lr"]
        began = group.setdefault("initial_lr", now.clone() if isinstance(now, Tensor) else now)  # as torch's schedulers
        if isinstance(now, Tensor):
            now.copy_(began * (lr / peak))
        else:
            group["lr"] = began * (lr / peak)
    return lr if peak is None else float(optimizer.param_groups[0]["lr"])


def check_step(optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError for an optimizer that evaluates the model itself."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"train: {type(optimizer).__name__} needs a closure, which the loop does not give; take another optimizer"
        )


def step(optimizer: torch.optim.Optimizer, coefficient: Tensor | None) -> None:
    """One step with gradients times the coefficient: inside the step where it takes grad_scale, else in place before it."""
    if "grad_scale" in inspect.signature(optimizer.step).parameters:
        optimizer.step(grad_scale=coefficient)
        return
    if coefficient is not None:
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            p.grad.mul_(coefficient.to(p.grad.device))
    optimizer.step()


def averages(optimizer: torch.optim.Optimizer) -> AbstractContextManager:
    """A block in which the model has its averaged weights, where the optimizer keeps some."""
    kept = any(group.get("average_decay") is not None for group in optimizer.param_groups)
    return optimizer.averages() if kept else nullcontext()


def learning_rate(config: TrainConfig, step: int, seconds: float) -> float:
    """The rate of the step about to be made, `seconds` into the run. In a time box the schedule ends with the time."""
    steps = float("inf") if config.steps is None else config.steps
    if config.max_seconds is not None and seconds > 0:
        steps = min(steps, step * config.max_seconds / seconds)
    plan = {"warmup": config.warmup, "floor": config.min_lr / config.lr}
    if config.schedule == "wsd":
        plan["decay"] = config.decay
    return config.lr * optim.SCHEDULES[config.schedule](step, steps, **plan)


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run is compared in, as JSON holds them."""
    values = {k: v for k, v in to_dict(config).items() if k not in ("resume", "overwrite")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch (a dataclass) with its tensors on the device, copied without waiting; `index` stays where it is."""
    if device.type == "cpu":
        return batch
    moved = {
        f.name: getattr(batch, f.name).pin_memory().to(device, non_blocking=True)
        for f in dataclasses.fields(batch)
        if f.name != "index" and isinstance(getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **moved)


def validation_batches(loader: Any, count: int) -> Iterator[Any]:
    """The loader's next `count` batches, but no sample twice where it says how many there are; all of them for 0."""
    if hasattr(loader, "samples_per_epoch"):
        whole = max(1, loader.samples_per_epoch // loader.batch_size)
        count = min(count or whole, whole)
    return itertools.islice(iter(loader), count or None)


def open_tensorboard(out: Path, step: int) -> Any:
    """A SummaryWriter on out/tensorboard that hides what an earlier run wrote after `step`. Raises UserError if not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("train: tensorboard is switched on but not installed; pip install tensorboard") from error
    return SummaryWriter(out / "tensorboard", purge_step=step + 1 if step else None)
