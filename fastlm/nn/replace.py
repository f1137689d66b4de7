"""One call that puts the ops into a model that is there already, and takes them out again."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastlm.nn import transformers as interface
from fastlm.nn.replace_table import LOSSES, MLPS, NORMS, Known, defining_class, known, original

_LOOKS_LIKE = re.compile(r"(Norm|MLP|FeedForward|FFN|ActDense|Experts)$")
_ROOT = "(the model)"


class Forward:
    """Takes the place of one module's `forward`, as an attribute of that instance. Pickles and deep-copies with it."""

    def __init__(self, module: nn.Module, known: Known) -> None:
        self.module, self.known = module, known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs and not self.known.keywords:
            return original(self.module, *args, **kwargs)
        return self.known.forward(self.module, self.known, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's own, by which generate() and trainers decide what to pass."""
        return inspect.signature(types.MethodType(type(self.module).forward, self.module))


@dataclass
class Report:
    """What `replace` did to a model.

    Attributes:
        replaced: name of a module -> its class and what computes it now.
        kept: name of a module that might have been replaced -> its class and why it was not.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    _bound: list[tuple[nn.Module, Forward]] = field(default_factory=list, repr=False)
    _implementations: list[tuple[Any, Any]] = field(default_factory=list, repr=False)

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
        for module, forward in self._bound:
            if module.__dict__.get("forward") is forward:
                del module.forward
            else:
                warnings.warn(
                    f"replace: the forward of a {type(module).__name__} was changed by others since; left as it is",
                    stacklevel=2,
                )
        for config, name in self._implementations:
            if config._attn_implementation == "fastlm":
                config._attn_implementation = name
        self._bound.clear()
        self._implementations.clear()


def replace(
    model: nn.Module, *, norms: bool = True, mlps: bool = True, attention: bool = True, loss: bool = False
) -> Report:
    """Makes a model compute with the ops of fastlm, in place; `undo()` of what it returns takes them out again.

    Any model of transformers (version 5) built of the classes of fastlm/nn/replace_table.py, with or without a head or a
    wrapper around it: GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi 3, T5's norms, ...; and torch.nn.LayerNorm and
    torch.nn.RMSNorm in any model. Everything else is left as it is; the report says what and why.

    Only the `forward` of single modules and the attention implementation in the model's config change. Modules, classes,
    parameters, state_dict keys, hooks, dtypes, devices and the training flag stay; the model can be saved, pickled, copied,
    compiled and wrapped as before. (Not by nn.DataParallel, whose shallow copies would run on the first one's parameters:
    use DistributedDataParallel.) Forwards read the parameters at every call: LoRA, FSDP or quantisation may come before or
    after. An MLP one of whose projections is not exactly a Linear or Conv1D, or has hooks, is not fused.

    Args:
        model: the model, on any device, in training or evaluation.
        norms: LayerNorm and RMSNorm, in the casting and with the `1 + weight` of their class.
        mlps: MLPs, plain and gated, with SiLU, GELU, ReLU or squared ReLU. Their dropout stays outside of the op.
        attention: attn_implementation="fastlm" (see fastlm.nn.transformers.register), for models of transformers.
        loss: in training and with labels, the forward of a causal language model computes its loss from hidden states. **The
            output's logits are then None**: they are never stored. Its loss is that of the model's own, with
            num_items_in_batch, shift_labels and ignore_index as passed; a batch in which all labels are ignored gives 0
            instead of NaN. In evaluation, without labels, or with logits_to_keep nothing changes.

    Returns:
        A Report: print it. A call on a model that was replaced already replaces nothing twice.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    probed: dict[type, str | None] = {}
    for name, module in list(model.named_modules()):
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


def _replace_one(name: str, module: nn.Module, entry: Known, report: Report, probed: dict | None) -> None:
    kind = type(module).__name__
    mine = module.__dict__.get("forward")
    if mine is not None:
        was = "replaced already" if isinstance(mine, Forward) else "its forward was replaced by others already"
        report.kept[name] = f"{kind}: {was}"
        return
    reason = entry.why_not(module, entry)
    if reason is None and probed is not None:
        if type(module) not in probed:
            probed[type(module)] = _probe(module, entry)
        reason = probed[type(module)]
    if reason is not None:
        report.kept[name] = f"{kind}: {reason}"
        return
    if entry in LOSSES.values():
        arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        entry = dataclasses.replace(entry, names=(entry.names[0], *arguments))
    module.forward = forward = Forward(module, entry)
    report._bound.append((module, forward))
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


@torch.no_grad()
def _probe(module: nn.Module, entry: Known) -> str | None:
    """Why the entry does not fit the class after all, on a few numbers: its forward may have changed since it was written."""
    parameters = list(module.parameters())
    if not parameters or any(type(p) is not nn.Parameter or p.is_meta for p in parameters):
        return None
    first = parameters[0]
    layer = module._modules.get(entry.names[1]) if len(entry.names) > 1 else None
    width = first.shape[-1] if layer is None else layer.weight.shape[int(type(layer) is nn.Linear)]
    x = torch.linspace(-2, 2, 2 * width, dtype=first.dtype, device=first.device).view(1, 2, width)
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()  # no dropout: it would also draw random numbers
        expected, found = original(module, x), entry.forward(module, entry, x)
    finally:
        for m, training in modes:
            m.training = training
    share = 1e-3 if torch.finfo(x.dtype).bits > 16 else 5e-2
    if expected.shape == found.shape and expected.dtype == found.dtype:
        scale = expected.float().abs().nan_to_num().max()
        if torch.allclose(expected.float(), found.float(), rtol=0, atol=share * float(scale) + 1e-6, equal_nan=True):
            return None
    return f"{entry.by} gives other values than this version of the class"


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
    report._implementations.extend((config, name) for config, name in before if name != config._attn_implementation)
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
