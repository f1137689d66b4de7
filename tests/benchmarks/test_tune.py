"""`python -m benchmarks tune`: settings are tried in the table's place, checked, ranked, and go back to where they belong."""

import importlib
import json

import pytest
import torch

from benchmarks import tune
from benchmarks.__main__ import COMMANDS
from fastlm.kernels import attention, attention_bwd
from fastlm.kernels.attention_call import Arguments

rehearsal = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")
TINY = {"B": 1, "S": 20, "H": 1, "block": 16}
OWN, OTHER = (16, 16, 4, 1), (32, 16, 4, 1)


@rehearsal
def test_a_rehearsal_measures_both_directions(tmp_path, capsys):
    assert tune.main(["--dry", "--op", "attention", "--kind", "hot", "--out", str(tmp_path)]) == 0
    entries = [json.loads(text) for text in (tmp_path / "tune.jsonl").read_text().splitlines()]
    assert entries[0]["kind"] == "machine"
    rows = [e for e in entries if e["kind"] == "setting"]
    assert [(r["kernel"], tuple(r["setting"]), r["table"]) for r in rows] == [
        (kernel, setting, setting == OWN) for kernel in ("fwd", "dkdv", "dq") for setting in (OWN, OTHER)
    ]
    assert all(len(r["ms"]) == 2 and min(r["ms"]) > 0 and r["ratio"] > 0 for r in rows)
    text = capsys.readouterr().out
    assert "dkdv, class hot, padded head width 16" in text and "(the table's)" in text
    assert text.count("rehearsal, not a result: ") == 2 and "kernels/attention_bwd.py, _HOT[0][16]" in text


@rehearsal
@pytest.mark.parametrize("kind", ("blocks", "heavy"))
def test_a_rehearsal_of_the_other_classes(kind, capsys):
    assert tune.main(["--dry", "--kernel", "fwd", "--kind", kind]) == 0
    assert f"fwd, class {kind}, padded head width 16" in capsys.readouterr().out


def test_the_settings_reach_the_kernels_and_the_tables_come_back(monkeypatch):
    seen = []

    def recorder(name):
        class Kernel:
            def __getitem__(self, grid):
                return lambda *a, **k: seen.append((name, k["BLOCK_M"], k["BLOCK_N"], k["num_warps"], k["num_stages"]))

        return Kernel()

    work = tune.Work(tune.calls("hot", 16, "cpu", torch.float32, **TINY)[0])
    monkeypatch.setattr(attention, "_attention_fwd_kernel", recorder("fwd"))
    for name in ("dkdv", "dq"):
        monkeypatch.setattr(attention_bwd, f"_attention_{name}_kernel", recorder(name))
    tables = attention._settings, attention_bwd._settings
    for kernel in ("fwd", "dkdv", "dq"):
        with tune.using(kernel, (64, 32, 8, 2)):
            work.run(kernel)
    assert seen == [(kernel, 64, 32, 8, 2) for kernel in ("fwd", "dkdv", "dq")]
    assert (attention._settings, attention_bwd._settings) == tables
    seen.clear()
    work.run("dq")
    assert [name for name, *_ in seen] == ["dkdv", "dq"]


@rehearsal
def test_wrong_and_failing_settings_get_no_time(monkeypatch):
    work = tune.Work(tune.calls("hot", 16, "cpu", torch.float32, **TINY)[0])
    checked, by_table = [(work, work.exact())], [work.run("fwd")]
    arguments = (OTHER, OWN, checked, by_table, [work], "cpu", 0.0)
    assert tune.measure_setting("fwd", *arguments)["ratio"] > 0
    launcher = attention.attention_fwd

    def slightly_wrong(*args):
        o, lse = launcher(*args)
        return o * 1.001, lse

    monkeypatch.setattr(attention, "attention_fwd", slightly_wrong)
    assert tune.measure_setting("fwd", *arguments)["reason"].startswith("wrong: call 0 result 0: max error")

    def too_much(*args):
        raise RuntimeError("out of resource: shared memory\nRequired: 1")

    monkeypatch.setattr(attention, "attention_fwd", too_much)
    assert tune.measure_setting("fwd", *arguments) == {"reason": "failed: RuntimeError: out of resource: shared memory"}


@pytest.mark.parametrize("generation", (80, 90, 100))
@pytest.mark.parametrize("kind", tune.KINDS)
def test_the_named_entry_is_the_one_that_the_launchers_read(kind, generation, monkeypatch):
    a = Arguments.of(*tune.calls(kind, 16, "cpu", torch.bfloat16, **TINY)[0])
    for module, kernel in ((attention, "fwd"), (attention_bwd, "dkdv")):
        monkeypatch.setattr(module, "generation", lambda device: generation)
        for width in tune.WIDTHS:
            file, entry = tune.place(kernel, kind, generation, width).split(", ", 1)
            assert file == f"kernels/{module.__name__.split('.')[-1]}.py"
            if entry.startswith("_"):
                assert eval(entry, vars(module)) == module._settings(a, width)
            else:
                assert (kernel, kind, generation) == ("fwd", "blocks", 80) and width <= 128


def test_settings_too_large_are_not_compiled():
    shared = 227 << 10
    assert (
        tune.too_large("fwd", (128, 128, 8, 4), 256, shared) == "too large: 384 KiB and more of 227 KiB shared memory"
    )
    for module, kernel in ((attention, "fwd"), (attention_bwd, "dkdv"), (attention_bwd, "dq")):
        for width, own in module._HOT[90].items():
            setting = own if kernel == "fwd" else own[kernel == "dq"]
            assert tune.too_large(kernel, setting, width, shared) is None, (kernel, width)
    assert len(set(tune.GRID)) == len(tune.GRID) == 72


def test_the_best_is_named_only_where_it_is_clearly_faster():
    rows = [{"setting": OWN, "ratio": 1.0, "ms": [1.0]}, {"setting": OTHER, "ratio": 0.99, "ms": [0.99]}]
    assert tune.best(rows, OWN) == OWN
    assert tune.line("x.py, _HOT[90][64]", [OWN], [OWN]) == "x.py, _HOT[90][64] stands: nothing is 2% faster"
    rows[1]["ratio"] = 0.9
    assert tune.best(rows, OWN) == OTHER
    assert tune.line("x.py, _HOT[90][64]", [OTHER], [OWN]).endswith("\n    (32, 16, 4, 1)")
    assert tune.line("x.py, y", [OWN, OTHER], [OWN, OWN]).endswith("\n    ((16, 16, 4, 1), (32, 16, 4, 1))")
    rows.append({"setting": (64, 64, 4, 2), "reason": "failed: x"})
    text = tune.report("title", rows, OWN).splitlines()
    assert text[2].split()[:5] == ["32", "16", "4", "1", "0.900"] and text[3].endswith("(the table's)")
    assert text[4] == "no time for 64,64,4,2: failed: x"


@pytest.mark.parametrize("text", ("64,64,4", "64,48,4,2", "256,64,4,2", "64,64,4,0", "a,b,c,d"))
def test_a_candidate_must_be_a_setting(text, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dry", "--candidate", text])
    assert text in capsys.readouterr().err


@rehearsal
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="torch sees no CUDA GPU; --dry"):
        tune.main([])


def test_every_command_exists():
    assert "tune" in COMMANDS
    assert all(callable(importlib.import_module(f"benchmarks.{name}").main) for name in COMMANDS)
