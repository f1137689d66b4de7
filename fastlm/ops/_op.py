"""The machinery of an op: definition, backend choice, autograd wiring. (Private torch calls: `_tensor.py`, `_native.py`, here.)

An op has up to four backends:

- `reference`  plain torch, any dtype up to fp64, called directly and never through the dispatcher, so derivatives of any
               order, torch.func transforms, forward-mode AD and export come free. It is the oracle of every test.
- `torch`      only where torch has a native fast form with the same meaning; the default on the CPU.
- `triton`     kernels/<stem>.py, called through `torch.ops.fastlm.<op>`.
- `cuda`       csrc/<stem>.cu, likewise; compiled into one library file (_cuda.py).

The last two (and a `torch` form that has a backward of its own) need the dispatcher: it keeps them opaque to torch.compile,
gives them shapes without running (fake), gradients, and DTensor rules. The dispatcher has one CUDA slot, hence the
`backend` string in every schema: it is chosen before the call and a constant for torch.compile.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fastlm.ops import _cuda
from fastlm.ops._tensor import is_compiling, is_tracing, modes, transforms_active, without_values

BACKENDS = ("cuda", "triton", "torch", "reference")
_KERNELS = ("cuda", "triton")  # those that need a GPU (Triton also runs in its interpreter)
_LIB = torch.library.Library("fastlm", "DEF")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

# A below-autograd guard: the op's own Autograd kernel re-enters the dispatcher underneath itself.
_below_autograd = torch._C._AutoDispatchBelowAutograd


class _State(threading.local):
    """Per-thread choices. A ContextVar would read better but breaks torch.compile(fullgraph=True).

    Set in each thread's own __init__: Dynamo of torch 2.11 reads the class's value where the class has one.
    """

    def __init__(self) -> None:
        self.backend = "auto"
        self.capture: list | None = None
        self.chooses_freely = True  # no use_backend and no explain: one look instead of two


_state = _State()
REGISTRY: dict[str, Op] = {}


@dataclass(frozen=True)
class Explanation:
    """Why a call runs where it runs: `backend` is the choice, `reasons` maps each other backend to why it was not taken."""

    op: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.reasons.items()])


class _Explained(Exception):
    """Carries an Explanation out of a public function, whose argument checks have then run as in a real call."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes `name` the backend of every op called in this thread that has such a backend, until the block ends.

    Ops without it choose automatically. Where it exists it never falls back: a call it cannot serve raises ValueError
    with the reason. `backend=` in a call wins over this.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"use_backend: name must be 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")
    before, _state.backend = _state.backend, name
    _state.chooses_freely = name == "auto" and _state.capture is None
    try:
        yield
    finally:
        _state.backend = before
        _state.chooses_freely = before == "auto" and _state.capture is None


def explain(op: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """The backend a call `op(*args, **kwargs)` would use and why not the others, as data. Nothing is computed.

    `op` is a public function of fastlm.ops. Raises whatever the call itself would raise for bad arguments.
    """
    _state.capture, _state.chooses_freely = [], False
    try:
        op(*args, **kwargs)
    except _Explained as found:
        return found.args[0]
    finally:
        _state.capture, _state.chooses_freely = None, _state.backend == "auto"
    raise TypeError(f"explain: {getattr(op, '__name__', op)!r} is not an op of fastlm.ops")


class Op:
    """One op: its backends, and its dispatcher entries `fastlm::<name>` and `fastlm::<name>_bwd`.

    Args:
        name: the op's stem.
        forward, backward: schemas without the name. The last argument of both is `str backend`. `backward` is None for
            ops that have no gradient (optimizer steps).
        reference: the plain formula; called as `plain("reference", *args)`.
        torch: the native form, same arguments as the reference, or None.
        kernels: backend -> (forward launcher, backward launcher), each a callable or "module:function" below
            fastlm.kernels that is imported on first use; for "cuda" callables or names of the library's functions. Launchers
            take the schema's arguments without `backend`.
        supports: `supports(backend, *tensors) -> reason or None`, given the arguments of `choose`.
        slower: `slower(backend, *tensors) -> reason or None`: why "auto" passes over a backend that could serve the call,
            because another one was measured to be faster there. A named backend does not ask.
        dtypes: dtypes the kernels take.
    """

    def __init__(
        self,
        name: str,
        forward: str,
        backward: str | None = None,
        *,
        reference: Callable,
        torch: Callable | None = None,
        kernels: dict[str, tuple[Any, Any]] | None = None,
        supports: Callable[..., str | None] | None = None,
        slower: Callable[..., str | None] | None = None,
        dtypes: Sequence[Any] = (),
    ) -> None:
        self.name = name
        self.plain_forms = {"reference": reference} | ({"torch": torch} if torch is not None else {})
        self.kernels = dict(kernels or {})
        self.backends = tuple(b for b in BACKENDS if b in self.plain_forms or b in self.kernels)
        self._supports = supports
        self._slower = slower
        self._dtypes = tuple(dtypes)
        self._sharding: list[tuple[Any, Callable]] = []
        self._loaded: dict[tuple[str, int], Callable] = {}
        self._function: Any = None
        self._backward_reference: Callable | None = None
        self.forward = self._define(name, forward, 0, self._forward_autograd)
        self.backward = self._define(f"{name}_bwd", backward, 1, self._backward_autograd) if backward else None
        REGISTRY[name] = self

    def _define(self, name: str, schema: str, slot: int, autograd: Callable) -> Any:
        _LIB.define(name + schema)
        _LIB.impl(name, lambda *args: self._launch(slot, *args), "CompositeExplicitAutograd")
        if "!" not in schema:  # an in-place op has no gradient and needs no Autograd kernel
            _LIB.impl(name, autograd, "Autograd")
        return getattr(getattr(torch.ops.fastlm, name), "default")  # noqa: B009

    # --- what an op file adds -------------------------------------------------------------------------------------

    def fake(self, forward: Callable, backward: Callable | None = None) -> None:
        """Registers shape functions: explicit torch.empty with the launchers' strides, same arguments as the schemas."""
        torch.library.register_fake(f"fastlm::{self.name}", forward, lib=_LIB)
        if backward is not None:
            torch.library.register_fake(f"fastlm::{self.name}_bwd", backward, lib=_LIB)

    def autograd(self, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        """Class decorator: the autograd.Function of the op; its forward calls `OP.below(*args)`."""
        self._function = function
        return function

    def backward_reference(self, fn: Callable) -> Callable:
        """Decorator: the backward in plain differentiable torch, used under create_graph. Same arguments as `_bwd`."""
        self._backward_reference = fn
        return fn

    def sharding(self, forward: Callable, backward: Callable | None = None) -> None:
        """DTensor rules (torch.distributed.tensor.experimental.register_sharding), registered when a DTensor is first seen."""
        self._sharding = [(self.forward, forward)] + ([(self.backward, backward)] if backward else [])

    def below(self, *args: Any) -> Any:
        """Runs the forward kernel underneath autograd; for use inside the op's autograd.Function."""
        with _below_autograd():
            return self.forward(*args)

    # --- calling --------------------------------------------------------------------------------------------------

    def plain(self, backend: str, *args: Any, **kwargs: Any) -> Any:
        """Calls the reference or torch form. Autocast is off inside: the public function has applied the op's own table."""
        return _without_autocast(self.plain_forms[backend], args, kwargs)

    def choose(self, backend: str, *tensors: Any) -> str:
        """The backend for a call on these arguments (tensors, and whatever `supports` asks for).

        Raises ValueError for an unknown or unsupported named backend; `auto` always finds one.
        """
        first = tensors[0] if tensors else None  # an optimizer may have nothing to do
        if type(first) is not Tensor and self._sharding and not torch.compiler.is_compiling():
            self._see_dtensors(tensors[:1])  # in inference mode the Autograd kernels, which look too, are not called
        if _transforming(tensors):
            # The reference is the only form that every transform can look into.
            return self._chosen("reference", {"others": "a torch.func transform or forward-mode AD is active"})
        if backend == "auto" and _state.backend != "auto" and _state.backend in self.backends:
            backend = _state.backend
        if backend != "auto":
            if backend not in self.backends:
                raise ValueError(f"{self.name}: backend must be 'auto' or one of {self.backends}, got {backend!r}")
            reason = self.reason_against(backend, *tensors)
            if reason:
                raise ValueError(f"{self.name}: backend {backend!r} cannot serve this call: {reason}")
            return self._chosen(backend, {"others": f"{backend!r} was named"})
        reasons: dict[str, str] = {}
        for name in self.backends:
            if name in _KERNELS and not _on_cuda(first, tensors):
                if _state.capture is not None:
                    remedy = "" if name == "cuda" else "; name the backend to run its CPU form"
                    reasons[name] = "no CUDA tensor among the arguments" + remedy
                continue
            reason = self._slower(name, *tensors) if self._slower is not None else None
            if reason is None:
                reason = self.reason_against(name, *tensors)
            if reason is None:
                return self._chosen(name, reasons)
            reasons[name] = reason
        raise AssertionError(f"{self.name}: the reference must support every call, but: {reasons}")

    def reason_against(self, backend: str, *tensors: Any) -> str | None:
        """Why `backend` cannot serve these arguments, or None."""
        if backend in _KERNELS:
            reason = _kernel_reason(backend, self._dtypes, tensors)
            if reason:
                return reason
        return self._supports(backend, *tensors) if self._supports is not None else None

    def _chosen(self, backend: str, reasons: dict[str, str]) -> str:
        if _state.capture is not None:
            raise _Explained(Explanation(self.name, backend, reasons))
        return backend

    # --- dispatcher entries ---------------------------------------------------------------------------------------

    def _launch(self, slot: int, *args: Any) -> Any:
        launcher = self._loaded.get((args[-1], slot)) or self._load(args[-1], slot)
        device = _first_tensor(args).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return _without_autocast(launcher, args[:-1])
        return _without_autocast(launcher, args[:-1])

    def _load(self, backend: str, slot: int) -> Callable:
        if backend not in self.kernels:
            raise ValueError(f"{self.name}: no kernel for backend {backend!r}; there is {tuple(self.kernels)}")
        launcher = self.kernels[backend][slot]
        if backend == "cuda" and isinstance(launcher, str):
            launcher = _cuda.function(launcher)
        elif isinstance(launcher, str):
            module, function = launcher.split(":")
            launcher = getattr(importlib.import_module(f"fastlm.kernels.{module}"), function)
        self._loaded[backend, slot] = launcher
        return launcher

    def _forward_autograd(self, *args: Any) -> Any:
        self._see_dtensors(args)
        if self._function is not None and _needs_grad(args):
            return self._function.apply(*args)
        return self.below(*args)

    def _backward_autograd(self, *args: Any) -> Any:
        self._see_dtensors(args)
        if self._backward_reference is not None and _needs_grad(args):
            return _without_autocast(self._backward_reference, args)
        with _below_autograd():
            return self.backward(*args)

    def _see_dtensors(self, args: Sequence[Any]) -> None:
        if self._sharding and any(type(a).__name__ == "DTensor" for a in args):
            from torch.distributed.tensor import DTensor
            from torch.distributed.tensor.experimental import register_sharding

            known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
            for entry, rule in self._sharding:
                register_sharding(entry)(rule)
                # A result is remembered by the arguments from here on; torch says the first int, or none of them. Shapes
                # depend on bools (need_dweight) and on which tensors are missing, too.
                known[entry].static_argnum = 0
            self._sharding = []


def at_once(backend: str, first: Any) -> bool:
    """Whether `choose` would give "torch" for a call on CPU tensors of which `first` is a plain one: eagerly, outside every
    transform, with nobody asking or deciding from outside.

    For ops whose torch form is then a call or two of torch's that refuse bad arguments themselves: a public function may make
    these calls before its own checks, which cost as much as a small call, and come back to the checks for the message if torch
    raises. Autocast is not asked for: such calls must be ones that it leaves alone.
    """
    return (
        type(first) is Tensor
        and first.is_cpu
        and (backend == "auto" or backend == "torch")
        and _state.chooses_freely
        and forward_ad._current_level < 0
        # is_eager(), whose call would be felt here.
        and not transforms_active()
        and not (is_compiling() or is_tracing() or (modes() and without_values()))
    )


def _on_cuda(first: Any, tensors: Sequence[Any]) -> bool:
    """Whether the first tensor among the arguments, most often their first, is on a GPU."""
    if not tensors:  # an optimizer may have nothing to do
        return False
    if type(first) is not Tensor:
        first = _first_tensor(tensors)
    return first.is_cuda


def _first_tensor(args: Sequence[Any]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise AssertionError("an op was called without a tensor")


def _without_autocast(fn: Callable, args: Sequence[Any], kwargs: dict | None = None) -> Any:
    """fn(*args, **kwargs) with autocast off: a launcher's or a formula's own products and sums keep their dtypes."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        device = _first_tensor(args).device.type
        if device in ("cpu", "cuda"):
            with torch.autocast(device, enabled=False):
                return fn(*args, **(kwargs or {}))
    return fn(*args, **(kwargs or {}))


def _needs_grad(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _transforming(tensors: Sequence[Any]) -> bool:
    if transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _kernel_reason(backend: str, dtypes: tuple, tensors: Sequence[Any]) -> str | None:
    """Why no GPU kernel can run on these tensors at all, whatever the op."""
    if backend == "triton" and not _HAS_TRITON:
        return "triton is not installed; `pip install 'fastlm[triton]'`"
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            return f"its kernels take {', '.join(str(d)[6:] for d in dtypes)}, got {str(tensor.dtype)[6:]}"
        if tensor.device.type == "cpu" and backend == "cuda":
            return "it needs CUDA tensors, got cpu"
        if tensor.device.type == "cpu" and not _INTERPRET:
            return (
                "it needs CUDA tensors, got cpu (or TRITON_INTERPRET=1 in the environment before the first kernel runs)"
            )
        if tensor.device.type == "cuda" and torch.cuda.get_device_properties(tensor.device).major < 8:
            return "its kernels need compute capability 8.0 (Ampere) or newer"
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            return f"it has no kernels for device {tensor.device.type!r}"
    return _cuda.unavailable() if backend == "cuda" else None


def missing_backends() -> dict[str, str]:
    """Backends that cannot run on this machine at all, with the reason (for `fastlm doctor`)."""
    missing = {}
    if not _HAS_TRITON:
        missing["triton"] = "triton is not installed; `pip install 'fastlm[triton]'`"
    elif not torch.cuda.is_available():
        missing["triton"] = "no CUDA GPU" + ("; running in Triton's interpreter" if _INTERPRET else "")
    library = _cuda.unavailable()
    if library or not torch.cuda.is_available():
        missing["cuda"] = library or "no CUDA GPU"
    return missing
