"""A dry run of a model's loader: which part of which tensor is written where. Reads nothing, writes nothing.

The loader (``model.load_weights`` in vLLM) is given tensors on the meta device, which have a shape and no data. Every
copy into a parameter or buffer of the model is noted instead of done: the box that it fills, the tensors that it comes
from, and, as long as they were only cut and permuted, which of their elements. That is the loader's own knowledge of
names, fusing and sharding; none of it is repeated here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CoverageError
from .boxes import Box
from .inline import pools_inline
from .operations import PlainDispatchMode, is_view, storage_key, tensors_in
from .pieces import contiguous_strides
from .unseen import views_unseen
from .views import Image, Layout, NoBoxError, Seen, View, joined, layout_of

_aten = torch.ops.aten
_copy_ = _aten.copy_.default
_NONE: frozenset[str] = frozenset()
#: what copies a tensor to another device, dtype or layout
_MOVES = frozenset({_aten._to_copy.default, _aten.clone.default})
#: what puts tensors side by side
_JOINS = frozenset({_aten.cat.default, _aten.stack.default})
#: what writes a constant
_FILLS = frozenset({_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default})


class Copy(NamedTuple):
    """One write into a parameter or buffer."""

    target: str
    box: Box  # of the target
    sources: frozenset[str]  # empty: filled with a constant
    view: View | None  # which elements of the one source; None where they were computed or rearranged
    into: View  # where the loader put them, in its own shape

    @property
    def src_name(self) -> str:
        return min(self.sources, default="a constant")


@dataclass
class Trace:
    """Everything that a dry run saw."""

    copies: list[Copy] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # sources of which a value was asked for
    computed: set[str] = field(default_factory=set)  # targets read after they are written, or changed otherwise
    opaque: dict[str, str] = field(default_factory=dict)  # target -> a write into it that is no box
    failed: tuple[str, Exception] | None = None  # the tensor that was being loaded when the loader gave up

    @functools.cached_property
    def by_source(self) -> Mapping[str, list[Copy]]:
        """Source -> its copies."""
        found: dict[str, list[Copy]] = {}
        for copy in self.copies:
            for source in copy.sources:
                found.setdefault(source, []).append(copy)
        return found

    @functools.cached_property
    def by_target(self) -> Mapping[str, list[Copy]]:
        """Parameter or buffer -> the copies into it."""
        found: dict[str, list[Copy]] = {}
        for copy in self.copies:
            found.setdefault(copy.target, []).append(copy)
        return found


class Source(NamedTuple):
    """A tensor that the loader is given."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def trace(model: nn.Module, load: Callable[[Iterator[tuple[str, Tensor]]], Any], sources: Iterable[Source]) -> Trace:
    """Run ``load`` on tensors without data; the model stays as it is.

    A loader that raises ends the run, and ``Trace.failed`` says where.

    Raises:
        CoverageError: the loader put the tensors themselves into the model, instead of writing into its parameters.
    """
    before = dict(_tensors(model))
    recorder = _Recorder(before)
    given = [(source.name, recorder.source(source)) for source in sources]  # before it looks at every operation
    current = ""

    def weights() -> Iterator[tuple[str, Tensor]]:
        nonlocal current
        for name, tensor in given:
            current = name
            yield name, tensor

    # a subclass that dispatches by itself must see the views of its tensors
    plain = all(storage_key(tensor) is not None for tensor in before.values())
    with torch.no_grad(), views_unseen() if plain else contextlib.nullcontext(), pools_inline(), recorder:
        try:
            load(weights())
        except Exception as error:  # whatever a model's loader raises means that it does not take the tensor
            recorder.trace.failed = (current, error)
    made = {name: tensor for name, tensor in _tensors(model) if before.get(name) is not tensor}
    replaced = [name for name, tensor in made.items() if recorder.is_made_of_sources(tensor)]
    if replaced:
        raise CoverageError(
            f"{type(model).__name__}.load_weights replaces {replaced[0]} instead of writing into it, which octavo "
            "can't follow; convert the checkpoint with `octavo convert`, and serve that"
        )
    recorder.adopt(made)
    recorder.find_computed()
    return recorder.trace


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


class _Target(NamedTuple):
    """A parameter or buffer that is written to."""

    name: str
    itemsize: int
    offset: int
    layout: Layout

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Target:
        offset, size, strides = View.of(tensor)
        return cls(name, tensor.itemsize, offset, layout_of(size, strides))


class _Recorder(PlainDispatchMode):
    """Notes writes into ``targets``; follows sources through views and computations by the identity of storages."""

    def __init__(self, targets: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._targets: dict[int, list[_Target]] = {}
        for name, tensor in targets.items():
            self._targets.setdefault(_storage(tensor), []).append(_Target.of(name, tensor))
        self._roots: dict[int, frozenset[str]] = {}
        self._itemsizes: dict[int, int] = {}  # of roots; seen as another dtype, they are not counted in elements
        self._boxes: dict[tuple[Layout, int, Sequence[int], Sequence[int]], Box | None] = {}
        self._derived: dict[int, frozenset[str]] = {}
        self._images: dict[int, Image] = {}  # of roots that are not sources themselves
        self._elsewhere: list[tuple[Tensor, frozenset[str], Seen]] = []  # writes into other memory
        self._read: set[int] = set()  # storages of targets
        self._written: set[int] = set()
        self._changed: set[int] = set()  # by other than a source
        self._made: set[int] = set()  # storages with what is computed of targets
        self._kept: list[Tensor] = []  # a storage that is freed could lend its identity to another

    def source(self, source: Source) -> Tensor:
        tensor = torch.empty(source.shape, dtype=source.dtype, device="meta")
        self._add_root(tensor, frozenset((source.name,)))
        return tensor

    def _add_root(self, tensor: Tensor, names: frozenset[str]) -> None:
        key = _storage(tensor)
        self._roots[key], self._itemsizes[key] = names, tensor.itemsize
        self._kept.append(tensor)

    def is_made_of_sources(self, tensor: Tensor) -> bool:
        """Return True if it is a source, or computed from some; memory into which sources were written is not."""
        written = any(_storage(target) == _storage(tensor) for target, *_ in self._elsewhere)
        return bool(self._names(tensor)) and not written

    def find_computed(self) -> None:
        """Name what the loader asked for after writing it, which tables of the model are not, and what it changed."""
        for key in (self._read & self._written) | self._changed:
            self.trace.computed |= {home.name for home in self._targets.get(key, ())}

    def adopt(self, made: dict[str, Tensor]) -> None:
        """Count parameters that the loader has made on the way, and what was written into them, as the model's."""
        for name, tensor in made.items():
            self._targets[_storage(tensor)] = [_Target.of(name, tensor)]
            self._changed.add(_storage(tensor))
        for target, sources, seen in self._elsewhere:
            if _storage(target) in self._targets:
                self._note(_storage(target), target, sources, seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is _copy_:
            target, value = args[0], args[1]
            home, origin = _storage(target), _storage(value)
            return target if self._move(home, target, origin, value) else self._copy(home, target, origin, value)
        if is_view(func):
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        # what is filled holds no longer what it held
        sources = self._sources_of(args[1:] if func in _FILLS else args, kwargs)
        used = set() if func in _FILLS else {_storage(tensor) for tensor in tensors_in((args, kwargs))}
        read = self._targets.keys() & used
        self._read |= read
        computes = bool(read) or not used.isdisjoint(self._made)
        if func._schema.is_mutable:
            self._changed |= read
            self._make(args[:1] if computes else ())
            return self._mutate(func, args, kwargs, sources)
        if not sources:
            result = func(*args, **kwargs)
            self._make(result if computes else ())
            return result
        if func is _aten._local_scalar_dense.default:
            self.trace.used |= sources
            return 1.0 if args[0].is_floating_point() else 1
        # what is moved to a device is still without data
        options = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
        result = func(*args, **options)
        for tensor in tensors_in(result):
            if func in _JOINS:
                follows = self._follow(joined(tensor, *args, **kwargs), tensor)
            else:
                follows = func in _MOVES and self._follow_move(args[0], tensor)
            if not follows:
                self._derive(tensor, sources)
        return result

    def _make(self, results: Any) -> None:
        """Note tensors that are computed of what the model holds."""
        for tensor in tensors_in((results,)):
            self._made.add(_storage(tensor))
            self._kept.append(tensor)

    def _follow_move(self, tensor: Tensor, made: Tensor) -> bool:
        """Note that ``made`` holds what ``tensor`` does; False where that is not known to be elements of sources."""
        names = self._whole_root(tensor)
        if names is not None and made.is_contiguous():
            self._add_root(made, names)
            return True
        return self._follow([(tensor, View.of(made))], made)

    def _follow(self, parts: Sequence[tuple[Tensor, View]], made: Tensor) -> bool:
        """Note that ``made`` holds tensors where the views say; False where these are not known to be of sources."""
        seen: Seen = []
        for tensor, into in parts:
            key = _storage(tensor)
            if key in self._derived or tensor.itemsize != self._itemsizes.get(key) or made.dtype != tensor.dtype:
                return False
            found = self._trace(tensor, into)
            if not found:
                return False
            seen += found
        image = Image.of(View.of(made), seen)
        if image is None:
            return False
        self._add_root(made, frozenset(name for name, *_ in seen))
        self._images[_storage(made)] = image
        return True

    def _trace(self, tensor: Tensor, into: View) -> Seen:
        """Views of sources that ``tensor`` is together, and where ``into``, of its shape, puts these."""
        image = self._images.get(_storage(tensor))
        if image is not None:
            return image.trace(View.of(tensor), into)
        (name,) = self._roots[_storage(tensor)]
        return [(name, View.of(tensor), into)]

    def _whole_root(self, tensor: Tensor) -> frozenset[str] | None:
        """The source that ``tensor`` is all of, in its own order."""
        key = _storage(tensor)
        whole = tensor.is_contiguous() and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
        alike = whole and tensor.itemsize == self._itemsizes.get(key)
        return self._roots.get(key) if alike and key not in self._derived and key not in self._images else None

    def _names(self, tensor: Tensor) -> frozenset[str]:
        key = _storage(tensor)
        return self._derived.get(key) or self._roots.get(key, _NONE)

    def _sources_of(self, args: Sequence[Any], kwargs: Any) -> frozenset[str]:
        found = _NONE
        for tensor in tensors_in((args, kwargs)):
            found |= self._names(tensor)
        return found

    def _derive(self, tensor: Tensor, sources: frozenset[str]) -> None:
        key = _storage(tensor)
        self._derived[key] = self._names(tensor) | sources
        self._kept.append(tensor)

    def _overwritten(self, tensor: Tensor, sources: frozenset[str]) -> None:
        """Other memory than the model's got values: if it held those of a source, it does no longer."""
        if _storage(tensor) not in self._targets and (sources or self._names(tensor)):
            self._derive(tensor, sources)

    def _copy(self, home: int, target: Tensor, origin: int, value: Tensor) -> Tensor:
        derived = self._derived.get(origin)
        sources = derived or self._roots.get(origin, _NONE)
        if origin in self._targets or origin in self._made:
            self._read.add(origin)
            (self._changed if home in self._targets else self._made).add(home)
        alike = value.shape == target.shape
        followed = sources and alike and derived is None and value.itemsize == self._itemsizes[origin]
        seen = self._trace(value, View.of(target)) if followed else []
        if home in self._targets:
            if sources and not alike and value.numel() != target.numel():  # torch would repeat a row to fill many
                shapes = f"of shape {list(value.shape)} does not fill {list(target.shape)}"
                raise RuntimeError(f"{min(sources)!r} {shapes}")
            self._note(home, target, sources, seen)
        else:
            if sources:
                self._elsewhere.append((target, sources, seen))
            self._overwritten(target, sources)
        return target if sources else target.copy_(value)

    def _move(self, home: int, target: Any, origin: int, value: Any) -> bool:
        """Note a copy that is like nearly all of them, of elements of one source into a box of one parameter.

        False for any other.
        """
        homes, names, size = self._targets.get(home, ()), self._roots.get(origin), value.shape
        if names is None or len(homes) != 1 or size != target.shape:
            return False
        if origin in self._derived or origin in self._images or origin in self._made:
            return False
        (found,) = homes
        if value.itemsize != self._itemsizes[origin] or target.itemsize != found.itemsize:
            return False
        size = tuple(size)  # a View's fields, asked of torch without functions between
        into = View(target.storage_offset(), size, target.stride())
        box = self._box(found, into)
        if box is None:
            return False
        self._written.add(home)
        view = View(value.storage_offset(), size, value.stride())
        self.trace.copies.append(Copy(found.name, box, names, view, into))
        return True

    def _box(self, home: _Target, part: View) -> Box | None:
        """The box that a view of a target's memory is; None if it is none, or empty. Layers are alike."""
        key = home.layout, part.offset - home.offset, part.size, part.strides
        if key not in self._boxes:
            try:
                self._boxes[key] = next(iter(home.layout.boxes(*key[1:], at_most=1)), None)
            except NoBoxError:
                self._boxes[key] = None
        return self._boxes[key]

    def _mutate(self, func: Any, args: Sequence[Any], kwargs: Any, sources: frozenset[str]) -> Any:
        target = args[0]
        if not isinstance(target, Tensor):
            return func(*args, **kwargs)
        home = _storage(target)
        if home in self._targets:
            self._note(home, target, sources, [])
        elif sources or func in _FILLS:
            self._elsewhere.append((target, sources, []))
        self._overwritten(target, sources)
        return target if sources else func(*args, **kwargs)

    def _note(self, key: int, target: Tensor, sources: frozenset[str], seen: Seen) -> None:
        self._written.add(key)
        into, homes = View.of(target), self._targets[key]
        if 0 in into.size:
            return
        for home in homes if seen else ():
            boxes = [self._box(home, part) if target.itemsize == home.itemsize else None for *_, part in seen]
            if None not in boxes:
                self.trace.copies += [
                    Copy(home.name, box, frozenset((name,)), view, part)
                    for box, (name, view, part) in zip(boxes, seen, strict=True)
                    if box
                ]
                return
        for home in homes:
            box = self._box(home, into) if target.itemsize == home.itemsize else None
            if box is not None:
                self.trace.copies.append(Copy(home.name, box, sources, None, into))
                return
        self.trace.opaque[homes[0].name] = min(sources, default="a constant")


def is_run(size: Sequence[int], strides: Sequence[int]) -> bool:
    """Return True if the elements of a view lie one after another."""
    wanted = contiguous_strides(size)
    return all(n == 1 or a == b for n, a, b in zip(size, strides, wanted, strict=True))


def _storage(tensor: Tensor) -> int:
    """The identity of a tensor's memory, which meta tensors have too."""
    key: int = tensor.untyped_storage()._cdata
    return key
