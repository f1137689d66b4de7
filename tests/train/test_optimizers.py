"""The settings that choose and shape the optimizer of a training run."""

import pytest
import torch
from safetensors.torch import load_file

import fastlm
from fastlm import optim
from fastlm.errors import UserError
from fastlm.models import preset
from fastlm.optim import wsd
from fastlm.train import TrainConfig, read_metrics, setup, train
from tests.train.tiny import TinyLoader, losses, make_model, settings

CHOICES = {
    "adamw": ({}, optim.AdamW),
    "adamw 8": ({"state_bits": 8}, optim.AdamW),
    "lion": ({"optimizer": "lion", "lr": 1e-3}, optim.Lion),
    "sgd": ({"optimizer": "sgd", "lr": 0.1}, optim.SGD),
    "muon": ({"optimizer": "muon"}, optim.Muon),
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_optimizer_learns_and_resumes(name, tmp_path):
    changes, cls = CHOICES[name]
    config = settings(tmp_path / "whole", steps=12, checkpoint_every=6, evaluate_every=0, **changes)
    model = make_model(width=64)  # wide enough for 8-bit codes
    assert type(setup.make_optimizer(model, config)) is cls
    train(model, config, TinyLoader())
    found = list(losses(tmp_path / "whole")[0].values())
    assert sum(found[-3:]) < sum(found[:3])

    part = settings(tmp_path / "parts", steps=6, checkpoint_every=6, evaluate_every=0, **changes)
    # The same schedule as the whole run's: the end of the first part is a kill.
    model = make_model(width=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "learning_rate", lambda _, *at, own=setup.learning_rate: own(config, *at))
        train(model, part, TinyLoader())
    resumed = make_model(width=64)
    train(resumed, settings(tmp_path / "parts", steps=12, evaluate_every=0, resume=True, **changes), TinyLoader())
    assert losses(tmp_path / "parts")[0] == losses(tmp_path / "whole")[0]


def test_what_is_evaluated_and_saved_are_the_averages(tmp_path):
    model = make_model()
    config = settings(tmp_path, steps=6, evaluate_every=3, average_decay=0.5)
    train(model, config, TinyLoader(), TinyLoader(seed=3))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.equal(saved["up.weight"], model.up.weight)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["kind"] == "evaluation"
    averaged = make_model()
    averaged.load_state_dict(saved, strict=False)
    averaged.eval()
    loader, total, live = TinyLoader(seed=3), 0.0, 0
    for _ in range(config.evaluate_batches):
        batch = next(loader)
        total += averaged.loss(batch.tokens, batch.labels, reduction="sum").item()
        live += int((batch.labels != -100).sum())
    assert last["validation_loss"] == pytest.approx(total / live, rel=1e-6)


def test_wsd_takes_its_share_from_the_settings(tmp_path):
    train(make_model(), settings(tmp_path, steps=10, schedule="wsd", decay=0.4, evaluate_every=0), TinyLoader())
    rates = [r["lr"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([0.01 * wsd(step, 10, 2, 0.1, decay=0.4) for step in range(10)])
    assert rates[5] == 0.01 > rates[8]


def test_16_bit_weights_keep_their_remainders(tmp_path):
    model = make_model().bfloat16()
    config = settings(tmp_path, steps=2, evaluate_every=0, optimizer_precision="remainder")
    train(model, config, TinyLoader())
    state = load_file(next((tmp_path / "checkpoints").glob("step-*")) / "optimizer.safetensors")
    assert state["up.weight.remainder"].dtype == torch.int16 and state["up.weight.exp_avg"].dtype == torch.float32


def test_errors():
    for message, changes in {
        "decay must be a share": {"decay": 3.0},
        "momentum must be in": {"momentum": 1.0},
        "average_decay must be in": {"average_decay": 1.0},
        "state_bits must be 32 or 8": {"state_bits": 4},
    }.items():
        with pytest.raises(UserError, match=message):
            TrainConfig(**changes)
    with pytest.raises(UserError, match="state_bits is not for muon"):
        setup.make_optimizer(make_model(), TrainConfig(optimizer="muon", state_bits=8))
    assert TrainConfig(optimizer="lion").betas == (0.9, 0.99) and TrainConfig().betas == (0.9, 0.95)


def test_muon_takes_queries_keys_and_values_apart():
    model = fastlm.Transformer(preset("llama-4x192"))
    optimizer = setup.make_optimizer(model, TrainConfig(optimizer="muon"))
    sections = [group["sections"] for group in optimizer.param_groups if group["use_muon"]]
    assert sections == [None, (192, 64, 64), (512, 512)]
    rows = {name: p.shape[0] for name, p in model.blocks[0].named_parameters() if "qkv" in name or "gate_up" in name}
    assert list(rows.values()) == [sum(parts) for parts in sections[1:]]


def test_a_callers_optimizer_keeps_its_groups_rates(tmp_path):
    def run(out, steps, model, **changes):
        tensor = torch.tensor(0.4)
        groups = [{"params": [model.up.weight], "lr": 0.2}, {"params": [model.down.weight], "lr": tensor}]
        optimizer = optim.SGD([*groups, {"params": [model.norm.weight], "lr": 0.0}])
        config = settings(tmp_path / out, steps=steps, evaluate_every=0, lr=0.01, clip=0, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup, "learning_rate", lambda c, step, s: c.lr * (1 - step / 8))
            train(model, config, TinyLoader(), optimizer=optimizer)
        return optimizer

    whole = make_model()
    optimizer = run("whole", 6, whole)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.2 * 3 / 8, 0.4 * 3 / 8, 0.0])
    assert [r["lr"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")][0] == pytest.approx(0.2)
    run("parts", 3, make_model())
    resumed = make_model()
    run("parts", 6, resumed, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_what_a_callers_optimizer_does_not_hold_is_not_clipped_by(tmp_path):
    def run(out, frozen):
        model = make_model(dropout=0.0)
        model.norm.bias.register_hook(lambda g: g * torch.inf)  # nobody steps it: nobody minds
        for name, p in model.named_parameters():
            p.requires_grad_(not frozen or name.startswith("down"))
        optimizer = optim.AdamW(model.down.parameters(), 0.01)
        train(model, settings(tmp_path / out, steps=3, clip=0.01, evaluate_every=0), TinyLoader(), optimizer=optimizer)
        assert all(p.grad is None for p in model.parameters())
        return model, [r["grad_norm"] for r in read_metrics(tmp_path / out / "metrics.jsonl")]

    (part, norms), (alone, expected) = run("part", False), run("alone", True)
    assert norms == expected and min(norms) > 0.01
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), alone.parameters()))


def test_torchs_optimizers_train_and_resume_too(tmp_path):
    def run(out, steps, cls, **changes):
        model = make_model(dropout=0.0)
        optimizer = cls(model.parameters(), 0.01, weight_decay=0.1)
        config = settings(tmp_path / out, steps=steps, clip=0.5, evaluate_every=0, schedule="constant", **changes)
        train(model, config, TinyLoader(), optimizer=optimizer)
        return model.up.weight

    whole = run("whole", 4, torch.optim.AdamW)
    run("parts", 2, torch.optim.AdamW)
    assert torch.equal(run("parts", 4, torch.optim.AdamW, resume=True), whole)
    torch.testing.assert_close(run("ours", 4, optim.AdamW), whole)


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    optimizer = optim.AdamW(make_model().parameters())
    with pytest.raises(UserError, match=r"the optimizer holds a parameter \[31, 16\] that TinyModel does not have"):
        train(make_model(), settings(tmp_path, steps=1), TinyLoader(), optimizer=optimizer)


def test_nothing_to_train_and_optimizers_with_a_closure_are_refused(tmp_path):
    with pytest.raises(UserError, match="no parameter of TinyModel has requires_grad"):
        train(make_model().requires_grad_(False), settings(tmp_path, steps=1), TinyLoader())
    model = make_model()
    with pytest.raises(UserError, match="LBFGS needs a closure"):
        train(model, settings(tmp_path, steps=1), TinyLoader(), optimizer=torch.optim.LBFGS(model.parameters()))
    assert not any(tmp_path.iterdir()), "a refused run left something"


def test_another_optimizer_does_not_resume(tmp_path):
    train(make_model(), settings(tmp_path, steps=2, evaluate_every=0, optimizer="lion"), TinyLoader())
    model = make_model(seed=1)
    before = model.up.weight.detach().clone()
    with pytest.raises(UserError, match="has the state of optimizer lion, which adamw cannot continue"):
        train(model, settings(tmp_path, steps=4, evaluate_every=0, resume=True), TinyLoader())
    assert torch.equal(model.up.weight, before)


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    model = make_model()
    train(model, settings(tmp_path, steps=2, evaluate_every=0), TinyLoader())
    other = make_model(seed=1)
    other.up.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(UserError, match="up.weight.* but the optimizer does not train that parameter"):
        train(other, settings(tmp_path, steps=4, evaluate_every=0, resume=True), TinyLoader())
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_settings_reach_the_optimizer_that_has_them():
    groups = setup.make_optimizer(make_model(), TrainConfig(optimizer="muon", eps=1e-5)).param_groups
    assert {group["eps"] for group in groups if not group["use_muon"]} == {1e-5}
    assert {group["eps"] for group in groups if group["use_muon"]} == {1e-7}
    assert setup.make_optimizer(make_model(), TrainConfig(eps=1e-5)).param_groups[0]["eps"] == 1e-5
    assert setup.make_optimizer(make_model(), TrainConfig(optimizer="sgd")).param_groups[0]["momentum"] == 0.9
    for name in setup.HYPERPARAMETERS:
        assert not setup.unused_settings(TrainConfig(optimizer=name))


def test_settings_without_a_use_are_named(tmp_path, capsys):
    config = settings(tmp_path, steps=1, evaluate_every=0, optimizer="sgd", eps=1e-5, betas=(0.9, 0.9))
    train(make_model(), config, TinyLoader())
    out = capsys.readouterr()
    assert (out.out + out.err).count("not used: betas, eps; optimizer sgd has no such setting") == 1
