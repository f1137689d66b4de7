"""The wheel: built with and without a compiler, installed elsewhere, imported there; the sdist; the bare checkout."""

import os
import shutil
import sys
import tarfile
import zipfile

import pytest

from tests.wheels import ROOT, build_wheel, copy_checkout, install, run

NO_COMPILER = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc", "PATH": os.path.dirname(sys.executable)}
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))

pytest.importorskip("setuptools")
pytest.importorskip("wheel")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", script, folder], checkout, **NO_COMPILER)
    (archive,) = folder.glob("fastlm-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """Built with whatever compiler there is."""
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def plain_wheel(sdist, tmp_path_factory):
    """Built from the sdist on a machine without a compiler."""
    source = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (source,) = source.iterdir()
    return build_wheel(source, tmp_path_factory.mktemp("plain_wheel"), **NO_COMPILER)


IMPORT = """
import sys
from pathlib import Path
# An editable install of the checkout answers for whatever is missing here.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import fastlm, fastlm.kernels
here = Path(sys.argv[1]).resolve()
assert Path(fastlm.__file__).resolve().is_relative_to(here), fastlm.__file__
(kernels,) = fastlm.kernels.__path__
assert Path(kernels).resolve() == here / sys.argv[2], kernels
import torch
from fastlm import ops
print(ops.rms_norm(torch.ones(2, 4)).sum().item())
try:
    import triton
except ImportError:
    pass
else:
    import fastlm.kernels.rms_norm
from fastlm.data import packing
try:
    from fastlm import _host
except ImportError:
    print("numpy twin")
else:
    print("compiled", Path(_host.__file__).resolve().is_relative_to(here))
"""


def _install_and_import(wheel, target, elsewhere):
    install(wheel, target, elsewhere)
    assert (target / "bin" / "fastlm").exists()
    return run([sys.executable, "-c", IMPORT, target, "fastlm/kernels"], elsewhere, PYTHONPATH=str(target)).splitlines()


def _sources_in(names):
    return {n for n in names if n.startswith("fastlm/") and n.endswith(".py")}


def _expected():
    own = {str(p.relative_to(ROOT)) for p in (ROOT / "fastlm").rglob("*.py")}
    return own | {f"fastlm/kernels/{name}" for name in KERNELS}


def test_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert _sources_in(names) == _expected()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"fastlm"}, "tests or benchmarks would be installed"
    built = [n for n in names if n.startswith("fastlm/_host")]
    has_compiler = shutil.which("c++") or shutil.which("g++")
    if has_compiler:
        # One wheel for every Python from 3.10 on; elsewhere than here the numpy twin serves.
        assert "-cp310-abi3-" in wheel.name and len(built) == 1
    _, *words = _install_and_import(wheel, tmp_path / "target", tmp_path)
    assert words[0] == ("compiled True" if has_compiler else "numpy twin")


def test_wheel_without_a_compiler(plain_wheel, tmp_path):
    with zipfile.ZipFile(plain_wheel) as archive:
        names = archive.namelist()
    assert _sources_in(names) == _expected()
    assert not [n for n in names if n.endswith((".so", ".pyd"))]
    total, word, *_ = _install_and_import(plain_wheel, tmp_path / "target", tmp_path)
    assert float(total) == pytest.approx(8.0, abs=1e-3)
    assert word == "numpy twin"


def test_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in KERNELS:
        assert f"kernels/{name}" in names
    for path in (ROOT / "csrc").rglob("*"):
        assert path.is_dir() or "__pycache__" in path.parts or str(path.relative_to(ROOT)) in names
    assert {"LICENSE", "pyproject.toml", "setup.py"} <= names


def test_bare_checkout(checkout, tmp_path):
    out = run([sys.executable, "-c", IMPORT, checkout, "kernels"], tmp_path, PYTHONPATH=str(checkout))
    assert float(out.split()[0]) == pytest.approx(8.0, abs=1e-3)
