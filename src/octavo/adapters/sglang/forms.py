"""Layers in two forms: that of a checkpoint, which SGLang's loaders write into, and that of its kernels.

SGLang processes a layer once its weights are there: it may transpose them, put other memory under them, change what
the layer knows of itself. Loading into what that made goes wrong, at worst without a word. So what a layer was before
is remembered, as far as it takes no memory, and what it was afterwards. New weights then go into memory of their own,
in the form of the checkpoint; once a layer has them all, SGLang's own processing makes the kernels' form of them, which
is copied to where the kernels have it. CUDA graphs find it there.

A layer that SGLang leaves as it is, and that one tensor fills, is written at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...elements.operations import storage_key
from ...errors import CheckpointError
from ...numerics.schemes import FP8
from ..engine.survey import Fillers

_PROCESS = "process_weights_after_loading"
#: what SGLang calls before updates, since 0.5.2x
_RESTORE = "restore_weights_before_loading"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: elements looked at in one operation
_AT_ONCE = 1 << 26
_REGISTRIES = ("_parameters", "_buffers", "_modules")


@dataclasses.dataclass
class _State:
    """What a module holds, its submodules aside. What tensors hold is no part of it."""

    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    plain: dict[str, Any]
    memory: dict[str, Tensor]  # name -> a parameter's memory, in its shape
    strides: dict[str, tuple[int, ...]]  # of parameters, which may be without memory
    attributes: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        return cls(
            dict(module._parameters),
            dict(module._buffers),
            {name: value for name, value in vars(module).items() if name not in _REGISTRIES},
            {name: parameter.detach() for name, parameter in parameters.items()},
            {name: parameter.stride() for name, parameter in parameters.items()},
            {name: dict(vars(parameter)) for name, parameter in parameters.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of them, in the memory that they had when this was noted."""
        plain = {name: value for name, value in self.plain.items() if isinstance(value, Tensor)}
        buffers = {name: value for name, value in self.buffers.items() if value is not None}
        return {**plain, **buffers, **self.memory}

    def equals(self, other: _State) -> bool:
        """Return True if between the two, nothing was replaced."""
        mine, theirs = self.tensors(), other.tensors()
        return (
            mine.keys() == theirs.keys()
            and all(_is_same(mine[name], theirs[name]) for name in mine)
            and _is_refilled(self.parameters, other.parameters)
            and all(_is_refilled(self.attributes[name], other.attributes[name]) for name in self.attributes)
        )


class Form:
    """A layer that is, at any moment, in one of its two forms.

    Args:
        fillers: tensors of the checkpoint -> its parameters that they fill.
        processed: whether SGLang may make something else of them.
    """

    def __init__(self, name: str, module: nn.Module, fillers: Mapping[str, frozenset[str]], *, processed: bool) -> None:
        self.name, self.tensors = name, sorted(fillers)
        self.filled = frozenset[str]().union(*fillers.values())
        self._module, self._is_processed, self._is_changed = module, processed, False
        self._process: Any = None
        self._staged: dict[str, Tensor] = {}
        self._lost: list[str] = []  # parameters whose memory processing has replaced
        self._entered = False
        self._before = self._after = _State.of(module)
        self._watch()

    @property
    def stages(self) -> bool:
        """Return True if its new weights wait in memory of their own until all are there."""
        held = self._before.memory.values()
        return self._is_processed or len(self.tensors) > 1 or any(data.dtype == FP8 for data in held)

    @property
    def waits(self) -> bool:
        return bool(self._staged)

    def made(self) -> Iterator[nn.Parameter]:
        """Its parameters that are made of tensors of the checkpoint."""
        for name, parameter in self._after.parameters.items():
            if parameter is not None and (name in self.filled or name not in self._before.parameters):
                yield parameter

    # -- when SGLang processes it -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        method = getattr(self._module, "quant_method", None)
        process = getattr(method, _PROCESS, None)
        if process is None:
            return
        done = False

        def process_weights_after_loading(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            """SGLang's own, of this layer but once: what it makes of new weights is copied to where the first is."""
            nonlocal done
            if layer is not self._module:
                return process(layer, *args, **kwargs)
            if not done:
                done = True
                before = _State.of(layer)
                process(layer, *args, **kwargs)
                self._settle(before)

        self._process = process
        vars(method)[_PROCESS] = process_weights_after_loading
        if restore := getattr(method, _RESTORE, None):  # which would undo what is kept here
            vars(method)[_RESTORE] = lambda layer: None if layer is self._module else restore(layer)

    def _settle(self, before: _State) -> None:
        self._after = _State.of(self._module)
        self._is_changed = not before.equals(self._after)
        live = {storage_key(tensor) for tensor in self._after.tensors().values()}
        for name in [name for name, data in before.memory.items() if storage_key(data) not in live]:
            parameter = before.parameters[name]
            assert parameter is not None
            parameter.data = before.memory[name] = _without_memory(before.memory[name])
            self._lost.append(name)
        before.plain = {
            name: value
            for name, value in before.plain.items()
            if not isinstance(value, Tensor) or storage_key(value) in live
        }
        self._before = before

    # -- while new weights come -------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Take the form of the checkpoint: into it, or into what waits for more, loaders write."""
        self._entered = True
        if self._is_changed or self._staged:
            self._be(self._before, {**self._before.memory, **self._staged})

    def leave(self) -> None:
        """Take the form of the kernels, with the weights that are whole."""
        if self._is_changed or self._staged:
            self._be(self._after, self._after.memory)
        self._entered = False

    def outline(self) -> None:
        """In the form of the checkpoint, until it is entered again: let a dry run see all strides."""
        for name in self._lost if not self._staged else ():
            parameter = self._before.parameters[name]
            assert parameter is not None
            fresh = self._fresh(name)
            fresh.untyped_storage().resize_(0)
            parameter.data = fresh

    def begin(self) -> None:
        """Before the first of its tensors comes, in the form of the checkpoint."""
        if not self.stages or self._staged:
            return
        for name, data in self._before.memory.items():
            fresh = self._fresh(name)
            if name in self.filled:
                fresh.view(_BITS[fresh.itemsize]).fill_(-1)
            else:
                fresh.copy_(data)
            self._staged[name] = fresh
        self.enter()

    def _fresh(self, name: str) -> Tensor:
        """Memory for a parameter in the form of the checkpoint."""
        data, strides = self._before.memory[name], self._before.strides[name]
        return torch.empty_strided(data.size(), strides, dtype=data.dtype, device=data.device)

    def drop(self) -> None:
        """Forget what waits: the layer is as it was."""
        if self._staged:
            entered = self._entered
            self.leave()
            self._staged.clear()
            if entered:
                self.enter()

    def complete(self) -> bool:
        """Take the weights that have come, all of them; False, with nothing done, if a loader has not written them.

        Raises:
            CheckpointError: SGLang makes something else of them than it did at first.
        """
        if not self._staged:
            return True
        if not self._is_written():
            return False
        try:
            if self._process is not None:
                self._process(self._module)
            made = _State.of(self._module).tensors()
            for name, live in self._after.tensors().items():
                self._take(name, live, made.get(name))
        finally:
            self.drop()
        return True

    def _take(self, name: str, live: Tensor, made: Tensor | None) -> None:
        if made is None or made.shape != live.shape or made.dtype != live.dtype:
            what = "nothing" if made is None else f"{made.dtype} {list(made.shape)}"
            raise CheckpointError(
                f"{self.name}.{name}: SGLang made {live.dtype} {list(live.shape)} of the weights that it loaded first, "
                f"and {what} of new ones, which can't be put into the same memory. Start anew to load them."
            )
        if not _is_same(made, live):
            live.copy_(made)

    def _is_written(self) -> bool:
        """Whether no element is left that is as it was made: a NaN that quantizing never gives."""
        left = []
        for name in self.filled & self._staged.keys():
            if (data := self._staged[name]).is_floating_point():
                bits = (data if data.dim() else data[None]).view(_BITS[data.itemsize])
                rows = max(1, _AT_ONCE // max(1, bits[:1].numel()))
                left += [(part == -1).any() for part in torch.split(bits, rows)]
        return not left or not bool(torch.stack(left).any())

    def _be(self, state: _State, memory: Mapping[str, Tensor]) -> None:
        other = self._after if state is self._before else self._before
        _refill(self._module._parameters, state.parameters)
        _refill(self._module._buffers, state.buffers)
        mine = vars(self._module)
        for name in state.plain.keys() | other.plain.keys():
            if name not in state.plain:
                mine.pop(name, None)
            elif name not in other.plain or state.plain[name] is not other.plain[name]:
                mine[name] = state.plain[name]
        for name, data in memory.items():
            parameter = state.parameters[name]
            assert parameter is not None
            parameter.data = data
            _refill(vars(parameter), state.attributes[name])


class Forms:
    """Of all layers of a model, made between loading and processing.

    Args:
        processes: whether a layer's method does anything in processing.
    """

    def __init__(self, model: nn.Module, fillers: Fillers, processes: Callable[[Any], bool]) -> None:
        self._forms = {}
        for name, module in model.named_modules():
            mine, method = fillers.get(name, {}), getattr(module, "quant_method", None)
            if mine or hasattr(method, _PROCESS):
                self._forms[name] = Form(name, module, mine, processed=processes(method))
        self._depth = 0
        device = next(model.parameters()).device
        #: a parameter on another device than the model, if there is one
        self.elsewhere = next((name for name, p in model.named_parameters() if p.device != device), None)

    def __getitem__(self, name: str) -> Form:
        return self._forms[name]

    def get(self, name: str) -> Form | None:
        return self._forms.get(name)

    def filled(self) -> Iterator[nn.Parameter]:
        """The parameters of kernels that are made of what a checkpoint holds."""
        for form in self._forms.values():
            yield from form.made()

    @contextlib.contextmanager
    def outlined(self) -> Iterator[None]:
        """While layers are in the form of the checkpoint: for dry runs, which ask for strides and write nothing."""
        for form in self._forms.values():
            form.outline()
        try:
            yield
        finally:
            for form in self._forms.values():
                form.enter()

    @contextlib.contextmanager
    def of_checkpoint(self) -> Iterator[None]:
        """Meanwhile, all layers are in the form of the checkpoint."""
        self._depth += 1
        try:
            if self._depth == 1:
                for form in self._forms.values():
                    form.enter()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for form in self._forms.values():
                    form.leave()


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are the same memory, seen in the same way."""
    return (
        storage_key(one) == storage_key(other)
        and one.storage_offset() == other.storage_offset()
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    )


def _without_memory(like: Tensor) -> Tensor:
    """A tensor of the same shape, of one element, which torch refuses to write to."""
    return torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)


def _is_refilled(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return list(held) == list(wanted) and all(held[name] is value for name, value in wanted.items())


def _refill(held: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    if not _is_refilled(held, wanted):
        held.clear()
        held.update(wanted)
