"""How the packaging tests copy the checkout, build wheels from it, and install them."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "fastlm", "kernels", "csrc")


def _build_library():
    spec = importlib.util.spec_from_file_location("build_library", ROOT / "csrc" / "build_library.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_library = _build_library()  # csrc/build_library.py, which is in no package


def run(command, cwd, **environment):
    """stdout of a command that must succeed, outside this process's settings."""
    hidden = ("PYTHONPATH", "CXX", "CC", "FASTLM_CUDA")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | environment
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(folder):
    """A copy of the checkout without anything built."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            )
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(source, folder, **environment):
    """The wheel of a checkout or an unpacked sdist, built without network."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run([*command, "--wheel-dir", folder, "."], source, **environment)
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def install(wheel, target, elsewhere):
    """Installs a wheel into the folder target, without its dependencies."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    run(command, elsewhere)
