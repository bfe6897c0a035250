"""Classes that are made while a process runs: pickle finds them by no name, so their objects say how they are made.

Another process makes such a class of the same bases. Where pickle finds no such base, its error is about that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class Made:
    """Mixed into a class that was made by a function of classes: ``octavo_made`` is that function, and these."""

    octavo_made: ClassVar[tuple[Callable[..., type], tuple[type, ...]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        # what others derive from it, FSDP say, is theirs to tell; a base may have a way of its own
        if "octavo_made" not in vars(cls) or not isinstance(reduced, tuple) or reduced[1][:1] != (cls,):
            return reduced
        function, (_, *args), *state = reduced
        return (_new, (function, _recipe(cls), *args), *state)


def _recipe(cls: type) -> Any:
    """A class, or where it was made, by which function and of what: another recipe each."""
    if "octavo_made" not in vars(cls):
        return cls
    make, bases = vars(cls)["octavo_made"]
    return make, *map(_recipe, bases)


def _class(recipe: Any) -> Any:
    if isinstance(recipe, type):
        return recipe
    make, *bases = recipe
    return make(*map(_class, bases))


def _new(function: Callable[..., Any], recipe: Any, *args: Any) -> Any:
    """An object without its state, as pickle makes it of a class by ``function``."""
    return function(_class(recipe), *args)
