"""New weights for a model that an engine runs: checkpoints and tensors in bf16, quantized as they come.

Each tensor is given to the model's own ``load_weights`` as it was when the model was loaded: by the names of the
checkpoint, stacks of experts cut into matrices, in FP8 and followed by its scale where it became FP8. When that can be
loaded, and how it comes to where kernels have it, is the engine's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checkpoint import dtypes
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.companions import of_weight
from ...checkpoint.header import TensorInfo
from ...checkpoint.names import plain_names
from ...conversion.formats import Format
from ...conversion.iterate import iterate
from ...conversion.packing import GLOBAL
from ...elements.pieces import whole
from ...errors import CheckpointError, CoverageError, raise_problems
from ...numerics import schemes
from ...planning.placement import Placement, Target, placement_of
from ...planning.plan import Plan
from ...planning.recipe import Decision
from . import derived
from .arrivals import Arrivals
from .naming import Names
from .options import Options
from .soundness import Soundness
from .trainers_fp8 import TrainersFp8

_ATTRIBUTE = "_octavo_weights"
#: what holds all its tensors while it is gone through
_AT_REST = (list, tuple)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The checkpoint that a model was loaded from, and how to load it again, instead of ``load_weights``."""

    tensors: Mapping[str, TensorInfo]  # in its files
    plan: Plan
    layout: Format
    model: nn.Module
    original: Callable[[Iterable[tuple[str, Tensor]]], Any]
    arrivals: Arrivals[Any]

    #: what has become of the layer of a tensor that holds what is no number
    unsound: ClassVar[str] = "Its layer may be new already"

    def load(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """``model.load_weights`` for tensors named and shaped as in the checkpoint.

        If it fails, layers of which only a part has come are as they were, and wait for all of their tensors.
        """
        soundness = Soundness(self.unsound)
        if isinstance(weights, CheckpointWeights):
            self.arrivals.drop()  # whatever has come before, all of it comes now
            pairs = self._read(weights, soundness)
        else:
            fp8 = TrainersFp8(self._placements, self.layout, type(weights) not in _AT_REST, self.plan.staging_bytes)
            pairs = self._quantized(fp8.joined(self._named(weights)), soundness)
        try:
            result = self.original(pairs, *args, **kwargs)
            soundness.check()
        except BaseException:
            self.arrivals.drop()
            raise
        self.arrivals.prune()
        return result

    def loading_at_once(self) -> AbstractContextManager[None]:
        """A context in which ``original`` writes what it is given, for dry runs."""
        return contextlib.nullcontext()

    def _named(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors without names of wrappers, where the checkpoint knows them so, or they are of a known weight."""
        for name, weight in weights:
            yield next((plain for plain in plain_names(name) if self._is_known(plain)), name), weight

    def _is_known(self, name: str) -> bool:
        return name in self.tensors or of_weight(name) in self.tensors or name in self._parts

    @functools.cached_property
    def _placements(self) -> dict[str, Placement]:
        return {placement.name: placement for placement in self.plan.placements}

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[Placement, torch.dtype, tuple[int, ...]]]:
        """What quantized weights are given as, but for names of the checkpoint -> of which, its dtype, its shape."""
        return {
            name: (placement, dtypes.MOVED[dtype_name], shape)
            for placement in self.plan.quantized
            for name, (dtype_name, shape) in self.layout.tensors(placement).items()
            if name != placement.name
        }

    @functools.cached_property
    def _matrices(self) -> dict[str, list[Placement]]:
        """Stack of experts -> what it is loaded as."""
        found: dict[str, list[Placement]] = {}
        for placement in self.plan.placements:
            if (stack := placement.pieces[0].src_name) != placement.name:
                found.setdefault(stack, []).append(placement)
        return found

    def _apart(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they were first given to the loader: stacks of experts cut into matrices."""
        for name, weight in weights:
            matrices = self._matrices.get(name)
            if matrices is None:
                yield name, weight
                continue
            _check_shape(name, weight, self.tensors[name].shape)
            stack = weight.contiguous()
            del weight
            for placement in matrices:
                piece = placement.pieces[0]
                offset = stack.storage_offset() + piece.src_off
                yield placement.name, stack.as_strided(piece.size, piece.src_strides, offset)

    @functools.cached_property
    def _names(self) -> Names:
        return Names(self.model, self.original, self.plan, self.tensors, self.loading_at_once)

    def _known(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors by the names of the checkpoint, where the loader takes other names for the same."""
        for name, weight in weights:
            known = name in self._placements or name in self.arrivals
            parts = None if known else self._names.apart(name, weight, self.arrivals)
            if parts is None:
                yield name, weight
            else:
                if not parts:
                    self._pass_over(name)
                del weight
                yield from parts

    def _pass_over(self, name: str) -> None:
        """The loader has no use for a tensor: in this process, or because it does not know the name."""
        if name in self.tensors:
            self.arrivals.names.add(name)
        else:
            self.arrivals.pass_over(name)

    def _read(self, weights: CheckpointWeights, soundness: Soundness) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.quantized():
            if name in self._placements and not self._placements[name].scheme:  # else it was looked at when it was read
                soundness.of_weight(name, weight)
            if name in self._repeated:
                continue
            self.arrivals.add(name)
            yield name, weight

    @functools.cached_property
    def _repeated(self) -> set[str]:
        """Facts of weights for which others stand: of matrices that an engine joins, one comes for all."""
        facts = (name for placement in self.plan.quantized for name in self.layout.beside(placement))
        return {name for name in facts if name not in self.arrivals}

    def _quantized(self, weights: Iterable[tuple[str, Tensor]], soundness: Soundness) -> Iterator[tuple[str, Tensor]]:
        """Each tensor as it was first loaded: in FP8 and followed by its scale, or as it is.

        Whether it is sound is asked of each before it is given to the loader, and looked at once all are made.
        """
        for name, weight in self._known(self._apart(weights)):
            self.arrivals.names.add(name)
            placement = self._placements.get(name)
            if placement is not None:
                _check_shape(name, weight, placement.shape)
                _check_dtype(placement, weight)
            if placement is not None and placement.scheme is not None and weight.dtype != placement.dtype:
                q, scale = schemes.quantize(weight, placement.scheme)
                del weight
                soundness.of_quantized(name, scale)
                for part, tensor in self.layout.handed_out(placement, q, scale).items():
                    if part not in self._repeated:
                        self.arrivals.add(part)
                        yield part, tensor
                del q, scale, tensor
                continue
            beside = self._parts.get(name)
            if beside is not None:
                _check_part(name, weight, *beside)
                _check_fact(name, weight, self.layout.beside(beside[0]).get(name))
                if name.endswith(GLOBAL):
                    soundness.of_divisor(name, weight)
                    soundness.check()  # joined layers are brought to one as soon as they are whole
                elif name == self.layout.scale_name(beside[0].name):
                    soundness.of_scale(name, weight)
            else:
                soundness.of_weight(name, weight)
            if name in self._repeated:
                continue
            if name in self.arrivals:
                self.arrivals.add(name)
                yield name, weight
            else:
                yield from self._other(name, weight)

    def _other(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor that the checkpoint does not know, and that holds none that it knows."""
        counts = self.arrivals.counts()
        yield name, weight
        self.arrivals.add_other(name, counts)


def _check_shape(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(weight.shape) != shape:
        raise CoverageError(f"{name}: has the shape {list(weight.shape)}, was loaded with {list(shape)}")


def _check_dtype(placement: Placement, weight: Tensor) -> None:
    """Raise for what engines cast, number by number."""
    first = dtypes.MOVED[placement.source_dtype_names[0]]
    floats = {*dtypes.QUANTIZABLE, *([placement.dtype] if placement.scheme else ())}
    if weight.dtype not in (floats if first in dtypes.QUANTIZABLE else {first}):
        raise CoverageError(f"{placement.name}: is {weight.dtype}, was loaded from {first}")


def _check_part(name: str, given: Tensor, placement: Placement, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise for what engines cast, or spread over more cells than it has."""
    allowed = dtypes.QUANTIZABLE if dtype == torch.float32 else (dtype,)
    if given.dtype not in allowed or tuple(given.shape) != shape:
        what = "the scale" if name == placement.name + "_scale" else name.rpartition(".")[2]
        raise CoverageError(
            f"{name}: is {given.dtype} {list(given.shape)}, and {what} of {placement.name} in {placement.scheme} is "
            f"{dtype} {list(shape)}"
        )


def _check_fact(name: str, given: Tensor, known: Tensor | None) -> None:
    """Raise for what is known of a weight, and is said to be otherwise."""
    if known is not None and given.tolist() != known.tolist():
        raise CoverageError(f"{name}: says {given.tolist()}, and the model was loaded with {known.tolist()}")


def prepare(weights: Weights) -> None:
    """Have later calls of ``load_weights`` quantize as the first one did, and updates checked."""
    setattr(weights.model, _ATTRIBUTE, weights)
    weights.model.load_weights = weights.load  # type: ignore[assignment]
    derived.follow(weights.model)


def of(model: nn.Module) -> Weights | None:
    """What a model was loaded from; None if octavo did not load it."""
    return getattr(model, _ATTRIBUTE, None)


class CheckpointWeights:
    """Another checkpoint of the same model; iterated over, its tensors as they are, as engines expect them of a loader.

    Raises:
        CoverageError: when made, before anything is read, if it has not the tensors that the model was loaded from.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, options: Options) -> None:
        loaded = of(model)
        if loaded is None:
            raise CheckpointError(f"{type(model).__name__}: was not loaded by octavo, and can't be reloaded by it")
        problems = []
        for placement in loaded.plan.placements:
            stack = placement.pieces[0].src_name
            info = checkpoint.tensors.get(placement.name) or checkpoint.tensors.get(stack)
            shape = placement.shape if info is None or info.name == placement.name else loaded.tensors[stack].shape
            if info is None:
                problems.append(f"has no {placement.name}")
            elif info.shape != shape:
                problems.append(f"{info.name} has the shape {list(info.shape)}, not {list(shape)}")
            elif placement.scheme and not info.quantizable:
                problems.append(f"{info.name} is {info.dtype_name}, not bf16, fp16 or fp32")
            elif info.coding is not None and info.name != placement.name:
                problems.append(f"{info.name} is a stack that is quantized already ({info.coding})")
        problems = list(dict.fromkeys(problems))  # of a stack, once
        raise_problems(CoverageError, checkpoint.path, problems, "Nothing was loaded: the model is as it was.")
        self._checkpoint, self._loaded, self._threads = checkpoint, loaded, options.threads

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._read(quantized=False)

    def quantized(self) -> Iterator[tuple[str, Tensor]]:
        """In FP8, each with its scale, as the model was first loaded."""
        return self._read(quantized=True)

    def _read(self, *, quantized: bool) -> Iterator[tuple[str, Tensor]]:
        infos, plan = self._checkpoint.tensors, self._loaded.plan
        found = [_of_checkpoint(placement, infos, quantized) for placement in plan.placements]
        first = {p.name: (infos[p.pieces[0].src_name], p.pieces[0].src_off) for p in found}
        found.sort(key=lambda p: (first[p.name][0].shard, first[p.name][0].offset, first[p.name][1]))
        plan = dataclasses.replace(plan, source=str(self._checkpoint.path), placements=tuple(found))
        return iterate(self._checkpoint, plan, self._loaded.layout, threads=self._threads)


def _of_checkpoint(placement: Placement, infos: Mapping[str, TensorInfo], quantized: bool) -> Placement:
    """The placement of the same tensor in another checkpoint, where experts may lie apart that were in a stack."""
    info = infos.get(placement.name)
    pieces = placement.pieces if info is None else (whole(info.name, info.shape),)
    info = infos[pieces[0].src_name]
    if info.coding is not None:
        return _of_codes(placement, info, quantized)
    nbytes = info.nbytes * pieces[0].numel // max(1, math.prod(info.shape))
    placement = dataclasses.replace(
        placement,
        source_dtype_names=(info.dtype_name,),
        source_bytes=nbytes,
        pieces=pieces,
        codings=(),
        lossless=False,
    )
    if placement.scheme and quantized:
        return placement
    return dataclasses.replace(placement, dtype_name=info.dtype_name, scheme=None, parts=())


def _of_codes(placement: Placement, info: TensorInfo, quantized: bool) -> Placement:
    """The placement of a tensor that is quantized already: what is read is what it stands for, as in a first load."""
    if not quantized and placement.scheme:
        # what they stand for would be rounded to bf16 first, and not to what a load makes of them
        raise CheckpointError(f"{info.name}: is quantized already ({info.coding}), and can't be loaded again")
    target = Target(placement.name, info.shape, None, "", (whole(info.name, info.shape),), placement.device)
    return placement_of(target, Decision(placement.scheme, placement.reason), {info.name: info})
