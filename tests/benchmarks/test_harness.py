"""The harness refuses times to wrong providers, says why others are missing, and takes turns fairly."""

import dataclasses
import json
import time

import pytest
import torch

from benchmarks import clock, harness, peaks, run
from benchmarks.harness import Bench, Provider, Row, measure, plain
from benchmarks.lines import Lines
from benchmarks.machine import machine
from benchmarks.peaks import set_shares
from benchmarks.tables import short_table, table


def _make(dtype, device, n):
    return torch.randn(8, n, device=device).to(dtype).requires_grad_(), 3


def _right(x, k):
    return (x * k).relu()


def _absent():
    import a_package_that_nobody_has  # noqa: F401


def _crashes(x, k):
    raise RuntimeError("no kernel image\nand more")


def _wrong_gradient(x, k):
    return (x * k).relu().detach() + (x - x.detach()) * 2.9


BENCH = Bench(
    op="rms_norm",
    make=_make,
    reference=_right,
    providers=[
        plain(_right),
        plain(lambda x, k: (x * k).relu() * 1.01, "wrong"),
        plain(_wrong_gradient, "wrong gradient"),
        plain(_crashes, "crashes"),
        Provider("absent", _absent),
    ],
    sizes={"tiny": [{"n": 40}], "cpu": [{"n": 41}], "quick": [{"n": 42}]},
    traffic=lambda mode, x, k: 2 * x.nbytes,
    flops=lambda mode, x, k: 2 * x.numel(),
)


@pytest.fixture(scope="module")
def rows():
    return measure(BENCH, {"n": 40}, torch.float32, "cpu", seconds=0.01)


def test_only_right_providers_get_a_time(rows):
    assert {(r.provider, r.mode) for r in rows if r.ms is not None} == {("torch", mode) for mode in harness.MODES}
    reasons = {r.provider: r.reason for r in rows if r.ms is None}
    assert reasons["wrong"].startswith("wrong: result 0: max error")
    assert reasons["wrong gradient"].startswith("wrong: result 1")
    assert reasons["crashes"] == "failed: RuntimeError: no kernel image"
    assert reasons["absent"].startswith("missing: No module named")


def test_a_time_has_quartiles_and_rates(rows):
    for r in rows:
        if r.ms is not None:
            assert 0 < r.q1 <= r.ms <= r.q3 and r.samples >= 7 and r.speedup == 1
            twice = 2 if r.mode == "both" else 1
            assert r.gbps == pytest.approx(twice * 2 * 8 * 40 * 4 / r.ms / 1e6)
            assert r.tflops == pytest.approx(twice * 2 * 8 * 40 / r.ms / 1e9)


def test_shares_of_the_machine_s_own_rates():
    cell = {"op": "toy", "provider": "torch", "size": {}, "dtype": "float32", "mode": "forward"}
    moves, multiplies, unknown = Row(**cell, gbps=50.0), Row(**cell, gbps=5.0, tflops=30.0), Row(**cell)
    set_shares([moves, multiplies, unknown], {"copy_gbps": 200.0, "float32_tflops": 40.0})
    assert (moves.share, multiplies.share, unknown.share) == (0.25, 0.75, None)
    set_shares([moves], {})
    assert moves.share is None


def test_table_and_lines(rows, tmp_path):
    text = table(rows)
    assert "rms_norm n=40 float32 both" in text
    assert "no time for absent (n=40 float32): missing" in text and "no time for wrong" in text
    lines = Lines(tmp_path / "new" / "ops.jsonl", machine("cpu"))
    lines.add(rows)
    entries = [json.loads(line) for line in (tmp_path / "new" / "ops.jsonl").read_text().splitlines()]
    assert entries[0]["kind"] == "machine" and {"date", "commit", "torch", "cpu"} <= entries[0].keys()
    assert [e["kind"] for e in entries[1:]].count("time") == 3 and len(entries) == 1 + len(rows)


def test_constant_data_is_refused():
    zeros = Bench("rms_norm", lambda dtype, device, n: (torch.zeros(n),), _right, BENCH.providers, BENCH.sizes)
    with pytest.raises(ValueError, match="tensor 0 is constant"):
        measure(zeros, {"n": 8}, torch.float32, "cpu", seconds=0.01)


def test_order_is_balanced():
    places = {provider: [0] * 3 for provider in range(3)}
    for turn in range(6):
        for place, provider in enumerate(clock.balanced_order(3, turn)):
            places[provider][place] += 1
    assert all(counts == [2, 2, 2] for counts in places.values())


def test_the_clock_tells_slow_from_fast():
    slow, fast = clock.time_calls([lambda: time.sleep(4e-3), lambda: time.sleep(1e-3)], "cpu", 0.1)
    assert clock.quartiles(slow)[1] > 2 * clock.quartiles(fast)[1]


def test_suites():
    assert BENCH.sizes_of("tiny", "cpu") == BENCH.sizes_of("tiny", "cuda") == [{"n": 40}]
    assert BENCH.sizes_of("quick", "cpu") == BENCH.sizes_of("full", "cpu") == [{"n": 41}]
    assert BENCH.sizes_of("full", "cuda") == [{"n": 42}]


def test_inputs_are_never_changed_for_the_next_provider():
    spoil = plain(lambda x, k: _right(x, k) + x.detach().mul_(0), "spoils its input")
    bench = Bench("rms_norm", _make, _right, [spoil, plain(_right)], BENCH.sizes)
    found = measure(bench, {"n": 8}, torch.float32, "cpu", seconds=0.01)
    assert {r.provider for r in found if r.ms is not None} >= {"torch"}


def _step(params, grads, backend=None):
    for p, g in zip(params, grads):
        p.sub_(g)
    return params


def _make_lists(dtype, device, n):
    return [torch.randn(n).to(dtype), torch.randn(3).to(dtype)], [torch.randn(n).to(dtype), torch.randn(3).to(dtype)]


def test_lists_of_tensors_changed_in_place():
    wrong = plain(lambda p, g: _step(p, [x * 1.1 for x in g]), "wrong")
    bench = Bench("adamw", _make_lists, _step, [plain(_step), plain(_step, "again"), wrong], {}, modes=("forward",))
    found = {r.provider: r for r in measure(bench, {"n": 8}, torch.float32, "cpu", seconds=0.01)}
    assert found["torch"].ms and found["again"].ms and found["wrong"].reason.startswith("wrong: result 0")


def test_without_a_reference_nobody_gets_a_time():
    bench = Bench("rms_norm", _make, _crashes, BENCH.providers[:1], BENCH.sizes)
    (row,) = measure(bench, {"n": 8}, torch.float32, "cpu", seconds=0.01)
    assert row.ms is None and row.reason == "no gate: failed: RuntimeError: no kernel image"


def test_the_gpu_clock_flushes_first_and_leaves_the_flush_out(monkeypatch):
    """The arithmetic of the GPU clock, on a GPU played by the CPU: each call's events enclose the call alone."""

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    flushes = []

    class Buffer:
        def zero_(self):
            flushes.append(time.sleep(2e-3))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: Buffer())
        one, five = clock.time_calls([lambda: time.sleep(1e-3), lambda: time.sleep(5e-3)], "cuda", 0.1)
    assert len(one) == len(five) >= 7
    # Medians, loosely: the machine is shared. The second call takes longer to queue, so it is flushed for longer.
    assert 0.9 < clock.quartiles(one)[1] < 4 and 4.9 < clock.quartiles(five)[1] < 12
    assert len(flushes) >= len(one) * (1 + 4)


def test_launches_are_what_the_profiler_saw_on_the_gpu(monkeypatch):
    from types import SimpleNamespace

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            kinds = [clock.DeviceType.CPU, *[clock.DeviceType.CUDA] * len(called)]
            return [SimpleNamespace(device_type=kind) for kind in kinds]

    called = []
    monkeypatch.setattr(clock, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert clock.launches(lambda: called.extend("abc")) == 3


@pytest.mark.parametrize("stem", run.ops_with_benchmarks())
def test_every_benchmark_file_runs(stem, monkeypatch):
    # torch.compile is left out: seconds per size for a form that is not ours.
    for bench in run.benches(stem):
        kept = [p for p in bench.providers if "compile" not in p.name]
        bench = Bench(**{f: getattr(bench, f) for f in bench.__dataclass_fields__} | {"providers": kept})
        for size in bench.sizes_of("tiny", "cpu"):
            found = measure(bench, size, bench.dtypes["cpu"][0], "cpu", seconds=0.001)
            assert any(r.ms is not None for r in found)
            # Another's kernel may fail here and say so; ours may only be missing.
            own = [r for r in found if r.provider.startswith(harness.OURS) and r.ms is None]
            bad = [f"{r.provider}: {r.reason}" for r in own if not r.reason.startswith("missing")]
            assert not bad, f"{stem} {size}: {bad}"


def test_an_unknown_op_is_one_line():
    with pytest.raises(SystemExit, match="no op 'nope'; there is .*rms_norm"):
        run.main(["--op", "nope"])


def test_the_command_prints_a_table_and_appends_lines(tmp_path, capsys):
    arguments = [
        "--op",
        "rms_norm",
        "--suite",
        "tiny",
        "--skip",
        "torch.compile",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    for _ in range(2):
        assert run.main(arguments) == 0
    text = capsys.readouterr().out
    assert "rms_norm M=8 N=48 float32 forward" in text and "fastlm:torch" in text and "torch.compile " not in text
    entries = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in entries].count("machine") == 2
    assert {e["provider"] for e in entries if e["kind"] == "time"} == {"torch", "fastlm:torch"}
    short = short_table(tmp_path / "ops.jsonl")
    forward = next(line.split() for line in short.splitlines() if "float32  forward" in line)
    assert forward[:4] == ["rms_norm", "float32", "forward", "2"] and "backward" in short and " both " not in short
    assert run.main(["--list"]) == 0 and "rms_norm" in capsys.readouterr().out.split()


def test_an_error_while_calls_are_timed_is_a_row_of_its_mode(monkeypatch):
    """Rows of the modes before it are there already, and the mode after it is measured."""
    timed, calls = harness.time_calls, []

    def second_fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: misaligned address")
        return timed(*arguments)

    kept = []
    monkeypatch.setattr(harness, "time_calls", second_fails)
    found = measure(BENCH, {"n": 8}, torch.float32, "cpu", seconds=0.001, keep=lambda rows: kept.append(list(rows)))
    assert [r.reason for r in kept[2]] == ["failed: RuntimeError: CUDA error: misaligned address"]
    assert [(r.mode, r.ms is not None) for rows in kept[1:] for r in rows] == [
        ("forward", True),
        ("backward", False),
        ("both", True),
    ]
    assert [r for rows in kept for r in rows] == found


def test_a_cell_that_cannot_be_made_is_a_row_and_the_next_is_measured(tmp_path, monkeypatch):
    def make(dtype, device, n):
        if n == 7:
            raise MemoryError("no room")
        return _make(dtype, device, n)

    bench = dataclasses.replace(BENCH, make=make, providers=[plain(_right)])
    lines = Lines(tmp_path / "ops.jsonl", {})
    cells = run.Run("tiny", "cpu", lines, {})
    (row,) = cells.measure(bench, {"n": 7}, torch.float32)
    assert row.reason == "failed: MemoryError: no room" and len(cells.measure(bench, {"n": 8}, torch.float32)) == 3
    assert (tmp_path / "ops.jsonl").read_text().count("no room") == 1


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "peaks", lambda dtypes, device: {"copy_gbps": 5.0})
    assert peaks.rates("cpu", tmp_path / "rates.json") == {"copy_gbps": 5.0}
    monkeypatch.setattr(peaks, "peaks", None)
    assert peaks.rates("cpu", tmp_path / "rates.json") == {"copy_gbps": 5.0}


def test_8_bit_products_are_set_against_their_own_rate():
    """The forward's; the backward's products have 16 bits, and what is both is set against neither."""
    bench = dataclasses.replace(BENCH, providers=[plain(_right)], traffic=None, peak=peaks.FP8)
    rows = measure(bench, {"n": 8}, torch.bfloat16, "cpu", seconds=0.001)
    set_shares(rows, {f"{peaks.FP8}_tflops": 2.0, "bfloat16_tflops": 1.0, "copy_gbps": 9.0})
    shares = {r.mode: r.share and r.share / r.tflops for r in rows}
    assert shares == {"forward": pytest.approx(0.5), "backward": pytest.approx(1.0), "both": None}


def test_what_torch_compiles_is_known_by_its_name():
    names = {p.name for stem in run.ops_with_benchmarks() for bench in run.benches(stem) for p in bench.providers}
    assert {n for n in names if run.is_compiled(n)} == {
        "torch.compile",
        "compiled",
        "flex",
        "torch._scaled_mm, compiled",
        "batched, torch.compile",
    }
