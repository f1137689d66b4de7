"""The machinery of an op: choosing a backend, autocast, threads, compile, export. One real op and one toy stand for all."""

import copy
import io
import pickle
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.ops import explain, use_backend
from fastlm.ops._op import REGISTRY, Op, at_once, missing_backends

OP = REGISTRY["rms_norm"]


def _norm(x, weight, backend="triton"):
    return ops.rms_norm(x, weight, 1e-5, backend=backend)


@pytest.fixture
def data(device):
    return torch.randn(3, 20, device=device), torch.randn(20, device=device)


@pytest.fixture
def launches(monkeypatch, data):
    """The Triton launchers of rms_norm that ran, "forward" or "backward", in order."""
    x, weight = data
    x = x.clone().requires_grad_()
    _norm(x, weight).sum().backward()  # loads the launchers
    ran = []
    for slot, name in enumerate(("forward", "backward")):
        real = OP._loaded["triton", slot]
        monkeypatch.setitem(OP._loaded, ("triton", slot), lambda *a, n=name, real=real: ran.append(n) or real(*a))
    return ran


# --- choosing -----------------------------------------------------------------------------------------------------


def test_explain_says_what_runs_and_why(data, device):
    x, weight = data
    found = explain(ops.rms_norm, x, weight)
    assert found.op == "rms_norm" and found.backend == ("triton" if device == "cuda" else "torch")
    if device == "cpu":
        assert "no CUDA tensor" in found.reasons["triton"]
        assert str(found).splitlines()[0] == "rms_norm: torch" and "not triton: no CUDA tensor" in str(found)
    assert explain(ops.rms_norm, x, weight, backend="reference").backend == "reference"
    assert pickle.loads(pickle.dumps(found)) == found


def test_auto_passes_over_what_was_measured_slower(data, monkeypatch):
    x, weight = data
    default = explain(ops.rms_norm, x, weight).backend
    monkeypatch.setattr(OP, "_slower", lambda backend, *tensors: "slow here" if backend == default else None)
    found = explain(ops.rms_norm, x, weight)
    assert found.backend != default and found.reasons[default] == "slow here"
    assert explain(ops.rms_norm, x, weight, backend=default).backend == default  # a named one does not ask


def test_explain_computes_nothing_and_raises_what_the_call_would(data, launches):
    x, weight = data
    assert explain(ops.rms_norm, x, weight, backend="triton").backend == "triton" and launches == []
    with pytest.raises(ValueError, match="weight must be"):
        explain(ops.rms_norm, x, weight[:3])
    with pytest.raises(TypeError, match="'relu' is not an op of fastlm.ops"):
        explain(torch.relu, x)
    _norm(x, weight)
    assert launches == ["forward"]  # neither error left the machinery in its asking state


def test_use_backend_nests_and_ends_with_its_block(data):
    x, weight = data
    chosen = lambda: explain(ops.rms_norm, x, weight).backend  # noqa: E731
    default = chosen()
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("triton"):
            assert chosen() == "triton"
            with use_backend("auto"):
                assert chosen() == default
            with pytest.raises(ZeroDivisionError), use_backend("torch"):
                raise ZeroDivisionError
            assert chosen() == "triton"
            assert explain(ops.rms_norm, x, weight, backend="torch").backend == "torch"  # the call's own word wins
        assert chosen() == "reference"
    assert chosen() == default
    with pytest.raises(ValueError, match="name must be 'auto' or one of cuda, triton, torch, reference, got 'tritn'"):
        use_backend("tritn").__enter__()


def test_a_call_is_taken_at_once_only_where_choose_says_torch():
    x, said = torch.randn(3), []
    say = lambda t: said.append(at_once("auto", t)) or t.sum()  # noqa: E731
    assert at_once("auto", x) and at_once("torch", x)
    assert not at_once("reference", x) and not at_once("triton", x) and not at_once("auto", None)
    assert not at_once("auto", torch.nn.Parameter(x)) and not at_once("auto", x.to("meta"))
    for name in ("torch", "reference"):
        with use_backend(name):
            say(x)
            with use_backend("auto"):
                assert at_once("auto", x)
            explain(ops.rms_norm, x, torch.ones(3))
            say(x)
    explain(lambda t: (say(t), ops.rms_norm(t)), x)
    torch.func.vmap(say)(x[None])
    torch.func.jvp(say, (x,), (x,))
    assert torch.compile(lambda t: t * at_once("auto", t), backend="eager", fullgraph=True)(x).count_nonzero() == 0
    assert len(said) == 7 and not any(said)
    assert at_once("auto", x), "it is over again after explain, use_backend and transforms"


def test_use_backend_is_one_thread_s_own(data):
    x, weight = data
    default, seen = explain(ops.rms_norm, x, weight).backend, {}
    inside = threading.Barrier(3)

    def work(name):
        with use_backend(name):
            inside.wait()  # all three threads are in their block at once
            seen[name] = explain(ops.rms_norm, x, weight).backend
            inside.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("triton", "torch", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {name: name for name in ("triton", "torch", "reference")}
    assert explain(ops.rms_norm, x, weight).backend == default


def test_a_named_backend_never_falls_back(data):
    x, weight = data
    for name in ("triton", "cuda"):
        wide = x.double()
        with pytest.raises(ValueError, match="rms_norm: backend"):
            _norm(wide, weight, name)
    with use_backend("triton"), pytest.raises(ValueError, match="cannot serve this call: its kernels take float32"):
        ops.rms_norm(x.double())
    with use_backend("cuda"):  # glu has no such backend: it goes on choosing by itself
        assert "cuda" not in REGISTRY["glu"].backends and ops.glu(x, x, "silu").shape == x.shape


def test_the_reason_without_a_gpu(data, device, monkeypatch):
    if device == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.setattr("fastlm.ops._op._INTERPRET", False)
    with pytest.raises(ValueError, match="it needs CUDA tensors, got cpu"):
        _norm(*data)
    monkeypatch.setattr("fastlm.ops._op._HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        _norm(*data)
    assert missing_backends().items() >= {"triton": "triton is not installed; `pip install 'fastlm[triton]'`"}.items()


def test_the_dispatcher_entry_refuses_what_it_has_no_kernel_for(data):
    with pytest.raises(ValueError, match=r"rms_norm: no kernel for backend 'reference'; there is \('triton', 'cuda'\)"):
        torch.ops.fastlm.rms_norm(*data, None, None, None, 1e-5, 0.0, False, 0.0, "reference")


# --- autograd -----------------------------------------------------------------------------------------------------


def test_backward_runs_where_forward_ran_whatever_the_thread_says(data, launches):
    x, weight = data
    x = x.clone().requires_grad_()
    with use_backend("triton"):
        y = ops.rms_norm(x, weight, 1e-5)

    def work():
        with use_backend("reference"):
            y.sum().backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert launches == ["forward", "backward"]
    (want,) = torch.autograd.grad(_norm(x, weight, "reference").sum(), x)
    torch.testing.assert_close(x.grad, want)


def test_no_gradient_no_graph(data, launches):
    x, weight = data
    live = x.clone().requires_grad_()
    with torch.no_grad():
        assert not _norm(live, weight).requires_grad
    with torch.inference_mode():
        y = _norm(live, weight)
        assert y.is_inference()
    assert not _norm(x, weight).requires_grad
    assert launches == ["forward"] * 3
    torch.testing.assert_close(y.clone(), _norm(x, weight, "reference"))


@pytest.mark.parametrize("which", [0, 1], ids=["x", "weight"])
def test_a_gradient_of_one_input_alone(data, which):
    grads = []
    for backend in ("triton", "reference"):
        args = [t.clone() for t in data]
        args[which].requires_grad_()
        _norm(*args, backend).square().sum().backward()
        assert args[1 - which].grad is None
        grads.append(args[which].grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(data, reentrant, launches):
    x, weight = data
    x = x.clone().requires_grad_()
    checkpoint(lambda z: _norm(z, weight).sin(), x, use_reentrant=reentrant).sum().backward()
    assert launches == ["forward", "forward", "backward"]
    (want,) = torch.autograd.grad(_norm(x, weight).sin().sum(), x)
    assert torch.equal(x.grad, want)


def test_hooks_and_anomaly_detection(data):
    x, weight = data
    x = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(_norm(x, weight).sum(), x)
    with torch.autograd.set_detect_anomaly(True), torch.autograd.graph.save_on_cpu():
        (got,) = torch.autograd.grad(_norm(x, weight).sum(), x)
    assert torch.equal(got, want)
    residual = torch.randn_like(x)
    with torch.autograd.set_detect_anomaly(True):  # y unused: its cotangent is never made
        _, total = ops.rms_norm(x, weight, residual=residual, backend="triton")
        assert torch.autograd.grad(total.sum(), x)[0].eq(1).all()


# --- autocast -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def product_op():
    """An op whose forms use torch's own products, which autocast would send through 16 bits."""
    op = Op(
        "toy_product", "(Tensor x, str backend) -> Tensor", "(Tensor dy, Tensor x, str backend) -> Tensor",
        reference=lambda x: x @ x, kernels={"triton": (lambda x: x @ x, lambda dy, x: dy @ x.t() + x.t() @ dy)},
        dtypes=(torch.float32,),
    )  # fmt: skip

    @op.autograd
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, backend):
            ctx.save_for_backward(x)
            ctx.backend = backend
            return op.below(x, backend)

        @staticmethod
        def backward(ctx, dy):
            return op.backward(dy, *ctx.saved_tensors, ctx.backend), None

    op.backward_reference(lambda dy, x, backend: dy @ x.t() + x.t() @ dy)
    yield lambda x, backend: op.plain(backend, x) if backend in op.plain_forms else op.forward(x, backend)
    del REGISTRY["toy_product"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_does_not_reach_into_an_op(product_op, backend, device):
    x = torch.randn(5, 5, device=device, requires_grad=True)

    def run():
        y = product_op(x, backend)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return y, first, second

    want = run()
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run()
    # Derivatives of a formula in plain torch are autograd's own calls, in the user's autocast.
    for g, w in list(zip(got, want))[: 2 if backend == "triton" else 1]:
        assert g.dtype == torch.float32 and torch.equal(g, w)


# --- compile, transforms, export ----------------------------------------------------------------------------------


def _graphs(fn):
    """fn compiled with a backend that records the graphs it is given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend=backend), graphs


def test_compiled_code_follows_use_backend(data):
    x, weight = data
    compiled, graphs = _graphs(lambda a: ops.rms_norm(a, weight, 1e-5))
    want = _norm(x, weight, "reference")
    for name in ("triton", "reference", "torch", "triton"):
        with use_backend(name):
            torch.testing.assert_close(compiled(x), want)
    assert ["torch.ops.fastlm.rms_norm" in code for code in graphs] == [
        True,
        False,
        False,
    ]  # the fourth call found the first


def test_use_backend_inside_compiled_code(data):
    x, weight = data

    def both(a):
        with use_backend("triton"):
            y = ops.rms_norm(a, weight, 1e-5)
        with use_backend("reference"):
            return y + ops.rms_norm(a, weight, 1e-5)

    compiled, graphs = _graphs(both)
    torch.testing.assert_close(compiled(x), both(x))
    assert graphs[0].count("torch.ops.fastlm.rms_norm") == 1
    assert explain(ops.rms_norm, x, weight, backend="auto").backend != "reference"


def test_transforms_inside_compiled_code(data):
    x, weight = data
    torch._dynamo.reset()
    stack = torch.stack([x, x + 1])
    total = lambda a: _norm(a, weight).sin().sum()  # noqa: E731
    for fn in (
        torch.func.vmap(torch.func.grad(total)),
        lambda s: torch.func.jvp(total, (s[0],), (torch.ones_like(s[0]),))[1],
    ):
        torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(stack), fn(stack))


def test_checkpoint_inside_compiled_code(data):
    x, weight = data
    torch._dynamo.reset()
    fn = lambda a: checkpoint(lambda z: _norm(z, weight).sin(), a, use_reentrant=False).sum()  # noqa: E731
    grads = []
    for f in (torch.compile(fn, fullgraph=True, backend="aot_eager"), fn):
        a = x.clone().requires_grad_()
        f(a).backward()
        grads.append(a.grad)
    torch.testing.assert_close(*grads)


def test_inductor(data):
    x, weight = data
    torch._dynamo.reset()
    fn = lambda a, w: (_norm(a * 2, w) + 1).square().mean()  # noqa: E731
    results = []
    for f in (torch.compile(fn, fullgraph=True), fn):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = f(a, w)
        results.append((loss, *torch.autograd.grad(loss, (a, w))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


class _Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(1 + torch.arange(20.0) / 20)

    def forward(self, x):
        return ops.rms_norm(x, self.weight, 1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_export(data, backend, device):
    model, x = _Module().to(device), data[0]
    rows = torch.export.Dim("rows", min=1, max=64)
    with use_backend(backend):
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("fastlm" in name for name in names) == (backend == "triton")
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    longer = torch.randn(7, 20, device=device)
    torch.testing.assert_close(loaded.module()(longer), model(longer))


def test_meta_tensors(data):
    x, weight = (t.to("meta") for t in data)
    for backend in ("auto", "torch", "triton", "reference"):
        assert _norm(x, weight, backend).device.type == "meta"


def test_modules_are_copied_and_pickled(data, device):
    model = _Module().to(device)
    model(data[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(data[0]), model(data[0]))


# --- cost ---------------------------------------------------------------------------------------------------------


def _microseconds(call, repeats=300):
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats * 1e6)
    return best


def test_host_overhead(data, capsys):
    """Printed rather than judged: only something absurd (a millisecond a call) fails."""
    x, weight = data
    with torch.no_grad():
        plain = _microseconds(lambda: F.rms_norm(x, (20,), weight, 1e-5))
        ours = _microseconds(lambda: ops.rms_norm(x, weight, 1e-5))
    with capsys.disabled():
        print(f"\nhost overhead of a tiny forward: F.rms_norm {plain:.1f} us, ops.rms_norm {ours:.1f} us")
    assert ours - plain < 1000


def test_an_optimizer_may_have_nothing_to_do():
    ops.adamw_([], [], [], [], lr=1.0, step=1)
    ops.sgd_([], [], None, lr=1.0, step=1)
    empty = [torch.empty(0, 3) for _ in range(4)]  # a process that holds no rows of a parameter under FSDP2
    ops.adamw_(*([t] for t in empty), lr=1.0, step=1)
