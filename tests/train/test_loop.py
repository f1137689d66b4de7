import dataclasses
import os
import signal

import pytest
import torch

from fastlm.errors import UserError
from fastlm.optim import cosine
from fastlm.train import NonFiniteError, TrainConfig, TrainingInterrupted, read_metrics, train
from tests.train.tiny import TinyBatch, TinyLoader, losses, make_model, settings


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Fixed:
    """Yields given batches in turn, for ever."""

    def __init__(self, batches):
        self.batches, self.position = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return self.batches[(self.position - 1) % len(self.batches)]

    def state_dict(self):
        return {"position": self.position}


def joined(batches):
    return TinyBatch(*(torch.cat([getattr(b, f.name) for b in batches]) for f in dataclasses.fields(TinyBatch)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_accumulation_equals_one_big_batch_with_uneven_live_tokens(tmp_path, dtype, tolerance):
    loader = TinyLoader()
    parts = [next(loader) for _ in range(6)]
    parts[0].labels[1:] = -100
    parts[4].labels[:] = -100  # a micro-batch with nothing to learn
    small, big = Fixed(parts), Fixed([joined(parts[:3]), joined(parts[3:])])
    one, other = make_model(dropout=0.0).to(dtype), make_model(dropout=0.0).to(dtype)
    # eps well above rounding noise: Adam turns a gradient that is zero but for rounding into a full step.
    train(one, settings(tmp_path / "a", steps=4, accumulate=3, eps=1e-3), small)
    train(other, settings(tmp_path / "b", steps=4, eps=1e-3), big)
    a, b = losses(tmp_path / "a")[0], losses(tmp_path / "b")[0]
    assert a == pytest.approx(b, rel=tolerance)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=tolerance, atol=tolerance)


def test_the_logged_loss_is_the_mean_over_live_tokens(tmp_path):
    batches = [next(loader) for loader in [TinyLoader()] for _ in range(2)]
    model = make_model(dropout=0.0)
    expected = model.loss(joined(batches).tokens, joined(batches).labels).item()
    train(model, settings(tmp_path, steps=1, accumulate=2), Fixed(batches))
    assert losses(tmp_path)[0][1] == pytest.approx(expected, rel=1e-6)


def test_clipping_bounds_the_gradient_the_optimizer_sees(tmp_path):
    class Spy(torch.optim.SGD):
        def step(self, closure=None, *, grad_scale=None):
            self.scales = [*getattr(self, "scales", []), 1.0 if grad_scale is None else float(grad_scale)]

    for clip in (0.01, 1e9, 0.0):  # 0 is off
        out, model = tmp_path / str(clip), make_model()
        spy = Spy(model.parameters(), lr=0.1)
        train(model, settings(out, steps=2, clip=clip), TinyLoader(), optimizer=spy)
        norms = [r["grad_norm"] for r in read_metrics(out / "metrics.jsonl")]
        expected = [min(1.0, clip / norm) if clip else 1.0 for norm in norms]
        assert spy.scales == pytest.approx(expected, rel=1e-6)


def test_learning_rate_follows_the_schedule(tmp_path):
    train(make_model(), settings(tmp_path, steps=10, warmup=3), TinyLoader())
    rates = [r["lr"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([0.01 * cosine(step, 10, 3, 0.1) for step in range(10)])


def test_a_time_box_ends_near_its_time_with_the_schedule(tmp_path):
    config = settings(tmp_path, steps=None, max_seconds=1.0, warmup=5, evaluate_every=0)
    result = train(make_model(), config, TinyLoader(pause=0.01))
    rates = [r["lr"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert result.stopped_by == "time"
    assert 1.0 <= result.seconds < 2.0
    assert rates[-1] < 0.1 * 0.01 + 0.1 * 0.009  # within a tenth of the way from min_lr to lr
    assert max(rates) > 0.009


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing_and_names_the_batch(tmp_path, fault):
    model, seen = make_model(), {}

    def loss_function(model, batch):
        loss = model.loss(batch.tokens, batch.labels, reduction="sum")
        if batch.index[0] == 28:  # the second batch of step 4
            seen.update(weights(model))
            if fault == "loss":
                return loss * float("nan")
            model.up.weight.register_hook(lambda g: g * float("inf"))
        return loss

    with pytest.raises(NonFiniteError, match="step 4 .*sequences .*28, 29, 30, 31") as caught:
        train(model, settings(tmp_path, accumulate=2, checkpoint_every=2), TinyLoader(), loss_function=loss_function)
    assert caught.value.step == 4
    assert caught.value.samples == ([28, 29, 30, 31] if fault == "loss" else list(range(24, 32)))
    assert "first non-finite gradient: " + ("embedding" if fault == "loss" else "up.weight") in str(caught.value)
    assert_equal(weights(model), seen)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (last["kind"], last["step"], last["samples"]) == ("non_finite", 4, caught.value.samples)


def test_early_stopping_keeps_the_best_model(tmp_path):
    from safetensors.torch import load_file

    model, kept = make_model(), {}
    # Trained on one text and tested on another: validation loss soon rises.
    batches = [next(TinyLoader())]
    other = next(TinyLoader(seed=5))
    other.labels = torch.where(other.labels >= 0, (other.labels + 7) % 31, other.labels)

    class Validation(Fixed):
        def load_state_dict(self, state):
            kept[len(kept)] = weights(model)

    config = settings(tmp_path, steps=500, evaluate_every=4, evaluate_batches=1, patience=3)
    result = train(model, config, Fixed(batches), Validation([other]))
    evaluations = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "evaluation"]
    values = [r["validation_loss"] for r in evaluations]
    best = values.index(min(values))
    assert result.stopped_by == "patience"
    assert len(values) == best + 4
    assert (result.best_step, result.best_validation_loss) == (evaluations[best]["step"], values[best])
    saved = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in kept[best].items())
    assert evaluations[-1]["gap"] == pytest.approx(values[-1] - evaluations[-1]["train_loss"])


def test_validation_sees_the_same_batches_without_dropout_each_time(tmp_path):
    model, validation = make_model(dropout=0.5), TinyLoader(seed=1)
    train(model, settings(tmp_path, lr=1e-12, min_lr=0.0, evaluate_every=2, steps=6), TinyLoader(), validation)
    held_out = list(losses(tmp_path)[1].values())
    assert len(held_out) == 3
    assert held_out == pytest.approx([held_out[0]] * 3, rel=1e-6)


def test_data_that_ends_ends_the_run(tmp_path):
    result = train(make_model(), settings(tmp_path, accumulate=2), TinyLoader(length=7), TinyLoader(seed=1, length=1))
    assert (result.stopped_by, result.step, result.tokens) == ("data", 4, 7 * 32)
    assert list(losses(tmp_path)[1]) == [4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(tmp_path, capsys, number):
    def loss_function(model, batch):
        if batch.index[0] == 24:  # in the middle of step 7
            os.kill(os.getpid(), number)
        return model.loss(batch.tokens, batch.labels, reduction="sum")

    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match=r"step 7.*--resume") as caught:
        train(make_model(), settings(tmp_path / "a"), TinyLoader(), TinyLoader(seed=1), loss_function=loss_function)
    assert caught.value.exit_status == 128 + number
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capsys.readouterr().out
    assert (tmp_path / "a" / "loss.png").exists()

    resumed, whole = make_model(seed=99), make_model()
    train(resumed, settings(tmp_path / "a", resume=True), TinyLoader(), TinyLoader(seed=1))
    train(whole, settings(tmp_path / "b"), TinyLoader(), TinyLoader(seed=1))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert_equal(weights(resumed), weights(whole))


def test_bf16_runs_under_autocast_over_fp32_weights(tmp_path):
    model, seen = make_model(), set()
    model.up.register_forward_hook(lambda module, args, result: seen.add(result.dtype))
    train(model, settings(tmp_path, steps=2, precision="bf16"), TinyLoader())
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_compile_and_activation_checkpointing_switches(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    model = make_model()
    model.activation_checkpointing = False
    train(model, settings(tmp_path / "a", steps=1, compile=True, activation_checkpointing=True), TinyLoader())
    assert len(compiled) == 1
    assert model.activation_checkpointing
    with pytest.raises(UserError, match="activation_checkpointing"):
        train(make_model(), settings(tmp_path / "b", activation_checkpointing=True), TinyLoader())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be above 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"min_lr": 1.0}, "min_lr must not be above lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"resume": True, "overwrite": True}, "give one of them"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu9"}, "device must be"),
        ({"device": "cuda:63"}, "cuda:63 is not there"),
        ({"patience": 2}, "patience needs validation"),
        ({"resume": True}, "nothing to resume"),
    ],
)
def test_runs_that_cannot_start(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(make_model(), settings(tmp_path / "run", **changes), TinyLoader())


def test_steps_are_1000_unless_time_bounds_the_run():
    assert TrainConfig().steps == 1000
    assert TrainConfig(max_seconds=5.0).steps is None
    assert TrainConfig(max_seconds=5.0, steps=7).steps == 7


def test_an_earlier_run_is_not_overwritten_unless_asked(tmp_path):
    out = tmp_path / "run"
    train(make_model(), settings(out, steps=3), TinyLoader())
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds a run"):
        train(make_model(), settings(out), TinyLoader())
    train(make_model(), settings(out, steps=2, overwrite=True), TinyLoader())
    assert list(losses(out)[0]) == [1, 2]
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert (out / "notes.txt").read_text() == "mine"
