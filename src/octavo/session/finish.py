"""Finishing a complete layer: its parameters are installed, in FP8 or as loaded, and the provider is run.

Octavo's own schemes turn ``nn.Linear`` into `octavo.running.modules.QuantizedLinear`, expert stacks of transformers'
kind into `octavo.running.modules.QuantizedExperts`, and give any other module its FP8 weight and, beside it,
``<weight>_scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..elements.operations import undisturbed
from ..errors import LoaderError
from ..machine import now
from ..planning.placement import cut_parts
from ..running import modules
from ..text import told
from .held import Held
from .inventory import Inventory
from .parameters import Item, Layer
from .report import Event, LayerReport, LayerwiseReport, Ledger

#: what users give as ``finish``: changes the layer in place, or returns the module that takes its place
Provider = Callable[[nn.Module], "nn.Module | None"]


def install_quantized(item: Item) -> tuple[Tensor, Tensor]:
    """Give an item's module its FP8 weight and scale, and what it needs to run with them. Returns both."""
    storage, face = item.quantized, item.faces[0]
    assert storage is not None
    assert storage.scale is not None
    assert storage.parts is not None
    assert item.scheme is not None
    module, leaf = face.module, face.leaf
    if type(module) is nn.Linear:
        module.__class__ = modules.QuantizedLinear  # in place: whoever holds the layer holds the quantized one
        module.scheme, module.parts = item.scheme, storage.parts  # type: ignore[assignment]
        module.activation_dtype = item.dtype  # type: ignore[assignment]
    elif hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        modules.quantize_stack(module, leaf, item.scheme, storage.shape, storage.parts)
    weight = nn.Parameter(storage.weight, requires_grad=False)
    weight.weight_loader = refuse  # type: ignore[attr-defined]  # a loader would cast new weights, without a scale
    module._parameters[leaf] = weight
    module._parameters[modules.scale_name(leaf)] = nn.Parameter(storage.scale, requires_grad=False)
    return storage.weight, storage.scale


def refuse(*_: Any, **__: Any) -> None:
    """The weight loader of an FP8 parameter."""
    raise LoaderError(
        "this parameter holds quantized numbers: a loader would overwrite them without their scale. To update it, "
        "enter the session that loaded the model again, or call octavo.update."
    )


def run_provider(provider: Provider, layer: Layer, model: nn.Module) -> None:
    """Let the provider have the layer, and take the module that it gives back, if it does."""
    try:
        made = provider(layer.module)
    except Exception as error:
        raise LoaderError(f"{layer}: finish failed: {told(error)}") from error
    if made is None or made is layer.module:
        return
    if not isinstance(made, nn.Module) or not layer.name:
        raise LoaderError(f"{layer}: finish returned {type(made).__name__}, which can't take the layer's place")
    model.set_submodule(layer.name, made)
    layer.module = made


def storages(module: nn.Module) -> Iterator[Tensor]:
    """A module's own tensors; of tensor subclasses (torchao's), those within."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield from _plain(tensor)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _plain(getattr(tensor, name))


def _way(layer: Layer) -> str:
    quantized = [item for item in layer.items if item.scheme]
    if not quantized:
        return "kept"
    return "direct" if all(item.real is None for item in quantized) else "whole layer"


class Finisher:
    """Gives complete layers their final form, and reports each.

    Args:
        provider: what the user gave as ``finish``, if that is a function.
    """

    def __init__(
        self,
        inventory: Inventory,
        held: Held,
        ledger: Ledger,
        report: LayerwiseReport,
        provider: Provider | None = None,
    ) -> None:
        self._inventory, self._held, self._ledger, self._report = inventory, held, ledger, report
        self._provider = provider

    def __call__(self, layer: Layer) -> None:
        assert not layer.finished
        layer.finished, started = True, now()
        way = "function" if self._provider is not None else _way(layer)
        try:
            with undisturbed():
                for item in layer.items:
                    if not item.settled and (item.required or not item.gaps):
                        self._settle(item)
            if self._provider is not None and not layer.late:
                self._provide(layer, self._provider)
        except BaseException:
            layer.finished = False
            for item in layer.items:
                item.unsettle()
            raise
        took = now() - started
        loaded, final = sum(i.nbytes for i in layer.items), sum(tensor.nbytes for tensor in storages(layer.module))
        self._report.layers.append(LayerReport(layer.name, took, loaded, final, way))
        self._ledger.event(Event("finish", layer.name))

    def _provide(self, layer: Layer, provider: Provider) -> None:
        for item in layer.items:
            self._ledger.hold(-item.nbytes)
            item.hand_over()
        run_provider(provider, layer, self._inventory.model)
        for tensor in storages(layer.module):
            if layer.items and self._inventory.find(tensor) is None:
                self._inventory.track_final(layer.items[0], tensor)
        self._ledger.hold(sum(tensor.nbytes for tensor in storages(layer.module)))

    def _settle(self, item: Item) -> None:
        if item.scheme:
            if item.quantized is None or item.quantized.parts is None:
                self._seal(item)
            for tensor in install_quantized(item):
                self._inventory.track_final(item, tensor)
        elif item.virtual:
            self._held.materialize(item)
            self._inventory.track(item, item.install())
        item.settle()

    def _seal(self, item: Item) -> None:
        """All boxes have come: quantize what waits, fix the parts, gather the scales."""
        self._held.press_rest(item)
        storage = self._held.storage(item)
        self._ledger.hold(-storage.nbytes)
        parts = cut_parts(item.stored_shape, [item.as_stored(piece) for piece in item.writes])
        self._held.quantizer.press()
        odd = storage.seal(parts)
        if odd is not None:
            raise LoaderError(
                f"{item.name}{odd}: was quantized as it came, but shares scale groups with other boxes of its tensor. "
                "Load it with direct=False."
            )
        self._ledger.hold(storage.nbytes)
        self._held.release(item)
        item.give_back()
