"""FP8 of a trainer's own in an engine's update: numbers and scales in another form than conversions have them.

A trainer that computes in FP8 sends ``X.weight`` as FP8 and ``X.weight_scale_inv`` or ``X.weight_scale`` beside it.
Where that is what the model holds, it passes through; otherwise what it stands for is quantized, as bf16 is. Both have
to come in one call. What is in the form of conversions is handed on as it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ...checkpoint import dtypes
from ...checkpoint.companions import of_weight
from ...checkpoint.packing import FP8
from ...conversion.formats import Format
from ...elements.pieces import whole
from ...errors import CoverageError
from ...planning.placement import Placement
from ...session.coded import Came, Coded
from ...session.quantize.storage import QuantizedStorage
from .cuts import unpacked

_SUFFIXES = ("_scale_inv", "_scale")


@dataclass
class TrainersFp8:
    """Joins numbers with their scales, in one call of a loader.

    Args:
        placements: of the checkpoint's tensors, by name.
        copied: whether what waits has to be copied, since its owner may write over it.
        limit_bytes: of what waits; what waits longest is then handed on as it came.
    """

    placements: Mapping[str, Placement]
    layout: Format
    copied: bool
    limit_bytes: int
    _numbers: dict[str, Tensor] = field(default_factory=dict)
    _scales: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # weight -> the scale's name, and itself
    _converted: set[str] = field(default_factory=set)  # weights whose numbers have come as conversions have them

    def joined(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of an update, without FP8 in a form that the model's loader does not take.

        Raises:
            CoverageError: numbers and scales that don't fit together, two scales of a weight, or one that is none.
        """
        for name, tensor in weights:
            weight = of_weight(name) or ""
            if name in self.placements and dtypes.NAMES.get(tensor.dtype) in FP8 and tensor.ndim > 1:
                if name in self._scales:
                    yield from self._made(name, tensor, *self._scales.pop(name))
                    continue
                if name in self._numbers:  # twice, which is for others to say
                    yield name, self._numbers.pop(name)
                self._numbers[name] = self._held(tensor)
                yield from self._released()
            elif weight in self.placements and name.removeprefix(weight) in _SUFFIXES:
                numbers = self._numbers.pop(weight, None)
                if self._is_converted(self.placements[weight], numbers, name, tensor):
                    if numbers is not None:
                        yield weight, numbers
                    yield name, tensor
                elif numbers is not None:
                    yield from self._made(weight, numbers, name, tensor)
                elif weight in self._scales:
                    raise CoverageError(f"{weight} has two scales: {self._scales[weight][0]} and {name}. Send one")
                else:
                    self._scales[weight] = name, self._held(tensor)
            else:
                yield name, tensor
                yield from self._released_by(name)
        yield from self._numbers.items()
        yield from self._scales.values()

    def _held(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self.copied else tensor

    def _released(self) -> Iterator[tuple[str, Tensor]]:
        """Numbers for which there is no room; nothing waits for them that is of conversions."""
        held = sum(tensor.nbytes for tensor in self._numbers.values()) if self.copied else 0
        while held > self.limit_bytes and len(self._numbers) > 1:
            name = next(iter(self._numbers))
            held -= self._numbers[name].nbytes
            yield name, self._numbers.pop(name)

    def _released_by(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The scale that has waited for numbers as conversions have them: a layer is whole by it."""
        placement = self.placements.get(weight := unpacked(name))
        if placement is not None and placement.scheme is not None and name == self.layout.weight_name(placement):
            self._converted.add(weight)
            if weight in self._scales:
                yield self._scales.pop(weight)

    def _is_converted(self, placement: Placement, numbers: Tensor | None, name: str, scale: Tensor) -> bool:
        """Return True for a scale as a conversion has it, and numbers, if they have come, that it is of."""
        if placement.scheme is None or name != self.layout.scale_name(placement.name):
            return False
        if numbers is None:
            # scales of int8 look as those of FP8 do: which they are, only the numbers tell
            alone = placement.rule.packed or dtypes.NAMES[placement.dtype] in FP8
            told = alone or placement.name in self._converted
        else:
            told = numbers.dtype == placement.dtype and self.layout.weight_name(placement) == placement.name
        _, shape = self.layout.scale_type(placement)
        return told and tuple(scale.shape) == shape

    def _made(self, name: str, numbers: Tensor, scale_name: str, scale: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A weight as the model's loader takes it, or what it stands for."""
        placement = self.placements[name]
        likely = [placement.rule.groups] if placement.scheme else []
        coded = Coded.of(Came(name, numbers, scale, scale_name), likely)
        if placement.scheme is None:
            yield name, coded.decode().to(dtypes.MOVED[placement.source_dtype_names[0]])
            return
        if coded.codes.dtype == placement.dtype and not placement.rule.packed:
            shape = tuple(coded.codes.shape)
            storage = QuantizedStorage(name, coded.codes, placement.rule, (shape[-2],))
            passed = coded.passed(whole(name, shape), storage)
            if passed is not None:
                yield from self.layout.handed_out(placement, coded.codes, passed).items()
                return
        yield name, coded.decode()
