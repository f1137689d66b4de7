"""Imports point one way, `import fastlm` stays light, and every op has all its files."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each part of fastlm may import directly; what those may import is then allowed too.
BELOW = {
    "kernels": (),
    "ops": ("kernels",),
    "nn": ("ops",),
    "models": ("nn",),
    "optim": ("ops",),
    "data": ("_host",),
    "generate": ("models", "data"),
    "evaluate": ("models", "data"),
    "train": ("models", "optim", "data", "evaluate", "generate"),
    "testing": ("ops", "_interpreter"),
    "_interpreter": (),
    "_host": (),
}
LEAVES = ("errors", "config", "_version")  # anyone may import these, and they import nothing of ours but each other
TOP = (
    "cli",
    "_flags",
    "demo",
    "doctor",
    "runs",
    "__init__",
    "__main__",
)  # may import anything; only each other import them
LAZY_UP = {("models", "generate")}  # model.generate() delegates, so the import is made inside the method
# Packages that cost time or may be missing: never imported with a module that `import fastlm` or a plain training needs.
HEAVY = ("matplotlib", "rich", "tokenizers", "transformers", "triton", "tensorboard")
MAY_NEED = {"kernels": ("torch", "triton"), "data": ("numpy", "torch")}


def imports(source: str, package: str) -> list[tuple[str, bool]]:
    """(absolute module, whether the import is inside a function) for every import; `from p import n` counts as p.n."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1] if node.level else [])
            base = ".".join(p for p in (base, node.module) if p)
            found.extend((f"{base}.{alias.name}", inside) for alias in node.names)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def closure(unit: str) -> set[str]:
    """Every part that `unit` may import."""
    todo, seen = list(BELOW.get(unit, ())), {unit, *LEAVES}
    while todo:
        part = todo.pop()
        if part not in seen:
            seen.add(part)
            todo.extend(BELOW[part])
    return seen


def violations(unit: str, source: str, package: str) -> list[str]:
    """What is wrong with the imports of one file of part `unit`, in words."""
    problems = []
    for module, inside in imports(source, package):
        names = module.split(".")
        if names[0] in ("tests", "benchmarks"):
            problems.append(f"{unit} imports {module}: nothing of the library may")
        elif names[0] == "fastlm" and len(names) > 1:
            target = names[1]
            known = target in BELOW or target in LEAVES or target in TOP
            if not known and (ROOT / "fastlm" / f"{target}.py").exists() | (ROOT / "fastlm" / target).is_dir():
                problems.append(f"fastlm.{target} is new: give it a place in BELOW")
            allowed = unit in TOP or target in closure(unit) or (inside and (unit, target) in LAZY_UP)
            if known and not allowed:
                problems.append(f"{unit} may not import {module}")
        elif names[0] in HEAVY and not inside and unit not in TOP and names[0] not in MAY_NEED.get(unit, ()):
            problems.append(f"{unit} imports {names[0]} at module level; import it inside the function that needs it")
        elif unit == "kernels" and names[0] not in {*MAY_NEED[unit], "fastlm"} | sys.stdlib_module_names:
            problems.append(f"kernels may import torch, triton and siblings, not {module}")
    return problems


def private_torch(source: str) -> list[str]:
    """Private names of torch (torch._x, torch.a._b) that a file uses or imports."""
    return re.findall(r"\btorch(?:\.\w+)*\._[a-zA-Z]\w*", ast.unparse(ast.parse(source)))  # without the comments


def library_files() -> list[tuple[str, Path, str]]:
    """(part, file, package) of every file of the library."""
    files = []
    for path in sorted((ROOT / "fastlm").rglob("*.py")):
        inner = path.relative_to(ROOT / "fastlm")
        unit = inner.parts[0] if len(inner.parts) > 1 else inner.stem
        files.append((unit, path, ".".join(["fastlm", *inner.parts[:-1]])))
    return files + [("kernels", path, "fastlm.kernels") for path in sorted((ROOT / "kernels").glob("*.py"))]


@pytest.mark.parametrize("unit, path, package", library_files(), ids=lambda v: v.name if isinstance(v, Path) else "")
def test_imports_point_one_way(unit, path, package):
    assert unit in BELOW or unit in LEAVES or unit in TOP, f"{path}: give {unit!r} a place in BELOW"
    assert violations(unit, path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    "unit, source, word",
    [
        ("ops", "from fastlm import nn", "ops may not import fastlm.nn"),
        ("ops", "import fastlm.models.io", "ops may not import fastlm.models.io"),
        ("nn", "def f():\n    from ..train import loop", "nn may not import fastlm.train"),
        ("models", "from fastlm.generate import generate", "models may not import fastlm.generate"),
        ("data", "from fastlm import ops", "data may not import fastlm.ops"),
        ("train", "from fastlm.cli import main", "train may not import fastlm.cli"),
        ("config", "from fastlm import ops", "config may not import fastlm.ops"),
        ("train", "from tests.tiny import model", "nothing of the library may"),
        ("train", "import matplotlib.pyplot", "imports matplotlib at module level"),
        ("kernels", "import numpy", "not numpy"),
        ("kernels", "from fastlm.ops import rms_norm", "kernels may not import fastlm.ops"),
    ],
)
def test_a_planted_violation_is_seen(unit, source, word):
    problems = violations(unit, source, f"fastlm.{unit}")
    assert len(problems) == 1 and word in problems[0], problems


def test_what_is_allowed_is_not_reported():
    assert violations("models", "def f():\n    from fastlm.generate import g", "fastlm.models") == []
    assert (
        violations("train", "from fastlm.models import load\nfrom fastlm.errors import UserError", "fastlm.train") == []
    )
    assert violations("kernels", "import torch\nimport triton\nfrom .common import rows", "fastlm.kernels") == []


def test_private_torch_calls_are_in_one_place():
    ops = ROOT / "fastlm" / "ops"
    allowed = {
        *(ops / name for name in ("_op.py", "_tensor.py", "_native.py")),
        ROOT / "fastlm" / "testing" / "contract.py",
    }
    for _, path, _ in library_files():
        if path not in allowed:
            assert private_torch(path.read_text(encoding="utf-8")) == [], (
                f"{path}: private torch calls go to ops/_op.py, ops/_tensor.py or ops/_native.py"
            )
    assert private_torch("import torch\nx = torch._C._are_functorch_transforms_active()") == [
        "torch._C._are_functorch_transforms_active"
    ]
    assert private_torch("from torch._dynamo import reset") == ["torch._dynamo"]


def test_there_is_no_package_that_would_shadow_others():
    # A top-level package named kernels shadows the one that transformers imports. tests is one: else another installed package of
    # that name hides it from `python -m tests.csrc.conformance`.
    assert not (ROOT / "kernels" / "__init__.py").exists() and (ROOT / "tests" / "__init__.py").exists()


def run(script: str) -> str:
    """stdout of a fresh interpreter that runs the script in the checkout, outside this process's settings."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ABSENT = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):  # finds everything but what is to be absent
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {absent} or name == "fastlm._host":
            return None
        return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def test_the_library_works_without_triton_and_without_the_compiled_module():
    run(
        ABSENT.format(absent={"triton", "transformers", "tensorboard"})
        + """
import torch, fastlm
from fastlm import data, evaluate, generate, models, nn, ops, optim, train
x = torch.randn(2, 8, requires_grad=True)
ops.rms_norm(x).sum().backward()
assert x.grad.isfinite().all()
try:
    ops.rms_norm(x, backend="triton")
except ValueError as error:
    assert "triton is not installed" in str(error), error
else:
    raise SystemExit("the triton backend was taken without triton")
assert "triton" not in sys.modules
"""
    )


def test_import_is_light():
    for _ in range(3):  # a busy machine may be slow once, not three times
        out = run(
            "import sys, time, torch\nbefore = set(sys.modules)\nstart = time.perf_counter()\nimport fastlm\n"
            "print(time.perf_counter() - start)\nprint(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
        )
        seconds, new = out.splitlines()
        assert not set(new.split()) & {*HEAVY, "typer", "numpy"}, new
        if float(seconds) < 0.3:
            return
    raise AssertionError(f"import fastlm takes {seconds} s after torch")


def public_ops() -> dict:
    from fastlm import ops

    plain_torch = {"attention_weights", "received_attention", "fp8_quantize"}
    helpers = {"explain", "use_backend", *plain_torch}
    return {n: getattr(ops, n) for n in ops.__all__ if inspect.isfunction(getattr(ops, n)) and n not in helpers}


@pytest.mark.parametrize("name", sorted(public_ops()))
def test_every_op_is_complete(name):
    op = public_ops()[name]
    stem = op.__module__.rsplit(".", 1)[1]
    for place in (f"tests/ops/test_{stem}.py", f"benchmarks/ops/bench_{stem}.py"):
        assert (ROOT / place).exists(), f"{name}: {place} is missing"
    kernels = f"kernels/{stem}.py", f"csrc/{stem}.cu"
    assert any((ROOT / place).exists() for place in kernels), f"{name}: there is neither of {kernels}"
    doc = inspect.getdoc(op) or ""
    for part in ("Args:", "Raises:", "Backends:") + (() if name.endswith("_") else ("Returns:",)):
        assert part in doc, f"{name}: its docstring lacks {part!r}"
    backend = inspect.signature(op).parameters.get("backend")
    assert backend is not None and backend.default == "auto" and backend.kind is backend.KEYWORD_ONLY
    described = [p for p in inspect.signature(op).parameters if not re.search(rf"\b{p}\b", doc)]
    assert not described, f"{name}: its docstring does not mention {described}"
