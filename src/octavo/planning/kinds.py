"""The kind of a weight: a linear layer's matrix, a stack of expert matrices, or something that is not quantized.

Two sources of that knowledge. A model definition knows (adapters ask its modules). A checkpoint alone does not: there,
names, shapes and the config's ``model_type`` must do, and whatever is not clearly a matrix that a linear layer
multiplies with is kept.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..checkpoint.header import TensorInfo

LINEAR = "linear"
EXPERTS = "experts"
#: the kind of a matrix that is one of the two
VOCABULARY = "as many rows as the vocabulary: head or embedding"
#: kinds that can be quantized; any other kind is the reason why a weight is kept
QUANTIZABLE = frozenset({LINEAR, EXPERTS})

#: kinds that stay by default, without more being said where they could not be quantized
BY_DEFAULT = frozenset({"output head", "embedding", "norm", "shared expert's gate", "MoE router", VOCABULARY})

#: output heads as transformers' models name them, the last components of a module's path
_HEADS = (
    r"lm_heads?(\.\d+)?|embed_out|output_layer|output|proj_out|vocab_projector|generator_lm_head|lm_loss|output_projection"
    r"|score|classifier|qa_outputs|cls|predictions\.decoder|pred_layer\.proj|shared_head\.head|codec_head"
    r"|v_head(\.\w+)?|value_head|reward_head|transformer\.ff_out|head"
)
#: of those, which are tied to the embedding in some models, and then in no file
TIED_HEADS = (
    r"lm_head",
    r"proj_out",
    r"embed_out",
    r"predictions\.decoder",
    r"vocab_projector",
    r"generator_lm_head",
    r"pred_layer\.proj",
    r"output_projection",
)

#: of those, names that matrices of layers have, too
_IN_LAYERS = frozenset({"output_layer", "output", "proj_out", "output_projection", "score", "classifier"})
#: modules that are heads with the layers in them, where they are in no layer: of rewards, classes, spans, ranks
_WHOLE_HEADS = frozenset({"score", "qa_outputs", "sequence_summary", "start_logits", "end_logits", "answer_class"})
_ENDS_OF_HEADS = ("_head", "classifier")

#: output heads, at the end of a module's name
_HEAD = re.compile(rf"(^|\.)({_HEADS})$")
#: names that embeddings have, and routers, without more
_EMBEDDINGS = frozenset({"wte", "wpe", "shared", "relative_attention_bias", "rel_pos_bias"})
_ROUTERS = frozenset({"gate", "switch", "gating"})
#: layers within a router
_OF_ROUTERS = frozenset({"layer", "weight", "wg", "linear", "classifier", "proj"})

_NUMBER = re.compile(r"\d+")
#: more rows than anything but a vocabulary has
_LARGE = 20_001

# models that keep weights as [in, out] in transformers' Conv1D, in modules of these names
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_MODULES = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
_STACKS = frozenset({"gate_up_proj", "down_proj", "input_linear", "output_linear"})
#: more matrices than a stack of experts has: each is cut, and has scales, of its own
_MAX_EXPERTS = 1 << 16


def module_of(name: str) -> str:
    """``a.b.weight`` -> ``a.b``; a name without ``.weight`` is its own module (expert stacks)."""
    return name.removesuffix(".weight")


def default_keep(name: str) -> str | None:
    """Name the kind of a weight that stays unquantized by default, judged by its name; None for all others."""
    # the patterns tell no number from another, and names of layers and experts differ in nothing else
    return _default_keep(_NUMBER.sub("0", module_of(name)))


@functools.lru_cache(maxsize=4096)
def _default_keep(module: str) -> str | None:
    # components are compared, and not searched by patterns, which take long on the names that a stranger can think of
    *_, before, last = "", *module.split(".")
    if _is_head(module):
        return "output head"
    if last in _EMBEDDINGS or "embed" in last or last.endswith(("emb", "embs")):
        return "embedding"
    if before.endswith(("embedding", "embeddings")) or (before.endswith("emb_layers") and last.isdecimal()):
        return "embedding"
    if "norm" in last:
        return "norm"
    if last == "shared_expert_gate" or (last == "gate" and before in ("shared_expert", "shared_experts")):
        return "shared expert's gate"
    router = before if last in _OF_ROUTERS else last
    if router in _ROUTERS or "router" in router or "router" in last:
        return "MoE router"
    return None


def _is_head(module: str) -> bool:
    """Return True for heads, layers of heads, and what prepares an encoder's output for one."""
    *above, before, last = "", "", *module.split(".")
    in_layer = any(component.isdecimal() for component in (*above, before))
    if _HEAD.search(module) and not (in_layer and last in _IN_LAYERS):
        return True
    if (before in ("pooler", "head") and last.startswith("dense")) or last == "logits_proj":
        return True
    if _is_in_cls((*above, before, last)):
        return True
    # what lies deeper is a model of its own, as robots have in their heads
    return not in_layer and any(name in _WHOLE_HEADS or name.endswith(_ENDS_OF_HEADS) for name in (before, last))


def _is_in_cls(components: Sequence[str]) -> bool:
    """Return True for what is in a BERT's ``cls``, however deep, but for the numbered layers of another model."""
    below = itertools.takewhile(lambda component: not component.isdecimal(), reversed(components))
    return "cls" in below


def _is_stack(module: str) -> bool:
    *above, last = module.split(".")
    return last in _STACKS or (last != "" and any("expert" in part for part in above))


def kind_by_name(info: TensorInfo, config: Mapping[str, Any], names: Collection[str] = ()) -> str:
    """The kind of a checkpoint's tensor when there is no model definition to ask.

    Args:
        config: the checkpoint's config.json, or empty.
        names: of all its tensors.
    """
    module = module_of(info.name)
    if len(info.shape) == 2:
        if not info.name.endswith(".weight"):
            return "not a .weight"
        if _is_conv1d(module, info.shape, config):
            return "Conv1D, stored [in, out]"
        if module.endswith(".out_proj") and f"{module.removesuffix('.out_proj')}.in_proj_weight" in names:
            return "MultiheadAttention, which reads its weight itself"
        if info.shape[0] >= _LARGE and info.shape[0] in values_of(config, "vocab_size"):
            return VOCABULARY
        return LINEAR
    if len(info.shape) == 3 and _is_stack(module):
        return EXPERTS if info.shape[0] <= _MAX_EXPERTS else f"{info.shape[0]:,} matrices, no expert stack"
    if info.name.endswith("bias"):
        return "bias"
    return {0: "scalar", 1: "vector"}.get(len(info.shape), f"{len(info.shape)}-D, no expert stack")


def _is_conv1d(module: str, shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    if not _CONV1D_MODULES.search(module):
        return False
    if values_of(config, "model_type") & _CONV1D_TYPES:
        return True
    # without a config, or with code of its own, GPT-2's names stand for GPT-2's layout
    unknown = not config or "auto_map" in config
    return unknown and not (module.endswith("c_attn") and shape[0] == 3 * shape[1])


def values_of(config: Mapping[str, Any], key: str) -> set[Any]:
    """The values that a config and its parts (of the text, of the vision model) have under a key."""
    parts: Sequence[Any] = [config, *config.values()]
    return {part[key] for part in parts if isinstance(part, Mapping) and isinstance(part.get(key), (str, int))}
