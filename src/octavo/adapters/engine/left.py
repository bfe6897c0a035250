"""What a loader leaves in a model beside weights while it runs dry, and how a later start has it again.

Plain attributes are noted, and set. Others that it sets (SGLang's Qwen3-MoE: a table of experts, to be made when it is
asked for) and calls of others that it makes are had by running it on no tensors, where that was seen to come to the
same. Of an object it is known to be the same by what it holds, down to what its functions have at hand; there may be no
tensors in it but the model's own, since their numbers would come from weights that were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...elements.operations import storage_key
from ..remembering import facts
from .survey import Survey

Load = Callable[[Iterable[Any]], Any]
#: words for the calls of others that a loader has made since this was asked last
Calls = Callable[[], str]
_PLAIN = (type(None), bool, int, float, str)
_Key = tuple[str, str]  # module, name


@dataclass(frozen=True)
class Left:
    """As JSON has it.

    Args:
        attributes: those that are plain: [module, name, value].
        others: [module, name, words].
        calls: words for them.
    """

    attributes: list[list[Any]]
    others: list[list[str]]
    calls: str

    def restore(self, model: nn.Module, load: Load, calls: Calls) -> None:
        """Have it again. Raise a `ValueError` where something else comes of it, and whatever comes of the loader."""
        for path, name, value in self.attributes:
            if not is_plain(value):
                raise ValueError("no plain attribute")
            vars(model.get_submodule(path))[name] = value
        if not self.others and not self.calls:
            return
        calls()
        load(())
        told = facts.of_model(model)
        if calls() != self.calls or any(told.get((path, name)) != words for path, name, words in self.others):
            raise ValueError("its loader leaves something else")


def is_plain(value: Any) -> bool:
    """Return True for what can be written down."""
    return type(value) in _PLAIN or (type(value) in (dict, list) and not value)


class Watch:
    """What a loader leaves in a model while it runs dry. To be made before it does."""

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self._model, self._calls = model, calls
        self._told, self._held = facts.of_model(model), facts.held(model)
        self.digest = digest_of(self._told)
        calls()

    def left(self, found: Survey, load: Load) -> Left:
        """What it has left. Raise a `ValueError` that names what can't be had again."""
        plain, others = [], dict[_Key, Any]()
        told = facts.of_model(self._model)
        for key in self._changed(told, facts.held(self._model), _written(found)):
            attributes = self._attributes(key)
            value = attributes.get(key[1], attributes)
            if is_plain(value):
                plain.append([*key, value])
            elif key[1] in attributes and key not in self._told:
                others[key] = value
            else:
                raise ValueError(f"a loader has changed {_name(key)}")
        if (calls := self._calls()) or others:
            self._check_again(others, load, calls)
        return Left(plain, [[*key, told[key]] for key in others], calls)

    def _changed(self, told: dict[_Key, str], held: dict[_Key, tuple[int, ...]], targets: set[str]) -> list[_Key]:
        changed = {key for key in told.keys() | self._told.keys() if told.get(key) != self._told.get(key)}
        for key in held.keys() | self._held.keys():
            now, before = held.get(key), self._held.get(key)
            # weights and constants are written, and counted as such where they were not
            written = ".".join(filter(None, key)) in targets and now and before and now[:-1] == before[:-1]
            if now != before and not written:
                changed.add(key)
        return sorted(changed)

    def _attributes(self, key: _Key) -> dict[str, Any]:
        return vars(self._model.get_submodule(key[0]))

    def _check_again(self, others: Mapping[_Key, Any], load: Load, calls: str) -> None:
        """Run it on no tensors, as a later start will, and leave the model as it was before."""
        words = {key: self._words(key, value) for key, value in others.items()}
        for key in others:
            del self._attributes(key)[key[1]]
        told, held = facts.of_model(self._model), facts.held(self._model)
        try:
            load(())
            again = {key: self._attributes(key).pop(key[1], None) for key in others}
            same = (facts.of_model(self._model), facts.held(self._model)) == (told, held)
        finally:
            for key, value in others.items():
                self._attributes(key)[key[1]] = value
        if not same:
            raise ValueError("a loader that runs again changes more in a model")
        if other := [key for key, value in again.items() if self._words(key, value) != words[key]]:
            raise ValueError(f"what a loader sets {_name(other[0])} to depends on what it is given")
        if self._calls() != calls:
            raise ValueError(f"which calls a loader makes depends on what it is given: {calls}")

    def _words(self, key: _Key, value: Any) -> list[str]:
        own = {storage_key(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
        words, tensors = facts.deep(value)
        if any(storage_key(tensor) not in own for tensor in tensors):
            raise ValueError(f"a loader has set {_name(key)}, which holds tensors of its own")
        return words


def digest_of(told: Mapping[_Key, str]) -> str:
    """A name for the facts of a model."""
    return facts.digest(*(word for (path, name), value in told.items() for word in (path, name, value)))


def _written(found: Survey) -> set[str]:
    """What is filled with weights and constants."""
    targets = {constant.target for constant in found.constants}
    for layer, mine in found.fillers.items():
        targets |= {f"{layer}.{name}".lstrip(".") for names in mine.values() for name in names}
    return targets


def _name(key: _Key) -> str:
    return ".".join(filter(None, key))
