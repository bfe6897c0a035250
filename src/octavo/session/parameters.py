"""What a session has to fill: the parameters and buffers of a model, and the layers that own them.

A layer is a module that has parameters of its own. An `Item` is one of them (or a buffer): the module attributes that
hold it (several where it is tied), the boxes that are still to come, and its storage once there is some. Until then an
item is *virtual*: its parameter is on meta, or has given its memory back, and views of it are made on a meta twin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import dtypes
from ..checkpoint.header import TensorInfo
from ..elements.boxes import Box, Gaps
from ..elements.operations import offset_of, view_on
from ..elements.pieces import Piece
from ..numerics import schemes
from ..planning import kinds
from ..planning.recipe import Decision, Recipe, Weight
from .quantize.storage import QuantizedStorage
from .report import Event


class Face(NamedTuple):
    """A module's attribute, and the tensor that loaders see there."""

    module: nn.Module
    leaf: str
    tensor: Tensor


_UNDECIDED = Decision(None, "")


@dataclass(eq=False)
class Item:
    """One parameter or buffer, however many modules share it."""

    name: str
    faces: list[Face]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # of the face in its storage
    dtype: torch.dtype
    is_buffer: bool
    device: torch.device  # where its storage goes
    cast: bool = True  # quantize values as the face's dtype holds them, and not as they come
    required: bool = True
    layers: list[Layer] = field(default_factory=list)
    decision: Decision = _UNDECIDED
    transposed: bool = False  # a stack stored [..., in, out]
    twin: Tensor | None = None  # on meta: what views are made of while the face has no storage
    real: Tensor | None = None  # high-precision storage
    quantized: QuantizedStorage | None = None
    writes: list[Piece] = field(default_factory=list)  # boxes as written; src_name tells what came together
    pressed: list[Box] = field(default_factory=list)  # boxes of the stored form that are in FP8
    emptied: Tensor | None = None  # a parameter that gave its memory back
    installed: Tensor | None = None  # while updating: the FP8 parameter whose place is lent
    provided: bool = False  # a function of the user's has finished its layer
    settled: bool = False  # in its final storage
    changed: bool = False  # its final storage was written by the update that runs
    gaps: Gaps = field(init=False)

    def __post_init__(self) -> None:
        self.gaps = Gaps(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def virtual(self) -> bool:
        return self.twin is not None

    @property
    def scheme(self) -> str | None:
        return self.decision.scheme

    @property
    def stored_axes(self) -> tuple[int, ...]:
        """Axes in their order when quantized: [..., out, in], so that groups run along the last one."""
        n = len(self.shape)
        return (*range(n - 2), n - 1, n - 2) if self.transposed else tuple(range(n))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.stored_axes)

    def as_stored(self, piece: Piece) -> Piece:
        """A piece of the stored form."""
        return piece.permute(self.stored_axes) if self.transposed else piece

    @property
    def padding(self) -> list[Box]:
        """Boxes that the layer declares as padding: ``parameter.padding = [(offsets, sizes), ...]``."""
        declared = getattr(self.faces[0].tensor, "padding", None) or ()
        return [Box(tuple(off), tuple(size)) for off, size in declared]

    @property
    def untouched(self) -> bool:
        """Whether nothing was written."""
        return not self.writes and self.gaps.boxes == self._all_gaps().boxes

    def is_complete(self) -> bool:
        return not self.gaps or not self.required

    def event(self, kind: str, box: Box | None = None, source: str = "") -> Event:
        """Something that happened to this item, or to a box of it, for the record."""
        return Event(kind, self.layers[0].name, self.name, box, source)

    def restart(self) -> None:
        """Forget what was written; all but padding is to come."""
        self.gaps, self.writes, self.pressed, self.changed = self._all_gaps(), [], [], False

    def _all_gaps(self) -> Gaps:
        gaps = Gaps(self.shape)
        for box in self.padding:
            gaps.fill(box)
        return gaps

    def elements(self, view: Tensor) -> tuple[int, list[int], list[int]]:
        """Offset, sizes and strides of a view of this item, in its elements; a `ValueError` where that can't be."""
        sizes, strides = list(view.shape), list(view.stride())
        mine, its = self.dtype.itemsize, view.dtype.itemsize
        if its == mine:
            return offset_of(view) - self.offset, sizes, strides
        at = offset_of(view) * its - self.offset * mine
        if not sizes or strides[-1] != 1 or sizes[-1] * its % mine or at % mine:
            raise ValueError(f"a view as {view.dtype} that holds no whole elements")
        if any(stride * its % mine for stride in strides[:-1]):
            raise ValueError(f"a view as {view.dtype} whose rows begin within elements")
        sizes[-1] = sizes[-1] * its // mine
        return at // mine, sizes, [*(stride * its // mine for stride in strides[:-1]), 1]

    def like(self, view: Tensor, storage: Tensor) -> Tensor:
        """``view``, of the face or the twin, as a view of ``storage`` that has taken its place."""
        begin = offset_of(view) * view.dtype.itemsize - self.offset * self.dtype.itemsize
        begin += offset_of(storage) * storage.dtype.itemsize
        return view_on(storage.untyped_storage(), view, begin // view.dtype.itemsize, storage.device)

    def on_twin(self, view: Tensor) -> Tensor:
        """The same view, of the meta twin: views of memory that was given back can't be made."""
        assert self.twin is not None
        if view.is_meta:
            return view
        return view_on(self.twin.untyped_storage(), view, offset_of(view), self.twin.device)

    def allocate(self) -> Tensor:
        """High-precision storage of the face's strides; declared padding is zero, all else uninitialised."""
        assert self.real is None
        self.real = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        for box in self.padding:
            self.real[box.slices].zero_()
        return self.real

    def give_back(self) -> None:
        """Free the memory of the face."""
        self.emptied = self.faces[0].tensor
        self.emptied.untyped_storage().resize_(0)

    def make_safe(self) -> None:
        """A parameter that gave its memory back, and got none: reading it must not crash, nor look like weights."""
        tensor = self.emptied
        if tensor is not None and self.numel and not tensor.untyped_storage().nbytes():
            tensor.data = torch.full((), math.nan if self.dtype.is_floating_point else 0).to(tensor).expand(self.shape)

    def quantized_storage(self) -> tuple[QuantizedStorage, bool]:
        """FP8 storage, and whether it was allocated just now."""
        if self.quantized is not None:
            return self.quantized, False
        assert self.scheme is not None
        weight = torch.empty(self.stored_shape, dtype=schemes.FP8, device=self.device)
        self.quantized = QuantizedStorage(self.name, weight, schemes.get(self.scheme))
        return self.quantized, True


@dataclass(eq=False)
class Layer:
    """A module with parameters of its own."""

    name: str
    module: nn.Module
    items: list[Item] = field(default_factory=list)
    finished: bool = False
    late: bool = False  # a parameter that was registered after the layer had been finished

    def is_complete(self) -> bool:
        return all(item.is_complete() for item in self.items)

    def __str__(self) -> str:
        return self.name or "the model itself"


# -- what each item is ------------------------------------------------------------------------------------------------


def decide(items: Sequence[Item], recipe: Recipe) -> None:
    """Give every item its scheme, or the reason why it keeps its dtype. Errors as for `Recipe.decide`."""
    weights = []
    for item in items:
        kind = kind_of(item)
        weights.append(Weight(item.name, (), item.dtype, kind))
        item.transposed = kind == kinds.EXPERTS and bool(getattr(item.faces[0].module, "is_transposed", False))
    decisions = recipe.decide(weights)
    for item in items:
        item.decision = decisions[item.name]


def kind_of(item: Item) -> str:
    """What an item is, asked from its module as far as that is torch's, else by name."""
    module, leaf = item.faces[0].module, item.faces[0].leaf
    if item.is_buffer:
        return "buffer"
    if not item.numel:
        return "empty"
    if len(item.faces) > 1:
        return f"tied: {len(item.faces)} modules share it"
    if type(module) is nn.Linear and leaf == "weight":
        return kinds.LINEAR
    if type(module).__module__.startswith("torch.nn."):
        return "bias" if leaf.endswith("bias") else f"{type(module).__name__}, not a linear layer"
    if item.dtype not in dtypes.QUANTIZABLE:
        return dtypes.short(item.dtype)
    return kinds.kind_by_name(TensorInfo(item.name, dtypes.NAMES[item.dtype], item.shape, 0, 0, 0), {})
