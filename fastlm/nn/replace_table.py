"""The modules that `replace` knows, by class name, and the forward that stands in for each class's own.

A forward here is called with the module whose forward it is: it reads that module's parameters and submodules at every call,
so that whatever wraps or replaces them later (LoRA, FSDP, quantisation) is seen, and hands anything it cannot serve to the
class's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops


@dataclass(frozen=True)
class Known:
    """How modules of one class are replaced.

    Attributes:
        by: what does the work, for the report.
        forward: called as forward(module, known, *args, **kwargs).
        why_not: why_not(module, known) -> why this module is left as it is, or None.
        names: what the class calls its parts; see the forwards.
        options: further arguments of the op.
        keywords: whether the forward takes keyword arguments; a call with any goes to the class's own otherwise.
    """

    by: str
    forward: Callable[..., Any]
    why_not: Callable[[nn.Module, Known], str | None]
    names: tuple[str | None, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    keywords: bool = False


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's class computes."""
    return type(module).forward(module, *args, **kwargs)


def bare(module: nn.Module) -> str | None:
    """Why code around this module cannot be left out, or None: nobody listens to its calls or has changed them."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    return "has a forward of its own" if "forward" in module.__dict__ else None


def projection(layer: Any) -> str | None:
    """Why a linear layer is not just its weight and bias, or None."""
    kind = type(layer)
    if kind is not nn.Linear and (kind.__name__, kind.__module__) != ("Conv1D", "transformers.pytorch_utils"):
        return f"is {kind.__name__}, not a plain Linear or Conv1D"
    # FSDP's are DTensors between the calls; other subclasses of tensors (quantised ones) multiply in a way of their own.
    held = type(layer.weight)
    if held is not nn.Parameter and held is not Tensor and held.__name__ != "DTensor":
        return f"has a weight of type {held.__name__}"
    return bare(layer)


# --- norms --------------------------------------------------------------------------------------------------------


def _one_vector(module, known):
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        shape = module.weight.shape
    return None if len(shape) == 1 else f"normalises over {list(shape)}, more than the last dimension"


def _mixed(x, weight):
    """Whether the class would change dtype on the way: a weight of another one, or autocast, which norms in fp32."""
    if weight is not None and weight.dtype is not x.dtype:
        return True
    return x.dtype is not torch.float32 and (x.is_cpu or x.is_cuda) and torch.is_autocast_enabled(x.device.type)


def _rms_norm(module, known, x):
    weight = module.weight
    if weight.dtype is not x.dtype:
        return original(module, x)
    return ops.rms_norm(x, weight, getattr(module, known.names[0]), **known.options)


def _scaled_layer_norm(module, known, x):
    if module.weight.dtype is not x.dtype:
        return original(module, x)
    return ops.layer_norm(x, module.weight, None, module.variance_epsilon)


def _torch_rms_norm(module, known, x):
    if _mixed(x, module.weight):
        return original(module, x)
    # None is the eps of the dtype computed in, which is fp32 for 16-bit inputs.
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if module.eps is None else module.eps
    return ops.rms_norm(x, module.weight, eps)


def _torch_layer_norm(module, known, x):
    if _mixed(x, module.weight):
        return original(module, x)
    return ops.layer_norm(x, module.weight, module.bias, module.eps)


# --- MLPs ---------------------------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "ReLUSquaredActivation": "relu2", "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh", "AccurateGELUActivation": "gelu_tanh",
}  # fmt: skip


def _activation(module):
    """The name in fastlm.ops of an activation module, or None."""
    if isinstance(module, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return _ACTIVATIONS.get(type(module).__name__)


def _why_not_mlp(module, known):
    act, *layers = (name for name in known.names if name is not None)
    parts = module._modules
    for name in (act, *layers):
        if parts.get(name) is None:
            return f"has no module {name}"
    if _activation(parts[act]) is None:
        return f"the op has no activation {type(parts[act]).__name__}"
    reasons = [(act, bare(parts[act])), *((name, projection(parts[name])) for name in layers)]
    if getattr(getattr(module, "config", None), "pretraining_tp", 1) > 1:
        reasons.append(("config", "asks for pretraining_tp"))
    return next((f"its {name} {reason}" for name, reason in reasons if reason), None)


def _mlp(module, known, x):
    """names: activation, then the projections in the order of the op, None where one matrix holds gate and up."""
    parts = module._modules
    act, *layers = (name and parts[name] for name in known.names)
    kind = _activation(act)
    if kind is None or bare(act) or any(projection(layer) for layer in layers if layer is not None):
        return original(module, x)
    if layers[0].weight.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
        return original(module, x)
    weights = (_rows(layer) for layer in layers)
    biases = (None if layer is None else layer.bias for layer in layers)
    op = ops.mlp if len(layers) == 2 else ops.gated_mlp
    y = op(x, *weights, *biases, activation=kind)
    return parts["dropout"](y) if "dropout" in parts else y  # GPT-2's


def _rows(layer):
    if layer is None:
        return None
    return layer.weight if type(layer) is nn.Linear else layer.weight.t()


# --- the loss of a causal language model --------------------------------------------------------------------------


def _why_not_loss(module, known):
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.modeling_utils import PreTrainedModel

    # Not asked, as it warns of models without a loss_type, GPT-2 among them; what its setter sets is _loss_function.
    theirs = type(module).loss_function is PreTrainedModel.loss_function
    named = getattr(module, "loss_type", None) or "ForCausalLM"
    given = getattr(module, "_loss_function", LOSS_MAPPING.get(named))
    if not theirs or given is not ForCausalLMLoss or ForCausalLMLoss.__module__ != "transformers.loss.loss_utils":
        return "its loss_function is not transformers' own for causal language models"
    reason = projection(module._modules.get("lm_head"))
    return reason and f"its lm_head {reason}"


def _causal_lm(module, known, *args, **kwargs):
    """names: the output class, then the arguments of the class's forward in order."""
    given = dict(zip(known.names[1:], args)) | kwargs
    labels, keep = given.pop("labels", None), given.pop("logits_to_keep", 0)
    whole = isinstance(keep, int) and keep == 0
    if labels is None or not module.training or not whole or _why_not_loss(module, known) is not None:
        return original(module, *args, **kwargs)
    # Not `from transformers import modeling_outputs`, whose lazy module Dynamo of torch 2.11 refuses.
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

    as_dict = given.pop("return_dict", None)
    outputs = module.base_model(**given)
    loss = _shifted_loss(module, outputs.last_hidden_state, labels, **given)
    kind = CausalLMOutputWithPast if known.names[0] == "CausalLMOutputWithPast" else CausalLMOutputWithCrossAttentions
    names = ("past_key_values", "hidden_states", "attentions", "cross_attentions")
    found = kind(loss=loss, logits=None, **{name: outputs[name] for name in names if name in outputs})
    as_dict = module.config.return_dict if as_dict is None else as_dict
    return found if as_dict else found.to_tuple()


def _shifted_loss(module, hidden, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_):
    """transformers' ForCausalLMLoss, from hidden states."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return ops.linear_cross_entropy(
        hidden,
        module.lm_head.weight,
        shift_labels.to(hidden.device).view(hidden.shape[:-1]),
        linear_bias=module.lm_head.bias,
        ignore_index=ignore_index,
        softcap=getattr(module.config, "final_logit_softcapping", None),
        denominator=num_items_in_batch,
    )


# --- the table ----------------------------------------------------------------------------------------------------


def _all(names: str, *how: Any) -> dict[str, Known]:
    return {name: Known(*how) for name in names.split()}


# Of torch.nn.
TORCH = {
    "LayerNorm": Known("ops.layer_norm", _torch_layer_norm, _one_vector),
    "RMSNorm": Known("ops.rms_norm", _torch_rms_norm, _one_vector),
}
# Of transformers, whose models have copies of one another's classes: a line is one forward under many names (tested).
NORMS = {
    **_all(
        "LlamaRMSNorm MistralRMSNorm MixtralRMSNorm Qwen2RMSNorm Qwen2MoeRMSNorm Qwen3RMSNorm Qwen3MoeRMSNorm Phi3RMSNorm"
        " DeepseekV2RMSNorm DeepseekV3RMSNorm GraniteRMSNorm SmolLM3RMSNorm GlmRMSNorm Glm4RMSNorm Glm4MoeRMSNorm"
        " MinistralRMSNorm Ministral3RMSNorm Qwen2_5_VLRMSNorm Qwen3VLTextRMSNorm Qwen3VLMoeTextRMSNorm MllamaTextRMSNorm"
        " PixtralRMSNorm SeedOssRMSNorm Ernie4_5RMSNorm Lfm2RMSNorm JambaRMSNorm Dots1RMSNorm CsmRMSNorm",
        "ops.rms_norm", _rms_norm, _one_vector, ("variance_epsilon",), {"casting": "llama"},
    ),
    **_all(
        "T5LayerNorm MT5LayerNorm UMT5LayerNorm",
        "ops.rms_norm", _rms_norm, _one_vector, ("variance_epsilon",), {"casting": "llama"},
    ),
    **_all(
        "Olmo2RMSNorm Olmo3RMSNorm GptOssRMSNorm",
        "ops.rms_norm", _rms_norm, _one_vector, ("variance_epsilon",),
    ),
    **_all(
        "GemmaRMSNorm Gemma2RMSNorm Gemma3RMSNorm T5GemmaRMSNorm Qwen3NextRMSNorm Qwen3_5RMSNorm"
        " Qwen3_5MoeRMSNorm RecurrentGemmaRMSNorm VaultGemmaRMSNorm",
        "ops.rms_norm", _rms_norm, _one_vector, ("eps",), {"weight_offset": 1.0},
    ),
    **_all("CohereLayerNorm Cohere2LayerNorm", "ops.layer_norm", _scaled_layer_norm, _one_vector),
}  # fmt: skip
MLPS = {
    **_all(
        "LlamaMLP MistralMLP Qwen2MLP Qwen3MLP GemmaMLP Gemma2MLP Gemma3MLP GraniteMLP SmolLM3MLP"
        " CohereMLP Cohere2MLP Olmo2MLP Olmo3MLP"
        " DeepseekV2MLP DeepseekV3MLP Qwen2MoeMLP Qwen3MoeMLP MinistralMLP Ministral3MLP Qwen3VLTextMLP Qwen3VLMoeTextMLP"
        " MllamaTextMLP PixtralMLP Qwen3NextMLP Dots1MLP CsmMLP JambaMLP Ernie4_5MLP",
        "ops.gated_mlp", _mlp, _why_not_mlp, ("act_fn", "gate_proj", "up_proj", "down_proj"),
    ),
    **_all(
        "Phi3MLP GlmMLP Glm4MLP",
        "ops.gated_mlp", _mlp, _why_not_mlp, ("activation_fn", "gate_up_proj", None, "down_proj"),
    ),
    **_all("NemotronMLP ArceeMLP", "ops.mlp", _mlp, _why_not_mlp, ("act_fn", "up_proj", "down_proj")),
    **_all("PhiMLP CLIPMLP SiglipMLP", "ops.mlp", _mlp, _why_not_mlp, ("activation_fn", "fc1", "fc2")),
    **_all("GPT2MLP GPTBigCodeMLP", "ops.mlp", _mlp, _why_not_mlp, ("act", "c_fc", "c_proj")),
}  # fmt: skip
# No other model: what stands between lm_head and the loss (scales, an auxiliary loss) differs.
LOSSES = {
    **_all(
        "LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM"
        " Gemma2ForCausalLM Gemma3ForCausalLM Phi3ForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM SmolLM3ForCausalLM"
        " MinistralForCausalLM Ministral3ForCausalLM SeedOssForCausalLM",
        "ops.linear_cross_entropy", _causal_lm, _why_not_loss, ("CausalLMOutputWithPast",), {}, True,
    ),
    **_all(
        "GPT2LMHeadModel",
        "ops.linear_cross_entropy", _causal_lm, _why_not_loss, ("CausalLMOutputWithCrossAttentions",), {}, True,
    ),
}  # fmt: skip


def defining_class(module: nn.Module) -> type:
    """The class that the module's forward is written in: a subclass without a forward of its own computes the same."""
    return next(c for c in type(module).__mro__ if "forward" in c.__dict__)


def patched(kind: type) -> str | None:
    """Who replaced the forward in a class of torch or transformers, as Liger and Unsloth do, or None if nobody has."""
    function = kind.__dict__["forward"]
    while function is not None:  # through decorators; functools.wraps copies __module__ and not the globals
        name = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
        if name.split(".")[0] not in ("torch", "transformers"):
            return name
        function = getattr(function, "__wrapped__", None)
    return None


def known(module: nn.Module, table: dict[str, Known]) -> Known | None:
    """The entry for a module of torch or transformers, or None."""
    kind = defining_class(module)
    package = kind.__module__.split(".")[0]
    if package == "torch":
        return TORCH.get(kind.__name__) if table is NORMS and kind.__module__.startswith("torch.nn.") else None
    return table.get(kind.__name__) if package == "transformers" else None
