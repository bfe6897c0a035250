"""What is read from JSON that others may have written: values of the kind that they have to be, or a ValueError."""

from __future__ import annotations

from typing import Any


def require(value: object, holds: bool) -> None:
    """Raise a ValueError about a value unless something holds."""
    if not holds:
        raise ValueError(f"not as it was written: {str(value)[:100]}")


def natural(value: Any) -> int:
    """A number of elements, or an offset."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:100]} is no natural number")
    return value


def naturals(values: Any) -> tuple[int, ...]:
    """A shape, or strides."""
    return tuple(map(natural, values))


def text(value: Any) -> str:
    """A name, or words."""
    if type(value) is not str:
        raise ValueError(f"{str(value)[:100]} is no text")
    return value


def texts(values: Any) -> tuple[str, ...]:
    """Several of these."""
    return tuple(map(text, values))
