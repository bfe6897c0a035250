"""What a loader is given for a weight that is quantized: by which names, and whether all of it arrives together.

The names, dtypes and shapes are those of a format. A weight and its scale always come; some formats have more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import dtypes
from ...choices import DEFAULT_SCHEME
from ...conversion.formats import Format
from ...conversion.packing import PACKED, SHAPE
from ...elements.dry_run import Copy, Source
from ...numerics import schemes
from ...numerics.schemes import Scheme
from ...planning.placement import Placement
from .cuts import Grid, unequal, unpacked

#: how a reason ends why a tensor can't be quantized of which a loader takes the weight alone
SCALE_PASSED_OVER = "passes over its scale"

Copies = Mapping[str, Sequence[Copy]]


@dataclass(frozen=True)
class Given:
    """Of weights in one scheme, in one format."""

    layout: Format
    scheme: Scheme

    def sources(self, placement: Placement) -> Iterator[Source]:
        """What the loader is given for a weight that is quantized."""
        for suffix, dtype, shape in self._parts(placement):
            yield Source(placement.name + suffix, shape, dtype)

    @functools.cached_property
    def _known(self) -> dict[tuple[Any, ...], list[tuple[str, torch.dtype, tuple[int, ...]]]]:
        return {}

    def _parts(self, placement: Placement) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What comes after the weight's name in that of each tensor; its dtype and its shape.

        In one scheme and one format, the shape of a whole weight decides, as placements have it in a survey, but for
        scales that pass through, which may have another dtype.
        """
        key = placement.shape, self.layout.scale_type(placement) if placement.passed else None
        found = self._known.get(key)
        if found is None:  # a model has thousands of weights, and few shapes of them
            found = self._known[key] = [
                (name.removeprefix(placement.name), dtypes.MOVED[dtype_name], shape)
                for name, (dtype_name, shape) in self.layout.tensors(placement).items()
            ]
        return found

    @property
    def packed(self) -> bool:
        """Whether layers hold several numbers in one, by a name of their own."""
        return self.each > 1

    @property
    def each(self) -> int:
        """How many numbers these are."""
        return self.layout.numbers_each(self.scheme.name)

    def facts(self, placements: Iterable[Placement]) -> dict[str, Tensor]:
        """What comes with quantized weights and is known without reading them: name -> value."""
        return {name: value for p in placements if p.scheme for name, value in self.layout.beside(p).items()}

    def weight(self, placement: Placement) -> str:
        """The name of the weight itself."""
        return placement.name + self._weight_suffix

    @functools.cached_property
    def _weight_suffix(self) -> str:
        return PACKED if self.layout.packs(self.scheme.name) or self.scheme.packed else ""

    def origin(self, name: str) -> str:
        """The weight that a tensor may belong to, by its name."""
        suffix = next((suffix for suffix in self._suffixes if name.endswith(suffix)), "")
        return name.removesuffix(suffix)

    @functools.cached_property
    def _suffixes(self) -> tuple[str, ...]:
        """Longest first: that of a scale may be the end of another's."""
        return tuple(sorted(self.layout.suffixes(self.scheme.name), key=lambda suffix: -len(suffix)))

    def holders(self, model: nn.Module) -> set[str]:
        """Parameters that hold numbers of the scheme; scales of their own may have the same dtype."""
        dtype = torch.int32 if self.layout.packs(self.scheme.name) else self.scheme.dtype
        return {
            name
            for name, parameter in model.named_parameters()
            if parameter.dtype == dtype and (name.endswith(PACKED) or not self.packed)
        }

    def misfit(self, placement: Placement, found: Copies, engine: str) -> str | None:
        """What is wrong with where the scales of a weight arrive; None if they lie beside it."""
        weights = found.get(self.weight(placement), ())
        for suffix, *_ in self._parts(placement):
            if suffix == self._weight_suffix:
                continue
            copies = found.get(name := placement.name + suffix, ())
            if not copies and suffix == SHAPE:
                continue  # another one is loaded over it
            if not copies:
                return f"{engine}'s loader {SCALE_PASSED_OVER}"
            if suffix == self.layout.scale_suffix:
                grid = Grid.of(self.scheme, placement.shape, self.each)
                if why := unequal(weights, copies, grid, suffix):
                    return f"{engine}'s loader {why}"
            elif {copy.target for copy in copies} != {unpacked(copy.target) + suffix for copy in weights}:
                return f"{engine}'s loader does not put {name.rpartition('.')[2]} beside it"
        return None


def given_for(layout: Format, scheme: str | None) -> Given:
    """For the scheme called so; where nothing is to be quantized, for that of parameters that might be."""
    return Given(layout, schemes.get(scheme or DEFAULT_SCHEME))
