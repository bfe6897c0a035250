"""Whether tensors that go straight to their places fill a model's memory, each element of it once.

Boxes are compared, never counted.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from ...conversion.formats import Format
from ...elements.boxes import Box, Gaps
from ...elements.views import View, layout_of
from .survey import Fillers, Survey

Placed = Iterable[tuple[str, View]]  # a parameter or buffer, and a view of its memory
Views = tuple[View, ...]

#: how a problem begins that is no gap
_TWICE = "two tensors fill"


def targets_of(fillers: Fillers, names: Collection[str] | None = None) -> set[str]:
    """The parameters and buffers that these tensors fill; all tensors, if none are named."""
    return {
        f"{layer}.{name}".lstrip(".")
        for layer, mine in fillers.items()
        for name in frozenset().union(*{to for source, to in mine.items() if names is None or source in names})
    }


def left_to_loader(found: Survey, layout: Format) -> set[str]:
    """What is filled, at least in part, by tensors that the loader computes with."""
    assert found.places is not None
    names = {
        placement.name + suffix
        for placement in found.places.rest.placements
        for suffix in ("", *(layout.suffixes(placement.scheme) if placement.scheme else ()))
    }
    return targets_of(found.fillers, names) if names else set()


def check_filling(
    memory: Mapping[str, Tensor], placed: Placed, constants: Placed, expected: Collection[str], others: Collection[str]
) -> None:
    """Raise a ValueError where places overlap, or leave something unfilled.

    Args:
        placed: where tensors go.
        constants: what is filled with constants, before that.
        expected: what tensors of the checkpoint have to fill.
        others: of that, what may be filled otherwise: by the model's loader, or in part (buffers).
    """
    views, padding = _by_name(memory, placed), _by_name(memory, constants)
    if missing := {*expected} - views.keys() - padding.keys() - {*others}:
        raise ValueError(f"nothing goes into {min(missing)}")
    for name in views.keys() | padding.keys():
        home, mine = memory[name], views.get(name, ())
        problem = _problem(tuple(home.shape), home.stride(), mine, padding.get(name, ()))
        if problem is not None and (name not in others or problem.startswith(_TWICE)):
            raise ValueError(f"{name}: {problem}")


def _by_name(memory: Mapping[str, Tensor], placed: Placed) -> dict[str, Views]:
    """Views of each tensor's memory, from where it begins."""
    found: dict[str, list[View]] = {}
    for name, view in placed:
        found.setdefault(name, []).append(view)
    starts = {name: int(memory[name].storage_offset()) for name in found}
    return {
        name: tuple(View(offset - starts[name], tuple(size), tuple(strides)) for offset, size, strides in views)
        for name, views in found.items()
    }


@functools.lru_cache(maxsize=1024)  # the layers of a model are alike
def _problem(shape: tuple[int, ...], strides: tuple[int, ...], views: Views, constants: Views) -> str | None:
    layout, gaps = layout_of(shape, strides), Gaps(shape)

    def boxes(of: Sequence[View]) -> list[Box]:
        return [box for view in of for box in layout.boxes(*view)]

    for box in boxes(views):
        if (twice := gaps.written(box)) is not None:
            return f"{_TWICE} {twice}"
        gaps.fill(box)
    for box in boxes(constants):
        gaps.fill(box)
    return f"nothing fills {gaps}" if gaps else None


def check_all_filled(model: nn.Module, filled: Collection[str], unneeded: Collection[str]) -> None:
    """Raise a ValueError where a parameter that is needed is not among those that are filled."""
    needed = {name for name, parameter in model.named_parameters() if parameter.numel()}
    if missing := needed.difference(filled, unneeded):
        raise ValueError(f"nothing fills {min(missing)}")
