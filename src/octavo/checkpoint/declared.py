"""What configs declare of quantized weights: in which ways, and of which modules by name.

    quant_method         where                                   says it by
    fp8                  quantization_config                     weight_block_size, scale_fmt
    fbgemm_fp8, mxfp4    quantization_config                     its name alone
    compressed-tensors   quantization_config, or the older       config_groups: num_bits, type, strategy, group_size,
                         compression_config                      block_structure, symmetric, targets
    modelopt             quantization_config, or quantization    quant_algo, quantized_layers
                         in hf_quant_config.json

Each may stand at the top of config.json, or in the config of a part of the model. What is not in this table, or says
that weights were changed otherwise (rotated, pruned into another layout, scaled by their inputs), can't be decoded.

Only what is declared of weights counts, and not what of activations and caches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..text import shown
from .packing import Groups, words
from .quantized import declarations

#: formats of compressed-tensors that leave numbers in their order
_FORMATS = (
    *("float-quantized", "int-quantized", "naive-quantized", "mxfp8-quantized", "mixed-precision"),
    *("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
#: of a pattern of names that is looked at, and of a name, in characters; and repeats in a pattern, but for digits
_MAX_PATTERN, _MAX_MODULE, _MAX_REPEATS = 500, 300, 3
#: what ModelOpt calls an algorithm -> kind of numbers, rows and columns of a group
_ALGORITHMS: dict[str, tuple[str, Groups]] = {
    "NVFP4": ("e2m1", (1, 16)),
    "W4A16_NVFP4": ("e2m1", (1, 16)),
    "NVFP4_AWQ": ("e2m1", (1, 16)),
    "W4A8_NVFP4_FP8": ("e2m1", (1, 32)),
    "MXFP4": ("e2m1", (1, 32)),
    "W4A8_MXFP4_FP8": ("e2m1", (1, 32)),
    "FP8": ("float8", (None, None)),
    "FP8_PER_CHANNEL_PER_TOKEN": ("float8", (1, None)),
    "FP8_PB_WO": ("float8", (128, 128)),
    "FP8_PB_REAL": ("float8", (128, 128)),
    "MXFP8": ("float8", (1, 32)),
    "W8A16": ("int8", (1, None)),
    "W8A8_SQ_PER_CHANNEL": ("int8", (1, None)),
}


@dataclass(frozen=True)
class Way:
    """One way in which weights are declared to be quantized."""

    kind: str  # of numbers
    groups: Groups
    symmetric: bool | None = True  # there are no zero points; None: it is not said
    weights: frozenset[str] = frozenset()  # those that are named
    patterns: tuple[str, ...] = ()  # regular expressions of names of modules
    of_classes: bool = False  # of modules, as Linear, whatever their names
    powers: bool = False  # of two are the scales, whatever their dtype
    divided: bool | None = None  # are scales by the scale of scales, if they have one; None: it is not said

    def matches(self, weight: str) -> bool:
        """Return True if the name of a weight's module matches a pattern. Those that could take long are not asked."""
        module = weight.removesuffix(".weight")
        return len(module) <= _MAX_MODULE and any(_matches(pattern, module) for pattern in self.patterns)

    def __str__(self) -> str:
        return words(self.kind, self.groups)


@dataclass(frozen=True)
class Declared:
    """All that is declared of a checkpoint; false if nothing is."""

    where: str = ""  # "its config.json"
    ways: tuple[Way, ...] = ()
    unknown: str | None = None  # what is declared, and can't be decoded
    of_caches: bool = False  # are scales, too
    ignored: tuple[str, ...] = ()  # modules that are not quantized, by name, or by a pattern after "re:"

    def __bool__(self) -> bool:
        return bool(self.where)

    def ignores(self, weight: str) -> bool:
        """Return True if a weight is said not to be quantized."""
        module = weight.removesuffix(".weight")
        if len(module) > _MAX_MODULE:
            return False
        return any(_matches(each[3:], module) if each.startswith("re:") else each == module for each in self.ignored)

    @property
    def weights(self) -> frozenset[str]:
        """Weights that are said to be quantized, by name."""
        return frozenset().union(*(way.weights for way in self.ways))


def _matches(pattern: str, name: str) -> bool:
    try:
        return _ends_soon(pattern) and re.match(pattern, name) is not None
    except (re.error, RecursionError, OverflowError):
        return False


@functools.lru_cache(maxsize=1024)
def _ends_soon(pattern: str) -> bool:
    """Return True if a pattern can't take long on a short name: it repeats no group, and little else.

    Whatever a config holds, Python would try it, for as long as the universe exists.
    """
    plain = re.sub(r"\\.|\[[^\]]*\]", lambda found: "\0" if found[0] == r"\d" else "x", pattern.replace("\0", "x"))
    plain = re.sub("\0[*+](?!\0)", "", plain)  # digits end where something else begins
    groups = re.search(r"\)[*+{]", plain) or re.search(r"\(\?(?!:)", plain)
    return not groups and len(re.findall(r"[*+{]", plain)) <= _MAX_REPEATS


class _Unknown(Exception):
    """What is declared can't be decoded."""


class Contradiction(str):
    """What a config and headers say otherwise of quantized weights, in words."""

    tensor: str | None  # that it is about; None: all of a config

    def __new__(cls, text: str, tensor: str | None = None) -> Contradiction:
        found = super().__new__(cls, text)
        found.tensor = tensor
        return found


def read_declared(folder: Path, config: Mapping[str, Any], problems: list[Contradiction]) -> Declared:
    """What is declared of a checkpoint; problems, where it can't be understood, are appended."""
    places: list[str] = []
    ways: list[Way] = []
    of_caches, ignored = False, list[str]()
    for where, value in declarations(folder, config):
        if not value:  # which declares nothing
            continue
        places.append(where)
        of_caches |= bool(value.get("kv_cache_scheme") or value.get("kv_cache_quant_algo"))
        for key in ("ignore", "modules_to_not_convert", "exclude_modules"):
            listed = value.get(key)
            names = listed if isinstance(listed, list) else []
            ignored += (name for name in names if isinstance(name, str) and len(name) < _MAX_PATTERN)
        try:
            ways += _ways(value)
        except _Unknown as unknown:
            return Declared(where, (), str(unknown))
        except ValueError as error:
            problems.append(Contradiction(f"{where} says of its quantization: {error}"))
    unique = tuple(dict.fromkeys(ways))
    return Declared(" and ".join(places), unique, of_caches=of_caches, ignored=tuple(dict.fromkeys(ignored)))


def _ways(value: Mapping[str, Any]) -> Iterator[Way]:
    """The ways that one declaration names."""
    method = str(value.get("quant_method") or "").lower()
    if not method:  # by the keys that each has
        method = "modelopt" if value.get("quant_algo") else "compressed-tensors" if value.get("config_groups") else ""
    reader = _METHODS.get("modelopt" if method.startswith("modelopt") else method)
    if reader is None:
        raise _Unknown(method or "unknown")
    return reader(value)


def _fine_grained(value: Mapping[str, Any]) -> Iterator[Way]:
    size = value.get("weight_block_size")
    groups = (None, None) if size is None else _block(size, "weight_block_size")
    yield Way("float8", groups, powers=value.get("scale_fmt") == "ue8m0")
    yield Way("e2m1", (1, 32))  # experts, of whose numbers the config of the model speaks


def _gpt_oss(value: Mapping[str, Any]) -> Iterator[Way]:
    yield Way("e2m1", (1, 32))


def _by_row(value: Mapping[str, Any]) -> Iterator[Way]:
    yield Way("float8", (1, None))
    yield Way("float8", (None, 1))  # stacks of experts, whose matrices are [in, out]


# -- compressed-tensors -----------------------------------------------------------------------------------------------


def _compressed_tensors(value: Mapping[str, Any]) -> Iterator[Way]:
    for key in ("transform_config", "sparsity_config"):
        more = value.get(key)
        if isinstance(more, dict) and (more.get("config_groups") or more.get("format") not in (None, "dense")):
            raise _Unknown(f"compressed-tensors with {key}")
    groups = value.get("config_groups")
    if not isinstance(groups, dict):
        raise ValueError(f"config_groups is {shown(groups)}")
    for group in groups.values():
        if not isinstance(group, dict):
            raise ValueError(f"a group of config_groups is {shown(group)}")
        weights = group.get("weights")
        if weights is None:  # of activations alone
            continue
        if not isinstance(weights, dict):
            raise ValueError(f"weights of a group are {shown(weights)}")
        layout = group.get("format") or value.get("format") or "naive-quantized"
        if not isinstance(layout, str):
            raise ValueError(f"format is {shown(layout)}")
        if layout not in _FORMATS:
            raise _Unknown(f"compressed-tensors, {layout}")
        yield _group(weights, group.get("targets"), layout == "pack-quantized")


def _group(weights: Mapping[str, Any], targets: Any, packed: bool) -> Way:
    bits, type_ = weights.get("num_bits", 8), weights.get("type", "int")
    if type(bits) is not int or not isinstance(type_, str):
        raise ValueError(f"num_bits is {shown(bits)}, and type {shown(type_)}")
    kinds = {(8, "float"): "float8", (4, "float"): "e2m1"}
    if packed:
        kinds |= {(4, "int"): "int4_in_int32", (8, "int"): "int8_in_int32"}
    else:  # where integers of fewer bits take a byte each, too
        kinds |= {(each, "int"): "int8" for each in range(1, 9)}
    kind = kinds.get((bits, type_.lower()))
    if kind is None:
        raise _Unknown(f"compressed-tensors with {shown(type_)} of {shown(bits)} bits")
    if (order := weights.get("actorder")) and (order is True or str(order).lower() in ("group", "dynamic")):
        raise _Unknown(f"compressed-tensors with columns in another order (actorder is {shown(order)})")
    names = [name for name in targets if isinstance(name, str)] if isinstance(targets, list) else []
    return Way(
        kind,
        _strategy(weights),
        weights.get("symmetric") is not False,
        frozenset(f"{name}.weight" for name in names if not name.startswith("re:")),
        tuple(name[3:] for name in names if name.startswith("re:") and len(name) < _MAX_PATTERN),
        of_classes=any("." not in name and not name.startswith("re:") for name in names),
        divided=True,
    )


def _strategy(weights: Mapping[str, Any]) -> Groups:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    strategy = strategy.lower() if isinstance(strategy, str) else strategy
    if strategy is None:  # as the library does without it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return None, None
    if strategy == "channel":
        return 1, None
    if strategy in ("group", "tensor_group"):
        return 1, _positive(size, "group_size")
    if strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str):  # as older versions write it
            block = [int(side) if side.isdecimal() and len(side) < 9 else side for side in re.split("[xX, ]+", block)]
        return _block(block, "block_structure")
    raise ValueError(f"strategy is {shown(strategy)}")


# -- ModelOpt ---------------------------------------------------------------------------------------------------------


def _modelopt(value: Mapping[str, Any]) -> Iterator[Way]:
    layers = value.get("quantized_layers")
    if not isinstance(layers, dict):
        mixed = str(value.get("quant_algo")).upper() == "MIXED_PRECISION" and value.get("config_groups")
        ways = _compressed_tensors(value) if mixed else iter([_algorithm(value, frozenset())])
        yield from (replace(way, divided=False) for way in ways)
        return
    alike: dict[tuple[str, str], tuple[Mapping[str, Any], list[str]]] = {}
    for name, layer in layers.items():
        if not isinstance(layer, dict):
            raise ValueError(f"quantized_layers says of {shown(name)}: {shown(layer)}")
        key = shown(layer.get("quant_algo")), shown(layer.get("group_size"))
        alike.setdefault(key, (layer, []))[1].append(f"{name}.weight")
    for layer, weights in alike.values():
        yield _algorithm(layer, frozenset(weights))


def _algorithm(value: Mapping[str, Any], weights: frozenset[str]) -> Way:
    name = str(value.get("quant_algo")).upper()
    if name not in _ALGORITHMS:
        raise _Unknown(f"modelopt {shown(value.get('quant_algo'))}")
    kind, groups = _ALGORITHMS[name]
    if groups[0] == 1 and groups[1] and value.get("group_size") is not None:
        groups = 1, _positive(value["group_size"], "group_size")
    return Way(kind, groups, weights=weights, divided=False)


_METHODS: dict[str, Callable[[Mapping[str, Any]], Iterator[Way]]] = {
    "fp8": _fine_grained,
    "fbgemm_fp8": _by_row,
    "mxfp4": _gpt_oss,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
}


# -- values -----------------------------------------------------------------------------------------------------------


def _block(value: Any, what: str) -> Groups:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{what} is {shown(value)}, and not two sizes")
    return _positive(value[0], what), _positive(value[1], what)


def _positive(value: Any, what: str) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{what} is {shown(value)}, and no size")
    return value
