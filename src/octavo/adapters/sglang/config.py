"""Which layers of a model of SGLang stay unquantized.

SGLang looks names up in a list that the config holds, by parts of names and by what it thinks is fused. Here the plan
decides: a layer stays if the tensors that it is known to be made of stay. Where that is not known, or wrong, dry runs
show it; then the model is made anew, and the layers are known by when they were made.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from torch import nn

from ...errors import RecipeError
from ...numerics import schemes
from ...numerics.schemes import FP8
from ...planning.kinds import module_of
from ...planning.plan import Plan
from ..engine.fitting import Fitting
from ..engine.layers import LayerPatterns


class Layers:
    """Those of one model that is being made.

    Args:
        scheme: of all others.
        plan: by which more stay; None where all are in ``kept``.
        kept: layers that stay unquantized, by `name` -> why.
    """

    def __init__(self, scheme: str, plan: Plan | None, patterns: LayerPatterns, kept: Mapping[str, str]) -> None:
        self._scheme, self._plan, self._patterns = scheme, plan, patterns
        self._kept = dict(kept)
        self.planned: dict[str, str] = {}  # those that stay because of the plan -> why
        self._made: Counter[str] = Counter()
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # those that don't fit FP8 -> why
        # a scale a row of weights goes with one for all activations of a token
        group = schemes.get(scheme).group_cols or 1
        self.fitting = Fitting(_can_be_plain, _unquantized, functools.partial(_check_activations, group))

    def name(self, layer: nn.Module, prefix: str) -> str:
        """What SGLang calls a layer, with a number where it calls others so, too."""
        self._made[prefix] += 1
        number = self._made[prefix]
        self._names[layer] = prefix if number == 1 else f"{prefix} ({number})"
        return self._names[layer]

    def stays(self, layer: nn.Module, prefix: str, packed: Mapping[str, list[str]]) -> bool:
        """Return True if a layer is to be made unquantized."""
        name = self.name(layer, prefix)
        if pattern := self._patterns.matching(prefix):
            self._kept.setdefault(name, f"ignored by {pattern!r}")
        if name in self._kept:
            return True
        if self._plan is None:
            return False
        base, dot, last = prefix.rpartition(".")
        parts = [f"{base}{dot}{part}" for part in packed.get(last, [last])]
        kept, quantized = self._modules
        if not all(part in kept for part in parts) or not quantized.isdisjoint(parts):
            return False
        self.planned[name] = "all of its tensors stay"
        return True

    @functools.cached_property
    def _modules(self) -> tuple[set[str], set[str]]:
        """Modules of tensors that stay, and of those that become FP8; with all that experts are in."""
        found: tuple[set[str], set[str]] = (set(), set())
        for placement in self._plan.placements if self._plan else ():
            names = found[placement.scheme is not None]
            if placement.name.endswith(".weight"):
                names.add(module_of(placement.name))
            if ".experts." in placement.name:
                names.add(placement.name.partition(".experts.")[0] + ".experts")
        return found

    def paths(self, model: nn.Module) -> dict[str, str]:
        """The place of each layer in the model -> its name."""
        return {path: self._names[module] for path, module in model.named_modules() if module in self._names}

    def unquantized(self, model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
        """The places of layers that were made unquantized -> why: as was asked; since SGLang can't make them in FP8."""
        kept = {path: self._kept[name] for path, name in self.paths(model).items() if name in self._kept}
        found = {path: self.refused[module] for path, module in model.named_modules() if module in self.refused}
        return kept, {
            path: f"SGLang can't make this layer in {self._scheme}: {why.rstrip('.')}" for path, why in found.items()
        }


class _Deciding:
    """Mixed into a config of SGLang's."""

    _ignored: ClassVar[str]  # where SGLang keeps its list of layers
    layers: Layers
    packed_modules_mapping: dict[str, list[str]]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not _can_be_plain(layer):
            return super().get_quant_method(layer, prefix)  # type: ignore[misc]
        if self.layers.stays(layer, prefix, self.packed_modules_mapping):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None  # then SGLang makes its own
        return self.layers.fitting.fitted([functools.partial(self._in_fp8, layer, prefix)], layer, self.layers.refused)

    def _in_fp8(self, layer: nn.Module, prefix: str) -> Any:
        ignored = getattr(self, self._ignored)
        setattr(self, self._ignored, [])
        try:
            return super().get_quant_method(layer, prefix)  # type: ignore[misc]
        finally:
            setattr(self, self._ignored, ignored)


class OctavoCompressedTensorsConfig(_Deciding, CompressedTensorsConfig):  # type: ignore[misc]
    """For the format compressed-tensors."""

    _ignored = "ignore"


class OctavoFp8Config(_Deciding, Fp8Config):  # type: ignore[misc]
    """For the format fp8."""

    _ignored = "ignored_layers"


def deciding(config: Any, layers: Layers) -> Any:
    """SGLang's config of the FP8 checkpoint, which decides about layers by what octavo knows of them."""
    for kind in (OctavoCompressedTensorsConfig, OctavoFp8Config):
        if type(config) is kind.__mro__[2]:
            made = kind.__new__(kind)
            made.__dict__.update(config.__dict__, layers=layers)
            return made
    raise RecipeError(f"SGLang takes octavo's config for one of {type(config).__name__}: leave --quantization out")


def _can_be_plain(layer: nn.Module) -> bool:
    return isinstance(layer, (LinearBase, FusedMoE))


def _unquantized(layer: Any) -> Any:
    """SGLang's method for a layer without quantization, in the place of another."""
    if isinstance(layer, LinearBase):
        method = UnquantizedLinearMethod()
        create = method.create_weights

        def create_weights(*args: Any, **kwargs: Any) -> Any:
            del method.create_weights
            # for that other method, the layer has a loader that needs more of parameters
            return create(*args, **{**kwargs, "weight_loader": layer.weight_loader})

        method.create_weights = create_weights
        return method
    return UnquantizedFusedMoEMethod(layer.use_triton_kernels, layer.use_flashinfer_trtllm_moe, layer.use_deep_gemm)


def _check_activations(group: int, layer: nn.Module) -> None:
    """Raise what SGLang's kernels raise with the first request: they cut a row of activations into groups."""
    for weight in layer.parameters(recurse=False):
        if weight.dtype == FP8 and weight.shape[-1] % group:
            raise ValueError(f"groups of {group} activations don't divide {weight.shape[-1]} columns")
