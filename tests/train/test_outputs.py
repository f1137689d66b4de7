import re
import sys

import pytest
import torch

from fastlm.train import read_metrics, speed, terminal, train, write_report
from fastlm.train.plot import draw_losses, smoothed
from tests.train.tiny import TinyLoader, make_model, settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(make_model(), settings(out, steps=40, log_every=2), TinyLoader(), TinyLoader(seed=1))
    return out


def test_metrics_hold_what_a_reader_needs(run):
    records = read_metrics(run / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    assert [r["step"] for r in steps] == list(range(2, 41, 2))
    assert [r["step"] for r in evaluations] == list(range(5, 41, 5))
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "share_of_peak", "seconds"} <= steps[0].keys()
    assert steps[-1]["tokens"] == 40 * 32
    assert all(r["gap"] == r["validation_loss"] - r["train_loss"] for r in evaluations)
    best = [r["validation_loss"] for r in evaluations if r["best"]]
    assert best == sorted(best, reverse=True)


def test_plain_lines_are_readable(tmp_path, capsys):
    train(make_model(), settings(tmp_path, steps=10), TinyLoader(), TinyLoader(seed=1))
    lines = capsys.readouterr().out.splitlines()
    number = r"[\d.,]+"
    step = rf"step  3/10  loss {number}  lr \d\.\d\de-0[23]  grad norm {number}  {number} tok/s  {number}% of peak  0:0\d left"
    assert any(re.fullmatch(step, line) for line in lines)
    assert any(
        re.match(r"step  5/10  validation loss \d+\.\d{4}  training loss \d+\.\d{4}  gap [+-]", line) for line in lines
    )
    assert re.match(r"peak: [\d,]+ GFLOP/s, fp32 matrix product measured", lines[0])


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    train(make_model(), settings(tmp_path, steps=10), TinyLoader(), TinyLoader(seed=1))
    shown = capsys.readouterr().out
    assert "100%" in shown
    assert "10/10" in shown
    assert "validation loss" in shown


def test_durations():
    assert [terminal.duration(s) for s in (9, 192, 4000, 59.6)] == ["0:09", "3:12", "1:06:40", "1:00"]


def test_the_report_is_one_whole_page(run):
    tables = {
        "Held-out <files>": [
            {"model": "this one", "bits per byte": 1.923456},
            {"model": "gzip -9", "bits per byte": 2.5},
        ]
    }
    path = write_report(
        run, title="A & B", summary="Short.", tables=tables, samples=[("def f(", "x):\n    return x < 1")]
    )
    page = path.read_text()
    assert "<h1>A &amp; B</h1>" in page
    assert "Held-out &lt;files&gt;" in page
    assert "1.9235" in page
    assert "<b>def f(</b>x):\n    return x &lt; 1</pre>" in page
    assert page.count("data:image/png;base64,iVBOR") == 2
    assert not re.search(r'(?:src|href|srcset)="(?!data:)|url\(|@import|<script', page)  # nothing from elsewhere
    assert torch.__version__ in page
    for tag in ("div", "table", "tr", "td", "th", "pre", "picture", "body", "html"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_the_report_of_a_folder_without_metrics(tmp_path):
    assert "<h1>Empty</h1>" in write_report(tmp_path, title="Empty").read_text()


def test_the_picture(run, tmp_path):
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_losses([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_smoothing_does_not_lag():
    line = [float(i) for i in range(200)]
    assert smoothed(line) == pytest.approx(line)
    noisy = [v + (-1) ** i for i, v in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smoothed(noisy)[10:-10], line[10:-10])) < 0.2


def test_flops_count_a_tied_embedding_and_not_one_that_is_only_looked_up():
    model = make_model()
    matrices = 31 * 16 + 2 * 16 * 32
    assert speed.flops_per_token(model, 8) == 6 * matrices
    model.head.weight = torch.nn.Parameter(torch.zeros(31, 16))
    assert speed.flops_per_token(model, 8) == 6 * matrices
    model.positions = torch.nn.Embedding(8, 16)
    assert speed.flops_per_token(model, 8) == 6 * matrices


def test_the_measured_peak_is_of_this_machine():
    peak, source = speed.peak_flops(torch.device("cpu"), "fp32")
    assert 1e8 < peak < 1e14
    assert "fp32" in source


def test_tensorboard_gets_every_record(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        make_model(),
        settings(tmp_path, steps=6, tensorboard=True, checkpoint_every=4),
        TinyLoader(),
        TinyLoader(seed=1),
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 7))
    assert [e.step for e in events.Scalars("evaluation/validation_loss")] == [5, 6]
