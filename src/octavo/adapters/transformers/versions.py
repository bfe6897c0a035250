"""Which transformers octavo is tested with. A newer one is taken at its word, and whoever loads with it is told so."""

from __future__ import annotations

import warnings

import transformers

#: the newest release that the tests were run with; the oldest stands in pyproject.toml
NEWEST = (5, 24)


def remark_on(version: str) -> str | None:
    """What there is to say about a version of transformers."""
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    if tuple(numbers) <= NEWEST:
        return None
    newest = ".".join(map(str, NEWEST))
    return (
        f"transformers {version} is newer than octavo was tested with ({newest}). Coverage of every element is checked "
        "all the same; if anything fails, try that version"
    )


def warn_of_newer() -> tuple[str, ...]:
    """Warn where transformers is newer than any that was tested, and return that as remarks of a plan."""
    remark = remark_on(transformers.__version__)
    if remark is None:
        return ()
    warnings.warn(remark, stacklevel=2)
    return (remark,)
