"""The conformance program without a GPU: its kernels on the host body against torch, what it says, and that nvcc builds it."""

import ctypes
import dataclasses
import re
import subprocess

import pytest
import torch

from tests.csrc import conformance, conformance_run, host_library
from tests.csrc.conformance import OnHost, Side, built, compare, main, run
from tests.csrc.conformance_cases import CASES, within
from tests.csrc.conformance_oracle import ORACLES
from tests.csrc.conformance_run import BROKEN, DeviceBroken, Tally
from tests.csrc.host_library import In, needs_compiler, needs_nvcc


class Oracle(Side):
    """Takes the place of the GPU: what torch says a case must give."""

    def run(self, case, values):
        name = max((n for n in ORACLES if case.launcher.startswith(n)), key=len)
        return ORACLES[name](*[v.tensor if isinstance(v, In) else v for v in values])


class Changed(OnHost):
    """The host body, but for what `change` makes of a case's last result."""

    major = 8

    def __init__(self, change):
        super().__init__("random")
        self._change = change

    def run(self, case, values):
        *others, last = super().run(case, values)
        return [*others, self._change(last)]


def named(word):
    return next(c for c in CASES if c.name.startswith(word))


@pytest.fixture(scope="module")
def host():
    return OnHost()


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_host_body_gives_what_torch_does(case, host):
    found = compare(case, Oracle(), host, seed=3, repeats=2)
    assert found.values > 8 and found.wrong == 0, found.example


@needs_compiler
def test_a_rehearsal_names_every_case(tmp_path, capsys):
    assert main(["--dry", "--tally", str(tmp_path / "tally.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "threads in random order" in lines[0] and re.search(rf"all {len(CASES)} cases agree; \d+ values", lines[-1])
    assert [line.split("  ")[0] for line in lines[1:-1]] == [c.name for c in CASES]
    assert all(re.search(r"\d+ values +0 differ$", line) for line in lines[1:-1])


@needs_compiler
def test_what_differs_is_counted_and_named(host, capsys):
    def flip(t):
        bits = t.view(torch.int32).clone()
        bits.flatten()[7] ^= 1
        return bits.view(t.dtype)

    cases = [named("warp_ballot"), named("warp_sum"), named("atomic_wrap"), named("philox")]
    assert run(Changed(flip), host, cases, seed=1, repeats=2) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert "4 of 4 cases differ" in last
    assert all(" 2 differ" in line and "where the host body has" in line for line in lines[:2] + lines[3:])
    assert "result 0 at [0, 2, 1]" in lines[0]


@needs_compiler
@pytest.mark.parametrize("factor, status, worst", [(1 + 2.0**-23, 0, "2^-2"), (1 + 1.5 * 2.0**-20, 1, "2^-19.")])
def test_approximate_functions_have_their_error(host, factor, status, worst, capsys):
    assert run(Changed(lambda t: (t.double() * factor).float()), host, [named("fast_exp2")], 0, 1) == status
    assert f"worst error {worst}" in capsys.readouterr().out


def test_errors_are_relative_down_to_the_floor():
    want = torch.tensor([1.0, 2.0**-126, 0.0, torch.inf, torch.nan, -4.0, 1.0])
    found = torch.tensor([1.0 + 2**-20, 0.0, 2.0**-127, torch.inf, torch.nan, -4.0, torch.nan])
    wrong, worst = within(2.0**-20)(found, want)
    assert wrong.tolist() == [False] * 6 + [True] and worst == torch.inf
    assert within(2.0**-20)(-found, want)[0].tolist() == [True, False, False, True, False, True, True]
    wrong, _ = within(2.0**-22, 2.0**-22)(torch.tensor([2.0**-22, 2.0**-20]), torch.zeros(2))
    assert wrong.tolist() == [False, True]


@needs_compiler
def test_a_gpu_that_fails_ends_the_run_and_other_gpus_instructions_are_passed_over(host, capsys):
    def fail(_):
        raise DeviceBroken("the kernel failed: illegal memory access")

    hopper = dataclasses.replace(named("fill_zero"), name="hopper's", majors=(9,))
    assert run(Changed(fail), host, [hopper, named("philox"), named("warp_ballot")], 0, 1) == BROKEN
    out = capsys.readouterr().out
    assert (
        "not run: for compute capability 9.x" in out and "FAILED  the kernel failed" in out and "warp_ballot" not in out
    )
    assert run(Changed(lambda t: t), host, [hopper], 0, 1) == 0


THREE = ["warp_ballot, _any, _all", "fill_zero", "philox"]  # in the order of CASES


@needs_compiler
@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_the_run_goes_on_after_a_refused_launch_and_a_hung_kernel(how, tmp_path, capsys):
    """`refuses` in the process that it is in; of `hangs` the process that goes on, with the tally of the one before it."""
    options = [word for name in THREE for word in ("--only", name)] + ["--tally", str(tmp_path / "tally.json")]
    options += ["--stand-in", "fill_zero", how]
    assert main(options) == (1 if how == "refuses" else BROKEN)
    lines = capsys.readouterr().out.splitlines()
    assert ("FAILED  the launch was refused" if how == "refuses" else "FAILED  HUNG: the kernel did not end") in lines[
        2
    ]
    if how == "hangs":
        assert len(lines) == 3 and main(options) == 1
        lines += capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == THREE and "1 of 3 cases differ or failed;" in lines[-1]


@needs_compiler
def test_another_process_goes_on_after_one_that_a_case_has_ended(capfd):
    """The whole command, its process killed by the case in the middle."""
    options = [word for name in THREE for word in ("--only", name)]
    assert main([*options, "--stand-in", "fill_zero", "dies"]) == 1
    out = capfd.readouterr().out
    assert out.count("conformance of a stand-in") == 1 and "FAILED  its process ended with exit status -6" in out
    assert out.index("fill_zero") < out.index("philox") and "1 of 3 cases differ or failed;" in out


def test_a_run_that_fails_at_every_case_gives_up(tmp_path, monkeypatch, capsys):
    def broken(command):
        tally = Tally.read(path)
        tally.begin(f"case {tally.next}")
        return subprocess.CompletedProcess(command, BROKEN)

    path = tmp_path / "tally.json"
    monkeypatch.setattr(conformance_run.subprocess, "run", broken)
    assert conformance_run.run_apart([], 30, path) == 1
    assert "conformance: 9 of 30 cases differ or failed, 21 were not run; 0 values" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on it")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2 and "torch sees no CUDA GPU; run it where there is one, or --dry" in capsys.readouterr().err
    assert main(["--only", "nothing"]) == 2 and "no case is named like nothing" in capsys.readouterr().err


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch, capsys):
    for module in (conformance, host_library):
        monkeypatch.setattr(module, "BUILT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        main(["--dry", "--tally", str(tmp_path / "t")]) == 2
        and "is not built, and cannot be here: " in capsys.readouterr().err
    )


@needs_nvcc
@pytest.mark.parametrize("source", sorted({c.source for c in CASES}))
def test_nvcc_builds_it_with_every_launcher(source):
    dll = ctypes.CDLL(str(built(conformance.HERE / source, "sm_90a")))
    for case in CASES:
        assert case.source != source or getattr(dll, case.launcher)


@pytest.mark.gpu
@needs_nvcc
@needs_compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(capfd):
    status = main(["--repeats", "2"])
    assert status == 0, capfd.readouterr().out
