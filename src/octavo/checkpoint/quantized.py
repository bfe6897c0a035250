"""Whether a checkpoint is quantized already, by what it declares anywhere, and by its tensors.

    declared    quantization_config in config.json, at the top or for a part of the model; compression_config;
                quantization (MLX); hf_quant_config.json (ModelOpt)
    shown       matrices of FP8, or of packed integers, with scales beside them, whatever any config says

Only what is conclusive counts. Integers alone are no evidence, since models have tables of positions and masks; nor is
a parameter that is called a scale; nor FP8 without scales, which stands for the numbers that it holds. Files such as
quantize_config.json (GPTQ, AWQ) lie about in folders, and count together with tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..text import some
from .files import is_there, read_object
from .header import TensorInfo
from .packing import FP8

#: what declares it in a config, or in a part of one
KEYS = ("quantization_config", "compression_config")
#: says of a whole config, by any of these keys, that weights are quantized
_METHODS = ("quant_method", "quant_algo", "quant_type", "format", "bits", "w_bit", "qformat_weight")
_MODELOPT = "hf_quant_config.json"
_OTHERS = ("quantize_config.json", "quant_config.json", "quantization_config.json", "quanto_qmap.json", "params.json")
#: what weights are packed into. Of 64 bits, or true and false, are positions and masks
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2")
_NARROW = frozenset((*FP8, *_PACKED))
_SCALE = re.compile(r"scale|^absmax$|^SCB$", re.IGNORECASE)
#: what takes the place of a weight, in a module that has a scale beside it
_WEIGHT = re.compile(r"weight|^w_q$|^codes$|^_data$|^qdata$", re.IGNORECASE)


@dataclass(frozen=True)
class Quantization:
    """By what a checkpoint is quantized, and what tells."""

    method: str
    source: str  # "says its config.json"
    doubted: bool = False  # no tensor bears it out
    undecoded: str | None = None  # what keeps it from being decoded

    def __str__(self) -> str:
        return f"{self.method}, {self.source}"

    @property
    def why(self) -> str:
        """``, in a way that octavo can't decode (X.pre_quant_scale)``; nothing where no tensor is quantized."""
        if self.doubted:
            return ""
        more = "" if self.undecoded in (None, self.method) else f" ({self.undecoded})"
        return f", in a way that octavo can't decode{more}"

    @property
    def advice(self) -> str:
        doubt = " None of its tensors bears that out, though: if they are unquantized, remove what says otherwise."
        return f"Start from the bf16 checkpoint.{doubt if self.doubted else ''}"


def find_quantization(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Quantization | None:
    """What tells that a checkpoint is quantized; None if nothing does.

    Raises:
        CheckpointError: a file that would declare it can't be read.
    """
    narrow = _narrow(tensors)
    for where, value in declarations(folder, config):
        return Quantization(_method(value) or "unknown", f"says {where}", not narrow)
    if not narrow:
        return None
    shown = list(_shown(narrow, tensors))
    said = next(_said(folder), None)
    if shown:
        weight, scale = shown[0]
        more = f", and {len(shown) - 1:,} more like it" if shown[1:] else ""
        source = f"though its config.json does not say so: {weight.name} ({weight.dtype_name}) beside {scale}{more}"
        return Quantization(said or ("FP8" if weight.dtype_name in FP8 else "packed weights"), source)
    return Quantization(said, f"with {some([f'{i.name} ({i.dtype_name})' for i in narrow])}") if said else None


def declarations(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where it is declared that weights are quantized, and what is declared there.

    Raises:
        CheckpointError: a file that would declare it can't be read.
    """
    yield from _declared(config)
    modelopt = read_object(folder / _MODELOPT, unique=False) if is_there(folder / _MODELOPT) else {}
    if _method(modelopt.get("quantization")):
        yield f"its {_MODELOPT}", modelopt["quantization"]


def shown(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What tells by tensors alone that there are weights which can only be read with a scale."""
    found = next(_shown(_narrow(tensors), tensors), None)
    return None if found is None else f"{found[0].name} ({found[0].dtype_name}) beside {found[1]}"


def _narrow(tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    return [info for info in tensors.values() if info.dtype_name in _NARROW and len(info.shape) > 1]


def _declared(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in KEYS:
        value = config.get(key)
        if isinstance(value, dict) and (value or not path):
            where = f"{path}{'' if key == KEYS[0] else key}".rstrip(".")
            yield f"{where} in its config.json" if where else "its config.json", value
    if _method(config.get("quantization")):
        yield f"{path}quantization in its config.json", config["quantization"]
    for key, value in config.items():
        if isinstance(value, dict) and key not in (*KEYS, "quantization"):
            yield from _declared(value, f"{path}{key}.")


def undeclared(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what declares, anywhere in it, that weights are quantized."""
    found = {}
    for key, value in config.items():
        if key in KEYS or (key == "quantization" and _method(value)):
            continue
        found[key] = _undeclared(value)
    return found


def _undeclared(value: Any) -> Any:
    if isinstance(value, list):
        return [_undeclared(each) for each in value]
    return undeclared(value) if isinstance(value, dict) else value


def declaring_files(folder: Path) -> Iterator[str]:
    """Names of the files beside config.json that declare that weights are quantized."""
    if is_there(folder / _MODELOPT):
        yield _MODELOPT
    yield from (name for name, _ in _in_files(folder))


def _method(value: Any) -> str | None:
    """What a declaration calls its method; None if it declares nothing."""
    if not isinstance(value, dict):
        return None
    found = next((key for key in _METHODS if value.get(key)), None)
    return None if found is None else str(value[found]) if "bit" not in found else f"{value[found]} bits"


def _said(folder: Path) -> Iterator[str]:
    return (f"{method} ({name})" for name, method in _in_files(folder))


def _in_files(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of files that declare a method, and which."""
    for name in _OTHERS:
        if is_there(folder / name):
            content = read_object(folder / name, unique=False)
            method = _method(content.get("quantization") or content)
            if method or name == "quanto_qmap.json":
                yield name, method or "quanto"


def _shown(narrow: list[TensorInfo], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[TensorInfo, str]]:
    """Matrices that can only be read with the scale beside them, and that."""
    scales: dict[str, list[str]] = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if _SCALE.search(leaf):
            scales.setdefault(module, []).append(leaf)
    for info in narrow:
        module, _, leaf = info.name.rpartition(".")
        if _SCALE.search(leaf):
            continue
        if inner := scales.get(info.name):  # X.weight.absmax
            yield info, f"{info.name}.{inner[0]}"
            continue
        beside = [each for each in scales.get(module, ()) if each != leaf]
        named = [each for each in beside if _is_scale_of(each, leaf)]
        if named or (beside and (info.dtype_name in FP8 or _WEIGHT.search(leaf))):
            yield info, f"{module}.{(named or beside)[0]}".lstrip(".")


def _is_scale_of(scale: str, leaf: str) -> bool:
    """``weight_scale`` of ``weight``, ``gate_up_proj_scales`` of ``gate_up_proj_blocks``."""
    stem, _, last = leaf.rpartition("_")
    return scale.startswith(f"{leaf}_") or (
        bool(stem) and last in ("blocks", "packed", "q", "qdata") and scale.startswith(f"{stem}_")
    )
