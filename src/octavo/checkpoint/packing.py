"""The kinds of numbers in quantized checkpoints, and words for them."""

from __future__ import annotations

#: rows and columns that share a scale; None: all
Groups = tuple[int | None, int | None]

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
#: kind of numbers -> how many of them, along a row, an element of the stored tensor holds
PACK = {"float8": 1, "int8": 1, "int4_in_int32": 8, "int8_in_int32": 4, "e2m1": 2}
_WORDS = {"float8": "FP8", "int8": "int8", "int4_in_int32": "int4", "int8_in_int32": "packed int8", "e2m1": "FP4"}

#: dtypes of scales that are numbers
FLOATS = ("F32", "BF16", "F16")
#: dtypes of scales that are powers of two; bytes are e8m0, too
EXPONENTS = ("F8_E8M0", "U8")
#: kind of numbers -> dtypes that their scales may have; bytes are e8m0
SCALES = {
    "float8": (*FLOATS, *EXPONENTS),
    "int8": FLOATS,
    "int4_in_int32": FLOATS,
    "int8_in_int32": FLOATS,
    "e2m1": ("F8_E4M3", *EXPONENTS),
}


def are_codes(dtype_name: str, axes: int) -> bool:
    """Return True for a dtype that weights have only beside scales; vectors of bytes are anything."""
    return dtype_name in FP8 or (dtype_name == "I8" and axes > 1)


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


# -- grids ------------------------------------------------------------------------------------------------------------

Shape = tuple[int, ...]


def cells_of(matrix: Shape, scale: Shape) -> tuple[int, int] | None:
    """Rows and columns of the grid that scales of this shape are; None if they are none for this matrix or stack."""
    *lead, rows, cols = matrix
    if len(scale) == len(matrix) + 2 and scale[-1] == scale[-3] == 1:  # ModelOpt: [row cells, 1, column cells, 1]
        scale = (*scale[:-4], scale[-4], scale[-2])
    if len(scale) == len(matrix) and list(scale[:-2]) == lead:
        return scale[-2], scale[-1]
    if list(scale) in (lead, [*lead, 1]):
        return 1, 1
    if list(scale) == [*lead, rows]:
        return rows, 1
    return (1, cols) if lead and list(scale) == [*lead, cols] else None


def fits(matrix: Shape, cells: tuple[int, int], groups: Groups) -> bool:
    """Return True if groups of so many rows and columns make this grid."""
    return (count(matrix[-2], groups[0]), count(matrix[-1], groups[1])) == cells


def guesses(length: int, cells: int) -> list[int | None]:
    """Sizes of groups that cut so many elements into so many cells: the usual ones, and those that leave no rest."""
    if cells == 1:
        return [None]
    usual = [group for group in (16, 32, 64, 128) if count(length, group) == cells]
    even = [length // cells] if cells and length % cells == 0 and length else []
    return list(dict.fromkeys([*even, *usual]))
