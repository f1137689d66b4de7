"""compare: what is slower is caught, equal runs raise no alarm. The harness measures as ever, by a clock that the test turns."""

import random
from dataclasses import replace

import pytest
import torch

from benchmarks import clock, compare
from benchmarks.harness import Bench, Provider, measure
from benchmarks.lines import Lines, cells, read

SIZES = [{"n": n} for n in (16, 24, 32, 40)]


class Clock:
    """perf_counter_ns of a noisy machine: calls take a few percent more or less than told, now and then three times that."""

    def __init__(self, seed, speed=1.0):
        self.now, self.random, self.speed = 0.0, random.Random(seed), speed

    def perf_counter_ns(self):
        return int(self.now)

    def work(self, us):
        noise = self.random.lognormvariate(0, 0.04) * (3 if self.random.random() < 0.03 else 1)
        self.now += 1e3 * us * noise / self.speed


def run(monkeypatch, tmp_path, name, seed, ours_us=200.0, speed=1.0, form=None):
    """Rows of one run of the harness, by way of the file it leaves: two providers of 200 us, ours and plain torch."""
    fake = Clock(seed, speed)
    monkeypatch.setattr(clock, "time", fake)

    def provider(us):
        def fn(x):
            fake.work(us)
            return x * 2

        return fn

    providers = [
        Provider("fastlm:torch", lambda: form or provider(ours_us)),
        Provider("torch", lambda: provider(200.0)),
    ]
    bench = Bench(
        "rms_norm",
        lambda dtype, device, n: (torch.randn(n).to(dtype),),
        lambda x: x * 2,
        providers,
        {},
        modes=("forward",),
    )
    lines = Lines(tmp_path / name / "ops.jsonl", {"kind": "machine", "cpu": "a clock"})
    for size in SIZES:
        lines.add(measure(bench, size, torch.float32, "cpu", seconds=0.05))
    return read(tmp_path / name / "ops.jsonl")[1]


def test_two_equal_runs_raise_no_alarm(monkeypatch, tmp_path):
    for seed in range(0, 20, 2):
        old, new = (run(monkeypatch, tmp_path, f"equal{s}", s) for s in (seed, seed + 1))
        result = compare.compare([old], [new])
        assert result.alarms == [] and result.compared == 8 and "no alarm" in str(result)


def test_ten_percent_slower_is_caught_in_every_cell(monkeypatch, tmp_path):
    for seed in range(0, 10, 2):
        old = run(monkeypatch, tmp_path, f"old{seed}", seed)
        slow = compare.compare([old], [run(monkeypatch, tmp_path, f"slow{seed}", seed + 1, ours_us=220.0)])
        assert len(slow.alarms) == len(SIZES) and "fastlm:torch" in slow.alarms[0]
    fast = compare.compare([old], [run(monkeypatch, tmp_path, "fast", 30, ours_us=180.0)])
    assert fast.alarms == [] and len(fast.faster) == len(SIZES)


@pytest.mark.parametrize("speed", [0.6, 1.7])
def test_another_machine_s_speed_is_divided_out(speed, monkeypatch, tmp_path):
    old = run(monkeypatch, tmp_path, "old", 0)
    assert compare.compare([old], [run(monkeypatch, tmp_path, "same", 1, speed=speed)]).alarms == []
    slow = compare.compare([old], [run(monkeypatch, tmp_path, "slow", 2, speed=speed, ours_us=220.0)])
    assert len(slow.alarms) == len(SIZES) and "beside plain PyTorch's" in slow.alarms[0]


def test_what_runs_differ_by_is_no_alarm_where_it_is_known(monkeypatch, tmp_path):
    """A cell that is 12 % slower in every other run, as where memory happens to lie badly: two runs of either know it."""
    fast, slow = run(monkeypatch, tmp_path, "fast", 0), run(monkeypatch, tmp_path, "slow", 1, ours_us=224.0)
    assert len(compare.compare([fast], [slow]).alarms) == len(SIZES)
    assert compare.compare([fast, slow], [slow, fast]).alarms == []
    slower = run(monkeypatch, tmp_path, "slower", 2, ours_us=260.0)
    assert len(compare.compare([fast, slow], [slower, slower]).alarms) == len(SIZES)


def test_a_kernel_that_became_wrong_is_an_alarm(monkeypatch, tmp_path):
    old = run(monkeypatch, tmp_path, "old", 0)
    new = run(monkeypatch, tmp_path, "wrong", 1, form=lambda x: x * 2.01)
    assert {c.ours for c in cells(new)} == {None}  # refused a time
    result = compare.compare([old], [new])
    assert len(result.alarms) == len(SIZES) and "wrong: result 0: max error" in result.alarms[0]


def test_memory_and_what_is_new(monkeypatch, tmp_path):
    old = [replace(r, peak_mb=100.0) for r in run(monkeypatch, tmp_path, "old", 0)]
    more = [replace(r, peak_mb=110.0) for r in old]
    result = compare.compare([old], [more])
    assert len(result.alarms) == len(SIZES) and "peak memory 100.0 -> 110.0 MiB" in result.alarms[0]
    half = compare.compare([old[: len(old) // 2]], [old])
    assert half.new == len(old) // 2 and half.alarms == []


def test_the_command(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "old", 0)
    run(monkeypatch, tmp_path, "slow", 1, ours_us=230.0)
    folders = [str(tmp_path / name) for name in ("old", "slow")]
    assert compare.main(folders) == 1 and "slower: rms_norm n=16 float32 forward" in capsys.readouterr().out
    assert compare.main([folders[0], folders[0] + "/ops.jsonl"]) == 0 and "no alarm" in capsys.readouterr().out
    assert compare.main([folders[0], str(tmp_path)]) == 2
    assert "give a folder that `python -m benchmarks run --out` wrote" in capsys.readouterr().err
