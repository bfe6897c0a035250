"""Formats: the names and layouts that consumers expect of FP8 weights and scales. Nothing else knows their terms.

    format              scheme                                scale beside X.weight
    compressed-tensors  fp8_channel, fp8_block, fp8_tensor    X.weight_scale, float32
    compressed-tensors  mxfp8                                 X.weight_scale, uint8 (the e8m0 bits)
    compressed-tensors  int8_channel                          X.weight_scale, bf16 (float32 if it passes through as
                                                              that); the weight is X.weight_packed
    compressed-tensors  nvfp4                                 X.weight_scale, e4m3; X.weight_global_scale, float32
    compressed-tensors-w8a8  int8_channel                     X.weight_scale, float32
    fp8                 fp8_block                             X.weight_scale_inv, float32

``weight_scale_inv`` is no inverse: both are octavo's scale, ``w ≈ q.float() * scale``.

What stock readers can't take is not written: such weights stay as they are, and the plan says why. Among them are
stacks of experts in one 3-D tensor: every reader tried (transformers 5.17 to 5.23, compressed-tensors 0.19 and 0.20)
takes the FP8 numbers of a stack for the weights themselves, without a word. Experts in tensors of their own are fine,
so stacks are cut into these where a reader takes them (`octavo.conversion.unstacking`).

Sources: compressed-tensors' ``QuantizationConfig`` (https://github.com/vllm-project/compressed-tensors) and
transformers' ``FineGrainedFP8Config``.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .. import choices
from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.codings import Coding
from ..checkpoint.header import TensorInfo
from ..errors import CheckpointError, RecipeError
from ..numerics import schemes
from ..numerics.nvfp4 import E4M3, Packed
from ..numerics.schemes import E8M0, Scheme
from ..planning.coded import settled
from ..planning.kinds import EXPERTS, module_of
from ..planning.placement import Placement
from ..planning.plan import Plan, Veto, plan_checkpoint
from ..planning.recipe import Recipe
from ..planning.stacks import NAMINGS, Cut, Experts, find_experts
from . import packing
from .arguments import CT_FORMATS, FP8_CONFIG, arguments
from .ignoring import ignore_patterns

NAMES = tuple(choices.FORMATS)
#: how a stack of gate and up is called -> the number of a naming; vLLM 0.32 was asked
_KNOWN = {".experts.gate_up_proj": 0, "moe.input_linear": 0, ".experts.fc1": 1}
#: schemes of such numbers
_INT8 = frozenset(name for name in choices.SCHEMES if schemes.get(name).dtype == torch.int8)
#: why a stack of experts is kept, unless it is cut into matrices
STACK = "expert stack: stock readers take no quantized 3-D tensors"


@dataclass(frozen=True, slots=True)
class Format:
    """One consumer's conventions."""

    name: str
    scale_suffix: str  # appended to the weight's name
    schemes: tuple[str, ...]

    def veto(self, name: str, shape: tuple[int, ...], kind: str, scheme: str) -> str | None:
        """Why stock readers of this format could not take a weight quantized so; None if they can."""
        if kind == EXPERTS:
            return STACK
        if why := self.unpackable(name, shape, kind, scheme):
            return why
        rows, cols = shape[-2:]
        if scheme == "mxfp8" and cols % 32:
            return f"{cols} columns: readers of mxfp8 want a multiple of 32"
        if self.name == "fp8" and any(side > 128 and side % 128 for side in (rows, cols)):
            return f"{rows}x{cols}: readers of the fp8 format want sides of at most 128, or multiples of 128"
        return None

    def unpackable(self, name: str, shape: tuple[int, ...], kind: str, scheme: str) -> str | None:
        """Why several numbers of a weight could not be one in this format; None if they can, or need not be."""
        if not self.packs(scheme) or not shape[-1] % packing.EACH:
            return None
        return f"{shape[-1]} columns: readers of packed int8 want a multiple of {packing.EACH}"

    def scale_name(self, name: str) -> str:
        """The name of a weight's scale."""
        return name + self.scale_suffix

    def packs(self, scheme: str | None) -> bool:
        """Return True if weights of a scheme are written as `packing` says."""
        return self.name == choices.DEFAULT_FORMAT and scheme in _INT8

    def numbers_each(self, scheme: str | None) -> int:
        """How many numbers of a weight are one of the tensor that it is written as."""
        if self.packs(scheme):
            return packing.EACH
        return 2 if has_groups(scheme) else 1

    def weight_name(self, placement: Placement) -> str:
        """The name under which a weight is written."""
        packed = self.packs(placement.scheme) or has_groups(placement.scheme)
        return placement.name + packing.PACKED if packed else placement.name

    def weight_type(self, placement: Placement) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype, shape) of a quantized weight on disk."""
        *lead, cols = placement.shape
        if self.packs(placement.scheme):
            return "I32", (*lead, cols // packing.EACH)
        if has_groups(placement.scheme):
            return placement.dtype_name, Packed.boxes(placement.shape)[0]
        return placement.dtype_name, placement.shape

    def to_bytes(self, scheme: str | None, values: Tensor) -> Tensor:
        """The bytes of a weight's values, or of some of them, as they are written; may be made of these in place."""
        return packing.flip(values) if self.packs(scheme) else values

    def stored_weight(self, scheme: str | None, weight: Tensor) -> Tensor:
        """A whole weight as it is written; may be made of it in place."""
        return packing.flip(weight).view(torch.int32) if self.packs(scheme) else weight

    def beside(self, placement: Placement) -> dict[str, Tensor]:
        """What is written beside a weight and its scale."""
        if not self.packs(placement.scheme):
            return {}
        return {placement.name + packing.SHAPE: packing.shape_tensor(placement.shape)}

    def scales(self, placement: Placement) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Name of each tensor of scales -> what it is in a `ShardLayout`, its safetensors dtype, its shape."""
        name = self.scale_name(placement.name)
        if not has_groups(placement.scheme):
            return {name: ("scale", *self.scale_type(placement))}
        return {
            name: ("group", "F8_E4M3", Packed.boxes(placement.shape)[1]),
            placement.name + packing.GLOBAL: ("scale", *self.scale_type(placement)),
        }

    def tensors(self, placement: Placement) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name of each tensor that a quantized weight becomes -> its safetensors dtype, its shape; the weight first."""
        found = {self.weight_name(placement): self.weight_type(placement)}
        found.update({name: (dtype_name, shape) for name, (_, dtype_name, shape) in self.scales(placement).items()})
        beside = self.beside(placement).items()
        return {**found, **{name: (dtypes.NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in beside}}

    def suffixes(self, scheme: str) -> tuple[str, ...]:
        """What comes after the name of a weight in those of the tensors that it becomes, but for the weight's own."""
        if has_groups(scheme):
            return self.scale_suffix, packing.PACKED, packing.GLOBAL
        return (self.scale_suffix, packing.PACKED, packing.SHAPE) if self.packs(scheme) else (self.scale_suffix,)

    def handed_out(self, placement: Placement, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """All tensors that a weight becomes, made of its numbers in place."""
        if not has_groups(placement.scheme):
            return {
                self.weight_name(placement): self.stored_weight(placement.scheme, weight),
                self.scale_name(placement.name): self.stored_scale(placement, scale),
                **self.beside(placement),
            }
        codes, scales = Packed.of(weight)
        return {
            self.weight_name(placement): codes.contiguous(),
            self.scale_name(placement.name): scales.contiguous(),
            placement.name + packing.GLOBAL: self.stored_scale(placement, scale),
        }

    def scale_type(self, placement: Placement) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype, shape) of a placement's scale on disk."""
        assert placement.scheme is not None
        shape = placement.scale_shape or (1,)
        return dtypes.NAMES[self._scale_dtype(placement)], shape

    def scale_bytes(self, placement: Placement) -> int:
        dtype_name, shape = self.scale_type(placement)
        return math.prod(shape) * dtypes.BITS[dtype_name] // 8

    def stored_scale(self, placement: Placement, scale: Tensor) -> Tensor:
        """octavo's scale -> this format's, as written to disk or handed out."""
        if scale.dtype == E8M0:
            return scale.view(torch.uint8)
        if self.packs(placement.scheme):
            scale = scale.to(self._scale_dtype(placement))  # exact
        if has_groups(placement.scheme):
            scale = 1 / scale  # exact
        return scale.reshape(1) if scale.ndim == 0 else scale

    def _scale_dtype(self, placement: Placement) -> torch.dtype:
        """The dtype of `stored_scale`."""
        assert placement.scheme is not None
        passed = placement.codings if self.packs(placement.scheme) and placement.passed else ()
        return self.stored_dtype(schemes.get(placement.scheme), (coding for _, coding in passed))

    def stored_dtype(self, scheme: Scheme, passed: Iterable[Coding] = ()) -> torch.dtype:
        """The dtype of scales that octavo computes, or of those of sources that pass through."""
        if self.packs(scheme.name):  # readers make it that of their activations, mostly bf16
            exact = all(coding.scale.dtype == torch.bfloat16 for coding in passed)
            return torch.bfloat16 if exact else torch.float32
        return torch.uint8 if scheme.power_of_two else scheme.scale_dtype

    def scheme_of(self, shape: tuple[int, ...], dtype: torch.dtype | None, stored: Tensor) -> Scheme:
        """The scheme that a weight of this shape and dtype with this scale was quantized by."""
        known = [schemes.get(name) for name in self.schemes]
        # of a dtype that none has, whatever the scale is for
        for scheme in [scheme for scheme in known if scheme.dtype == dtype] or known:
            if scheme.packed:
                if stored.dtype == E4M3 and tuple(stored.shape) == Packed.boxes(shape)[1]:
                    return scheme
                continue
            wanted = scheme.scale_shape(shape) or (1,)
            if tuple(stored.shape) == wanted and (stored.dtype == torch.uint8) == scheme.power_of_two:
                return scheme
        raise CheckpointError(
            f"a scale {list(stored.shape)} ({dtypes.short(stored.dtype)}) beside a weight {list(shape)} is of no "
            f"scheme that octavo writes as {self.name}"
        )

    def config(
        self,
        plan: Plan,
        unquantized: Iterable[str] = (),
        modules: Mapping[str, str] = MappingProxyType({}),
        ragged: bool = False,
    ) -> dict[str, Any]:
        """config.json's ``quantization_config``.

        Args:
            unquantized: more modules in which no reader may look for a scale, by the names that readers give them.
            modules: quantized tensor -> the module that a reader loads it into, where it has another name.
            ragged: whether the reader sees for itself where activations can't be cut into groups.
        """
        # every module without a scale is named, and the head even when it is tied and in no file: some readers would
        # otherwise wait for a scale there, and go on with uninitialised memory
        kept = sorted({module_of(p.name) for p in plan.kept if p.name.endswith(".weight")})
        ignore = ["lm_head", *sorted({*kept, *unquantized} - {"lm_head"})]
        if self.name == "fp8":
            return {**FP8_CONFIG, "modules_to_not_convert": ignore}
        groups = {
            f"group_{number}": {
                "targets": targets,
                **arguments(scheme, () if ragged else placements, self.packs(scheme)),
            }
            for number, (scheme, targets, placements) in enumerate(_groups(plan, modules))
        }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "ignore": ignore_patterns(
                [p for p in plan.kept if p.name.endswith(".weight")], plan.quantized, unquantized
            ),
            "config_groups": groups,
        }

    def notes(self, plan: Plan, asked: bool = False) -> list[str]:
        """Remarks about who can read the result; fewer of them if transformers has been asked."""
        if not plan.quantized:
            return ["nothing was quantized: the result is an unquantized checkpoint, and says nothing of quantization"]
        if self.name == "fp8":
            return []
        notes = []
        if len({p.scheme for p in plan.quantized}) > 1:
            notes.append(
                "transformers (up to 5.23) reads a checkpoint of several schemes right only without dequantize=True, "
                "which takes the first scheme for all weights."
            )
        # of experts, it unpacks integers, and multiplies FP8 with the scale of a row or of all
        experts = {schemes.get(p.scheme) for p in plan.quantized if p.scheme and _EXPERT.search(p.name)}
        unread = sorted(s.name for s in experts if not self.packs(s.name) and (s.dtype != schemes.FP8 or s.group_cols))
        if unread and not asked:
            notes.append(
                f"transformers (up to 5.23) can't read {' and '.join(unread)} experts in {self.name} checkpoints. For "
                "it, use fp8_channel, or fp8_block in the fp8 format. --reader vllm says whether vLLM can."
            )
        return notes


@functools.cache
def has_groups(scheme: str | None) -> bool:
    """Return True if a scheme's weights have scales among their numbers, and one over all."""
    return scheme is not None and schemes.get(scheme).packed


_EXPERT = re.compile(r"\.experts\.\d+\.")


def _groups(plan: Plan, modules: Mapping[str, str]) -> list[tuple[str, list[str], list[Placement]]]:
    """(scheme, targets, placements): classes where that is enough, names where schemes are mixed."""
    by_scheme: dict[str, list[Placement]] = {}
    for placement in plan.quantized:
        assert placement.scheme is not None
        by_scheme.setdefault(placement.scheme, []).append(placement)
    if len(by_scheme) == 1:
        return [(scheme, ["Linear"], placements) for scheme, placements in by_scheme.items()]
    groups = []
    for scheme, placements in by_scheme.items():
        kinds = {bool(_EXPERT.search(p.name)) for p in placements}
        others = {bool(_EXPERT.search(p.name)) for s, ps in by_scheme.items() if s != scheme for p in ps}
        if kinds & others:
            targets = [module_of(p.name) for p in placements]
            targets += sorted({modules[p.name] for p in placements if p.name in modules} - {*targets})
        else:
            targets = [r"re:.*\.experts\.\d+\..*"] if kinds == {True} else ["Linear"]
        groups.append((scheme, targets, placements))
    return groups


_FORMATS = {name: Format(name, terms.scale_suffix, terms.schemes) for name, terms in choices.FORMATS.items()}


def whole_config(scheme: str, name: str = choices.DEFAULT_FORMAT) -> dict[str, Any]:
    """The config of a checkpoint of which no more is known: all is in one scheme but the head."""
    if name == "fp8":
        return {**FP8_CONFIG, "modules_to_not_convert": ["lm_head"]}
    group = {"targets": ["Linear"], **arguments(scheme, (), get(name).packs(scheme))}
    return {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def get(name: str) -> Format:
    """The format called ``name``; a `RecipeError` that lists them otherwise."""
    if name not in NAMES:  # what is no text is not in a tuple either
        raise RecipeError(f"unknown format {name!r}; known: {', '.join(NAMES)}")
    return _FORMATS[name]


def plan_for(
    checkpoint: Checkpoint,
    recipe: Recipe,
    name: str,
    staging_bytes: int,
    device: str = "cpu",
    veto: Veto | None = None,
    cuts: Iterable[Cut] | None = None,
) -> tuple[Plan, Format]:
    """The plan of a conversion to the format called ``name``, within what its readers can take.

    Args:
        veto: says what they can't take, if more is known of them than the format knows.
        cuts: stacks of experts that become matrices; None: as far as is known without asking readers.

    Raises:
        RecipeError: the format can't express a scheme of the recipe, or no such format exists.
    """
    found = get(name)
    for scheme in settled(recipe, checkpoint.tensors.values())[0].schemes:
        if scheme not in found.schemes:
            raise RecipeError(
                f"the format {found.name!r} has no {scheme}, only {', '.join(found.schemes)}; choose another scheme, "
                f"or the format {choices.DEFAULT_FORMAT!r}"
            )
    if cuts is None:
        known = ((experts, known_naming(experts)) for experts in find_experts(checkpoint))
        cuts = (experts.cut(NAMINGS[naming]) for experts, naming in known if naming is not None)
    return plan_checkpoint(checkpoint, recipe, staging_bytes, device, veto or found.veto, cuts), found


def known_naming(experts: Experts) -> int | None:
    """By which of `NAMINGS` vLLM is known to take the matrices, where no reader can be asked; None: by none."""
    module = module_of(experts.stacks["gate_up"].name) if "gate_up" in experts.stacks else ""
    return next((naming for end, naming in _KNOWN.items() if module.endswith(end)), None)


def scheme_by_scale(shape: Sequence[int], scale: TensorInfo, dtype: torch.dtype | None = None) -> Scheme | None:
    """The scheme of a weight of this shape, by its scale; of several that have such scales, that of the dtype."""
    known = [schemes.get(name) for name in choices.SCHEMES]
    for scheme in sorted(known, key=lambda scheme: scheme.dtype != dtype):
        if scheme.packed:
            if dtype == scheme.dtype and scale.dtype == E4M3 and scale.shape == Packed.boxes(shape)[1]:
                return scheme
            continue
        bits = scale.dtype_name in ("U8", "F8_E8M0")
        wanted = scheme.scale_shape(shape)
        if scale.shape in (wanted, wanted or (1,)) and bits == scheme.power_of_two:
            return scheme
    return None


def recognize(checkpoint: Checkpoint) -> Format:
    """The format of a converted checkpoint: by its config, or by the names of its scales if it has none."""
    config: Mapping[str, Any] | None = checkpoint.config.get("quantization_config")
    if config is None:
        named = [each for each in _FORMATS.values() if any(n.endswith(each.scale_suffix) for n in checkpoint.tensors)]
        return named[0] if named else _FORMATS[choices.DEFAULT_FORMAT]
    method = config.get("quant_method")
    if method == choices.DEFAULT_FORMAT and config.get("format") == CT_FORMATS["int8_channel"]:
        return _FORMATS["compressed-tensors-w8a8"]
    if method not in _FORMATS:
        raise CheckpointError(f"{checkpoint.path}: quantized by {method!r}, which octavo does not write")
    return _FORMATS[str(method)]
