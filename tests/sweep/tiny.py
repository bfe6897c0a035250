"""Tiny models of any type: a default config, every number in it made small, and random weights.

A default config is consistent, and is kept so by treating equal things alike: all widths are divided by the same
number, layers are cut to four wherever they are counted, token ids stay different. What then does not fit (groups that
don't divide the channels, rotary tables of odd length) shows when the model is built; the next milder `Shrink` is tried
until one fits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: more parameters than a tiny model has, if there is a size that has fewer, and if there is none
_MOST_PARAMETERS = (25_000_000, 150_000_000)
#: tokens, special ones among them
_VOCABULARY = 512
_LAYERS, _EXPERTS = 4, 4


@dataclass(frozen=True)
class Shrink:
    """How much smaller everything becomes."""

    widths: int  # divides hidden sizes, channels, head dimensions
    layers: int = _LAYERS
    experts: bool = True  # whether there are fewer of them
    vocabulary: bool = True
    images: bool = True
    derived: bool = True  # whether the config derives what it has no default for; else it is told


#: from the smallest models to milder and milder ones
SHRINKS = (
    Shrink(8),
    Shrink(16),
    Shrink(4),
    Shrink(8, derived=False),
    Shrink(2),
    Shrink(8, layers=12),
    Shrink(8, images=False),
    Shrink(8, experts=False),
    Shrink(8, vocabulary=False),
    Shrink(4, layers=1000, experts=False),
    Shrink(1),
    Shrink(1, layers=1000, experts=False, vocabulary=False),
)

_WIDTH = re.compile(
    r"hidden|intermediate|(^|_)(dims?|d_model|d_ff|d_kv|d_inner|rank|channels|filters|width|units|embd|inner|lora)($|_)"
    r"|ffn|mlp_size|embed_(size|dim)|embedding_size|projection|head_dim|dim$|state_size|d_head|chunk_dim|proj_size"
)
_NO_WIDTH = re.compile(
    r"layers|vocab|image|patch_size|kernel|num_(in_)?channels$|^in_channels$|audio_channels|input_channels|token|ratio|act"
    r"|dropout|prob|num_.*heads|hidden_size_factor|codebook_size"
)
_LAYER = re.compile(r"(^|_)layers?$|(^|_)depths?$|num_(encoder_)?blocks$|blocks_per_stage|layer_repeats|numb_of_layers")
_NO_LAYER = re.compile(
    r"feat_extract|feature_layer|vision_select|postnet|^num_nextn|conv_layers|output_layer|adapter_layers"
)
_INDEXES = re.compile(r"(index(es)?|indices|idxs?|layer_ids|hook_ids|(attention|block)s?|(?<!numb_of)_layers)$")
_EXPERT = re.compile(r"(num|n)_(local_|routed_|total_)?experts$|moe_num_experts|num_local_experts")
_CHOSEN = re.compile(r"experts_per_tok|moe_k$|(?<!index_)top_?k(_experts)?$|moe_topk|num_selected_experts|moe_top_k")
_GROUPS = re.compile(r"^(n_group|topk_group|num_expert_groups?|n_expert_groups?|num_limited_groups)$")
_IMAGE = re.compile(r"(image|img)_(size|height|width)$")
_TOKEN = re.compile(r"(token_?(id|index)s?|_token)$|^(bos|eos|pad)_index$")


def tiny_config(model_type: str, shrink: Shrink) -> Any:
    """The default config of a type, made small."""
    cls = CONFIG_MAPPING[model_type]
    default = cls(**_REQUIRED.get(model_type, {}))
    small = _Small(default, shrink)
    config = small.rebuilt(default, _REQUIRED.get(model_type, {}) | _FIXED.get(model_type, {}))
    config.dtype = torch.bfloat16
    return config


class _Small:
    """Makes the parts of one config small."""

    def __init__(self, config: Any, shrink: Shrink) -> None:
        self.shrink = shrink
        ids = sorted({value for part in parts(config) for value in _token_ids(part) if value >= _VOCABULARY // 2})
        self.tokens = {value: _VOCABULARY - 1 - position for position, value in enumerate(reversed(ids))}

    def rebuilt(self, config: Any, given: Mapping[str, Any]) -> Any:
        """A config of the same class, made of small values.

        Args:
            given: values that are to stay as they are, also of configs within it (``text_config.hidden_size``).
        """
        values: dict[str, Any] = {}
        layers = vars(config).get("num_hidden_layers")
        for name, default in _arguments(type(config)).items():
            value = vars(config).get(name, default)
            if isinstance(value, PreTrainedConfig):
                within = {key.removeprefix(f"{name}."): v for key, v in given.items() if key.startswith(f"{name}.")}
                values[name] = self.rebuilt(value, within)
            elif (
                value is None or name in _BASE or (self.shrink.derived and default is None and type(value) is not dict)
            ):
                continue
            elif isinstance(value, (list, tuple)) and len(value) == layers:  # one for each layer
                values[name] = type(value)(self.value(name, v) for v in value[: self.shrink.layers])
            else:
                values[name] = self.value(name, value)
        return type(config)(**values | {name: value for name, value in given.items() if "." not in name})

    def value(self, name: str, value: Any) -> Any:
        """What stands for a value of this name."""
        if isinstance(value, bool) or not isinstance(value, (int, list, tuple, dict)):
            return value
        if isinstance(value, dict):
            return {k: self.value(str(k), v) for k, v in value.items()} if name != "id2label" else value
        if name == "mrope_section":
            short = [v // self.shrink.widths for v in value]
            return [short[0] + sum(value) // self.shrink.widths - sum(short), *short[1:]]
        if self.shrink.vocabulary and _TOKEN.search(name):
            return _each(value, lambda v: self.tokens.get(v, v))
        if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value) and _INDEXES.search(name):
            most = max(value) + 1
            if most > self.shrink.layers:
                return list(dict.fromkeys(v * self.shrink.layers // most for v in value))
            return value
        return _each(value, lambda v: self.number(name, v))

    def number(self, name: str, value: int) -> int:
        """What stands for one number of this name."""
        shrink = self.shrink
        if "vocab" in name and shrink.vocabulary:
            return min(value, _VOCABULARY)
        if _LAYER.search(name) and not _NO_LAYER.search(name):
            return min(value, shrink.layers)
        if name.startswith("first_k") or name.endswith(("_period", "_offset")):
            return min(value, 1 if not name.endswith("period") else 2)
        if shrink.images and _IMAGE.search(name) and value >= 512:
            return value // 4
        if shrink.experts and _EXPERT.search(name):
            return min(value, _EXPERTS)
        if shrink.experts and _CHOSEN.search(name):
            return min(value, 2)
        if shrink.experts and _GROUPS.search(name):
            return 1
        if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= 8 * shrink.widths:
            return value // shrink.widths if value % shrink.widths == 0 else value
        return value


#: what every config has, and stays
_BASE = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def _each(value: Any, function: Any) -> Any:
    """``function`` of a number, or of all numbers in lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(v, function) for v in value)
    return function(value) if type(value) is int else value


def _arguments(cls: type) -> dict[str, Any]:
    """What a config class takes -> the default."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(cls)
        if field.init
    }


def _token_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if _TOKEN.search(name):
            for number in value if isinstance(value, (list, tuple)) else (value,):
                if type(number) is int:
                    yield number


def parts(config: Any) -> Iterator[Any]:
    """A config and all configs within it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


#: model type -> arguments without which its config can't be made, or its model
_REQUIRED: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "chameleon": {"vocabulary_map": {}},
    "emu3": {"vocabulary_map": {}},
    "esm": {"vocab_size": 33},
}
#: model type -> numbers that belong together in a way that no rule above knows
_FIXED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "csm": {"codec_config.upsample_groups": 32},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n": {"text_config.num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 32},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 2]},
    "nemotron": {"num_key_value_heads": 8},
    "perceiver": {"d_latents": 160, "d_model": 96, "num_latents": 16, "num_self_attends_per_block": 2},
    "qwen2_5_omni": {"token2wav_config.bigvgan_config.upsample_initial_channel": 128},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}


def candidates(model_type: str, model_class: str) -> Iterator[tuple[Any, str]]:
    """(model or None, why not): tiny models of a class with random weights, from the smallest on."""
    large: list[Shrink] = []
    for most, shrinks in zip(_MOST_PARAMETERS, (SHRINKS, large), strict=True):
        for shrink in shrinks:
            try:
                model = _build(model_type, getattr(transformers, model_class), shrink, most)
            except _LargeError as error:
                large.append(shrink)
                yield None, str(error)
            except Exception as error:  # whatever a config leads to that fits nothing
                yield None, f"{shrink}: {type(error).__name__}: {str(error)[:300]}"
            else:
                yield model, ""


class _LargeError(Exception):
    pass


def _build(model_type: str, cls: Any, shrink: Shrink, most: int) -> Any:
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(tiny_config(model_type, shrink)).parameters())
    if count > most:
        raise _LargeError(f"{shrink}: {count:,} parameters")
    torch.manual_seed(0)
    model = cls._from_config(tiny_config(model_type, shrink), dtype=torch.bfloat16).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: Any) -> None:
    """Fill every parameter and every buffer that is saved with finite random numbers, near those that it has."""
    saved = model.state_dict()
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        if not tensor.is_floating_point() or not any(tensor.data_ptr() == s.data_ptr() for s in saved.values()):
            continue
        tensor.nan_to_num_(0.0, 1.0, -1.0).clamp_(-100, 100)
        tensor.add_(torch.randn(tensor.shape) * 0.02)
        if tensor.ndim >= 2:
            tensor.mul_(1 + torch.rand(tensor.shape[-2], 1))
