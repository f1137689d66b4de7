"""The training loop. Every way of training a model in this library calls `train` with its own loss and data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.errors import UserError
from fastlm.optim import clip_coefficient, global_norm
from fastlm.train import checkpoint, plot, setup, speed, terminal
from fastlm.train.config import TrainConfig
from fastlm.train.metrics import MetricsLog, read_metrics
from fastlm.train.signals import StopRequest, TrainingInterrupted

IGNORE_INDEX = -100
LossFunction = Callable[[torch.nn.Module, Any], Tensor]


class NonFiniteError(UserError):
    """The loss or the gradient norm became NaN or infinite. The weights are those before the step.

    Attributes: step, loss, grad_norm, samples (ids of the batch's sequences in the data, where the loader gives them).
    """

    def __init__(self, message: str, step: int, loss: float, grad_norm: float, samples: list[int]) -> None:
        super().__init__(message)
        self.step, self.loss, self.grad_norm, self.samples = step, loss, grad_norm, samples


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to. `stopped_by` is "steps", "time", "patience" or "data" (the loader ended)."""

    step: int
    tokens: int
    seconds: float
    stopped_by: str
    train_loss: float | None
    validation_loss: float | None
    best_validation_loss: float | None
    best_step: int | None


@dataclasses.dataclass
class _Progress:
    """The counters that a checkpoint carries, beside tensors, data position and random states."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent_losses: list[float] = dataclasses.field(default_factory=list)
    validation_loss: float | None = None
    validation_step: int = 0
    best_validation_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


def train(
    model: torch.nn.Module,
    config: TrainConfig,
    train_loader: Iterator[Any],
    validation_loader: Any = None,
    *,
    loss_function: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    tokenizer: Any = None,
) -> TrainResult:
    """Trains the model in place and leaves config.out with checkpoints/, best/, model/, metrics.jsonl and loss.png.

    The loss of a step is the mean over all live tokens (labels other than -100) of all `accumulate` batches, however unevenly
    they are spread. A step whose loss or gradient norm is not finite is never applied: the loop reads both (one wait for the
    device a step, of which the next step's launches hide little: they are needed before the optimizer may run) and stops.

    With max_seconds, the schedule takes step * max_seconds / elapsed for the number of steps, so that it ends with the time;
    elapsed wall time is part of the checkpoint. Such a run depends on the machine's speed; one bounded by steps alone is, on
    the CPU, the same bit for bit whether or not it was killed and resumed.

    Args:
        model: any module with `loss(tokens, labels, reduction="sum")`, or with what loss_function uses. Its parameters are moved
            to config.device. For `activation_checkpointing` it must have an attribute of that name.
        train_loader: iterator of batches with int64 `tokens` and `labels` [B, S] and optionally `index` (ids of the sequences),
            with state_dict() and load_state_dict() for resuming.
        validation_loader: the same; it is put back to its first batch before each evaluation. None: no evaluation.
        loss_function: (model, batch on the device) -> 0-d sum of the loss over the batch's live tokens.
        optimizer: any torch.optim.Optimizer with tensors as state, over parameters of the model or a part of them, whose
            gradients alone are clipped and looked at then. Each group's lr is its peak, which follows the schedule as config.lr
            would (min_lr / lr is the share at the end). Default: the one that config names.
        tokenizer: with `save(folder)`: written beside the weights in model/ and best/.

    Returns:
        TrainResult.

    Raises:
        UserError: nothing to resume, a run already in the out folder, a damaged or foreign checkpoint, a full disk, nothing
        to train, an optimizer that needs a closure or holds what is no parameter of the model.
        NonFiniteError: see above; names the step and the sequences.
        TrainingInterrupted: SIGINT or SIGTERM, after the step was finished and a checkpoint saved.
    """
    run = _Run(model, config, train_loader, validation_loader, loss_function, optimizer, tokenizer)
    try:
        with StopRequest(run.screen.say) as stop:
            run.start()
            return run.loop(stop)
    except OSError as error:
        if not checkpoint.is_full_disk(error):
            raise
        last = next(iter(checkpoint.checkpoints(run.checkpoints)), None)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        raise UserError(
            f"train: no space left in {run.out} at step {run.at.step}; {kept}; free some space and resume"
        ) from error
    finally:
        run.close()


class _Run:
    """One call of `train`: its parts, and the steps of the loop as methods."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainConfig,
        train_loader: Iterator[Any],
        validation_loader: Any,
        loss_function: LossFunction | None,
        optimizer: torch.optim.Optimizer | None,
        tokenizer: Any,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.out, self.checkpoints = Path(config.out), Path(config.out) / "checkpoints"
        self.device = setup.pick_device(config.device)
        self.model = model.to(self.device)
        self.own_optimizer = optimizer is None  # then config says all about it
        self.optimizer = setup.make_optimizer(model, config) if optimizer is None else optimizer
        self.loss_function = loss_function or _model_loss
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.at = _Progress()
        self.metrics: MetricsLog | None = None
        self.board: Any = None
        self.screen = terminal.Terminal()

    def start(self) -> None:
        """Checks the settings, opens the out folder, resumes if asked to."""
        config = self.config
        if config.patience and (self.validation_loader is None or not config.evaluate_every):
            raise UserError("train: patience needs validation data and evaluate_every above 0")
        if config.activation_checkpointing:
            if not hasattr(self.model, "activation_checkpointing"):
                raise UserError(f"train: activation_checkpointing is not something {type(self.model).__name__} can do")
            self.model.activation_checkpointing = True
        setup.check_step(self.optimizer)
        checkpoint.optimizer_names(self.model, self.optimizer)  # raises, and now rather than at the first checkpoint
        if config.compile:
            self.loss_function = torch.compile(self.loss_function)
        if self.own_optimizer and (unused := setup.unused_settings(config)):
            self.screen.say(unused)
        self.first_validation = self.validation_loader.state_dict() if self.validation_loader is not None else None
        torch.manual_seed(config.seed)
        if not config.resume:
            setup.start_folder(self.out, config.overwrite)
        resumed = config.resume and self._resume()
        self.batches = iter(self.train_loader)
        self.metrics = MetricsLog(self.out / "metrics.jsonl", resume_step=self.at.step if resumed else None)
        self.board = setup.open_tensorboard(self.out, self.at.step) if config.tensorboard else None
        self.flops_per_token = speed.flops_per_token(self.model, config.context)
        self.peak, source = speed.peak_flops(self.device, config.precision)
        self.screen.say(f"peak: {source}")
        self.began, self.seconds_before, self.share_before = time.monotonic(), self.at.seconds, self._share_done()
        self.last_drawn, self.saved_step = self.began, self.at.step if resumed else None
        self.window_tokens, self.window_seconds = 0, 0.0

    def _resume(self) -> bool:
        path = setup.newest_checkpoint(self.out, self.screen.say)
        if path is None:
            return False
        setup.check_optimizer(path, self.config if self.own_optimizer else None)
        state = checkpoint.load(path, self.model, self.optimizer)
        self.at = _Progress(**state["progress"])
        self.train_loader.load_state_dict(state["loader"])
        self.screen.say(f"resumed from {path}")
        now = setup.plain_settings(self.config)
        for name, old in state["config"].items():
            if name in now and now[name] != old:
                self.screen.say(f"changed since then: {name} was {old}, is {now[name]}")
        return True

    def loop(self, stop: StopRequest) -> TrainResult:
        """Steps until something ends the run; evaluates, saves and draws on the way and at the end."""
        config, at = self.config, self.at
        self.model.train()
        stopped_by = self._finished()
        while not stopped_by:
            stopped_by = self._finished() if self._step() else "data"
            if stopped_by or self._due(config.evaluate_every):
                with setup.averages(self.optimizer):
                    self._evaluate()
                stopped_by = stopped_by or self._finished()  # evaluating takes time, and patience
            if stopped_by or stop.signal_number is not None or self._due(config.checkpoint_every):
                self._save()
            if stop.signal_number is not None and not stopped_by:
                self._draw()
                hint = "give the same command with --resume to continue"
                raise TrainingInterrupted(
                    f"stopped after step {at.step}, saved in {self.checkpoints}; {hint}", stop.signal_number
                )
            if time.monotonic() - self.last_drawn > 60:
                self._draw()
        with setup.averages(self.optimizer):
            checkpoint.save_model(self.model, self.out / "model", self.tokenizer)
        self._draw()
        loss = sum(at.recent_losses) / len(at.recent_losses) if at.recent_losses else None
        best = (at.best_validation_loss, at.best_step)
        return TrainResult(at.step, at.tokens, at.seconds, stopped_by, loss, at.validation_loss, *best)

    def _step(self) -> bool:
        """One optimizer step. False if the data has ended."""
        began = time.perf_counter()
        config, at = self.config, self.at
        batches = list(itertools.islice(self.batches, config.accumulate))
        if not batches:
            return False
        live = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        lr = setup.learning_rate(config, at.step, at.seconds)
        lr = setup.set_rates(self.optimizer, lr, None if self.own_optimizer else config.lr)
        losses = []
        for batch in batches:
            loss = self._loss(batch) / max(live, 1)
            loss.backward()
            losses.append(loss.detach())
        norm = global_norm(p.grad for p in self._trained())
        # The one wait for the device: the weights may change only once these are known to be finite.
        *losses, grad_norm = torch.stack([x.to(self.device, torch.float64) for x in (*losses, norm)]).tolist()
        if not (all(map(math.isfinite, losses)) and math.isfinite(grad_norm)):
            raise self._non_finite(batches, losses, grad_norm)
        too_long = 0 < config.clip < grad_norm  # else no coefficient: multiplying by 1 costs a pass on the CPU
        setup.step(self.optimizer, clip_coefficient(norm, config.clip) if too_long else None)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # what the optimizer does not hold would grow for ever

        tokens = sum(batch.tokens.numel() for batch in batches)
        at.step, at.tokens = at.step + 1, at.tokens + tokens
        at.recent_losses = [*at.recent_losses, sum(losses)][-max(config.evaluate_batches, 1) :]
        self.window_tokens, self.window_seconds = (
            self.window_tokens + tokens,
            self.window_seconds + time.perf_counter() - began,
        )
        at.seconds = self.seconds_before + time.monotonic() - self.began
        if at.step % config.log_every == 0:
            self._log(sum(losses), lr, grad_norm)
        return True

    def _trained(self) -> list[Tensor]:
        """The parameters that the optimizer steps: a caller's may hold a part of the model."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _loss(self, batch: Any) -> Tensor:
        """The summed loss of one batch, under the precision's autocast."""
        batch = setup.on_device(batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.loss_function(self.model, batch)

    def _non_finite(self, batches: list[Any], losses: list[float], grad_norm: float) -> NonFiniteError:
        bad = [b for b, loss in zip(batches, losses) if not math.isfinite(loss)] or batches
        samples = [int(i) for batch in bad if getattr(batch, "index", None) is not None for i in batch.index]
        shown = ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        what = f"sequences {shown}" if samples else "a batch whose loader gives no ids"
        if samples and hasattr(self.train_loader, "describe"):
            what += f"; {self.train_loader.describe(samples[0])}"
        trained = set(self._trained())
        named = ((n, p.grad) for n, p in self.model.named_parameters() if p in trained and p.grad is not None)
        first = (n for n, grad in named if not grad.isfinite().all())
        where = next((f"; first non-finite gradient: {name}" for name in first), "")
        step, loss = self.at.step + 1, sum(losses)
        record = {
            "kind": "non_finite",
            "step": step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "samples": samples,
        }
        self.metrics.write(record)
        self._draw()
        return NonFiniteError(
            f"train: step {step} has loss {loss} and gradient norm {grad_norm} ({what}{where}); stopped before the weights "
            "changed; look at that data, or lower lr",
            step,
            loss,
            grad_norm,
            samples,
        )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Loss on the first evaluate_batches of the validation part, beside the latest training losses."""
        config, at = self.config, self.at
        if self.validation_loader is None or at.validation_step == at.step:
            return
        self.validation_loader.load_state_dict(self.first_validation)
        self.model.eval()
        total, live = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in setup.validation_batches(self.validation_loader, config.evaluate_batches):
            total += self._loss(batch)
            live += int((batch.labels != IGNORE_INDEX).sum())
        self.model.train()
        if not live:
            raise UserError("train: the validation part holds no token to predict")
        at.validation_loss, at.validation_step = total.item() / live, at.step
        train_loss = sum(at.recent_losses) / len(at.recent_losses)
        best = at.best_validation_loss is None or at.validation_loss < at.best_validation_loss
        at.evaluations_since_best = 0 if best else at.evaluations_since_best + 1
        if best:
            at.best_validation_loss, at.best_step = at.validation_loss, at.step
            checkpoint.save_model(self.model, self.out / "best", self.tokenizer)
        at.seconds = self.seconds_before + time.monotonic() - self.began
        record = {
            "kind": "evaluation",
            "step": at.step,
            "train_loss": train_loss,
            "validation_loss": at.validation_loss,
            "gap": at.validation_loss - train_loss,
            "best": best,
            "tokens": at.tokens,
            "seconds": at.seconds,
        }
        self._record(record)
        self.screen.say(terminal.evaluation_line(record, config.steps))

    def _log(self, loss: float, lr: float, grad_norm: float) -> None:
        rate = self.window_tokens / self.window_seconds
        self.window_tokens, self.window_seconds = 0, 0.0
        record = {
            "kind": "train",
            "step": self.at.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self.at.tokens,
            "tokens_per_second": rate,
            "share_of_peak": rate * self.flops_per_token / self.peak,
            "seconds": self.at.seconds,
        }
        self._record(record)
        share = self._share_done()
        done = share - self.share_before
        left = (1 - share) / done * (self.at.seconds - self.seconds_before) if done > 0 else None
        self.screen.progress(
            share, terminal.learning_text(record, self.config.steps), terminal.speed_text(record, left)
        )

    def _record(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        if self.board is not None:
            for name, value in record.items():
                if name not in ("kind", "step", "best"):
                    self.board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def _share_done(self) -> float:
        """How much of the run is done, in [0, 1], by whichever of its bounds is nearer."""
        by_steps = self.at.step / self.config.steps if self.config.steps else 0.0
        by_time = self.at.seconds / self.config.max_seconds if self.config.max_seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def _finished(self) -> str:
        config, at = self.config, self.at
        if config.steps is not None and at.step >= config.steps:
            return "steps"
        if config.max_seconds is not None and at.seconds >= config.max_seconds:
            return "time"
        return "patience" if config.patience and at.evaluations_since_best >= config.patience else ""

    def _due(self, every: int) -> bool:
        return bool(every) and self.at.step % every == 0

    def _save(self) -> None:
        if self.saved_step == self.at.step:
            return
        self.metrics.flush_to_disk()
        state = {
            "progress": dataclasses.asdict(self.at),
            "loader": self.train_loader.state_dict() if hasattr(self.train_loader, "state_dict") else None,
            "config": setup.plain_settings(self.config),
        }
        checkpoint.save(
            self.checkpoints, self.at.step, self.model, self.optimizer, state, keep=self.config.keep_checkpoints
        )
        self.saved_step = self.at.step

    def _draw(self) -> None:
        plot.draw_losses(read_metrics(self.out / "metrics.jsonl"), self.out / "loss.png")
        self.last_drawn = time.monotonic()

    def close(self) -> None:
        """Releases the terminal and the files."""
        self.screen.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.board is not None:
            self.board.close()


def _model_loss(model: torch.nn.Module, batch: Any) -> Tensor:
    return model.loss(batch.tokens, batch.labels, reduction="sum")
