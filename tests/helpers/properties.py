"""How many examples a property is tried on."""

from __future__ import annotations

from hypothesis import settings

#: what hypothesis itself takes as usual; the profile in `conftest` has many times as many where that is asked
_USUAL = 100


def examples(count: int) -> settings:
    """Decorate a property with so many examples, as many times more as the profile has of the usual."""
    return settings(max_examples=count * settings().max_examples // _USUAL)
