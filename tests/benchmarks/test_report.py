"""report: the page and the pictures say what the rows say, lost cells included."""

import pytest

from benchmarks import report, run
from benchmarks.harness import Row
from benchmarks.lines import Lines, cells, read
from benchmarks.plots import draw

MACHINE = {"kind": "machine", "cpu": "abacus", "cores": 2, "threads": 1, "torch": "2.13.0", "triton": "3.6.0"}
MACHINE |= {"date": "2026-01-02T03:04:05+00:00", "commit": "abc123", "copy_gbps": 20.0, "bfloat16_tflops": 1.0}


def row(provider, ms, op="attention", mode="forward", size=None, **more):
    base = {"fastlm:torch": None, "torch": 1.0}
    more = {"q1": ms, "q3": ms, "samples": 9, "speedup": base.get(provider)} | more
    return Row(op=op, provider=provider, size=size or {"B": 1, "S": 64}, dtype="bfloat16", mode=mode, ms=ms, **more)


def rows():
    found = []
    for B, S, ours in ((4, 64, 2.0), (2, 128, 1.25), (1, 256, 0.5)):
        rates = {"tflops": 0.1, "gbps": 5.0, "peak_mb": float(S)}
        found += [
            row("fastlm:torch", ours, size={"B": B, "S": S}, **rates),
            row("torch", 1.0, size={"B": B, "S": S}, **rates),
        ]
    found.append(Row("attention", "flash-attn", {"B": 4, "S": 64}, "bfloat16", "all", reason="missing: No module"))
    for n in (64, 128):
        found.append(Row("attention", "fast", {"B": 4, "S": n}, "bfloat16", "all", reason=f"wrong: by {n}"))
    return [*found, row("fastlm:torch", 1.0, op="softmax"), row("torch", 1.5, op="softmax")]


@pytest.fixture
def folder(tmp_path):
    Lines(tmp_path / "ops.jsonl", MACHINE).add(rows())
    (tmp_path / "train.jsonl").write_text('{"kind": "train", "model": "gpt2", "ms": 3.0}\n')
    return tmp_path


def test_the_page(folder, capsys):
    assert report.main([str(folder)]) == 0
    page = (folder / "README.md").read_text()
    assert "abacus, 2 cores, 1 thread(s); torch 2.13.0, triton 3.6.0; 2026-01-02, commit abc123." in page
    assert (
        "| `attention` | 3 | 0.80x | 0.50x (B=4 S=64, bfloat16, forward) | 2.00x (B=1 S=256, bfloat16, forward) | 2 |"
        in page
    )
    assert "| `softmax` | 1 | 1.50x |" in page
    assert "| `attention` | B=2 S=128 | bfloat16 | forward | 0.80x | 250 us |" in page
    assert "- fast (`attention`): wrong: by 64\n" in page + "\n" and "by 128" not in page
    assert "- flash-attn (`attention`): missing: No module" in page and "train.jsonl" not in page
    for name in ("speed.png", "roofline.png", "attention-speed.png", "attention-memory.png"):
        assert f"]({name})" in page and (folder / name).stat().st_size > 5000


def test_what_was_not_measured_is_not_drawn(folder):
    few = [r for r in rows() if r.op == "softmax"]
    assert [p.name for p in draw({"ops.jsonl": (MACHINE, few)}, folder)] == ["speed.png"]
    assert [p.name for p in draw({"ops.jsonl": ({}, rows()[:2])}, folder)] == ["speed.png"]


def test_into_a_page_of_others(folder, capsys):
    file = folder / "README-of-others.md"
    file.write_text(f"# Ours\n{report.MARK}\nold\n{report.MARK}\nend\n")
    for _ in range(2):
        assert report.main([str(folder), "--into", str(file)]) == 0
    text = file.read_text()
    assert text.startswith("# Ours\n") and text.endswith(f"{report.MARK}\nend\n") and "old" not in text
    assert text.count("| `softmax` |") == 1 and "(speed.png)" in text
    file.write_text("no marks")
    with pytest.raises(SystemExit, match="must hold the line <!-- benchmarks --> twice"):
        report.main([str(folder), "--into", str(file)])


def test_nothing_to_report(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2 and "python -m benchmarks run --out" in capsys.readouterr().err


def test_of_a_cell_measured_twice_the_latest_counts(folder):
    again = Lines(folder / "ops.jsonl", MACHINE | {"commit": "def456"})
    again.add([row("fastlm:torch", 9.0, op="softmax"), row("torch", 3.0, op="softmax")])
    again.add([Row("attention", "fastlm:torch", {"S": 64, "B": 4}, "bfloat16", "all", reason="wrong: result 0")])
    with (folder / "ops.jsonl").open("a") as file:
        file.write('{"kind": "time", "op": "att')  # a run that was killed
    machine, found = read(folder / "ops.jsonl")
    by_name = {str(c): c for c in cells(found)}
    softmax = by_name["softmax B=1 S=64 bfloat16 forward"]
    assert machine["commit"] == "def456" and softmax.speed(softmax.plain) == pytest.approx(1 / 3)
    assert by_name["attention B=4 S=64 bfloat16 forward"].ours is None


def test_a_run_ends_with_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.SECONDS, "quick", 0.001)
    monkeypatch.setattr(run, "rates", lambda device, kept: {"copy_gbps": 10.0, "float32_tflops": 0.1})
    assert run.main(["--op", "activation", "--device", "cpu", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "| `activation` |" in page and (tmp_path / "speed.png").exists()
    assert (
        "- torch.compile (`activation`, `glu`): missing: compiling takes minutes on a CPU; --suite full has it" in page
    )
    caught = capsys.readouterr()
    assert "copy_gbps: 10.0" in caught.out and "left: activation" in caught.err
