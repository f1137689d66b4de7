"""One call that puts the ops into a model that is there already, and takes them out again."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.nn import transformers as interface
from fastlm.nn.replace_table import LOSSES, MLPS, NORMS, Known, defining_class, known, original, patched

_LOOKS_LIKE = re.compile(r"(Norm|MLP|FeedForward|FFN|ActDense|Experts)$")
_ROOT = "(the model)"


class _Mark:
    """What replace leaves in a module's __dict__. Pickles and deep-copies with it, and belongs to the copy then.

    It refers to its module weakly: `del model` frees the weights at once, without the garbage collector, also while a Report
    is kept.
    """

    place = ""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        module.__dict__[self.place] = self

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_module"} | {"module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["module"]
        self.__dict__.update((key, value) for key, value in state.items() if key != "module")
        self._module = (lambda: None) if module is None else weakref.ref(module)


class Forward(_Mark):
    """Takes the place of one module's `forward`, as an attribute of that instance."""

    place = "forward"

    def __init__(self, module: nn.Module, known: Known) -> None:
        super().__init__(module)
        self.known = known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if module is None:
            raise ReferenceError("replace: the module of this forward is gone; keep the module, not only its forward")
        if kwargs and not self.known.keywords:
            return original(module, *args, **kwargs)
        return self.known.forward(module, self.known, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's own, by which generate() and trainers decide what to pass."""
        return inspect.signature(types.MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> types.CodeType:
        """Where the class's own stands: torch.export asks it of the module it is given."""
        return type(self.module).forward.__code__


class Attention(_Mark):
    """Remembers what the attention implementations of one model of transformers were.

    Attributes:
        before: pairs of a config and the implementation that stood in it.
    """

    place = "_fastlm_attention"

    def __init__(self, module: nn.Module, before: list[tuple[Any, Any]]) -> None:
        super().__init__(module)
        self.before = before

    def restore(self) -> None:
        for config, name in self.before:
            if config._attn_implementation == "fastlm":
                config._attn_implementation = name


@dataclass
class Report:
    """What `replace` did to a model.

    Attributes:
        replaced: name of a module -> its class and what computes it now.
        kept: name of a module that might have been replaced -> its class and why it was not.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    _marks: list[_Mark] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = []
        for title, entries in (("replaced", self.replaced), ("kept", self.kept)):
            groups = defaultdict(list)
            for name, text in entries.items():
                groups[text].append(name)
            lines.append(f"{title} {len(entries)} module{'s' * (len(entries) != 1)}")
            for text, names in groups.items():
                where = "" if title == "replaced" else f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
                lines.append(f"  {len(names)} {text}{where}")
        return "\n".join(lines)

    def undo(self) -> None:
        """Restores the model: forwards and attention implementations are again what they were. A second call does nothing.

        What someone else has put over ours since is left alone, with a warning that names the class.
        """
        for mark in reversed(self._marks):  # the latest first: an earlier one may be what it found
            module = mark.module
            here = None if module is None else module.__dict__.get(mark.place)
            if here is mark:
                delattr(module, mark.place)
            elif here is not None and not isinstance(here, _Mark):
                warnings.warn(
                    f"replace: the forward of a {type(module).__name__} was changed by others since; left as it is",
                    stacklevel=2,
                )
            if isinstance(mark, Attention) and (here is mark or module is None):
                mark.restore()
        self._marks.clear()


def replace(
    model: nn.Module, *, norms: bool = True, mlps: bool = True, attention: bool = True, loss: bool = False
) -> Report:
    """Makes a model compute with the ops of fastlm, in place; `undo()` of what it returns takes them out again.

    Any model of transformers (version 5) built of the classes of fastlm/nn/replace_table.py, with or without a head or a
    wrapper around it: GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi 3, T5's norms, ...; and torch.nn.LayerNorm and
    torch.nn.RMSNorm in any model. Everything else is left as it is; the report says what and why.

    Only the `forward` of single modules and the attention implementation in the model's config change. Modules, classes,
    parameters, state_dict keys, hooks, dtypes, devices and the training flag stay; the model can be saved, pickled, copied,
    compiled, exported and wrapped as before. (Not by nn.DataParallel, whose shallow copies would run on the first one's
    parameters: use DistributedDataParallel. Nor by torch.jit.script and torch.jit.trace: use torch.compile and
    torch.export.) Forwards read the parameters at every call: LoRA, FSDP or quantisation may come before or after. An MLP
    one of whose projections is not exactly a Linear or Conv1D, or has hooks, is not fused; hooks for all modules
    (torch.nn.modules.module.register_module_forward_hook) do not see the projections of one that is. A class whose forward
    was patched before, as by Liger or Unsloth, or computes something else on a few numbers, is left as it is.

    Args:
        model: the model, on any device, in training or evaluation.
        norms: LayerNorm and RMSNorm, in the casting and with the `1 + weight` of their class.
        mlps: MLPs, plain and gated, with SiLU, GELU, ReLU or squared ReLU. Their dropout stays outside of the op.
        attention: attn_implementation="fastlm" (see fastlm.nn.transformers.register), for models of transformers.
        loss: in training and with labels, the forward of a causal language model computes its loss from hidden states. **The
            output's logits are then None**: they are never stored; with return_dict=False the tuple is without them, so that
            what follows the loss moves up by one place. The loss is that of the model's own, with num_items_in_batch,
            shift_labels and ignore_index as passed; a batch in which all labels are ignored gives 0 instead of NaN. In
            evaluation, without labels, or with logits_to_keep nothing changes. A model with a loss_function of its own
            keeps it.

    Returns:
        A Report: print it. What an earlier call replaced, in this model or in the one it was copied or loaded from with
        pickle, is not replaced twice: it is listed as kept, and undo() of the new report takes it out as well, whatever the
        options. An attention implementation that was "fastlm" before any call, as by from_pretrained, stays: what it might
        have been before is not known.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    probed: dict[Any, str | None] = {}
    for name, module in list(model.named_modules()):
        if _adopt(name or _ROOT, module, report):
            continue
        for wanted, table in ((norms, NORMS), (mlps, MLPS), (loss, LOSSES)):
            entry = known(module, table) if wanted else None
            if entry is not None:
                _replace_one(name or _ROOT, module, entry, report, probed if table is not LOSSES else None)
                break
        else:
            reason = _unknown(module, norms, mlps, loss)
            if reason:
                report.kept[name or _ROOT] = f"{type(module).__name__}: {reason}"
    if attention:
        _replace_attention(model, report)
    return report


def _adopt(name: str, module: nn.Module, report: Report) -> bool:
    """Puts what earlier calls left in the module into the report; whether its forward is replaced already."""
    before, mine = (module.__dict__.get(kind.place) for kind in (Attention, Forward))
    if isinstance(before, Attention):
        report._marks.append(before)
    if not isinstance(mine, Forward):
        return False
    if mine.module is not module:  # a shallow copy
        mine = Forward(module, mine.known)
    report._marks.append(mine)
    report.kept[name] = f"{type(module).__name__}: replaced already"
    return True


def _replace_one(name: str, module: nn.Module, entry: Known, report: Report, probed: dict | None) -> None:
    kind = type(module).__name__
    if "forward" in module.__dict__:
        report.kept[name] = f"{kind}: its forward was replaced by others already"
        return
    by = patched(defining_class(module))
    reason = entry.why_not(module, entry) if by is None else f"the forward of its class was replaced by {by}"
    if reason is None and probed is not None:
        key = type(module), getattr(module, "eps", None)  # torch's RMSNorm has a rule of its own for None
        if key not in probed:
            probed[key] = _probe(module, entry)
        reason = probed[key]
    if reason is not None:
        report.kept[name] = f"{kind}: {reason}"
        return
    if entry in LOSSES.values():
        arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        entry = dataclasses.replace(entry, names=(entry.names[0], *arguments))
    report._marks.append(Forward(module, entry))
    report.replaced[name] = f"{kind}: {entry.by}"


def _unknown(module: nn.Module, norms: bool, mlps: bool, loss: bool) -> str | None:
    """Why a module that looks like one to be replaced is not, or None for all others."""
    kind, owner = type(module), defining_class(module)
    if owner is nn.Module or owner.__module__.startswith("fastlm."):
        return None  # a container, or ours
    if loss and re.search(r"(ForCausalLM|LMHeadModel)$", owner.__name__):
        return "its loss is not known to be that of plain logits"
    found = _LOOKS_LIKE.search(kind.__name__)
    if not found or not (norms if found[0] == "Norm" else mlps):
        return None
    return f"not a class that is known ({owner.__module__}.{owner.__qualname__})"


class _Both(nn.Module):
    """A module's own forward beside ours, under one call, for functional_call to lend it other parameters."""

    def __init__(self, module: nn.Module, entry: Known) -> None:
        super().__init__()
        self.module, self.entry = module, entry

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return original(self.module, x), self.entry.forward(self.module, self.entry, x)


@torch.no_grad()
def _probe(module: nn.Module, entry: Known) -> str | None:
    """Why the entry does not fit the class after all, on a few numbers: its forward may have changed since it was written.

    In the dtype of the parameters, and in fp32 if that has 16 bits: a factor of 1.02 is within the rounding of an MLP there.
    """
    parameters = list(module.parameters())
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    # Quantised and sharded ones are subclasses, or of integers, or empty until they are needed.
    if not parameters or any(
        type(p) is not nn.Parameter or p.is_meta or p.dtype not in dtypes or not p.numel() for p in parameters
    ):
        return None
    first = parameters[0]
    layer = module._modules.get(entry.names[1]) if len(entry.names) > 1 else None
    width = first.shape[-1] if layer is None else layer.weight.shape[int(type(layer) is nn.Linear)]
    x = torch.linspace(-2, 2, 2 * width, dtype=torch.float32, device=first.device).view(2, width)
    x = torch.stack((x, x * 1e-3))  # small numbers tell the eps of a norm
    both, modes = _Both(module, entry), [(m, m.training) for m in module.modules()]
    try:
        module.eval()  # no dropout: it would also draw random numbers
        with torch.autocast(x.device.type, enabled=False):
            fits = _agree(*both(x.to(first.dtype)))
            if fits and first.dtype.itemsize == 2:
                fits = _agree(*torch.func.functional_call(both, _in_fp32(module, entry), (x,)))
    finally:
        for m, training in modes:
            m.training = training
    return None if fits else f"{entry.by} gives other values than this version of the class"


def _agree(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    share = 1e-3 if expected.dtype.itemsize > 2 else 5e-2
    scale = float(expected.float().abs().nan_to_num().max())
    return torch.allclose(expected.float(), found.float(), rtol=0, atol=share * scale + 1e-6, equal_nan=True)


def _in_fp32(module: nn.Module, entry: Known, units: int = 64) -> dict[str, Tensor]:
    """Copies of the parameters for functional_call; of an MLP of Linear layers, those of its first hidden units alone."""
    found = {f"module.{name}": p.detach() for name, p in module.named_parameters()}
    layers = entry.names[1:]
    if layers and all(name is None or type(module._modules[name]) is nn.Linear for name in layers):
        for name in layers[:-1]:
            for key in (f"module.{name}.weight", f"module.{name}.bias"):
                if key in found:  # gate above up, if one matrix holds both
                    halves = found[key].chunk(2 if None in layers else 1)
                    found[key] = torch.cat([half[:units] for half in halves])
        last = f"module.{layers[-1]}.weight"
        found[last] = found[last][:, :units]
    return {name: p.float() for name, p in found.items()}


def _pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost models of transformers in the model."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(outer) for outer in inside):
            inside.append(f"{name}." if name else "")
            yield name, module


def _replace_attention(model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            report.kept[name or _ROOT] = "MultiheadAttention: build the model with fastlm.nn.MultiheadAttention"
    for name, module in _pretrained(model):
        reason = _set_attention(module, report)
        for inner, layer in module.named_modules(prefix=name):
            if hasattr(layer, "is_causal"):  # which attention layers of transformers have
                kind = type(layer).__name__
                if reason is None:
                    report.replaced[inner or _ROOT] = f"{kind}: ops.attention"
                else:
                    report.kept[inner or _ROOT] = f"{kind}: {reason}"


def _set_attention(model: Any, report: Report) -> str | None:
    """Sets attn_implementation="fastlm" in a model of transformers; or says why not."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    if all(name == "fastlm" for _, name in before):
        return "replaced already"
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} does not take an attention implementation"
    interface.register()
    try:
        model.set_attn_implementation("fastlm")
    except (ValueError, ImportError) as error:
        for config, name in before:
            config._attn_implementation = name
        return str(error).strip().splitlines()[0]
    changed = [(config, name) for config, name in before if name != config._attn_implementation]
    report._marks.append(Attention(model, changed))
    return None


def _configs(model: Any) -> list[Any]:
    """Every config that says how some part of the model attends, those above before those below."""
    found: dict[int, Any] = {}
    todo = [m.config for m in model.modules() if hasattr(m, "set_attn_implementation")]
    while todo:
        config = todo.pop(0)
        if config is not None and id(config) not in found:
            found[id(config)] = config
            todo.extend(getattr(config, key, None) for key in config.sub_configs)
    return list(found.values())
