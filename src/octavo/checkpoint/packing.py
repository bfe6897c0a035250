"""The kinds of numbers in quantized checkpoints, and words for them."""

from __future__ import annotations

#: rows and columns that share a scale; None: all
Groups = tuple[int | None, int | None]

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
#: kind of numbers -> how many of them an element of the stored tensor holds
PACK = {"float8": 1, "int8": 1}
_WORDS = {"float8": "FP8", "int8": "int8"}


def count(length: int, group: int | None) -> int:
    """How many groups of so many elements a length is cut into; the last may be shorter."""
    return 1 if group is None else -(-length // group)


def words(kind: str, groups: Groups) -> str:
    """``FP8 in blocks of 128x128``."""
    rows, cols = groups
    how = {
        (None, None): "with a scale for each matrix",
        (1, None): "with a scale for each row",
        (None, 1): "with a scale for each column",
    }.get(groups)
    if how is None:
        how = f"in groups of {cols}" if rows == 1 else f"in blocks of {rows or 'all'}x{cols or 'all'}"
    return f"{_WORDS[kind]} {how}"
