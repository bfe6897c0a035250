"""Items, which a session has to fill: the parameters and buffers of a model; and the layers that own them.

A layer is a module that has parameters of its own. An `Item` is one of them (or a buffer): the module attributes that
hold it (several where it is tied), the boxes that are still to come, and its storage once there is some. Until then an
item is *virtual*: its parameter is on meta, or has given its memory back, and views of it are made on a meta twin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import dtypes
from ..checkpoint.header import TensorInfo
from ..elements.boxes import Box, Gaps
from ..elements.operations import offset_of, view_on
from ..elements.pieces import Piece
from ..elements.views import NoBoxError
from ..numerics import schemes
from ..planning import kinds
from ..planning.recipe import Decision, Recipe, Weight
from .quantize.storage import QuantizedStorage
from .report import Event

_UNDECIDED = Decision(None, "")


class Face(NamedTuple):
    """A module's attribute, and the tensor that loaders see there."""

    module: nn.Module
    leaf: str
    tensor: Tensor


@dataclass(eq=False)
class Layout:
    """How the elements of a parameter lie in its storage, and where those of a view of it are."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def elements(self, view: Tensor) -> tuple[int, list[int], list[int]]:
        """Offset, sizes and strides of a view, which must not tear elements."""
        if view.dtype.itemsize != self.dtype.itemsize:
            raise NoBoxError(f"bits are seen as {view.dtype}")
        return offset_of(view) - self.offset, list(view.shape), list(view.stride())

    def like(self, view: Tensor, storage: Tensor) -> Tensor:
        """``view`` of the parameter as a view of ``storage``, which has taken the parameter's place."""
        begin = offset_of(view) * view.dtype.itemsize - self.offset * self.dtype.itemsize
        begin += offset_of(storage) * storage.dtype.itemsize
        return view_on(storage.untyped_storage(), view, begin // view.dtype.itemsize, storage.device)

    def on_meta(self) -> Tensor:
        """A tensor that lies like the parameter, without data."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


@dataclass(eq=False)
class Item(Layout):
    """One parameter or buffer, however many modules share it.

    Its values are in one of these places, and only the verbs below move them:

    virtual    nowhere: its modules hold a tensor on meta, or one that gave its memory back. `hide` makes it so
    real       in high precision: `allocate` gives it memory, `release` takes that back; `keep`: where they were before
    quantized  in FP8, box by box as they come (`start_fp8`, `pressed`); to loaders it looks as if virtual
    settled    in its modules, in their final form: `install` or `settle`. If finishing the layer fails, `unsettle`
    lent       in FP8, while an update lasts, whose modules hold a tensor on meta: `lend`, `take_back`

    The beginning of every load and update is `restart`, the end of a load that fails is `abandon`.
    """

    name: str
    faces: list[Face]
    is_buffer: bool
    device: torch.device  # where its storage goes
    layers: list[Layer]
    required: bool = True
    decision: Decision = _UNDECIDED
    transposed: bool = False  # a stack stored [..., in, out]
    # where its values are
    twin: Tensor | None = None  # on meta: what views are made of while the face has no storage
    real: Tensor | None = None  # high-precision storage
    quantized: QuantizedStorage | None = None
    settled: bool = False
    provided: bool = False  # a function of the user's has finished its layer
    # what came since it was restarted
    gaps: Gaps = field(init=False)
    writes: list[Piece] = field(default_factory=list)  # boxes as written; src_name tells what came together
    pressed: list[Box] = field(default_factory=list)  # boxes of the stored form that are in FP8
    generated: bool = False  # some of what came were constants or random numbers: how loaders begin, or padding
    changed: bool = False  # its final storage has other values than before

    def __post_init__(self) -> None:
        self.gaps = Gaps(self.shape)

    @property
    def virtual(self) -> bool:
        """True while the face has no storage."""
        return self.twin is not None

    @property
    def scheme(self) -> str | None:
        return self.decision.scheme

    @property
    def padding(self) -> list[Box]:
        """Boxes that the layer declares as padding: ``parameter.padding = [(offsets, sizes), ...]``."""
        declared = getattr(self.faces[0].tensor, "padding", None) or ()
        return [Box(tuple(off), tuple(size)) for off, size in declared]

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

    def on_twin(self, view: Tensor) -> Tensor:
        """The same view, of the meta twin: views of memory that was given back can't be made."""
        assert self.twin is not None
        if view.is_meta:
            return view
        return view_on(self.twin.untyped_storage(), view, offset_of(view), self.twin.device)

    def event(self, kind: str, box: Box | None = None, source: str = "") -> Event:
        """Something that happened to this item, or to a box of it, for the record."""
        return Event(kind, self.layers[0].name, self.name, box, source)

    # -- what came ----------------------------------------------------------------------------------------------------

    @property
    def untouched(self) -> bool:
        """True if nothing was written."""
        return not self.writes and self.gaps.boxes == self._all_gaps().boxes

    @property
    def blank(self) -> bool:
        """True if all that came are constants and random numbers, and values of no tensor."""
        return self.generated and not self.writes

    def is_complete(self) -> bool:
        return not (self.gaps or self.blank) or not self.required

    def restart(self) -> None:
        """Forget what was written; all but padding is to come."""
        self.gaps, self.writes, self.pressed = self._all_gaps(), [], []
        self.changed = self.generated = False

    def expect(self, boxes: list[Box]) -> None:
        """These boxes are to come, and nothing else."""
        self.gaps.boxes = boxes

    def wrote(self, boxes: Iterable[Box], pieces: Iterable[Piece]) -> None:
        """Boxes were written, some of them as these pieces."""
        for box in boxes:
            self.gaps.fill(box)
        self.writes += pieces
        self.changed |= not self.scheme

    def note_pressed(self, box: Box | None) -> None:
        """FP8 numbers are new: those of a box of the stored form; None: nobody knows which."""
        if box is not None:
            self.pressed.append(box)
        self.changed = True

    def reopen(self, box: Box) -> None:
        """FP8 numbers of a box of the stored form are about to be written once more."""
        self.pressed = [rest for done in self.pressed for rest in done.without(box)]

    def _all_gaps(self) -> Gaps:
        gaps = Gaps(self.shape)
        for box in self.padding:
            gaps.fill(box)
        return gaps

    # -- where its values are -----------------------------------------------------------------------------------------

    def show(self, face: Face) -> None:
        """A module holds it from now on, in this or another tensor."""
        others = [other for other in self.faces if (other.module, other.leaf) != (face.module, face.leaf)]
        self.faces = [*others, face]

    def hide(self) -> Tensor:
        """It is virtual from now on; returns the twin. The memory of the faces goes with `give_back`."""
        face = self.faces[0].tensor
        self.twin = face.detach() if face.is_meta else self.on_meta()
        return self.twin

    def give_back(self) -> None:
        """Free the memory of faces that are not on meta: whoever holds such a parameter holds no values."""
        for face in self.faces:
            if self.virtual and not face.tensor.is_meta and face.tensor.untyped_storage().resizable():
                face.tensor.untyped_storage().resize_(0)

    def keep(self, tensor: Tensor) -> None:
        """Values go into the memory of ``tensor``, which stays where it is."""
        self.twin, self.real = None, tensor.detach()
        self.offset, self.strides = offset_of(tensor), tuple(tensor.stride())

    def allocate(self) -> Tensor:
        """High-precision storage of the face's strides; declared padding is zero, all else uninitialised."""
        assert self.real is None
        self.real = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        for box in self.padding:
            self.real[box.slices].zero_()
        return self.real

    def release(self) -> int:
        """Drop the high-precision storage, if there is one; returns its bytes."""
        nbytes, self.real = 0 if self.real is None else self.real.nbytes, None
        return nbytes

    def start_fp8(self) -> QuantizedStorage:
        """FP8 storage, of which nothing is written yet."""
        assert self.scheme is not None
        scheme = schemes.get(self.scheme)
        weight = torch.empty(scheme.stored_shape(self.stored_shape), dtype=scheme.dtype, device=self.device)
        self.quantized = QuantizedStorage(self.name, weight, scheme)
        return self.quantized

    def adopt(self, storage: Tensor | QuantizedStorage) -> None:
        """All its values are in ``storage``, which others have filled."""
        if isinstance(storage, QuantizedStorage):
            self.quantized = storage
        else:
            self.real = storage
        self.expect([])

    def install(self) -> Tensor:
        """Settle the high-precision storage, in the same parameter wherever torch can do that. Returns it."""
        assert self.real is not None
        made: dict[int, Tensor] = {}  # modules that share the parameter go on sharing it
        for face in self.faces:
            if id(face.tensor) not in made:
                made[id(face.tensor)] = _with_data(face.tensor, self.like(face.tensor, self.real))
        self.faces = [self._put(face, made[id(face.tensor)]) for face in self.faces]
        self.settle()
        return self.real

    def settle(self) -> None:
        """Its modules hold its values, in their final form."""
        self.settled = True

    def unsettle(self) -> None:
        """Finishing its layer has failed: whatever its modules hold, it is not loaded."""
        self.settled = False

    def hand_over(self) -> None:
        """A function of the user's has its modules: only that knows what becomes of its values."""
        self.real, self.provided = None, True

    def lend(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Its module gets a high-precision parameter on meta, which is returned, in place of the FP8 ``weight``."""
        assert self.quantized is not None
        self.quantized.hold(weight.data, scale.data)
        self.device = weight.device
        lent = _remade(self.faces[0].tensor, self.on_meta())
        self.faces, self.twin, self.real = [self._put(self.faces[0], lent)], lent.detach(), None
        return lent

    def take_back(self, weight: Tensor) -> None:
        """Its module has the FP8 ``weight`` again."""
        self._put(self.faces[0], weight)
        self.real = None

    def abandon(self) -> None:
        """Nothing of it looks loaded: its modules hold tensors on meta."""
        for face in self.faces:
            if self.settled or not face.tensor.is_meta:
                self._put(face, _remade(face.tensor, self.on_meta()))
        self.real = self.quantized = None

    def _put(self, face: Face, tensor: Tensor) -> Face:
        """A module gets another tensor, without `nn.Module.register_parameter`, which tells every hook."""
        holder: dict[str, Any] = face.module._buffers if self.is_buffer else face.module._parameters
        holder[face.leaf] = tensor
        return face._replace(tensor=tensor)


def _with_data(tensor: Tensor, data: Tensor) -> Tensor:
    """A parameter (or buffer) with other data: the same object, or one of its class where it is on another device."""
    if tensor.device != data.device:
        return _remade(tensor, data)
    tensor.data = data
    return tensor


def _remade(like: Tensor, data: Tensor) -> Tensor:
    """A parameter (or buffer) with other data, of the class and with the attributes of ``like``."""
    if not isinstance(like, nn.Parameter):
        return data
    new: Tensor = torch.Tensor._make_subclass(type(like), data, like.requires_grad)
    new.__dict__.update(like.__dict__)
    return new


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
        decision = decisions[item.name]
        why = schemes.get(decision.scheme).unfit(item.stored_shape[-1]) if decision.scheme else None
        item.decision = Decision(None, f"{decision.scheme}: {why}") if why else decision


def kind_of(item: Item) -> str:
    """The kind of an item: its module tells as far as it is torch's own, and its name otherwise."""
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
