"""What a weight is: a linear layer's matrix, a stack of expert matrices, or something that is not quantized.

Two sources of that knowledge. A model definition knows (adapters ask its modules). A checkpoint alone does not: there,
names, shapes and the config's ``model_type`` must do, and whatever is not clearly a matrix that a linear layer
multiplies with is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .checkpoint import TensorInfo

LINEAR = "linear"
EXPERTS = "experts"
#: kinds that can be quantized; any other kind is the reason why a weight is kept
QUANTIZABLE = frozenset({LINEAR, EXPERTS})

#: (pattern over the module's name, what it is): kept by default, in a checkpoint and in a model
DEFAULT_KEEPS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"(^|\.)(lm_head|embed_out|output_layer|score|classifier|qa_outputs|cls)(\.|$)", "output head"),
        (r"(^|\.)(wte|wpe|shared|relative_attention_bias|[^.]*embed[^.]*)(\.|$)", "embedding"),
        (r"(^|\.)[^.]*norm[^.]*$", "norm"),
        (r"(^|\.)(shared_expert_gate|shared_experts?\.gate)$", "shared expert's gate"),
        (r"(^|\.)(gate|[^.]*router[^.]*|switch|gating)(\.(layer|weight|wg|linear|classifier|proj))?$", "MoE router"),
    )
)

# models that keep weights as [in, out] in transformers' Conv1D
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_MODULES = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
# models that keep expert stacks as [experts, in, out]
_TRANSPOSED_TYPES = frozenset({"gpt_oss", "openai_privacy_filter", "llama4", "llama4_text", "aria", "aria_text"})
_STACK = re.compile(r"(^|\.)([^.]*experts?[^.]*\.(.*\.)?|)(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|w13)$")
_GRANITE_STACK = re.compile(r"\.(input_linear|output_linear)$")


def module_of(name: str) -> str:
    """``a.b.weight`` -> ``a.b``; a name without ``.weight`` is its own module (expert stacks)."""
    return name.removesuffix(".weight")


def default_keep(name: str) -> str | None:
    """What a weight is that stays unquantized by default, judged by its name; None for all others."""
    module = module_of(name)
    for pattern, what in DEFAULT_KEEPS:
        if pattern.search(module):
            return what
    return None


def kind_by_name(info: TensorInfo, config: Mapping[str, Any]) -> str:
    """The kind of a checkpoint's tensor when there is no model definition to ask."""
    module = module_of(info.name)
    if len(info.shape) == 2:
        if not info.name.endswith(".weight"):
            return "not a .weight"
        if _model_types(config) & _CONV1D_TYPES and _CONV1D_MODULES.search(module):
            return "Conv1D, stored [in, out]"
        return LINEAR
    if len(info.shape) == 3 and (_STACK.search(module) or _GRANITE_STACK.search(module)):
        return EXPERTS
    if info.name.endswith("bias"):
        return "bias"
    return {0: "scalar", 1: "vector"}.get(len(info.shape), f"{len(info.shape)}-D, no expert stack")


def is_transposed_stack(info: TensorInfo, config: Mapping[str, Any]) -> bool:
    """Whether an expert stack is stored [experts, in, out]."""
    return len(info.shape) == 3 and bool(_model_types(config) & _TRANSPOSED_TYPES)


def _model_types(config: Mapping[str, Any]) -> set[str]:
    nested: Sequence[Any] = [config, *config.values()]
    return {str(part["model_type"]) for part in nested if isinstance(part, Mapping) and "model_type" in part}
