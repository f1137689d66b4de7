"""Rules that every file in kernels/ keeps, read from its source. Each exists because breaking it once cost a wrong result."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
FORBIDDEN = {
    "libdevice": "Triton's interpreter has no libdevice; build on tl.exp2, tl.math.erf and the like",
    "inline_asm_elementwise": "the interpreter runs no inline assembly",
    "make_block_ptr": "block pointers are deprecated; write offsets, in 64 bits",
}
# torch.empty and torch.empty_like are poisoned with NaN under test; these would hide an element that nobody wrote.
HIDES_UNWRITTEN = {"full", "full_like", "ones", "ones_like", "zeros_like", "empty_strided", "rand", "randn"}
SYNCHRONISES = {"item", "tolist", "cpu", "nonzero", "synchronize"}
LENGTHS = {"B", "S", "T", "M", "N", "rows", "length", "seqlen", "tokens"}


def _is_jit(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _is_load(value: ast.expr) -> bool:
    """A load, or a join: that is for random bits, which no product takes."""
    return isinstance(value, ast.Call) and ast.unparse(value.func) in ("tl.load", "tl.join")


def _only_loaded(function: ast.FunctionDef, name: str) -> bool:
    """True if every assignment to `name` in the function is a plain `name = tl.load(...)` or tl.join(...), and there is one."""
    values = []
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in filter(None, targets):
            if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(target)):
                plain = isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name)
                values.append(node.value if plain else None)
    return bool(values) and all(v is not None and _is_load(v) for v in values)


def _device_problems(function: ast.FunctionDef) -> list[str]:
    problems = []
    for node in ast.walk(function):
        transposed = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.trans", "tl.permute"):
            transposed = node.args[0]
        elif isinstance(node, ast.Attribute) and node.attr in ("T", "trans") and ast.unparse(node.value) != "tl":
            transposed = node.value
        if transposed is not None and not (
            isinstance(transposed, ast.Name) and _only_loaded(function, transposed.id)
        ):  # tl.dot(tl.trans(x), y), x from an accumulator, is miscompiled on Hopper by Triton 3.4.0 to 3.7.0
            problems.append(
                f"{function.name} transposes {ast.unparse(transposed)!r}, which is not straight from tl.load"
            )
    for argument in function.args.args:
        if (
            argument.annotation is not None
            and "constexpr" in ast.unparse(argument.annotation)
            and argument.arg in LENGTHS
        ):
            problems.append(
                f"{function.name}: {argument.arg} is a length; as constexpr it recompiles for every new one"
            )
    return problems


def _host_problems(function: ast.FunctionDef) -> list[str]:
    problems = []
    for node in ast.walk(function):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        if (owner == "torch" and name in HIDES_UNWRITTEN) or name.startswith("new_"):
            problems.append(f"{function.name} allocates with {owner}.{name}; use torch.empty, empty_like or zeros")
        if name in SYNCHRONISES:
            problems.append(f"{function.name} calls {owner}.{name}(), which waits for the GPU")
    return problems


def problems_in(source: str) -> list[str]:
    """What breaks a rule in one kernel file, in words."""
    tree, problems = ast.parse(source), []
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        names = [name] + [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else [name]
        problems += [f"{n}: {FORBIDDEN[n]}" for n in names if n in FORBIDDEN]
        if isinstance(node, ast.FunctionDef):
            problems += _device_problems(node) if _is_jit(node) else _host_problems(node)
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_rules(path):
    assert problems_in(path.read_text(encoding="utf-8")) == []


JIT = "@triton.jit\ndef _k(x_ptr, y_ptr, n, BLOCK: tl.constexpr):\n"


@pytest.mark.parametrize(
    "source, word",
    [
        (JIT + "    p = tl.dot(a, b)\n    tl.dot(tl.trans(p), y)", "transposes 'p'"),
        (JIT + "    p = tl.load(x_ptr)\n    p = p * 2\n    tl.dot(tl.trans(p), y)", "transposes 'p'"),
        (JIT + "    p = tl.load(x_ptr)\n    p += 1\n    tl.dot(tl.trans(p), y)", "transposes 'p'"),
        (JIT + "    p, q = f(x_ptr)\n    tl.dot(tl.trans(p), y)", "transposes 'p'"),
        (JIT + "    tl.dot(tl.trans(tl.dot(a, b)), y)", "transposes 'tl.dot(a, b)'"),
        (JIT + "    tl.dot(n.T, y)", "transposes 'n'"),
        (JIT + "    tl.dot(tl.permute(n, (1, 0)), y)", "transposes 'n'"),
        ("@triton.jit(do_not_specialize=['n'])\ndef _k(S: tl.constexpr):\n    pass", "S is a length"),
        ("def f(x):\n    return torch.full((2,), 0.0)", "allocates with torch.full"),
        ("def f(x):\n    return x.new_empty(2)", "allocates with x.new_empty"),
        ("def f(x):\n    return x.sum().item()", "waits for the GPU"),
        (JIT + "    tl.make_block_ptr(x_ptr)", "make_block_ptr"),
        ("from triton.language.extra import libdevice", "libdevice"),
        (JIT + "    tl.inline_asm_elementwise('', '', [], 1, True, 1)", "inline_asm_elementwise"),
    ],
)
def test_a_planted_violation_is_seen(source, word):
    problems = problems_in(source)
    assert len(problems) == 1 and word in problems[0], problems


def test_what_is_allowed_is_not_reported():
    loaded = "    k = tl.load(x_ptr, mask=m, other=0.0)\n    s = tl.dot(q, tl.trans(k))\n    D = tl.load(y_ptr)"
    assert problems_in(JIT + loaded) == []
    assert problems_in("def f(x):\n    return torch.empty_like(x), torch.zeros(2), torch.empty(0)") == []
