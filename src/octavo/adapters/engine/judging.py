"""What an engine's loader would make of a checkpoint in FP8 as it is, seen in dry runs. Imports no engine.

A survey (see `survey`) finds out what could become FP8; here that is decided, and the question is whether the engine
reads it as it was meant: every FP8 weight with its scale into a layer that holds both, every other one into a layer
that waits for none. Where its loader raises, it is asked again without the tensor that it does not take in FP8, so
that one answer names all that stands in the way.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...checkpoint import dtypes
from ...checkpoint.header import TensorInfo
from ...conversion.formats import scheme_by_scale
from ...conversion.packing import PACKED
from ...elements.dry_run import Copy, Source, Trace
from ...numerics.schemes import NUMBERS
from .coverage import uncovered
from .culprits import Loader, trace_to_culprit
from .cuts import Grid, unequal, unpacked
from .survey import layer_of, pattern_of, text_of

_SCALES = ("_scale", "_scale_inv")


@dataclass
class Verdict:
    """What would become of a checkpoint in one model."""

    misread: dict[str, str] = field(default_factory=dict)  # quantized tensor -> why it can't be one
    refused: dict[str, str] = field(default_factory=dict)  # quantized tensor whose layer can't be built -> why
    waiting: dict[str, str] = field(default_factory=dict)  # module that wants a scale which does not come -> why
    empty: tuple[str, ...] = ()  # of these: modules to which nothing goes
    missing: tuple[str, ...] = ()  # other parameters to which nothing goes
    unread: tuple[str, ...] = ()  # quantized tensors that the loader passes over
    refusal: str = ""  # what it says of a tensor that it does not take in bf16 either, so that nothing is known
    homeless: tuple[str, ...] = ()  # such tensors


@dataclass(frozen=True)
class Case:
    """A checkpoint before a model.

    Args:
        load: the model's own ``load_weights``.
        tensors: in the order of the files.
        scales: quantized tensor -> its scale.
        plain: modules that have sides or neighbours with which they can't be built in FP8 -> why.
        unbuilt: modules of kinds that can't be built in FP8 here at all -> why.
        exempt: parameters that no checkpoint needs to hold.
    """

    model: nn.Module
    load: Loader
    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, str]
    plain: Mapping[str, str] = field(default_factory=dict)
    unbuilt: Mapping[str, str] = field(default_factory=dict)
    exempt: Collection[str] = ()

    def judge(self) -> Verdict:
        """Run the loader until it passes.

        Raises:
            CoverageError: a loader that puts the tensors themselves into the model.
        """
        verdict = Verdict()
        lacking: dict[str, str] = {}  # patterns of tensors for which layers in FP8 have no place -> what was said
        seen = self._trace(self.scales.keys(), ())
        if seen.failed is not None:  # loaders that read all before they load call what they can't take by other names
            verdict.misread.update(self._elsewhere())
            seen = self._trace(self.scales.keys() - verdict.misread.keys(), ())
        while seen.failed is not None:
            name = self._origin(seen.failed[0])
            pattern, said = pattern_of(name), text_of(seen.failed)
            alike = [n for n in self.scales.keys() - verdict.misread.keys() if pattern_of(n) == pattern]
            if alike:
                verdict.misread.update(dict.fromkeys(alike, f"its loader does not take it with a scale ({said})"))
            elif pattern in lacking:
                return self._refusal(pattern, said)
            else:
                lacking[pattern] = said
            seen = self._trace(self.scales.keys() - verdict.misread.keys(), lacking)
        self._look(seen, verdict)
        for pattern, said in lacking.items():
            beside = self._beside(seen, pattern)
            if not beside:
                return self._refusal(pattern, said)
            verdict.waiting.update(dict.fromkeys(beside, f"in FP8 it has no place for {pattern.rpartition('.')[2]}"))
        self._spread(seen, verdict)
        return verdict

    def _elsewhere(self) -> dict[str, str]:
        """Quantized tensors that go into unquantized modules: seen where all come unquantized, if that passes."""
        plain = self._trace((), ())
        found = plain.by_source if plain.failed is None else {}
        odd = {name: self._unquantized(found.get(name, [])) for name in self.scales}
        return {name: f"it keeps this layer unquantized ({kind})" for name, kind in odd.items() if kind}

    def _refusal(self, pattern: str, said: str) -> Verdict:
        alike = tuple(name for name in self.tensors if pattern_of(name) == pattern)
        return Verdict(
            refusal=f"its {type(self.model).__name__} does not take the tensor {alike[0]} ({said})", homeless=alike
        )

    # -- names --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _weight_of(self) -> dict[str, str]:
        return {scale: weight for weight, scale in self.scales.items()}

    @functools.cached_property
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @functools.cached_property
    def _holders(self) -> set[str]:
        """Parameters that hold quantized numbers."""
        found = self._parameters.items()
        return {name for name, parameter in found if parameter.dtype in NUMBERS or name.endswith(PACKED)}

    def _origin(self, name: str) -> str:
        """The weight that a tensor is, or is the scale of."""
        return self._weight_of.get(name, name)

    def _beside(self, seen: Trace, pattern: str) -> set[str]:
        """Modules in FP8 that are filled from the same modules of the checkpoint as tensors of a pattern."""
        found, wanted = seen.by_source, layer_of(pattern)
        return {
            layer_of(copy.target)
            for name in self.tensors
            if layer_of(pattern_of(name)) == wanted
            for copy in found.get(name, ())
            if copy.target in self._holders
        }

    # -- dry runs -----------------------------------------------------------------------------------------------------

    def _trace(self, quantized: Collection[str], without: Collection[str]) -> Trace:
        return trace_to_culprit(self.model, self.load, self._given(quantized, without))

    def _given(self, quantized: Collection[str], without: Collection[str]) -> Iterator[Source]:
        """All tensors, of which those that are to stay in bf16 after all come so, and without their scales."""
        for name, info in self.tensors.items():
            if without and pattern_of(name) in without:
                continue
            if name in self.scales:
                yield Source(name, info.shape, dtypes.MOVED[info.dtype_name] if name in quantized else torch.bfloat16)
            elif name not in self._weight_of or self._weight_of[name] in quantized:
                yield Source(name, info.shape, dtypes.MOVED[info.dtype_name])

    # -- what arrived where -------------------------------------------------------------------------------------------

    def _look(self, seen: Trace, verdict: Verdict) -> None:
        found, unread = seen.by_source, []
        for name, scale in self.scales.items():
            weights, scales = found.get(name, []), found.get(scale, [])
            homes = {layer_of(copy.target) for copy in weights}
            if unbuilt := homes & self.unbuilt.keys():
                verdict.misread.pop(name, None)
                verdict.refused[name] = f"it can't build the layer in FP8: {self.unbuilt[min(unbuilt)]}"
            elif plain := homes & self.plain.keys():
                verdict.misread[name] = f"it can't build the layer in FP8: {self.plain[min(plain)]}"
            elif name in verdict.misread:
                if odd := self._unquantized(weights):
                    verdict.misread[name] = f"it keeps this layer unquantized ({odd})"
            elif not weights and not scales:
                unread.append(name)
            elif why := self._wrong(name, weights, scales):
                verdict.misread[name] = why
        verdict.unread = tuple(unread)
        given = {layer_of(copy.target) for name in self.scales for copy in found.get(name, ())}
        written = seen.by_target
        filled = {target[:end] for target in written for end, letter in enumerate(target) if letter == "."}
        for module, why in {**self.plain, **self.unbuilt}.items():
            if module not in given:  # it only has to be told that there is no scale
                verdict.waiting[module] = f"it can't build it in FP8: {why}"
            if module not in filled:
                verdict.empty += (module,)
        for holder in sorted(self._holders):
            module = layer_of(holder)
            given = {self._origin(source) for copy in written.get(holder, ()) for source in copy.sources}
            bare = given - self.scales.keys() | given & verdict.misread.keys()
            if bare:
                verdict.waiting[module] = f"{pattern_of(min(bare))} comes without a scale"
            elif not given and self._parameters[holder].numel():
                verdict.waiting[module] = "nothing goes there"
                verdict.empty += (module,)
        for name in sorted(self._holders | {unpacked(holder) + end for holder in self._holders for end in _SCALES}):
            if name in self._parameters and layer_of(name) not in verdict.waiting:
                self._cover(name, written.get(name, []), verdict)
        layers = {layer_of(holder) for holder in self._holders}
        verdict.missing = tuple(
            name
            for name, parameter in self._parameters.items()
            if name not in written and name not in seen.opaque and name not in self.exempt
            if parameter.numel() and layer_of(name) not in layers
        )

    def _cover(self, name: str, copies: list[Copy], verdict: Verdict) -> None:
        """What fills a parameter of a layer in FP8 with gaps, or one over the other, is taken for something else."""
        if not uncovered(self._parameters[name], list(dict.fromkeys(copies))):
            return
        why = f"it leaves a part of {pattern_of(name)} empty, or fills it twice"
        for source in {self._origin(source) for copy in copies for source in copy.sources} & self.scales.keys():
            verdict.misread.setdefault(source, why)

    def _wrong(self, name: str, weights: list[Copy], scales: list[Copy]) -> str | None:
        """What is wrong with where a quantized tensor and its scale arrive."""
        if odd := self._unquantized(weights):
            return f"it takes the codes for weights: its {odd} is not quantized"
        if not weights:
            return "it reads the scale, and not the weight"
        if not scales:
            return "it passes over the scale"
        info, scale = self.tensors[name], self.tensors[self.scales[name]]
        scheme = scheme_by_scale(info.shape, scale, info.dtype)
        beside = [copy._replace(target=copy.target.removesuffix("_inv")) for copy in scales]
        if scheme is None or (scheme.group_rows is None and scheme.group_cols is None):
            # one number, which goes to a cell of its own where several matrices are fused
            alike = {f"{unpacked(copy.target)}_scale" for copy in weights} == {copy.target for copy in beside}
            return None if alike else "its scale does not arrive beside it"
        why = unequal(weights, beside, Grid.of(scheme, info.shape), _SCALES[0])
        return why and f"it {why}"

    def _unquantized(self, weights: list[Copy]) -> str | None:
        """The class of an unquantized module among those that a tensor goes to."""
        odd = next((copy.target for copy in weights if copy.target not in self._holders), None)
        return odd and type(self.model.get_submodule(layer_of(odd))).__name__

    def _spread(self, seen: Trace, verdict: Verdict) -> None:
        """What is quantized, and goes into a layer that has to stay unquantized for something else, has to stay so."""
        for copy in seen.copies:
            module = layer_of(copy.target)
            if module not in verdict.waiting or copy.target not in self._holders:
                continue
            for name in copy.sources & self.scales.keys():
                verdict.misread.setdefault(name, f"it fuses it with others, of which {verdict.waiting[module]}")
