"""Layers in NVFP4 of which an engine joins several, brought to one global scale whenever it processes them.

Of joined linear layers vLLM takes the largest of their divisors for all, and of gate and up of an expert that of gate;
where they differ, it only warns, and SGLang refuses to load them. Layers of which none would hold are refused, before
any of a model is processed; those that come in an update, before they are, and stay as they were.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...conversion.packing import GLOBAL, PACKED
from ...errors import WeightError, raise_problems
from .global_scales import Joined

_SUFFIX = f"weight{GLOBAL}"


@dataclasses.dataclass(frozen=True)
class Joining:
    """Of one engine.

    Args:
        engine: what it is called.
        begin_anew: has a layer wait again that is about to be processed, with weights that it can't have.
    """

    engine: str
    log: logging.Logger
    begin_anew: Callable[[nn.Module], object]

    def follow(self, model: nn.Module, paths: Mapping[str, str]) -> None:
        """Have layers agree before they are processed. To be called between loading and processing.

        Args:
            paths: the place of each layer in the model -> the engine's name of it.

        Raises:
            WeightError: naming layers that can't.
        """
        problems: dict[str, str] = {}
        for path, layer in model.named_modules():
            names = [name for name in layer._parameters if name.endswith(_SUFFIX)]
            if names:
                called = paths.get(path, path)
                problems.update((called, why) for why in _misfits(layer, names))
                self._watch(layer, called, names)
        told = [f"{layer} {why}" for layer, why in problems.items()]
        raise_problems(WeightError, type(model).__name__, told, _way_out(*problems))

    def _watch(self, layer: Any, called: str, names: list[str]) -> None:
        method = layer.quant_method
        process = method.process_weights_after_loading

        def process_weights_after_loading(given: nn.Module) -> None:
            if given is layer:
                self._settle(layer, called, names)
            process(given)

        method.process_weights_after_loading = process_weights_after_loading

    def _settle(self, layer: Any, called: str, names: list[str]) -> None:
        why = next(_misfits(layer, names), None)
        if why is not None:
            self.begin_anew(layer)
            raise WeightError(f"{called}: with its new weights, it {why}. It is as it was. {_way_out(called)}")
        for joined in _joined(layer, names):
            if joined.agree():
                self.log.info(
                    "octavo: %s joins matrices with different global scales (the largest weight of one is beyond 6.75, "
                    "or below 0.0066), and %s takes one for all: they were brought to that, and no weight changed",
                    called,
                    self.engine,
                )


def _way_out(*layers: str) -> str:
    return f"Load the model with these as they are, ignore={list(layers)}, or in another scheme, like fp8_channel."


def _misfits(layer: Any, names: list[str]) -> Iterator[str]:
    for joined in _joined(layer, names):
        why = joined.misfit()
        if why is not None:
            yield why


def _joined(layer: Any, names: list[str]) -> Iterator[Joined]:
    for name in names:
        divisors: Tensor = getattr(layer, name).data
        scales: Tensor = getattr(layer, name.replace(GLOBAL, "_scale")).data
        if divisors.ndim < scales.ndim - 1 or divisors.shape[-1] == 1:
            continue  # of each matrix
        rows = getattr(layer, "logical_widths", None) or [scales.shape[-2] // divisors.shape[-1]] * divisors.shape[-1]
        yield Joined(getattr(layer, name.replace(GLOBAL, PACKED)).data, scales, divisors, rows)
